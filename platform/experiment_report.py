"""What came out of an experiment: a table, JSON and a picture, ours beside what was published.

A published figure never stands without the size and data it was reached with, and ours neither: the two are about the
same method, not about the same thing.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from eagleray.platform import storage
from eagleray.platform.experiment import Stage
from eagleray.platform.experiment_run import Outcome
from eagleray.platform.progress import format_seconds
from eagleray.platform.runs import REPORT_FILE
from eagleray.platform.sweep_results import interval_95

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """A figure of somebody else's."""

    value: float
    setting: str
    """Size and data, and where the figure stands."""


@dataclass(frozen=True)
class Wanted:
    """One line of the table: which figure of which stage."""

    label: str
    stages: Sequence[str]
    """Of which stage; of several, the mean with its t-interval."""
    metric: str
    """Dotted name in a stage's `report.json`, as `eagleray runs show` prints it; positions in lists count from 0."""
    unit: str
    scale: float
    published: Published | None


@dataclass(frozen=True)
class Figure:
    """One line of the table with what was measured, in `unit`."""

    label: str
    stage: str
    """All of them if it is a mean."""
    metric: str
    unit: str
    value: float | None
    low: float | None
    high: float | None
    published: Published | None


def read_figures(wanted: Sequence[Wanted], stages: Mapping[str, Stage]) -> list[Figure]:
    """The figures that the stages' reports hold; one that is missing is told and has no value."""
    reports: dict[str, dict[str, Any]] = {}
    for name in {name for line in wanted for name in line.stages}:
        path = stages[name].folder / REPORT_FILE
        reports[name] = dict(_entries(storage.read_json(path), "")) if path.is_file() else {}
    return [_figure(line, reports) for line in wanted]


def write_experiment(
    root: Path,
    about: Mapping[str, Any],
    stages: Sequence[Stage],
    outcomes: Mapping[str, Outcome],
    figures: Sequence[Figure],
) -> str:
    """Write `report.json`, `report.md` and `plots/results.png`; nothing is touched if all is as it was.

    Args:
        root: The experiment's folder.
        about: `name`, `title`, and as `size` and `data` what ours was reached with.
        stages: All stages.
        outcomes: How each ended.
        figures: The lines of the table.

    Returns:
        The table, as Markdown.
    """
    report = {**about, "stages": {s.name: _stage(s, outcomes[s.name]) for s in stages}}
    report["results"] = [asdict(figure) for figure in figures]
    table = to_markdown(about, figures)
    path = root / REPORT_FILE
    if not path.is_file() or storage.read_json(path) != storage.plain(report):
        storage.write_text(root / "report.md", f"{table}\n{_stage_table(report['stages'])}")
        if any(figure.value is not None for figure in figures):
            plot_figures(figures, root / "plots" / "results.png", title=about["title"], setting=about["size"])
        storage.write_json(path, report)
    return table


def to_markdown(about: Mapping[str, Any], figures: Sequence[Figure]) -> str:
    """The table of figures."""
    lines = [f"# {about['title']}", "", f"Ours: {about['size']} Data: {about['data']}", ""]
    lines += ["| | ours | 95 % interval | published | which is of |", "| --- | ---: | --- | ---: | --- |"]
    for f in figures:
        interval = "" if f.low is None or f.high is None else f"{f.low:.4g} to {f.high:.4g}"
        published = ("", "") if f.published is None else (f"{f.published.value:g}", f.published.setting)
        ours = "not measured" if f.value is None else f"{f.value:.4g}"
        unit = f" ({f.unit})" if f.unit else ""
        lines.append(f"| {f.label}{unit} | {ours} | {interval} | {published[0]} | {published[1]} |")
    if any(f.published for f in figures):
        lines += [
            "",
            "Published figures are of other sizes and data, as the last column says; they are no target of ours.",
        ]
    return "\n".join(lines) + "\n"


def plot_figures(figures: Sequence[Figure], path: Path, *, title: str, setting: str) -> None:
    """A panel a unit: ours as dots with intervals, published figures as hollow diamonds."""
    from matplotlib.figure import (
        Figure as Canvas,
    )  # a second to import, which a re-run without changes need not wait

    units = {figure.unit: None for figure in figures if figure.value is not None}
    groups = [[f for f in figures if f.unit == unit and f.value is not None] for unit in units]
    heights = [1 + 0.4 * len(group) for group in groups]
    canvas = Canvas(figsize=(8, 0.8 + sum(heights)), layout="constrained")
    panels = canvas.subplots(len(groups), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, unit, group in zip(panels, units, groups, strict=True):
        for place, f in enumerate(reversed(group)):
            assert f.value is not None
            low, high = (f.value if edge is None else edge for edge in (f.low, f.high))
            axes.errorbar(
                f.value,
                place,
                xerr=[[max(0, f.value - low)], [max(0, high - f.value)]],
                fmt="o",
                color="C0",
                capsize=3,
            )
            if f.published is not None:
                axes.plot(f.published.value, place, "D", markerfacecolor="none", color="C1")
        axes.set_yticks(range(len(group)), [f.label for f in reversed(group)])
        axes.set_ylim(-0.6, len(group) - 0.4)
        axes.set_xlabel(unit or "value")
        axes.grid(alpha=0.3)
    shown = "; diamonds: published, of other size and data" if any(f.published for f in figures) else ""
    canvas.suptitle(f"{title}\ndots: ours, {setting}{shown}", fontsize="small")
    path.parent.mkdir(exist_ok=True)
    canvas.savefig(path, dpi=120)


def _figure(line: Wanted, reports: Mapping[str, Mapping[str, Any]]) -> Figure:
    found = [_estimate(line.metric, name, reports[name]) for name in line.stages]
    value, low, high = found[0]
    if len(found) > 1:
        known = [estimate[0] for estimate in found if estimate[0] is not None]
        value = low = high = None
        if len(known) == len(found):  # else a mean over other seeds than the line says
            half = interval_95(known)
            assert half is not None, "several values have an interval"
            value = fmean(known)
            low, high = value - half, value + half
    scaled = [None if x is None else x * line.scale for x in (value, low, high)]
    return Figure(
        line.label, ", ".join(line.stages), line.metric, line.unit, *scaled, published=line.published
    )


def _estimate(
    metric: str, stage: str, report: Mapping[str, Any]
) -> tuple[float | None, float | None, float | None]:
    """A figure and, if the report has one, its interval."""
    value, low, high = report.get(metric), None, None
    if f"{metric}.value" in report:
        value, low, high = (report[f"{metric}.{part}"] for part in ("value", "low", "high"))
    if report and not isinstance(value, int | float):
        near = difflib.get_close_matches(metric, report, n=3, cutoff=0.4)
        logger.warning(
            "`%s` is no number in the report of `%s`; near are: %s.",
            metric,
            stage,
            ", ".join(near) or "none",
        )
    value, low, high = (float(x) if isinstance(x, int | float) else None for x in (value, low, high))
    return value, low, high


def _entries(value: Any, name: str) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        parts = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list):
        parts = [(str(place), item) for place, item in enumerate(value)]
    else:
        return [(name, value)]
    return [entry for key, item in parts for entry in _entries(item, f"{name}.{key}" if name else key)]


def _stage(stage: Stage, outcome: Outcome) -> dict[str, Any]:
    manifest = stage.manifest
    commit = (manifest.get("git") or {}).get("commit")
    return {
        "job": stage.job,
        "status": "finished" if outcome.status == "done" else outcome.status,
        "error": outcome.error,
        "run": str(stage.folder),
        "key": stage.key,
        "seconds": manifest.get("wall_seconds"),
        "eagleray": manifest.get("eagleray"),
        "commit": commit,
    }


def _stage_table(stages: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| stage | job | status | time | run |", "| --- | --- | --- | ---: | --- |"]
    for name, s in stages.items():
        status = f"{s['status']}: {s['error']}" if s["error"] else s["status"]
        took = format_seconds(s["seconds"]) if s["seconds"] else ""
        lines.append(f"| {name} | {s['job']} | {status.replace('|', '/')} | {took} | {Path(s['run']).name} |")
    return "\n".join(lines) + "\n"
