"""An experiment with nothing to do, and two stages side by side against one after the other.

    python -m benchmarks.experiment_rerun [--quick]

- `rerun_seconds`: `eagleray experiment run` of an experiment that is done, from the start of the process to its end; the
  median of five.
- `side_by_side`: seconds of two independent trainings of one core each, with one core for both over those with two. Each
  stage starts Python and a Ray of its own, which is part of what a user waits for and is measured with it.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.harness import Ratio, finish, start


def experiment(folder: Path, name: str, *, steps: int) -> Path:
    """Write an experiment of two trainings on generated pairs."""
    train = {
        "batch_size": 8,
        "micro_batch_size": 8,
        "max_steps": steps,
        "eval_every": steps,
        "log_every": steps,
    }
    stage: dict[str, Any] = {
        "job": "gram.discriminative",
        "scratch": {"vocab_size": 600, "width": 128, "layers": 4, "heads": 4, "max_length": 512},
        "data": {"synthetic": {"pairs": 400}},
        "max_length": 256,
        "tracking": {"tensorboard": False},
        "ray": {"use_gpu": False},
    }
    stages = {f"seed_{seed}": {"set": {**stage, "train": {**train, "seed": seed}}} for seed in (0, 1)}
    about = {"title": "Two trainings", "size": "0.9 million parameters.", "data": "generated pairs."}
    values = {
        "job": "experiment",
        "name": name,
        **about,
        "stages": stages,
        "run": {"dir": str(folder / name)},
    }
    values["results"] = [{"label": "accuracy", "stage": "seed_0", "metric": "accuracy"}]
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def seconds(path: Path, *settings: str) -> float:
    """Wall time of a run of an experiment."""
    command = [sys.executable, "-m", "eagleray.jobs.cli", "experiment", "run", str(path), *settings]
    begun = time.perf_counter()
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return time.perf_counter() - begun


def main() -> None:
    """Measure and print."""
    options, machine = start(__doc__ or "", use_gpu=False)
    steps = 4 if options.quick else 120
    with tempfile.TemporaryDirectory(prefix="eagleray-benchmark-") as name:
        folder = Path(name)
        experiment(folder, "warm", steps=1)
        seconds(folder / "warm.yaml")  # DeepSpeed compiles at its first use
        together = seconds(experiment(folder, "together", steps=steps), "cores=2")
        in_turn = seconds(experiment(folder, "in_turn", steps=steps), "cores=1")
        reruns = [seconds(folder / "together.yaml") for _ in range(2 if options.quick else 5)]
    rerun = statistics.median(reruns)
    finish(
        "experiment_rerun",
        [
            Ratio("rerun_seconds", "a run with nothing to do", rerun, 10, "low", f"{rerun:.1f} s"),
            Ratio(
                "side_by_side",
                "two trainings, in turn over side by side",
                in_turn / together,
                1.6,
                "high",
                f"{in_turn:.1f}, {together:.1f} s",
            ),
        ],
        machine=machine,
        quick=options.quick,
        steps=steps,
        reruns=reruns,
    )


if __name__ == "__main__":
    main()
