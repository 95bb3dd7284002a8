"""Configuration: reading, overriding, explaining what is wrong, and comparing."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, ValidationError

from eagleray.platform.config import (
    Config,
    ConfigError,
    config_hash,
    describe_fields,
    diff_configs,
    flatten,
    json_schema,
    load_config,
    to_yaml,
    validate_config,
)
from eagleray.platform.sections import DeepSpeedSection, RaySection, TrainingConfig


class Optim(Config):
    lr: float = Field(default=1e-5, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates."""


class Adapter(Config):
    rank: int = 8
    """Rank of the update."""


class Example(Config):
    data: str
    """Where rows come from."""
    mode: Literal["fast", "exact"] = "fast"
    """How to count."""
    optim: Optim = Optim()
    adapter: Adapter | None = None


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "example.yaml"
    path.write_text(text)
    return path


def test_file_then_overrides_in_order(tmp_path: Path) -> None:
    path = write(tmp_path, "data: a.jsonl\noptim: {lr: 0.5}\n")
    cfg = load_config(Example, path, ["optim.lr=0.25", "optim.lr=2e-5", "mode=exact"])
    assert cfg == Example(data="a.jsonl", mode="exact", optim=Optim(lr=2e-5))


@pytest.mark.parametrize("text", ["2e-5", "2E-5", "2.0e-05", "0.00002"])
def test_numbers_in_exponent_form_are_numbers(text: str) -> None:
    assert load_config(Example, None, ["data=x", f"optim.lr={text}"]).optim.lr == 2e-5


def test_override_opens_an_optional_section_and_closes_it(tmp_path: Path) -> None:
    path = write(tmp_path, "data: x\nadapter: null\n")
    opened = load_config(Example, path, ["adapter.rank=4"])
    assert opened.adapter == Adapter(rank=4)
    assert load_config(Example, path, ["adapter.rank=4", "adapter=null"]).adapter is None


def test_an_override_changes_what_it_names_and_not_what_shares_an_anchor_with_it(tmp_path: Path) -> None:
    """In a mapping, below it, and in a list."""
    path = write(
        tmp_path, "first: &same {optim: {lr: 2.0}, many: [{lr: 3.0}]}\nsecond: *same\nthird: {<<: *same}\n"
    )
    cfg = load_config(Pair, path, ["first.optim.lr=1.0", "second.many.0.lr=4.0", "third.many=[]"])
    assert cfg.first == Shared(optim=Optim(lr=1.0), many=(Optim(lr=3.0),))
    assert cfg.second == Shared(optim=Optim(lr=2.0), many=(Optim(lr=4.0),))
    assert cfg.third == Shared(optim=Optim(lr=2.0), many=())


class Shared(Config):
    optim: Optim = Optim()
    """A section."""
    many: tuple[Optim, ...] = ()
    """A list of sections."""


class Pair(Config):
    first: Shared
    """Defines an anchor."""
    second: Shared
    """An alias of it."""
    third: Shared
    """Merges it."""


class Nested(Config):
    optim: Optim = Optim(betas=(0.8, 0.9))
    """Also set by `Job`."""
    other: Optim = Optim(lr=0.5)
    """Not set by `Job`."""


class Job(Config):
    optim: Optim = Optim(lr=0.25, betas=(0.5, 0.75))
    """A section that the job sets."""
    nested: Nested = Nested(optim=Optim(lr=0.125))
    """A section with sections."""
    either: Optim | Adapter = Optim(lr=0.25)
    """One of two kinds of section."""


def test_a_section_given_in_part_keeps_what_the_job_sets_for_it(tmp_path: Path) -> None:
    path = write(tmp_path, "optim: {lr: 2.0}\nnested: {optim: {betas: [0.1, 0.2]}}\n")
    job = load_config(Job, path, ["nested.other.betas=[0.3, 0.4]"])
    assert job.optim == Optim(lr=2.0, betas=(0.5, 0.75))
    assert job.nested.optim == Optim(lr=0.125, betas=(0.1, 0.2))
    assert job.nested.other == Optim(lr=0.5, betas=(0.3, 0.4))
    assert load_config(Job, None, ["optim={}"]).optim == Job().optim
    assert load_config(Job, None, ["either.rank=4"]).either == Adapter(rank=4)


def test_override_may_hold_an_equals_sign() -> None:
    assert load_config(Example, None, ["data=s3?key=value"]).data == "s3?key=value"


def test_yaml_round_trip(tmp_path: Path) -> None:
    cfg = Example(data="ä b.jsonl", optim=Optim(lr=1e-7, betas=(0.8, 0.9)), adapter=Adapter())
    assert load_config(Example, write(tmp_path, to_yaml(cfg))) == cfg


def test_config_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Example(data="x").data = "y"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=x", "optim.lrr=1"], r"unknown key `optim\.lrr`; did you mean `optim\.lr`\?"),
        (["data=x", "rank=1"], r"unknown key `rank`; did you mean `adapter\.rank`\?"),
        (["data=x", "zzz=1"], r"unknown key `zzz`; the keys here are: data, mode, optim, adapter"),
        ([], r"`data` is required and has no default"),
        (["data=x", "optim.lr=-1"], r"`optim\.lr`: Input should be greater than 0 \(given: -1\)"),
        (["data=x", "mode=slow"], r"`mode`: Input should be 'fast' or 'exact' \(given: 'slow'\)"),
        (["data=x", "mode"], r"'mode' is not of the form key=value"),
        (["data=x", "optim..lr=1"], r"'optim\.\.lr=1' is not of the form key=value"),
        (["data=x", "data.y=1"], r"`data` holds a value, it has no key under it"),
        (["data=[x"], r"'data=\[x': the value is not YAML"),
    ],
)
def test_mistakes_are_explained(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Example, None, overrides)


def test_all_problems_are_listed_with_their_source() -> None:
    with pytest.raises(ConfigError, match=r"(?s)worker: 2 problem\(s\).*`mode`.*`optim\.lr`"):
        validate_config(Example, {"data": "x", "optim": {"lr": 0}, "mode": 1}, "worker")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", "expected a mapping of keys at the top, found list"),
        (b"a: [1\n", "cannot be read as YAML"),
        (b"a: \xff\xfe\n", "cannot be read as YAML"),
        (b"data: !!python/object:os.system {}\n", "cannot be read as YAML"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"bad\.yaml: {message}"):
        load_config(Example, path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such config file"):
        load_config(Example, tmp_path / "none.yaml")


def test_flatten_keeps_lists_and_empty_mappings() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [{"e": 2}]}) == {"a.b": 1, "a.c": {}, "d": [{"e": 2}]}


def test_diff_names_keys_and_ignores_whole_sections() -> None:
    old = {"a": 1, "run": {"dir": "x", "deep": {"y": 1}}, "runs": 1, "gone": 5}
    new = {"a": 2, "run": {"dir": "z"}, "runs": 2, "new": 6}
    assert diff_configs(old, new, ignore=["run"]) == {
        "a": (1, 2),
        "runs": (1, 2),
        "gone": (5, None),
        "new": (None, 6),
    }


def test_hash_depends_on_values_but_not_on_excluded_keys() -> None:
    one, other = Example(data="x"), Example(data="x", optim=Optim(lr=1.0))
    assert config_hash(one) == config_hash(Example(data="x", mode="fast"))
    assert config_hash(one) != config_hash(other)
    assert config_hash(one, exclude=["optim.lr"]) == config_hash(other, exclude=["optim.lr"])
    assert config_hash(one, exclude=["optim"]) == config_hash(other, exclude=["optim"])
    assert config_hash(one, exclude=["opt"]) != config_hash(other, exclude=["opt"])


def test_fields_are_described_once() -> None:
    fields = {key: field.description for key, field in describe_fields(Example)}
    assert list(fields) == ["data", "mode", "optim.lr", "optim.betas", "adapter.rank"]
    assert fields["optim.lr"] == "Peak learning rate."
    schema = json_schema(Example)
    assert schema["$defs"]["Optim"]["properties"]["lr"]["description"] == "Peak learning rate."
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["data"]


@pytest.mark.parametrize("workers", ["3", "[2, 4]"])
def test_batch_size_must_divide(workers: str) -> None:
    """Ray takes any number of workers in a range, so the batch must divide for each."""
    with pytest.raises(ConfigError, match=r"`train\.batch_size` is 32; it must be a multiple .* 3 x 8 = 24"):
        load_config(TrainingConfig, None, [f"ray.num_workers={workers}"])
    by_length = ["train.micro_batch_length=4000", "train.micro_batch_size=64"]
    assert load_config(TrainingConfig, None, ["ray.num_workers=2", *by_length]).train.batch_size == 32
    with pytest.raises(ConfigError, match=r"`train\.batch_size` is 32; .* multiple of `ray\.num_workers`, 3"):
        load_config(TrainingConfig, None, [f"ray.num_workers={workers}", *by_length])


def test_a_range_of_workers() -> None:
    ray = load_config(TrainingConfig, None, ["ray.num_workers=[1, 2]", "ray.max_failures=1"]).ray
    assert (ray.min_workers, ray.max_workers) == (1, 2)
    assert RaySection(num_workers=3).min_workers == RaySection(num_workers=3).max_workers == 3
    with pytest.raises(
        ConfigError, match=r"`ray.num_workers` is \[2, 1\]; it is a number or \[least, most\]"
    ):
        load_config(TrainingConfig, None, ["ray.num_workers=[2, 1]"])
    with pytest.raises(ConfigError, match="num_workers"):
        load_config(TrainingConfig, None, ["ray.num_workers=0"])


@pytest.mark.parametrize(
    ("override", "stage"),
    [("offload_optimizer=true", 0), ("offload_params=true", 2), ("offload_params=true", 0)],
)
def test_offload_needs_a_stage(override: str, stage: int) -> None:
    with pytest.raises(ConfigError, match=r"needs `deepspeed\.zero_stage`"):
        load_config(DeepSpeedSection, None, [override, f"zero_stage={stage}"])


def test_every_shared_field_has_a_description() -> None:
    assert [key for key, field in describe_fields(TrainingConfig) if not field.description] == []


def test_a_merge_key_brings_defaults(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("optim: {<<: {lr: 1.0e-3, schedule: linear}, lr: 2.0e-3}\n")
    optim = load_config(TrainingConfig, path).optim
    assert (optim.lr, optim.schedule) == (2e-3, "linear")


def test_a_key_given_twice_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("optim:\n  lr: 1\n  lr: 2\n")
    with pytest.raises(ConfigError, match=r"the key `lr` is given twice"):
        load_config(TrainingConfig, path)
