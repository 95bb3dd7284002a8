"""Entropic transport from features: time and memory against POT's log-domain Sinkhorn, and the size that it is meant for.

    python -m benchmarks.sinkhorn [--quick] [--threads N]

Features of width 512 from eight clusters (noise half as long as the centres), three of which the targets are from;
cosine cost, eps 0.05 of its mean, both with 1e-6 as the tolerance. Ours stops on the L1 error of the marginals, POT on the L2 error, which is looser. Both
sides start from features; POT gets float64, for which its kernel is meant.

- `over_pot`: time of `ot.sinkhorn(method="sinkhorn_log")` over ours, 20,000 x 5,000. A whole run of POT takes too long:
  it is stopped after 1 and after 4 iterations, which gives the time of one, and the number it would need is counted on
  our iterates, which are the same: the first whose L2 error is below the tolerance, at the next multiple of ten, where
  POT looks. Its looks themselves are not charged.
- `over_pot_whole`: the same at 6,000 x 2,000, where POT runs to its end.
- `memory`: peak of ours over that of POT, 20,000 x 5,000.
- `emd_gap`: |cost - cost of ot.emd| over the latter, 2,000 x 2,000, eps 0.002 of the mean cost.
- `gigabytes_200k`: peak over the inputs at 200,000 x 2,000.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from benchmarks.harness import (
    Ratio,
    Side,
    finish,
    in_fresh_process,
    interleave,
    median_ratio,
    resident_bytes,
    start,
)

_TOLERANCE = 1e-6
_EPS_RATIO = 0.05


@dataclass(frozen=True)
class Size:
    """Rows and targets of each part."""

    width: int = 512
    large: tuple[int, int] = (20_000, 5_000)
    whole: tuple[int, int] = (6_000, 2_000)
    exact: tuple[int, int] = (2_000, 2_000)
    long: tuple[int, int] = (200_000, 2_000)
    rounds: int = 2


QUICK = Size(width=32, large=(600, 200), whole=(300, 100), exact=(150, 100), long=(3000, 200), rounds=1)


def features(rows: int, targets: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A pool of eight clusters and targets from three of them, float32."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((8, width), dtype=np.float32)

    def draw(count: int, kinds: int) -> np.ndarray:
        points = rng.standard_normal((count, width), dtype=np.float32)
        points *= 0.5
        points += centres[rng.integers(0, kinds, count)]
        return points

    return draw(rows, 8), draw(targets, 3)


def build_ours(*, shape: tuple[int, int], width: int) -> Callable[[], dict[str, float]]:
    """Solve and score; tells seconds, iterations and those after which the L2 error is below the tolerance."""
    from eagleray.models.selection.costs import FeatureCost
    from eagleray.models.selection.sinkhorn import RowShard, in_double, local_call
    from eagleray.models.selection.transport import TransportSettings, choose_eps, marginals, transport_over

    pool, target = features(*shape, width)
    settings = TransportSettings(tolerance=_TOLERANCE, eps_ratio=_EPS_RATIO)

    def work() -> dict[str, float]:
        started = time.perf_counter()
        cost = FeatureCost(pool, target)
        a, b = marginals(shape)
        eps = choose_eps(cost, settings)
        inner = local_call([RowShard(cost, a, b, eps=eps, double=in_double(*shape))])
        errors: list[float] = []

        def call(method: str, *args: Any) -> list[Any]:
            answers = inner(method, *args)
            if method == "scale":
                errors.append(float(np.linalg.norm(args[0] * answers[0][0] - b)))
            return answers

        result = transport_over(call, a, b, largest_cost=cost.largest, eps=eps, settings=settings)
        seconds = time.perf_counter() - started
        needed = next((i for i, error in enumerate(errors, start=1) if error < _TOLERANCE), len(errors))
        return {
            "seconds": seconds,
            "iterations": result.iterations,
            "needed": needed,
            "cost": result.cost or 0.0,
        }

    return work


def build_pot(*, shape: tuple[int, int], width: int) -> Callable[[int], dict[str, float]]:
    """POT from features to scores, stopped after a number of iterations."""
    import ot

    pool, target = features(*shape, width)

    def work(most: int) -> dict[str, float]:
        started = time.perf_counter()
        x, y = (rows.astype(np.float64) for rows in (pool, target))
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        y /= np.linalg.norm(y, axis=1, keepdims=True)
        cost = x @ y.T
        np.subtract(1, cost, out=cost)
        a, b = (np.full(size, 1 / size) for size in shape)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it stopped early is meant
            plan: Any = ot.sinkhorn(
                a,
                b,
                cost,
                _EPS_RATIO * cost.mean(),
                method="sinkhorn_log",
                stopThr=_TOLERANCE,
                numItermax=most,
            )
        plan *= cost
        return {"seconds": time.perf_counter() - started, "cost": float(plan.sum())}

    return work


def emd_gap(*, shape: tuple[int, int], width: int) -> float:
    """Relative difference of the entropic cost at a small eps and the exact one."""
    from eagleray.models.selection.costs import FeatureCost
    from eagleray.models.selection.transport import TransportSettings, transport

    cost = FeatureCost(*features(*shape, width))
    exact = transport(cost, settings=TransportSettings(solver="emd")).cost or 0.0
    near = transport(cost, settings=TransportSettings(eps_ratio=0.002, tolerance=1e-5)).cost or 0.0
    return abs(near - exact) / exact


def peak_over_inputs(*, shape: tuple[int, int], width: int) -> dict[str, float]:
    """Seconds, and bytes at the peak less those when the features were there."""
    work = build_ours(shape=shape, width=width)
    before = resident_bytes()
    return work() | {"bytes": float(resident_bytes("VmHWM") - before)}


def main() -> None:
    """Measure and print."""
    options, machine = start(__doc__ or "", use_gpu=False)
    size = QUICK if options.quick else Size()
    shared: dict[str, Any] = {"threads": options.threads, "width": size.width}
    with (
        Side(build_ours, shape=size.large, **shared) as ours,
        Side(build_pot, shape=size.large, **shared) as pot,
    ):
        parts = {"ours": ours, "one": lambda: pot(1), "four": lambda: pot(4)}
        large = interleave(parts, rounds=size.rounds)
        memory = ours.peak_memory() / pot.peak_memory()
    with (
        Side(build_ours, shape=size.whole, **shared) as ours,
        Side(build_pot, shape=size.whole, **shared) as pot,
    ):
        whole = interleave({"ours": ours, "pot": lambda: pot(5000)}, rounds=size.rounds)
    gap = in_fresh_process(emd_gap, threads=options.threads, shape=size.exact, width=size.width)
    long = in_fresh_process(peak_over_inputs, threads=options.threads, shape=size.long, width=size.width)
    needed = int(large["ours"][0]["needed"])
    looks = -(-(needed - 1) // 10) * 10 + 1  # POT looks after iterations 1, 11, 21, ...
    seconds = {name: [found["seconds"] for found in rounds] for name, rounds in large.items()}
    pot_seconds = [
        one + (looks - 1) * max(0.0, four - one) / 3
        for one, four in zip(seconds["one"], seconds["four"], strict=True)
    ]
    whole_seconds = {name: [found["seconds"] for found in rounds] for name, rounds in whole.items()}
    shape = "x".join(map(str, size.large))
    ratios = [
        Ratio(
            "over_pot",
            f"{shape}: time of POT (extrapolated to {looks} iterations) over ours",
            median_ratio(pot_seconds, seconds["ours"]),
            15,
            "high",
            f"{median(pot_seconds):.3g}, {median(seconds['ours']):.3g} s",
        ),
        Ratio(
            "over_pot_whole",
            f"{'x'.join(map(str, size.whole))}: time of POT over ours",
            median_ratio(whole_seconds["pot"], whole_seconds["ours"]),
            15,
            "high",
            f"{median(whole_seconds['pot']):.3g}, {median(whole_seconds['ours']):.3g} s",
        ),
        Ratio("memory", f"{shape}: peak of ours over POT's", memory, 0.5, "low"),
        Ratio("emd_gap", "cost at a small eps against the exact one", gap, 0.01, "low"),
        Ratio(
            "gigabytes_200k",
            f"{'x'.join(map(str, size.long))}: peak over the inputs (GB)",
            long["bytes"] / 1e9,
            2.0,
            "low",
            f"in {long['seconds']:.3g} s",
        ),
    ]
    iterations = {"ours": int(large["ours"][0]["iterations"]), "pot": looks}
    costs = [found[0]["cost"] for found in whole.values()]
    finish(
        "sinkhorn",
        ratios,
        machine=machine,
        quick=options.quick,
        iterations=iterations,
        cost_difference=abs(costs[0] - costs[1]),
    )


if __name__ == "__main__":
    main()
