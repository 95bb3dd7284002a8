"""Pools and targets of a selection: preference pairs, stores of vectors, or both joined by id."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from eagleray.models.selection.rows import SelectionError, check_disjoint, overlapping, shown
from eagleray.models.selection.synthetic import Kind, planted_pairs
from eagleray.platform.config import Config as Section
from eagleray.platform.data.preferences import Preference, PreferenceMixture, load_preferences
from eagleray.platform.data.vectors import read_vectors

logger = logging.getLogger(__name__)

Overlap = Literal["raise", "drop", "allow"]
WithoutVector = Literal["raise", "drop"]


class PlantedPairs(Section):
    """Generated pairs, of which some ask about pictures."""

    pairs: int = Field(default=200, ge=2)
    """How many."""
    seed: int = Field(default=0, ge=0)
    """Seed of the generator; pairs of different seeds share no prompt."""
    kinds: list[Kind] = Field(default=["picture", "kitchen"], min_length=1)
    """Kinds of pairs, in turn."""


class DataSection(Section):
    """Rows that can be selected, or that are selected for."""

    pairs: PreferenceMixture | None = None
    """Preference pairs. A column `source` says where a row is from."""
    synthetic: PlantedPairs | None = None
    """Generated pairs in place of `pairs`."""
    vectors: str | None = None
    """Parquet file, pattern or folder with columns `id` and `h`, for `features.name: stored`; with pairs, their vectors
    by id, else the rows themselves."""

    @model_validator(mode="after")
    def _one_origin(self) -> DataSection:
        if self.pairs is not None and self.synthetic is not None:
            raise ValueError("give either `pairs` or `synthetic`")
        if self.pairs is None and self.synthetic is None and self.vectors is None:
            raise ValueError("give `pairs`, `vectors` or both")
        return self

    @field_validator("vectors")
    @classmethod
    def _path_is_absolute(cls, path: str | None) -> str | None:
        return None if path is None else str(Path(path).expanduser().absolute())

    @property
    def has_texts(self) -> bool:
        """Whether there are prompts and answers."""
        return self.pairs is not None or self.synthetic is not None


class PoolSection(DataSection):
    """Rows to select from."""

    count: int | None = Field(default=None, ge=0)
    """Rows to select."""
    fraction: float | None = Field(default=None, ge=0, le=1)
    """Share of the rows to select, in place of `count`."""

    @model_validator(mode="after")
    def _one_size(self) -> PoolSection:
        if (self.count is None) == (self.fraction is None):
            raise ValueError("give either `count` or `fraction`")
        return self


@dataclass(frozen=True)
class LoadedSet:
    """Rows of a pool or target."""

    name: str
    ids: list[str]
    sources: list[str]
    pairs: list[Preference] | None
    vectors_ND: np.ndarray | None
    model_hash: str | None
    hashes: dict[str, str]
    without_vector: int = 0
    """Pairs that were left out, as they have no vector."""

    def without(self, rows: Sequence[int]) -> LoadedSet:
        """The set without these rows."""
        gone = set(rows)
        kept = [row for row in range(len(self.ids)) if row not in gone]
        return replace(
            self,
            ids=[self.ids[row] for row in kept],
            sources=[self.sources[row] for row in kept],
            pairs=None if self.pairs is None else [self.pairs[row] for row in kept],
            vectors_ND=None if self.vectors_ND is None else self.vectors_ND[kept],
        )

    @property
    def prompts(self) -> list[str]:
        """Prompt of each row; empty where there are no texts."""
        return [pair.prompt_text for pair in self.pairs or []]


def load_set(
    section: DataSection,
    name: str,
    *,
    with_vectors: bool,
    order: str | None = None,
    without_vector: WithoutVector = "raise",
) -> LoadedSet:
    """Read a pool or target; vectors are read if they are needed or are all there is.

    Raises:
        DataError: A file cannot be read.
        SelectionError: A pair has no vector and `without_vector` is `raise`, or no pair has one.
    """
    pairs, hashes = _load_pairs(section)
    sources = [str(pair.extra.get("source", "unknown")) for pair in pairs or []]
    if section.vectors is None or not (with_vectors or pairs is None):
        assert pairs is not None
        return LoadedSet(name, [pair.id for pair in pairs], sources, pairs, None, None, hashes)
    table = read_vectors(section.vectors, order=order, ids_only=not with_vectors)
    hashes = hashes | table.hashes
    if pairs is None:
        sources = table.sources or ["unknown"] * len(table.ids)
        return LoadedSet(name, table.ids, sources, None, table.vectors_ND, table.model_hash, hashes)
    row_of = {identity: row for row, identity in enumerate(table.ids)}
    missing = [pair.id for pair in pairs if pair.id not in row_of]
    if missing and (without_vector == "raise" or len(missing) == len(pairs)):
        raise SelectionError(
            f"{len(missing)} pair(s) of {name} have no vector in {section.vectors}: {shown(missing)}. Compute what is "
            "missing; `without_vector: drop` goes on with the pairs that have one."
        )
    if missing:
        logger.warning("Left out %d pair(s) of %s that have no vector.", len(missing), name)
        kept = [row for row, pair in enumerate(pairs) if pair.id in row_of]
        pairs, sources = [pairs[row] for row in kept], [sources[row] for row in kept]
    ids = [pair.id for pair in pairs]
    vectors = table.vectors_ND[[row_of[identity] for identity in ids]]
    return LoadedSet(name, ids, sources, pairs, vectors, table.model_hash, hashes, len(missing))


def check_models(sets: Sequence[LoadedSet]) -> None:
    """Refuse vectors of different models.

    Raises:
        SelectionError: With the name and hash of each set.
    """
    known = {loaded.name: loaded.model_hash for loaded in sets if loaded.model_hash is not None}
    if len(set(known.values())) > 1:
        listed = ", ".join(f"{name}: {value}" for name, value in known.items())
        raise SelectionError(
            f"The vectors come from different models ({listed}), so they cannot be compared. Encode all of them with one."
        )


def separated(pool: LoadedSet, other: LoadedSet, *, what: str, overlap: Overlap) -> LoadedSet:
    """The pool without what another set has too, by prompt, or by id where there are only vectors.

    Raises:
        SelectionError: They overlap and `overlap` is `raise`; with the ids.
    """
    if overlap == "allow":
        return pool
    if pool.pairs is not None and other.pairs is not None:
        keys, others = pool.prompts, other.prompts
        shared = overlapping(keys, others)
        if shared and overlap == "raise":
            check_disjoint(keys, pool.ids, others, other.ids, what=what)
    else:
        known = set(other.ids)
        shared = [row for row, identity in enumerate(pool.ids) if identity in known]
        if shared and overlap == "raise":
            names = shown([pool.ids[row] for row in shared])
            raise SelectionError(f"{len(shared)} id(s) of {pool.name} are in the {what} too: {names}.")
    if shared:
        logger.warning("Left out %d row(s) of %s that the %s has too.", len(shared), pool.name, what)
    return pool.without(shared) if shared else pool


def output_row(pool: LoadedSet, row: int, score: float, rank: int) -> dict[str, Any]:
    """A selected row as a training job reads it: the pair with its further columns, or id and source."""
    found = {"selection_score": score, "selection_rank": rank}
    if pool.pairs is None:
        return {"id": pool.ids[row], "source": pool.sources[row], **found}
    pair = pool.pairs[row]
    values: dict[str, Any] = {**pair.extra, "id": pair.id, "prompt": pair.prompt}
    # Messages throughout: a transcript as plain text would be taken for one that is still to be split.
    values["chosen"] = [{"role": "assistant", "content": pair.chosen}]
    values["rejected"] = [{"role": "assistant", "content": pair.rejected}]
    return values | ({} if pair.margin is None else {"margin": pair.margin}) | found


def _load_pairs(section: DataSection) -> tuple[list[Preference] | None, dict[str, str]]:
    if section.synthetic is not None:
        made = section.synthetic
        rows = planted_pairs(made.pairs, seed=made.seed, kinds=made.kinds)
        return [_generated(row) for row in rows], {}
    if section.pairs is None:
        return None, {}
    pairs, report = load_preferences(section.pairs)
    logger.info("Pairs: %s.", report.summary())
    return pairs, report.hashes


def _generated(row: dict[str, str]) -> Preference:
    prompt = [{"role": "user", "content": row["prompt"]}]
    return Preference(row["id"], prompt, row["chosen"], row["rejected"], None, {"source": row["source"]})
