"""What scorers say about candidates: a number for each answer, or a comparison of each pair.

Everything here takes all prompts at once, so that a model is loaded once and its batches are full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

from pydantic import Field, model_validator

from eagleray.jobs.align.gold import GoldSection
from eagleray.jobs.gram.evaluate import build_scorer
from eagleray.models.gram.checks import CHECKS
from eagleray.models.gram.discriminative import DiscriminativeScorer
from eagleray.platform.config import Config as Section
from eagleray.platform.scoring import Row, Score, map_with_model
from eagleray.platform.sections import ModelPath, RaySection

Pairs = dict[tuple[int, int], float]
"""For i < j the probability that answer i is better than answer j."""


class ScorerSection(Section):
    """One way to choose among answers."""

    kind: Literal["judge", "discriminative", "longest", "first"]
    """`judge` (GRAM), `discriminative`, the longest answer, or the first of the row."""
    path: ModelPath | None = None
    """Model folder or hub name, for `judge` and `discriminative`."""
    method: Literal["round_robin", "bracket", "linear", "reference"] = "round_robin"
    """How a judge ranks n answers. `reference`: by the probability to beat one answer of the row, its first, which then is
    no candidate."""
    options: dict[str, Any] = Field(default={})
    """Further settings of a judge, e.g. `swap_average: logit`."""

    @model_validator(mode="after")
    def _models_have_a_path(self) -> ScorerSection:
        if (self.kind in ("judge", "discriminative")) != (self.path is not None):
            raise ValueError("`path` belongs to a scorer of kind judge or discriminative, and only there")
        return self


@dataclass(frozen=True)
class Group:
    """Answers to one prompt."""

    prompt: str
    answers: list[str]
    qualities: list[float]
    models: list[str]
    reference: str = ""
    """What answers are compared with."""


def rewards_or_pairs(
    section: ScorerSection, groups: Sequence[Group], ray: RaySection
) -> list[list[float]] | list[Pairs]:
    """What a scorer says about each group: a number for each answer, or, if it only compares, each pair once."""
    if section.kind == "longest":
        return [[float(len(answer)) for answer in group.answers] for group in groups]
    if section.kind == "first":
        return [[-float(place) for place in range(len(group.answers))] for group in groups]
    assert section.path is not None
    if section.kind == "discriminative":
        return _scored(section.path, section.options, groups, ray)
    if section.method == "reference":
        return _against_reference(section.path, section.options, groups, ray)
    places = [list(combinations(range(len(group.answers)), 2)) for group in groups]
    triples = [
        (g.prompt, g.answers[i], g.answers[j]) for g, ij in zip(groups, places, strict=True) for i, j in ij
    ]
    found = iter(_compared(section.path, section.options, triples, ray))
    return [{pair: next(found) for pair in pairs} for pairs in places]


def graded(groups: list[Group], gold: GoldSection | None, ray: RaySection) -> list[Group]:
    """Groups with the qualities that a gold model or rule gives; as they are without one."""
    if gold is None:
        return groups
    if gold.kind in CHECKS:
        check = CHECKS[gold.kind]
        found = [[check(answer, group.reference) for answer in group.answers] for group in groups]
    elif gold.kind == "discriminative":
        found = _scored(str(gold.path), {}, groups, ray)
    else:
        found = _against_reference(str(gold.path), {}, groups, ray)
    return [replace(group, qualities=scores) for group, scores in zip(groups, found, strict=True)]


def build_reward(path: str, options: dict[str, Any]) -> Score:
    """A discriminative reward model, for the workers: rows with prompt and answer to a reward."""
    scorer = DiscriminativeScorer.from_pretrained(path, **options)

    def score(rows: list[Row]) -> list[Row]:
        return [{"reward": r} for r in scorer.score([(row["prompt"], row["answer"]) for row in rows])]

    return score


def _scored(
    path: str, options: dict[str, Any], groups: Sequence[Group], ray: RaySection
) -> list[list[float]]:
    rows: list[Row] = [{"prompt": g.prompt, "answer": answer} for g in groups for answer in g.answers]
    found = iter(map_with_model(build_reward, {"path": path, "options": options}, rows, ray))
    return [[float(next(found)["reward"]) for _ in group.answers] for group in groups]


def _against_reference(
    path: str, options: dict[str, Any], groups: Sequence[Group], ray: RaySection
) -> list[list[float]]:
    """The probability of each answer to beat its group's reference."""
    found = iter(
        _compared(path, options, [(g.prompt, a, g.reference) for g in groups for a in g.answers], ray)
    )
    return [[next(found) for _ in group.answers] for group in groups]


def _compared(
    path: str, options: dict[str, Any], triples: Sequence[tuple[str, str, str]], ray: RaySection
) -> list[float]:
    rows: list[Row] = [{"prompt": p, "first": a, "second": b} for p, a, b in triples]
    arguments = {"kind": "judge", "path": path, "options": options}
    return [float(row["p_a"]) for row in map_with_model(build_scorer, arguments, rows, ray)]
