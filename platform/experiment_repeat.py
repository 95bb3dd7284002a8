"""Repeated stages: one stage in the file that stands for one each of some values, e.g. of seeds.

In such a stage `${seed}` is the value, a number where it stands alone, and `${train}` is the stage `train` of the same
values. The stages are named by their values, `train-0`, and can be referred to by that name from anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from eagleray.platform.config import ConfigError
from eagleray.platform.experiment import Definition, substitute

Value = bool | int | float | str


@dataclass(frozen=True)
class Repetition:
    """One of those that a stage in the file stands for; a stage that is not repeated stands for itself."""

    stage: str
    """Name in the file."""
    values: Mapping[str, Value]

    @property
    def name(self) -> str:
        """Name among all stages."""
        return "-".join([self.stage, *map(str, self.values.values())])


def repetitions(each: Mapping[str, Mapping[str, Sequence[Value]]]) -> dict[str, Repetition]:
    """All stages by name.

    Args:
        each: Stage -> what it is repeated over -> values; nothing for a stage that is not repeated.

    Raises:
        ConfigError: Two stages have one name, or a stage is repeated over something with the name of a stage.
    """
    found: dict[str, Repetition] = {}
    for stage, lists in each.items():
        for clash in set(lists) & set(each):
            raise ConfigError(
                f"`stages.{stage}.each.{clash}` has the name of a stage, so `${{{clash}}}` could be either. Rename one."
            )
        for values in product(*lists.values()):
            one = Repetition(stage, dict(zip(lists, values, strict=True)))
            if one.name in found:
                raise ConfigError(
                    f"`stages.{stage}` makes a stage `{one.name}`, which there is already. Take out values that are "
                    "listed twice, or rename a stage."
                )
            found[one.name] = one
    return found


def repeat(definitions: Mapping[str, Definition], found: Mapping[str, Repetition]) -> dict[str, Definition]:
    """The definitions of all stages, with values filled in.

    Args:
        definitions: By name in the file.
        found: All stages, from `repetitions`.

    Raises:
        ConfigError: A stage refers to one that is repeated over something that it isn't repeated over itself.
    """
    return {name: _fill(definitions[one.stage], one, found) for name, one in found.items()}


def grouped(
    found: Mapping[str, Repetition], stage: str, over: Iterable[str]
) -> list[tuple[Mapping[str, Value], list[str]]]:
    """What a stage in the file stands for, put together over some of what it is repeated over.

    Args:
        found: All stages, from `repetitions`.
        stage: Name in the file, or of one repetition.
        over: What the members of a group differ in.

    Returns:
        For each group what its members have in common and their names; empty if there is no such stage.
    """
    groups: dict[str, tuple[Mapping[str, Value], list[str]]] = {}
    for name, one in found.items():
        if stage in (name, one.stage):
            common = {key: value for key, value in one.values.items() if key not in over}
            groups.setdefault(Repetition(stage, common).name, (common, []))[1].append(name)
    return list(groups.values())


def _fill(definition: Definition, one: Repetition, found: Mapping[str, Repetition]) -> Definition:
    places: dict[str, Any] = dict(one.values)
    for need in definition.references:
        fitting = _fitting(need, one, found)
        if len(fitting) > 1:
            missing = sorted(set(found[fitting[0]].values) - set(one.values))
            raise ConfigError(
                f"`stages.{one.stage}` refers to `{need}`, which is repeated over {', '.join(missing)}. Name one of "
                f"them, e.g. `${{{fitting[0]}}}`, or repeat `{one.stage}` over the same by `each`."
            )
        if fitting:
            places[need] = f"${{{fitting[0]}}}"
    after = tuple(name for need in definition.after for name in _fitting(need, one, found) or [need])
    return replace(definition, values=substitute(definition.values, places), after=after)


def _fitting(need: str, one: Repetition, found: Mapping[str, Repetition]) -> list[str]:
    """The stages called `need` in the file whose values are those of `one`, as far as they have them in common."""
    return [
        name
        for name, other in found.items()
        if other.stage == need
        and all(other.values[key] == one.values[key] for key in other.values.keys() & one.values.keys())
    ]
