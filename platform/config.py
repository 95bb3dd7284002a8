"""Typed configuration: one path from YAML text and `key=value` overrides to a frozen pydantic object.

A job declares a subclass of `Config`, nested by concern. A docstring under a field is its description; it
appears in `eagleray config show`, in the exported JSON schema and in editors, so a fact is stated once.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo

T = TypeVar("T", bound="Config")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file, the key and what is allowed."""


class Config(BaseModel):
    """Base of every configuration class: frozen, unknown keys refused, field docstrings as descriptions."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _complete_sections(cls, values: Any) -> Any:
        """A section that is given in part keeps the rest of what this class sets for it: `optim: {lr: 2e-5}` says nothing
        about the schedule, so it must not replace a schedule that the job chose by the one of `OptimSection`."""
        if not isinstance(values, dict):
            return values
        defaults = {name: field.default for name, field in cls.model_fields.items()}
        return _complete(cls.model_fields, defaults, values)


def load_config(cls: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Read a YAML file, apply `key=value` overrides in order and validate.

    Args:
        cls: The configuration class the job takes.
        path: A YAML file; `None` starts from the class defaults.
        overrides: Dotted keys with YAML values, e.g. `optim.lr=2e-5` or `lora=null`.

    Raises:
        ConfigError: The file is missing or not a mapping, a key is unknown, or a value is not allowed.
    """
    values: Any = {}
    source = "command line" if path is None else str(path)
    if path is not None:
        try:
            values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such config file.") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: cannot be read as YAML: {error}") from None
        values = {} if values is None else values
        if not isinstance(values, dict):
            raise ConfigError(
                f"{path}: expected a mapping of keys at the top, found {type(values).__name__}."
            )
    for override in overrides:
        _apply_override(values, override)
    return validate_config(cls, values, source)


def validate_config(cls: type[T], values: dict[str, Any], source: str) -> T:
    """Build `cls` from plain values; every problem is listed with its key, what was given and what is allowed."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        lines = [_explain(cls, dict(problem)) for problem in error.errors()]
        raise ConfigError(
            f"{source}: {len(lines)} problem(s) in the config\n" + "\n".join(f"  - {x}" for x in lines)
        ) from None


def to_yaml(cfg: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal object."""
    return yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def config_hash(cfg: Config, *, exclude: Sequence[str] = ()) -> str:
    """sha256 of the resolved config without the given dotted keys and what lies under them."""
    values = {k: v for k, v in flatten(cfg.model_dump(mode="json")).items() if not _is_under(k, exclude)}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to dotted keys; lists and empty mappings stay values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def diff_configs(
    old: dict[str, Any], new: dict[str, Any], *, ignore: Sequence[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, as `key -> (old, new)`; a missing key shows as `None`."""
    a, b = flatten(old), flatten(new)
    keys = [k for k in {**a, **b} if not _is_under(k, ignore)]
    return {k: (a.get(k), b.get(k)) for k in keys if a.get(k) != b.get(k)}


def _is_under(key: str, prefixes: Sequence[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def describe_fields(cls: type[Config], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted key and pydantic field of every leaf of a config class, in declaration order."""
    for name, field in cls.model_fields.items():
        section = _section_class(field)
        if section is None:
            yield f"{prefix}{name}", field
        else:
            yield from describe_fields(section, f"{prefix}{name}.")


def json_schema(cls: type[Config]) -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a config class, for editors."""
    return cls.model_json_schema()


class _Loader(yaml.SafeLoader):
    """YAML with two habits of YAML 1.1 mended: `1e-5` is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # A merge key (`<<: *anchor`) brings defaults that the keys beside it may replace.
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in own]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key `{twice}` is given twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise ConfigError(f"Override {override!r} is not of the form key=value, e.g. optim.lr=2e-5.")
    *parents, leaf = key.split(".")
    node: Any = values
    for name in parents:
        node = _child(node, name, override)
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"Override {override!r}: the value is not YAML: {error}") from None
    if isinstance(node, list):
        node[_position(node, leaf, override)] = value
    else:
        node[leaf] = value


def _child(node: Any, name: str, override: str) -> Any:
    place: Any = _position(node, name, override) if isinstance(node, list) else name
    child = node[place] if isinstance(node, list) else node.get(name)
    if child is None:
        child = {}
    if not isinstance(child, dict | list):
        raise ConfigError(f"Override {override!r}: `{name}` holds a value, it has no key under it.")
    # A copy: in YAML an anchor and its aliases are one object, and the override names one of them.
    node[place] = copy.copy(child)
    return node[place]


def _position(items: list[Any], name: str, override: str) -> int:
    if not name.isdigit() or int(name) >= len(items):
        raise ConfigError(
            f"Override {override!r}: {name!r} is not a position in a list of {len(items)}; they count from 0."
        )
    return int(name)


def _explain(cls: type[Config], problem: dict[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        return f"unknown key `{key}`{_nearest(cls, location)}"
    if problem["type"] == "missing":
        return f"`{key}` is required and has no default"
    given = problem.get("input")
    shown = "" if isinstance(given, dict) else f" (given: {given!r})"
    return (
        f"`{key}`: {problem['msg'].removeprefix('Value error, ')}{shown}"
        if key
        else problem["msg"].removeprefix("Value error, ")
    )


def _nearest(cls: type[Config], location: list[str]) -> str:
    parent: type[Config] | None = cls
    for name in location[:-1]:
        field = parent.model_fields.get(name) if parent else None
        parent = _section_class(field) if field else None
    if parent is None:
        return "."
    everywhere = [key for key, _ in describe_fields(cls)]
    near = difflib.get_close_matches(location[-1], parent.model_fields, n=1, cutoff=0.5)
    if near:
        return f"; did you mean `{'.'.join([*location[:-1], near[0]])}`?"
    elsewhere = [key for key in everywhere if key.split(".")[-1] == location[-1]]
    if elsewhere:
        return f"; did you mean `{elsewhere[0]}`?"
    return f"; the keys here are: {', '.join(parent.model_fields)}."


def _complete(
    fields: Mapping[str, FieldInfo], defaults: Mapping[str, Any], given: dict[str, Any]
) -> dict[str, Any]:
    values = dict(given)
    for name, value in given.items():
        default = defaults.get(name)
        # Of several kinds of section, the default's values would be wrong for another kind.
        if (
            isinstance(default, Config)
            and isinstance(value, dict)
            and len(_section_classes(fields[name])) == 1
        ):
            own = {key: getattr(default, key) for key in default.model_fields_set}
            values[name] = own | _complete(type(default).model_fields, own, value)
    return values


def _section_class(field: FieldInfo) -> type[Config] | None:
    return next(iter(_section_classes(field)), None)


def _section_classes(field: FieldInfo) -> list[type[Config]]:
    candidates = (field.annotation, *get_args(field.annotation))
    return [c for c in candidates if isinstance(c, type) and issubclass(c, Config)]
