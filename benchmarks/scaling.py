"""`gram.finetune` with two workers against one, on the same global batch.

    python -m benchmarks.scaling [--quick] [--threads N]

The job as users run it: Ray Train, DeepSpeed (ZeRO 0, gloo), fp32 on the CPU, a line of metrics for every step. The
batch of 16 prompts of 256 tokens is split over the workers, and each worker has the same number of threads (default:
half of the cores), so two workers have twice the cores of one. The runs take turns, twice, the second time in the
opposite order; the first steps of a run are left out. The first losses must agree: both sides do the same step.

- `speedup_2_over_1`: steps a second, two workers over one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.gram_vs_trl import Size, Timing, ours, prepare
from benchmarks.harness import Ratio, finish, in_fresh_process, interleave, median_ratio, start

SIZE = Size(batch=16, steps=20, left_out=3)
QUICK = Size(width=64, layers=2, vocab_size=2000, tokens=192, batch=4, left_out=2, steps=4, rounds=1)


def main() -> None:
    """Measure and print."""
    options, machine = start(__doc__ or "", use_gpu=False, workers=2)
    size, threads = QUICK if options.quick else SIZE, options.threads
    with tempfile.TemporaryDirectory(prefix="eagleray-benchmark-") as name:
        folder = Path(name)
        in_fresh_process(prepare, threads=threads, folder=folder, size=size)
        runs: list[str] = []

        def train(workers: int) -> Timing:
            runs.append(f"run-{len(runs)}")
            return in_fresh_process(
                ours, threads=threads, folder=folder, run=runs[-1], size=size, workers=workers
            )

        sides: dict[str, Callable[[], Timing]] = {"two": partial(train, 2), "one": partial(train, 1)}
        results = interleave(sides, rounds=size.rounds)
    losses = [timing.first_loss for timings in results.values() for timing in timings]
    if max(losses) - min(losses) > 1e-4:
        raise AssertionError(f"one and two workers begin with different losses: {losses}")
    rates = {side: [1 / median(timing.seconds) for timing in timings] for side, timings in results.items()}
    finish(
        "scaling",
        [
            Ratio(
                "speedup_2_over_1",
                "steps/s, two workers over one",
                median_ratio(rates["two"], rates["one"]),
                1.6,
                "high",
                f"{median(rates['two']):.3g}, {median(rates['one']):.3g} steps/s",
            )
        ],
        machine=machine,
        quick=options.quick,
        size=asdict(size),
        precision="fp32",
        steps_per_s=rates,
    )


if __name__ == "__main__":
    main()
