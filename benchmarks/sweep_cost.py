"""Training steps that ASHA spends on a sweep, against trying every point to its end.

    python -m benchmarks.sweep_cost [--quick] [--threads N]

Both sweep the learning rate of a small reward model (`gram.discriminative`) over the same points with the same seed, as
many trials at a time as `--threads`. In a made-up pair the better answer has more words of one half of a small
vocabulary, so that rates differ in how far they get; some stand still and some diverge.

- `steps_asha_over_grid`: optimiser steps of all trials with `--scheduler asha` over those without. Steps are counted
  from what the trials logged, those between a scheduler's decision and the end of the trial included. Trials are
  deterministic, so whatever ASHA lets run to its end is as good as in the grid: if the best accuracies differ, ASHA
  has stopped the best trial, and the benchmark fails in place of reporting a ratio.
"""

from __future__ import annotations

import json
import random
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Ratio, finish, in_fresh_process, start

POINTS = (3e-3, 1e-6, 1e-2, 1e-4, 1.0, 1e-5, 1e-3, 3e-2, 3e-5, 3e-4)
"""Learning rates in a fixed, mixed order."""


@dataclass(frozen=True)
class Size:
    """Trials and their length."""

    points: int = 10
    steps: int = 64
    eval_every: int = 4
    batch: int = 16
    eval_pairs: int = 200
    words: int = 12
    """Words of an answer."""


QUICK = Size(points=1, steps=8, eval_every=2, eval_pairs=20)


@dataclass(frozen=True)
class Cost:
    """What one sweep spent and reached."""

    steps: int
    best: float
    counts: dict[str, int]


def write_pairs(path: Path, count: int, *, words: int, seed: int) -> None:
    """Write pairs whose better answer has about two thirds of its words from one half of the vocabulary."""
    rng = random.Random(seed)
    vocabulary = [consonant + vowel * 2 for consonant in "bdgklmrs" for vowel in "aeiou"]

    def answer(share: float) -> str:
        return " ".join(
            rng.choice(vocabulary[:20] if rng.random() < share else vocabulary[20:]) for _ in range(words)
        )

    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            row = {"prompt": f"Say number {i}.", "chosen": answer(0.65), "rejected": answer(0.35)}
            file.write(json.dumps(row) + "\n")


def costs(*, folder: Path, size: Size, trials: int) -> dict[str, Cost]:
    """Run both sweeps, one after the other, on a cluster with a core for each trial at a time."""
    import ray

    ray.init(address="local", num_cpus=trials, include_dashboard=False, log_to_driver=False)
    try:
        return {scheduler: _cost(folder, scheduler, size) for scheduler in ("none", "asha")}
    finally:
        ray.shutdown()


def main() -> None:
    """Measure and print."""
    options, machine = start(__doc__ or "", use_gpu=False)
    size = QUICK if options.quick else Size()
    with tempfile.TemporaryDirectory(prefix="eagleray-benchmark-") as name:
        folder = Path(name)
        pairs = size.steps * size.batch
        write_pairs(folder / "train.jsonl", pairs, words=size.words, seed=0)
        write_pairs(folder / "eval.jsonl", size.eval_pairs, words=size.words, seed=1)
        spent = in_fresh_process(costs, threads=1, folder=folder, size=size, trials=options.threads)
    grid, asha = spent["none"], spent["asha"]
    if asha.best < grid.best and not options.quick:
        raise AssertionError(f"ASHA ends at accuracy {asha.best:g}, the grid at {grid.best:g}")
    finish(
        "sweep_cost",
        [
            Ratio(
                "steps_asha_over_grid",
                "training steps of a sweep, ASHA over grid, at equal best accuracy",
                asha.steps / grid.steps,
                0.5,
                "low",
                f"{asha.steps}, {grid.steps} steps; accuracy {asha.best:.3f}, {grid.best:.3f}",
            )
        ],
        machine=machine,
        quick=options.quick,
        size=asdict(size),
        trials_at_a_time=options.threads,
        sweeps={"grid": asdict(grid), "asha": asdict(asha)},
    )


def _cost(folder: Path, scheduler: str, size: Size) -> Cost:
    from ray import tune

    from eagleray.jobs import sweep
    from eagleray.platform.space import Space
    from eagleray.platform.tracking import read_metrics

    rates = Space("rates", {"optim.lr": tune.grid_search(list(POINTS[: size.points]))}, "accuracy", "max")
    sweep.load_space = lambda *_: rates
    done = sweep.main(sweep.Config(**_config(folder, scheduler, size)))
    report = json.loads((done.path / "report.json").read_text())
    ends = [read_metrics(path / "metrics.jsonl")[-1]["step"] for path in (done.path / "trials").iterdir()]
    return Cost(sum(ends), report["best"]["accuracy"], report["count"])


def _config(folder: Path, scheduler: str, size: Size) -> dict[str, Any]:
    trial = {
        "job": "gram.discriminative",
        "scratch": {"vocab_size": 600, "width": 32, "layers": 1, "heads": 2, "max_length": 128},
        "data": {part: {"sources": [{"path": str(folder / f"{part}.jsonl")}]} for part in ("train", "eval")},
        "max_length": 64,
        "train": {
            "batch_size": size.batch,
            "micro_batch_size": size.batch,
            "max_steps": size.steps,
            "eval_every": size.eval_every,
            "checkpoint_every": size.steps,
            "log_every": 1,
        },
        "tracking": {"tensorboard": False},
    }
    run, ray = {"dir": str(folder / scheduler)}, {"use_gpu": False}
    return {"run": run, "ray": ray, "space": "optim", "trial": trial, "scheduler": scheduler}


if __name__ == "__main__":
    main()
