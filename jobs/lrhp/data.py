"""Config sections and data loading that the jobs of LRHP share."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pydantic import Field, model_validator

from eagleray.models.lrhp.synthetic import make_typed_pairs
from eagleray.models.selection.store import text_hash
from eagleray.platform.config import Config as Section
from eagleray.platform.data.preferences import (
    Preference,
    PreferenceMixture,
    load_preferences,
    split_by_prompt,
)

logger = logging.getLogger(__name__)
_SHOWN = 5


class TypedPairs(Section):
    """Generated pairs of two types: the longer answer wins, or the one without a banned word; ratings go up to 6."""

    pairs: int = Field(default=400, ge=10)
    """Number of pairs."""
    seed: int = Field(default=0, ge=0)
    """Seed of the generator."""
    split: str = "train"
    """Part of every prompt; sets with different ones share no prompt."""


class PairSet(Section):
    """Preference pairs from files, or generated ones."""

    pairs: PreferenceMixture | None = None
    """Preference data; a list mixes files whose columns have different names."""
    synthetic: TypedPairs | None = None
    """Generated pairs in place of `pairs`."""

    @model_validator(mode="after")
    def _one_origin(self) -> PairSet:
        if (self.pairs is None) == (self.synthetic is None):
            raise ValueError("give either `pairs` or `synthetic`")
        return self

    def load(self, *, keep_ties: bool = False) -> LoadedPairs:
        """Read or make the pairs.

        Args:
            keep_ties: Keep pairs whose margin is 0: they say nothing about the order, but a margin is a label.
        """
        if self.synthetic is not None:
            made = self.synthetic
            rows = make_typed_pairs(made.pairs, made.seed, split=made.split)
            return LoadedPairs([_as_preference(row) for row in rows], {}, {"generated": len(rows)})
        assert self.pairs is not None
        parts = self.pairs
        if keep_ties:
            parts = [part.model_copy(update={"drop_ties": False}) for part in parts]
        preferences, report = load_preferences(parts)
        logger.info("Pairs: %s.", report.summary())
        counts = {"read": report.read, "kept": report.kept, "skipped": dict(report.skipped)}
        return LoadedPairs(preferences, report.hashes, counts)


class TrainingPairs(Section):
    """Pairs to train on, and pairs to choose the model by."""

    train: PairSet
    """Training pairs."""
    eval: PairSet | None = None
    """Evaluation pairs; default: `eval_fraction` of the training prompts."""
    eval_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of the training prompts that is held out if `eval` is not given."""

    def load(self, *, seed: int) -> tuple[LoadedPairs, list[Preference]]:
        """Prepared training pairs (without repetitions and without evaluation prompts), and evaluation pairs."""
        train = self.train.load()
        pairs, counts = deduplicated(train.pairs)
        hashes = dict(train.hashes)
        if self.eval is None:
            pairs, held_out = split_by_prompt(pairs, fraction=self.eval_fraction, seed=seed)
        else:
            loaded = self.eval.load()
            held_out, hashes = loaded.pairs, hashes | loaded.hashes
            pairs, counts["prompt is an evaluation prompt"] = without_prompts_of(pairs, held_out)
        if not pairs:
            raise ValueError(f"No training pair is left: {_shown_counts(counts)}.")
        logger.info("Training pairs left out: %s.", _shown_counts(counts) or "none")
        return LoadedPairs(pairs, hashes, {**train.counts, "left_out": counts}), held_out


@dataclass(frozen=True)
class LoadedPairs:
    """Pairs with the hashes of their files, and what became of the rows."""

    pairs: list[Preference]
    hashes: dict[str, str]
    counts: dict[str, Any]


def deduplicated(pairs: Sequence[Preference]) -> tuple[list[Preference], dict[str, int]]:
    """The first of pairs with the same prompt and the same two answers; if their labels differ, none of them.

    Returns:
        What is left, and the numbers of repetitions and of pairs that contradict each other.
    """
    members: dict[tuple[str, frozenset[str]], list[Preference]] = {}
    for pair in pairs:
        key = text_hash(pair.prompt_text), frozenset({text_hash(pair.chosen), text_hash(pair.rejected)})
        members.setdefault(key, []).append(pair)
    kept, repeated, contradictory = [], 0, 0
    for same in members.values():
        if len({text_hash(pair.chosen) for pair in same}) > 1:
            contradictory += len(same)
        else:
            kept.append(same[0])
            repeated += len(same) - 1
    return kept, {"repeated": repeated, "contradictory": contradictory}


def without_prompts_of(
    pairs: Sequence[Preference], others: Sequence[Preference]
) -> tuple[list[Preference], int]:
    """The pairs whose prompt is none of `others`, and how many there were besides."""
    prompts = {text_hash(pair.prompt_text) for pair in others}
    kept = [pair for pair in pairs if text_hash(pair.prompt_text) not in prompts]
    return kept, len(pairs) - len(kept)


def named_pairs(sets: Mapping[str, LoadedPairs]) -> list[tuple[str, Preference]]:
    """Pairs of several sets with their source (the column `source`, else the set's name), sorted by id.

    Raises:
        ValueError: An id occurs twice.
    """
    found = [
        (str(pair.extra.get("source") or name), pair)
        for name, loaded in sets.items()
        for pair in loaded.pairs
    ]
    found.sort(key=lambda item: item[1].id)
    ids = [pair.id for _, pair in found]
    if twice := [a for a, b in pairwise(ids) if a == b]:
        raise ValueError(
            f"{len(twice)} ids occur in more than one set: {', '.join(twice[:_SHOWN])}. Representations are kept by id; "
            "give the files ids of their own, or name a column of theirs in `columns.id`."
        )
    return found


def tags_of(pair: Preference) -> list[str]:
    """The row's column `tags`: a list of texts, or one text."""
    tags = pair.extra.get("tags") or []
    return [tags] if isinstance(tags, str) else [str(tag) for tag in tags]


def _as_preference(row: dict[str, Any]) -> Preference:
    prompt = [{"role": "user", "content": row["prompt"]}]
    margin = row["score_chosen"] - row["score_rejected"]
    return Preference(row["id"], prompt, row["chosen"], row["rejected"], margin, {"tags": row["tags"]})


def _shown_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in counts.items() if count)
