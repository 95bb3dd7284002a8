"""Scores of a pool by each method, in this process or split over Ray workers with the same result."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from pydantic import Field

from eagleray.jobs.selection.data import LoadedSet
from eagleray.models.selection.chain import FeatureSet
from eagleray.models.selection.choice import medoids
from eagleray.models.selection.cosine import Aggregate, cosine_scores
from eagleray.models.selection.costs import CostKind, FeatureCost
from eagleray.models.selection.features import random_scores
from eagleray.models.selection.rows import Rows, mean_row
from eagleray.models.selection.sinkhorn import Call, RowShard, in_double, local_call, shard_spans
from eagleray.models.selection.transport import (
    Mode,
    Solver,
    TransportResult,
    TransportSettings,
    choose_eps,
    marginals,
    transport,
    transport_over,
)
from eagleray.platform.cluster import check_placement, wants_gpu
from eagleray.platform.config import Config as Section
from eagleray.platform.sections import RaySection

logger = logging.getLogger(__name__)

_SAVE_EVERY_S = 30


class CosineSection(Section):
    """Cosine similarity to the target set."""

    aggregate: Aggregate = "mean"
    """Over the targets: `mean`, `max`, `topk_mean`, or `centroid`, which ranks like `mean`."""
    top: int = Field(default=10, ge=1)
    """Targets that count for `topk_mean`."""
    centre: bool = False
    """Subtract the mean of the pool from all vectors first."""


class TransportSection(Section):
    """Optimal transport to the target set."""

    mode: Mode = "plan_cost"
    """Score: `plan_cost` (covers all targets), `pointwise` (each row alone) or `dual`."""
    solver: Solver = "sinkhorn"
    """`sinkhorn`, or `emd`: exact, for small problems."""
    cost: CostKind = "cosine"
    """1 - cosine, or the squared Euclidean distance."""
    eps: float | None = Field(default=None, gt=0)
    """Regularisation; default: `eps_ratio` of the mean cost."""
    eps_ratio: float = Field(default=0.05, gt=0)
    """Regularisation as a share of the mean cost."""
    tolerance: float = Field(default=1e-6, gt=0)
    """L1 error of the marginals at which iteration stops."""
    max_iterations: int = Field(default=5000, ge=1)
    """Iterations at most."""
    allow_unconverged: bool = False
    """Go on with what there is after `max_iterations`; else that is an error."""
    max_targets: int | None = Field(default=None, ge=1)
    """More targets than this are replaced by medoids of k-means, each with the mass of its cluster."""
    kernel_gb: float = Field(default=1.7, ge=0)
    """Memory of each worker for the kernel; what does not fit is computed again in every pass."""


@dataclass(frozen=True)
class Scored:
    """Scores of a pool."""

    score_N: np.ndarray
    highest_is_best: bool
    nearest_N: np.ndarray | None = None
    """Number of the most similar target of each row, where the method knows it."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the report says of them."""


@dataclass(frozen=True)
class Context:
    """What a method may use besides the features."""

    ray: RaySection
    cosine: CosineSection
    transport: TransportSection
    seed: int
    checkpoint: Path
    """Where an interrupted solver leaves its state."""

    @property
    def spread(self) -> bool:
        """Whether the work is split over Ray workers."""
        return self.ray.min_workers > 1

    @property
    def device(self) -> str:
        """Where one worker computes."""
        gpu = wants_gpu(self.ray) if self.spread else bool(self.ray.use_gpu) and torch.cuda.is_available()
        return "cuda" if gpu else "cpu"


def score_random(pool: FeatureSet, target: FeatureSet, loaded: LoadedSet, context: Context) -> Scored:
    """A number for each id; the lowest are taken."""
    return Scored(random_scores(pool.ids, seed=context.seed), highest_is_best=False)


def score_longest(pool: FeatureSet, target: FeatureSet, loaded: LoadedSet, context: Context) -> Scored:
    """Characters of the chosen answer."""
    assert loaded.pairs is not None
    return Scored(np.array([float(len(pair.chosen)) for pair in loaded.pairs]), highest_is_best=True)


def score_cosine(pool: FeatureSet, target: FeatureSet, loaded: LoadedSet, context: Context) -> Scored:
    """Similarity to the target set; each worker takes a part of the pool."""
    section = context.cosine
    options = {"aggregate": section.aggregate, "top": section.top, "device": context.device}
    options["centre_D"] = mean_row(pool.rows) if section.centre else None
    facts = {"aggregate": section.aggregate, "centred": section.centre}
    if not context.spread:
        return Scored(cosine_scores(pool.rows, target.rows, **options), True, facts=facts)
    import ray

    check_placement(context.ray)
    task: Any = ray.remote(_cosine_part).options(**_resources(context.ray))
    goal = ray.put(target.rows)
    edges = np.linspace(0, len(pool.ids), context.ray.min_workers + 1).astype(int)
    parts = [pool_part(pool.rows, *span) for span in itertools.pairwise(edges) if span[0] < span[1]]
    scores = ray.get([task.remote(part, goal, options, _threads(context.ray)) for part in parts])
    return Scored(np.concatenate(scores), True, facts=facts)


def score_transport(pool: FeatureSet, target: FeatureSet, loaded: LoadedSet, context: Context) -> Scored:
    """Optimal transport; each worker holds the kernel of its rows."""
    section = context.transport
    numbers, b = _capped(target, section.max_targets, context.seed)
    goal = target.take(numbers)
    settings = TransportSettings(
        **section.model_dump(exclude={"cost", "max_targets", "kernel_gb"}),
        kernel_bytes=int(section.kernel_gb * 1e9),
    )
    cost = FeatureCost(pool.rows, goal.rows, section.cost, device=context.device)
    if section.solver == "emd" or section.mode == "pointwise":
        result = transport(cost, b_M=b, settings=settings)
    else:
        result = _sinkhorn(cost, pool.rows, goal.rows, b, settings, context)
    facts = {
        "mode": result.mode,
        "solver": result.solver,
        "cost_function": section.cost,
        "eps": result.eps,
        "iterations": result.iterations,
        "marginal_error": {"pool": result.row_error, "target": result.column_error},
        "converged": result.converged,
        "transport_cost": result.cost,
        "targets_used": len(numbers),
    }
    return Scored(result.score_N, False, numbers[result.nearest_N], facts)


Method = Literal["cosine", "transport", "random", "longest"]

METHODS: dict[Method, Callable[[FeatureSet, FeatureSet, LoadedSet, Context], Scored]] = {
    "cosine": score_cosine,
    "transport": score_transport,
    "random": score_random,
    "longest": score_longest,
}


def pool_part(rows: Rows, start: int, stop: int) -> Rows:
    """Rows of a worker, without the rest of the array they are in."""
    part = rows[start:stop]
    return part.clone() if isinstance(part, torch.Tensor) else part.copy()


class ShardWorker:
    """A `RowShard` in a process of its own."""

    def __init__(
        self, pool: Rows, target: Rows, kind: CostKind, a: np.ndarray, b: np.ndarray, options: dict[str, Any]
    ) -> None:
        torch.set_num_threads(options.pop("threads"))
        cost = FeatureCost(pool, target, kind, device=options.pop("device"))
        self._shard = RowShard(cost, a, b, **options)

    def run(self, method: str, *args: Any) -> Any:
        """Call a method of the shard."""
        return getattr(self._shard, method)(*args)


def _sinkhorn(
    cost: FeatureCost, pool: Rows, target: Rows, b: np.ndarray, settings: TransportSettings, context: Context
) -> TransportResult:
    a, b = marginals(cost.shape, None, b)
    eps = choose_eps(cost, settings)
    options = {"eps": eps, "double": in_double(*cost.shape), "kernel_bytes": settings.kernel_bytes}
    start = np.load(context.checkpoint) if context.checkpoint.exists() else None
    solve: dict[str, Any] = {"largest_cost": cost.largest, "eps": eps, "settings": settings, "psi_M": start}
    solve["progress"] = _saver(context.checkpoint)
    if not context.spread:
        return transport_over(local_call([RowShard(cost, a, b, **options)]), a, b, **solve)
    options |= {"threads": _threads(context.ray), "device": context.device}
    with _shard_workers(cost, pool, target, a, b, options, context.ray) as call:
        return transport_over(call, a, b, **solve)


@contextmanager
def _shard_workers(
    cost: FeatureCost,
    pool: Rows,
    target: Rows,
    a: np.ndarray,
    b: np.ndarray,
    options: dict[str, Any],
    section: RaySection,
) -> Iterator[Call]:
    import ray

    check_placement(section)
    # Ray's type of an actor does not know the `remote` of its methods.
    actor = cast(Any, ray.remote(ShardWorker).options(**_resources(section)))
    goal = ray.put(target)
    workers = [
        actor.remote(pool_part(pool, start, stop), goal, cost.kind, a[start:stop], b, options)
        for start, stop in shard_spans(*cost.shape, section.min_workers)
    ]
    try:
        yield lambda method, *args: ray.get([worker.run.remote(method, *args) for worker in workers])
    finally:
        for worker in workers:
            ray.kill(worker)


def _cosine_part(pool: Rows, target: Rows, options: dict[str, Any], threads: int) -> np.ndarray:
    torch.set_num_threads(threads)
    return cosine_scores(pool, target, **options)


def _capped(target: FeatureSet, most: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the targets to use, and their mass."""
    count = len(target.ids)
    if most is None or count <= most:
        return np.arange(count), np.full(count, 1 / count)
    logger.info("%d targets are represented by at most %d medoids.", count, most)
    return medoids(target.rows, most, seed=seed)


def _saver(path: Path) -> Callable[[np.ndarray], None]:
    """Writes the solver's state at most every half minute."""
    written = time.monotonic()

    def save(psi_M: np.ndarray) -> None:
        nonlocal written
        if time.monotonic() - written > _SAVE_EVERY_S:
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            with temporary.open("wb") as file:
                np.save(file, psi_M, allow_pickle=False)
            temporary.replace(path)
            written = time.monotonic()

    return save


def _resources(section: RaySection) -> dict[str, Any]:
    return {"num_cpus": section.cpus_per_worker, "num_gpus": 1 if wants_gpu(section) else 0}


def _threads(section: RaySection) -> int:
    return max(1, int(section.cpus_per_worker))
