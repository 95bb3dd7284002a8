"""Entropic optimal transport between a large pool and a target set (RoVRM sections 4.1 and 4.5).

    min_P <P, C> + eps · sum_ij P_ij (log P_ij - 1)    with    P 1 = a,  P^T 1 = b

The plan is P_ij = a_i b_j exp((phi_i + psi_j - C_ij) / eps); the spec's f and g are phi + eps·log a and
psi + eps·log b. phi always follows from psi row by row, so that psi [M] is the whole state of the solver, the row
marginals are exact, and only the column marginals have to converge. Two operations advance psi:

- a *sweep*, in the log domain with float64 sums over blocks of the cost: safe for every eps, and the only thing that
  decides whether the solver is done;
- *passes* over the kernel exp((phi + psi - C) / eps), computed once and then only multiplied with vectors. One pass
  reads each block once: its row scalings come first, and the block is still in cache for the column sums. When
  scalings leave a safe range they are absorbed into psi and the kernel is computed anew.

Rows are split into shards that hold their own kernel. A shard answers `sweep` and `scale` with sums over its rows, [M]
numbers, and `solve` adds them up: the result is that of one shard, not an approximation. `solve` sees shards only
through a callable, so they may live in this process or in others.

Shape letters: N rows of the pool, M targets, B rows of a block.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from eagleray.models.selection.costs import Cost
from eagleray.models.selection.rows import SelectionError, spans

_BLOCK_VALUES = 2**20
"""Entries of a block: 4 MB in float32, so that a block stays in the second-level cache."""
_DOUBLE_UP_TO = 4_000_000
"""Entries of a whole problem that is small enough for a kernel in float64."""
_FLOAT32_GOAL = 5e-7
"""Marginal error below which products of a float32 kernel say no more."""
_FLOOR = {torch.float32: 80.0, torch.float64: 600.0}
"""Kernel entries stop at exp(-this): what is smaller adds nothing, and subnormal numbers are slow."""
_SCALING_RANGE = (1e-8, 1e8)

Call = Callable[..., "list[Any]"]
"""Calls a method of every shard, by name and with the same arguments; answers in the order of the shards."""

Progress = Callable[[np.ndarray], None]


class ConvergenceError(SelectionError):
    """The marginals did not come within the tolerance; the message holds the error that was reached."""


@dataclass(frozen=True)
class RowResult:
    """What a shard knows of its rows after the last sweep."""

    phi_N: np.ndarray
    plan_cost_N: np.ndarray
    """sum_j P_ij C_ij / a_i: the mean cost of the targets that the row is sent to."""
    nearest_N: np.ndarray
    """Number of the target with the smallest cost."""


@dataclass(frozen=True)
class Solution:
    """Where `solve` ended."""

    psi_M: np.ndarray
    iterations: int
    """Updates of psi, by sweeps and passes."""
    column_error: float
    """sum_j |sum_i P_ij - b_j|."""
    converged: bool


class RowShard:
    """Some rows of the problem, with their part of the kernel.

    Args:
        cost: Cost of these rows.
        a_N: Mass of these rows.
        b_M: Mass of the targets.
        eps: Regularisation.
        double: Kernel in float64 instead of float32.
        kernel_bytes: Blocks of the kernel beyond this are computed again in every pass instead of being held.
    """

    def __init__(
        self,
        cost: Cost,
        a_N: np.ndarray,
        b_M: np.ndarray,
        *,
        eps: float,
        double: bool,
        kernel_bytes: int = 1_700_000_000,
    ) -> None:
        self._cost, self._eps = cost, eps
        self._dtype = torch.float64 if double else torch.float32
        self._a = torch.as_tensor(a_N, dtype=torch.float64, device=cost.device)
        self._log_b = torch.as_tensor(b_M, dtype=torch.float64, device=cost.device).log()
        count, targets = cost.shape
        self._spans = list(spans(count, block_rows(targets)))
        self._phi = torch.zeros(count, dtype=torch.float64, device=cost.device)
        self._plan_cost = torch.zeros_like(self._phi)
        self._nearest = torch.zeros(count, dtype=torch.long, device=cost.device)
        self._psi = torch.zeros(targets, dtype=self._dtype, device=cost.device)
        self._kernel: list[torch.Tensor] = []
        held = kernel_bytes // (block_rows(targets) * targets * self._dtype.itemsize)
        self._held = min(len(self._spans), held)

    def sweep(self, psi_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Set phi from psi, in float64.

        Returns:
            Column sums of the plan [M], and max_i (phi_i - C_ij) / eps [M], from which psi of a column follows whose
            sum is too small for a float.
        """
        self._kernel.clear()
        psi = torch.as_tensor(psi_M, dtype=torch.float64, device=self._cost.device)
        columns, reach = torch.zeros_like(psi), torch.full_like(psi, -math.inf)
        shift = psi / self._eps + self._log_b
        for start, stop in self._spans:
            cost_BM = self._cost.block(start, stop, self._dtype)
            self._nearest[start:stop] = cost_BM.argmin(dim=1)
            cost_BM = cost_BM.double()
            logits_BM = torch.add(shift, cost_BM, alpha=-1 / self._eps)
            highest = logits_BM.amax(dim=1, keepdim=True)
            shares_BM = logits_BM.sub_(highest).exp_()
            total = shares_BM.sum(dim=1)
            columns += shares_BM.T @ (self._a[start:stop] / total)
            self._phi[start:stop] = -self._eps * (highest[:, 0] + total.log())
            self._plan_cost[start:stop] = shares_BM.mul_(cost_BM).sum(dim=1) / total
            if self._cost.largest > 500 * self._eps:
                reached = (self._phi[start:stop, None] - cost_BM).amax(dim=0) / self._eps
                torch.maximum(reach, reached, out=reach)
        return columns.cpu().numpy(), reach.cpu().numpy()

    def build(self, psi_M: np.ndarray) -> None:
        """Compute the kernel from the phi of the last sweep (0 at first) and this psi."""
        self._psi = torch.as_tensor(psi_M, dtype=self._dtype, device=self._cost.device)
        self._kernel = [self._kernel_block(*span) for span in self._spans[: self._held]]

    def scale(self, weights_M: np.ndarray) -> tuple[np.ndarray, float]:
        """One pass: scale the rows to their mass under column weights b_j v_j.

        Returns:
            sum_i a_i u_i K_ij with the new row scalings u [M], and the smallest row sum before scaling.
        """
        weights = torch.as_tensor(weights_M, dtype=self._dtype, device=self._cost.device)
        mass = self._a.to(self._dtype)
        columns = torch.zeros(len(weights), dtype=torch.float64, device=weights.device)
        lowest = torch.tensor(math.inf, dtype=self._dtype, device=weights.device)
        for number, (start, stop) in enumerate(self._spans):
            held = number < self._held
            kernel_BM = self._kernel[number] if held else self._kernel_block(start, stop)
            sums_B = kernel_BM @ weights
            lowest = torch.minimum(lowest, sums_B.min())
            columns += kernel_BM.T @ (mass[start:stop] / sums_B)
        return columns.cpu().numpy(), float(lowest)

    def rows(self) -> RowResult:
        """What the last sweep found."""
        parts = (self._phi, self._plan_cost, self._nearest)
        return RowResult(*(part.cpu().numpy() for part in parts))

    def _kernel_block(self, start: int, stop: int) -> torch.Tensor:
        exponent = self._cost.block(start, stop, self._dtype).neg_().add_(self._psi)
        exponent.add_(self._phi[start:stop, None].to(self._dtype)).div_(self._eps)
        return exponent.clamp_(min=-_FLOOR[self._dtype]).exp_()


def solve(
    call: Call,
    b_M: np.ndarray,
    *,
    eps: float,
    largest_cost: float,
    double: bool,
    tolerance: float = 1e-6,
    max_iterations: int = 5000,
    psi_M: np.ndarray | None = None,
    progress: Progress | None = None,
) -> Solution:
    """Iterate until both marginals are right; the shards then hold the results of their rows.

    Args:
        call: Reaches all `RowShard`s of the problem.
        b_M: Mass of the targets.
        eps: Regularisation, that of the shards.
        largest_cost: No cost is larger.
        double: Whether the kernels are float64, as in the shards.
        tolerance: L1 error of the column marginal at which to stop; the row marginal is exact.
        max_iterations: Updates of psi at most.
        psi_M: Where to start, e.g. what `progress` was given last before an interruption.
        progress: Told psi after every update.
    """
    psi = np.zeros(len(b_M)) if psi_M is None else np.asarray(psi_M, dtype=np.float64)
    goal = tolerance if double else max(tolerance, _FLOAT32_GOAL)
    # A kernel of phi = psi = 0 must not underflow; after a sweep each of its rows adds up to one.
    passes = psi_M is None and largest_cost / eps < 0.75 * _FLOOR[torch.float64 if double else torch.float32]
    finished = False
    iterations = 0
    while True:
        if passes and not finished:
            left = max_iterations - iterations - 1
            psi, used, finished = _run_passes(call, psi, b_M, eps, double, goal, left, progress)
            iterations += used
        answers = call("sweep", psi)
        columns = np.sum([answer[0] for answer in answers], axis=0)
        iterations += 1
        error = float(np.abs(columns - b_M).sum())
        if error <= tolerance or iterations >= max_iterations:
            return Solution(psi, iterations, error, error <= tolerance)
        reach = np.max([answer[1] for answer in answers], axis=0)
        with np.errstate(divide="ignore"):
            step = eps * (np.log(b_M) - np.log(columns))
        psi = np.where(columns > 1e-280, psi + step, -eps * reach)
        passes = True
        if progress is not None:
            progress(psi)


def block_rows(targets: int) -> int:
    """Rows of a block of the cost."""
    return max(1, _BLOCK_VALUES // targets)


def in_double(rows: int, targets: int) -> bool:
    """Whether a problem is small enough for kernels in float64."""
    return rows * targets <= _DOUBLE_UP_TO


def shard_spans(rows: int, targets: int, shards: int) -> list[tuple[int, int]]:
    """Start and stop of each shard, in whole blocks where there are enough: the same blocks for every number of shards.

    >>> shard_spans(10, 3, 2)
    [(0, 5), (5, 10)]
    """
    size = block_rows(targets)
    unit = size if rows >= shards * size else 1
    edges = [min(rows, math.ceil(rows / unit * i / shards) * unit) for i in range(shards + 1)]
    return [(start, stop) for start, stop in itertools.pairwise(edges) if stop > start]


def local_call(shards: Sequence[RowShard]) -> Call:
    """Calls shards that live in this process, one after the other."""
    return lambda method, *args: [getattr(shard, method)(*args) for shard in shards]


def join_rows(parts: Sequence[RowResult]) -> RowResult:
    """Results of consecutive shards as one."""
    joined = [np.concatenate([getattr(part, name) for part in parts]) for name in RowResult.__annotations__]
    return RowResult(*joined)


def _run_passes(
    call: Call,
    psi: np.ndarray,
    b: np.ndarray,
    eps: float,
    double: bool,
    goal: float,
    most: int,
    progress: Progress | None,
) -> tuple[np.ndarray, int, bool]:
    """Passes over a new kernel until the goal is reached or scalings leave the safe range: psi, passes, reached."""
    if not double:
        # What the kernel is computed with must be a float32, or its rounding would look like an error of the marginals.
        psi = psi.astype(np.float32).astype(np.float64)
    call("build", psi)
    v = np.ones_like(psi)
    low, high = _SCALING_RANGE
    used, reached = 0, False
    while used < most and not reached:
        answers = call("scale", b * v)
        columns = np.sum([answer[0] for answer in answers], axis=0)
        lowest = min(answer[1] for answer in answers)
        if not (lowest > low**2 and np.isfinite(columns).all() and columns.min() > 0):
            break
        used += 1
        reached = float((b * np.abs(v * columns - 1)).sum()) <= goal
        if not reached:
            v = 1 / columns
            if v.min() < low or v.max() > high:
                break
            if progress is not None:
                progress(psi + eps * np.log(v))
    return psi + eps * np.log(v), used, reached
