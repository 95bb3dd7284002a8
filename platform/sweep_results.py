"""What came out of a sweep: one row a point of the space, best first, read from the trials' run folders.

Ray's own result of a trial has only what was reported with a checkpoint, which is nothing here
(docs/decisions/0002-checkpoints.md).
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from statistics import fmean, stdev
from typing import Any, Literal

from eagleray.platform.runs import RunFolder
from eagleray.platform.space import SEED_KEY, Mode, Space, TrialOutcome
from eagleray.platform.tracking import RECORD_KEYS, read_metrics

TrialStatus = Literal["finished", "stopped", "failed"]

_ORDER: tuple[TrialStatus, ...] = ("finished", "stopped", "failed")
"""A trial that was stopped has seen less training: it never stands above one that finished."""


class SweepError(ValueError):
    """A sweep without a result; the message says what became of its trials."""


@dataclass(frozen=True)
class TrialRecord:
    """One trial, as its run folder tells."""

    name: str
    place: str
    """Its run folder, a path or URI."""
    point: dict[str, Any]
    """Its value of every key of the space."""
    seed: int
    status: TrialStatus
    evaluations: list[dict[str, Any]]
    """Records of `metrics.jsonl`."""
    kept: dict[str, Any] | None
    """The evaluation of the model that the trial leaves: the best by the sweep's metric, or the last one."""
    error: str | None


@dataclass(frozen=True)
class PointResult:
    """One point of the space over all seeds."""

    point: dict[str, Any]
    trials: list[TrialRecord]
    metrics: dict[str, float]
    """Mean over the seeds of each metric of the kept model; empty if a trial has none."""
    interval: float | None
    """Half the width of the 95 % t-interval of the sweep's metric; `None` for a single seed."""

    @property
    def status(self) -> TrialStatus:
        """The worst among the trials: a mean over those that are left would compare unlike things."""
        return _ORDER[max(_ORDER.index(trial.status) for trial in self.trials)]


def read_trial(outcome: TrialOutcome, space: Space, *, keep: Literal["best", "last"]) -> TrialRecord:
    """Read one trial's folder and record there that the scheduler stopped it, if that is what happened."""
    status: TrialStatus = "failed"
    run, error = RunFolder(outcome.place).fetch_records(), outcome.error
    manifest = run.read_manifest() if run.manifest.is_file() else {}
    if manifest.get("status") == "finished":
        status, error = "finished", None
    elif outcome.error is None:
        # The process was ended from outside; its manifest says `running`, or `failed` over what broke first.
        status = "stopped"
        _record_stopped(run)
    elif manifest.get("status") == "failed":
        error = manifest["attempts"][-1].get("error", error)
    records = [record for record in read_metrics(run.metrics) if record["kind"] == "eval"]
    return TrialRecord(
        name=outcome.name,
        place=outcome.place,
        point={key: value for key, value in outcome.point.items() if key in space.domains},
        seed=outcome.point[SEED_KEY],
        status=status,
        evaluations=records,
        kept=kept_evaluation(records, space.metric, space.mode, keep=keep),
        error=error,
    )


def join_segments(
    parts: Sequence[TrialRecord], space: Space, *, keep: Literal["best", "last"]
) -> TrialRecord:
    """The segments of one trial as one record: the values and the model are those of the kept evaluation."""
    kept = [part for part in parts if part.kept is not None]
    chosen = kept[-1] if kept else parts[-1]
    if keep == "best" and kept:
        best = kept_evaluation(
            [part.kept for part in kept if part.kept], space.metric, space.mode, keep="best"
        )
        chosen = next(part for part in kept if part.kept is best)
    return replace(
        chosen,
        status=parts[-1].status,
        evaluations=[record for part in parts for record in part.evaluations],
        error=parts[-1].error,
    )


def kept_evaluation(
    records: Sequence[dict[str, Any]], metric: str, mode: Mode, *, keep: Literal["best", "last"]
) -> dict[str, Any] | None:
    """The first best evaluation by a metric, or the last one that has it; values that were not finite do not count."""
    usable = [record for record in records if record.get(metric) is not None]
    if not usable:
        return None
    if keep == "last":
        return usable[-1]
    return (max if mode == "max" else min)(usable, key=lambda record: record[metric])


def rank_points(trials: Sequence[TrialRecord], space: Space) -> list[PointResult]:
    """Group trials by point and sort: finished before stopped before failed, then by the metric, best first.

    Trials of one point differ in their seeds; the same point with the same seed is a point of its own.

    Raises:
        SweepError: No trial finished with a value of the metric.
    """
    groups: dict[tuple[Any, ...], list[TrialRecord]] = {}
    seen: Counter[tuple[Any, ...]] = Counter()
    for trial in trials:
        point = tuple(trial.point[key] for key in space.varied)
        groups.setdefault((*point, seen[*point, trial.seed]), []).append(trial)
        seen[*point, trial.seed] += 1
    results = [_point_result(group, space.metric) for group in groups.values()]
    sign = space.objectives[0].sign

    def order(result: PointResult) -> tuple[int, float]:
        value = result.metrics.get(space.metric)
        return _ORDER.index(result.status), math.inf if value is None else sign * value

    results.sort(key=order)
    if not results or results[0].status != "finished" or space.metric not in results[0].metrics:
        raise SweepError(_no_result(trials, space))
    return results


def table_rows(results: Sequence[PointResult], space: Space) -> list[dict[str, Any]]:
    """The sweep's table, one mapping a row with the same keys in all: varied keys, metrics, how it ended, trials."""
    names = [name for result in results for name in result.metrics if name != space.metric]
    several = any(result.interval is not None for result in results)
    rows = []
    for result in results:
        row = {key: result.point[key] for key in space.varied}
        row[space.metric] = result.metrics.get(space.metric)
        if several:
            row[f"{space.metric}_ci95"] = result.interval
        row |= {name: result.metrics.get(name) for name in dict.fromkeys(names)}
        row |= {"status": result.status, "step": max((_last_step(t) for t in result.trials), default=0)}
        row["trials"] = " ".join(trial.name for trial in result.trials)
        rows.append(row)
    return rows


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with equal keys as CSV, numbers in full; a missing value is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with equal keys as an aligned Markdown table, numbers with four digits."""
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    return (
        "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]) + "\n"
    )


def interval_95(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % t-interval of a mean; `None` for fewer than two values.

    >>> round(interval_95([1.0, 3.0]), 4)
    12.7062
    """
    if len(values) < 2:
        return None
    from scipy.stats import t  # takes a second to import

    return float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def _point_result(trials: list[TrialRecord], metric: str) -> PointResult:
    kept = [trial.kept for trial in trials]
    metrics: dict[str, float] = {}
    interval = None
    if all(record is not None for record in kept):
        records = [record for record in kept if record is not None]
        names = [name for name in records[0] if name not in RECORD_KEYS]
        whole = [name for name in names if all(record.get(name) is not None for record in records)]
        metrics = {name: fmean(record[name] for record in records) for name in whole}
        interval = interval_95([record[metric] for record in records])
    return PointResult(trials[0].point, trials, metrics, interval)


def _record_stopped(run: RunFolder) -> None:
    if not run.manifest.is_file():
        return
    attempts = run.read_manifest()["attempts"]
    ended = datetime.now(UTC).isoformat(timespec="seconds")
    for key in ("error", "traceback"):
        attempts[-1].pop(key, None)
    attempts[-1] |= {"status": "stopped", "ended": ended}
    run.update_manifest(
        status="stopped", ended=ended, attempts=attempts, stopped_by="the scheduler of the sweep"
    )


def _no_result(trials: Sequence[TrialRecord], space: Space) -> str:
    failed = [trial for trial in trials if trial.status == "failed"]
    if failed:
        first = failed[0]
        return (
            f"No point of the sweep finished: {len(failed)} of {len(trials)} trials failed. "
            f"The first, {first.place}: {first.error}"
        )
    known = {name: None for t in trials for r in t.evaluations for name in r if name not in RECORD_KEYS}
    return (
        f"The sweep selects by `{space.metric}`, which no finished trial evaluated; the trials evaluated: "
        f"{', '.join(known) or 'nothing'}."
    )


def _last_step(trial: TrialRecord) -> int:
    return trial.evaluations[-1]["step"] if trial.evaluations else 0


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
