"""Score any number of answer pairs with a trained judge or reward model, files larger than memory included.

    eagleray score runs/demo/finetune/model 'pairs/*.jsonl' run.dir=scores

The run folder gets `scores/part-00000.parquet` and so on: a line for each pair with its id and the verdict, in the
order of the input. A run that was stopped goes on with the same command: parts that are there stay, the others are done.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pydantic import Field, field_validator

from eagleray.jobs.gram.evaluate import ScorerSection, build_scorer
from eagleray.platform.config import ConfigError
from eagleray.platform.data.parts import cut_into_parts
from eagleray.platform.data.preferences import PreferenceData, ReadReport, read_candidates
from eagleray.platform.data.sources import DataError, Row, file_hashes
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import JobConfig
from eagleray.platform.shards import process_parts, read_parts

JOB = "gram.score"
logger = logging.getLogger(__name__)

_CHUNK = 512
"""Pairs handed to the model at a time; it makes batches of like length from them."""


class Config(JobConfig):
    """Config of `gram.score`."""

    job: Literal["gram.score"] = JOB
    scorer: ScorerSection
    """A `judge` or a `discriminative` model."""
    pairs: PreferenceData
    """Pairs with `response_a` and `response_b`, or with a chosen and a rejected answer. Labels are not needed."""
    rows_per_part: int = Field(default=10_000, ge=1)
    """Rows after which a part ends: what a kill may cost a worker."""

    @field_validator("scorer")
    @classmethod
    def _scorer_has_a_model(cls, scorer: ScorerSection) -> ScorerSection:
        if scorer.path is None:
            raise ValueError(f"a scorer of kind {scorer.kind} has no model; give `judge` or `discriminative`")
        return scorer


class PairScores:
    """Scores the pairs of a part; lives in a worker."""

    schema = pa.schema(
        [
            ("id", pa.string()),
            ("p_a", pa.float64()),
            ("p_order1", pa.float64()),
            ("p_order2", pa.float64()),
            ("delta1", pa.float64()),
            ("delta2", pa.float64()),
            ("consistent", pa.bool_()),
        ]
    )

    def __init__(self, scorer: ScorerSection, pairs: PreferenceData) -> None:
        assert scorer.path is not None
        self._score = build_scorer(scorer.kind, scorer.path, scorer.options)
        self._pairs = pairs

    def __call__(self, rows: Iterable[Row | DataError], report: ReadReport) -> Iterator[list[dict[str, Any]]]:
        """Id and verdict of each pair; `p_a` is the probability that the first (or chosen) answer is better."""
        candidates = read_candidates(rows, self._pairs, report)
        while chunk := list(islice(candidates, _CHUNK)):
            texts = [
                {"prompt": pair.prompt_text, "first": pair.response_a, "second": pair.response_b}
                for pair in chunk
            ]
            yield [
                {"id": pair.id, **verdict} for pair, verdict in zip(chunk, self._score(texts), strict=True)
            ]


def main(cfg: Config) -> dict[str, Any]:
    """Score, and sum up.

    Returns:
        The report: `pairs`, `skipped` by reason, `parts`, and of the verdicts the share that prefers the first
        answer and the share in which both orders agree.

    Raises:
        ConfigError: The input has changed since the run was begun.
        DataError: A row does not fit (unless `pairs.on_error` is `skip`), or none is left.
    """
    pairs = cfg.pairs.resolved(".")
    with RunFolder.create(JOB, cfg).recording() as run:
        _check_unchanged(run, pairs)
        parts = [part for source in pairs.sources for part in cut_into_parts(source, rows=cfg.rows_per_part)]
        place = f"{run.folder.place}/scores"
        report = process_parts(PairScores, {"scorer": cfg.scorer, "pairs": pairs}, parts, place, cfg.ray)
        logger.info("Pairs: %s.", report.summary())
        if report.kept == 0:
            raise DataError(
                ", ".join(source.path for source in pairs.sources), "no row is left", report.summary()
            )
        summary = {
            "pairs": report.kept,
            "skipped": report.skipped,
            "parts": len(parts),
            **_shares(read_parts(place, len(parts), PairScores.schema)),
        }
        run.write_report(summary)
    return summary


def _check_unchanged(run: RunFolder, pairs: PreferenceData) -> None:
    """Parts are places in files, so an attempt must see the files of the first one."""
    before = run.read_manifest()["data_hashes"]
    hashes = {path: value for source in pairs.sources for path, value in file_hashes(source).items()}
    changed = sorted(path for path in before.keys() | hashes.keys() if before.get(path) != hashes.get(path))
    if before and changed:
        raise ConfigError(
            f"{run.path} holds scores of other data: {', '.join(changed)} changed since then. "
            "Set another `run.dir` to score the data as they are now."
        )
    run.update_manifest(data_hashes=hashes)


def _shares(scores: ds.Dataset) -> dict[str, float]:
    rows = first = agreeing = 0
    for batch in scores.to_batches(columns=["p_a", "consistent"]):
        rows += batch.num_rows
        first += pc.sum(pc.greater(batch["p_a"], 0.5)).as_py() or 0  # pyright: ignore[reportAttributeAccessIssue]
        agreeing += pc.sum(batch["consistent"]).as_py() or 0  # pyright: ignore[reportAttributeAccessIssue]
    return {"first_preferred": first / rows, "orders_agree": agreeing / rows}


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
