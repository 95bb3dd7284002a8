"""What a sweep leaves in its folder: tables, pictures, the report and the best config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eagleray.platform import storage
from eagleray.platform.config import to_yaml
from eagleray.platform.pareto import pareto_front, plot_pareto
from eagleray.platform.population import Exploit
from eagleray.platform.runs import RunFolder
from eagleray.platform.space import SEED_KEY, Space, SweepPlan, trial_config
from eagleray.platform.sweep_plots import plot_by_value, plot_over_time, plot_parallel
from eagleray.platform.sweep_results import PointResult, TrialRecord, table_rows, to_csv, to_markdown


def write_results(
    plan: SweepPlan,
    run: RunFolder,
    trials: Sequence[TrialRecord],
    results: Sequence[PointResult],
    exploits: Sequence[Exploit] = (),
) -> str:
    """Write tables, pictures and `report.json` of a sweep; returns its table, best first, as Markdown."""
    space, rows = plan.space, table_rows(results, plan.space)
    table = _write_table(run.path / "table", rows)
    report: dict[str, Any] = {
        "best": {**results[0].point, **results[0].metrics},
        "selected_by": {"metric": space.metric, "mode": space.mode},
        "space": space.name,
        "search": plan.search,
        "scheduler": plan.scheduler,
        "seeds": list(plan.seeds),
        "count": {
            status: sum(trial.status == status for trial in trials)
            for status in ("finished", "stopped", "failed")
        },
        "table": rows,
        "errors": {trial.name: trial.error for trial in trials if trial.error},
    }
    if space.further:
        report["pareto"] = _write_pareto(space, run, results, rows)
    if plan.scheduler == "pbt":
        report["exploits"] = [asdict(exploit) for exploit in exploits]
        if exploits:
            _write_table(run.path / "exploits", [_exploit_row(exploit) for exploit in exploits])
    _draw(space, run.plots, trials, results)
    run.write_report(report)
    return table


def write_best(plan: SweepPlan, run: RunFolder, best: PointResult) -> Path:
    """Write the config of the best point as a file that `eagleray train` runs."""
    point = {**best.point, SEED_KEY: best.trials[0].seed}
    config = trial_config(plan.config_class, plan.config, point, source="best point")
    head = f"# Best of the sweep {run.path.name} over `{plan.space.name}` by {plan.space.metric}.\n"
    if plan.scheduler == "pbt":
        model = f"{best.trials[0].place.removeprefix(f'{run.folder.place}/')}/model"
        head += (
            "# Values changed while the trials trained (see `exploits.md`): these are those of the best model, which\n"
            f"# lies in {model}; training with them from the start is another run.\n"
        )
    path = run.path / "best.yaml"
    storage.write_text(path, head + to_yaml(config))
    return path


def _write_pareto(
    space: Space, run: RunFolder, results: Sequence[PointResult], rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The points that finished and that no other beats in everything."""
    whole = [i for i, result in enumerate(results) if result.status == "finished"]
    measured = [results[i].metrics for i in whole]
    front = [rows[whole[i]] for i in pareto_front(measured, space.objectives)]
    if front:
        _write_table(run.path / "pareto", front)
        run.plots.mkdir(exist_ok=True)
        names = [rows[i]["trials"] for i in whole]
        plot_pareto(measured, space.objectives, run.plots / "pareto.png", names=names)
    return front


def _exploit_row(exploit: Exploit) -> dict[str, Any]:
    changes = [{f"{key} before": exploit.old[key], f"{key} after": exploit.new[key]} for key in exploit.old]
    row: dict[str, Any] = {"step": exploit.step, "trial": exploit.trial, "from": exploit.donor}
    for change in changes:
        row |= change
    return row


def _draw(space: Space, folder: Path, trials: Sequence[TrialRecord], results: Sequence[PointResult]) -> None:
    folder.mkdir(exist_ok=True)
    plot_over_time(trials, space, folder / f"{space.metric}_over_time.png")
    plot_parallel(results, space, folder / "parallel.png")
    for key in space.varied:
        plot_by_value(results, space, key, space.curves or (space.metric,), folder / f"by_{key}.png")


def _write_table(path: Path, rows: list[dict[str, Any]]) -> str:
    table = to_markdown(rows)
    storage.write_text(path.with_name(f"{path.name}.md"), table)
    storage.write_text(path.with_name(f"{path.name}.csv"), to_csv(rows))
    return table
