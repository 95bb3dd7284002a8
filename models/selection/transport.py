"""Optimal transport from a pool to a target set, and the score of each row of the pool (RoVRM section 4.2).

| mode | score of row i, lower is better |
| --- | --- |
| `plan_cost` | sum_j P_ij C_ij / a_i: mean distance to the targets that the row is sent to; covers all targets |
| `pointwise` | sum_j b_j C_ij: what transport costs if row i were the whole pool; no plan, no coverage |
| `dual` | f_i less the mean of the others' f: how transport cost changes when mass is added at i |

Which of them the paper uses is not known; a result records its mode.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import ot
import torch

from eagleray.models.selection.costs import Cost
from eagleray.models.selection.rows import SelectionError, spans
from eagleray.models.selection.sinkhorn import (
    Call,
    ConvergenceError,
    Progress,
    RowShard,
    block_rows,
    in_double,
    join_rows,
    local_call,
    shard_spans,
    solve,
)

Mode = Literal["plan_cost", "pointwise", "dual"]
Solver = Literal["sinkhorn", "emd"]

EXACT_UP_TO = 4_000_000
"""Entries of the cost matrix that the exact solver takes."""
_MASS_ERROR = 1e-9


@dataclass(frozen=True)
class TransportSettings:
    """How transport is solved and read."""

    mode: Mode = "plan_cost"
    solver: Solver = "sinkhorn"
    """`sinkhorn`: entropic; `emd`: exact, for up to `EXACT_UP_TO` entries."""
    eps: float | None = None
    """Regularisation; default: `eps_ratio` of the mean cost."""
    eps_ratio: float = 0.05
    tolerance: float = 1e-6
    """L1 error of each marginal at which the iteration stops."""
    max_iterations: int = 5000
    allow_unconverged: bool = False
    kernel_bytes: int = 1_700_000_000
    """Memory for the kernel, over all shards; what does not fit is computed again in every pass."""


@dataclass(frozen=True)
class TransportResult:
    """Scores and what they come from."""

    score_N: np.ndarray
    """Lower is better."""
    nearest_N: np.ndarray
    """Number of the target with the smallest cost."""
    mode: Mode
    solver: Solver | None
    """None for `pointwise`, which needs none."""
    cost: float | None
    """<P, C>, without the entropy."""
    f_N: np.ndarray | None
    g_M: np.ndarray | None
    """Dual potentials, up to a constant that may move from one to the other."""
    plan_NM: np.ndarray | None
    """Plan of the exact solver; `gibbs_plan` gives that of Sinkhorn."""
    eps: float | None
    iterations: int
    row_error: float
    column_error: float
    converged: bool


def transport(
    cost: Cost,
    *,
    a_N: np.ndarray | None = None,
    b_M: np.ndarray | None = None,
    settings: TransportSettings | None = None,
    shards: int = 1,
) -> TransportResult:
    """Transport the pool to the target and score its rows.

    Args:
        cost: Costs C_NM.
        a_N: Mass of the rows; default 1/N each.
        b_M: Mass of the targets; default 1/M each.
        settings: Mode, solver and when to stop.
        shards: Into how many parts Sinkhorn splits the rows, one after the other; the result is the same.

    Raises:
        SelectionError: The marginals are not positive or differ in sum, or the problem is too large for `emd`.
        ConvergenceError: The marginals did not come within the tolerance and `allow_unconverged` is off.
    """
    settings = settings or TransportSettings()
    a, b = marginals(cost.shape, a_N, b_M)
    if settings.mode == "pointwise":
        return _pointwise(cost, b)
    if settings.solver == "emd":
        return _exact(cost, a, b, settings)
    eps = choose_eps(cost, settings)
    double = in_double(*cost.shape)
    parts = shard_spans(*cost.shape, shards)
    options = {"eps": eps, "double": double, "kernel_bytes": settings.kernel_bytes // len(parts)}
    held = [RowShard(cost.part(start, stop), a[start:stop], b, **options) for start, stop in parts]
    return transport_over(local_call(held), a, b, largest_cost=cost.largest, eps=eps, settings=settings)


def transport_over(
    call: Call,
    a_N: np.ndarray,
    b_M: np.ndarray,
    *,
    largest_cost: float,
    eps: float,
    settings: TransportSettings,
    psi_M: np.ndarray | None = None,
    progress: Progress | None = None,
) -> TransportResult:
    """Entropic transport over shards that exist already, wherever they are; see `sinkhorn.solve`.

    Raises:
        ConvergenceError: As `transport`.
    """
    solution = solve(
        call,
        b_M,
        eps=eps,
        largest_cost=largest_cost,
        double=in_double(len(a_N), len(b_M)),
        tolerance=settings.tolerance,
        max_iterations=settings.max_iterations,
        psi_M=psi_M,
        progress=progress,
    )
    if not solution.converged and not settings.allow_unconverged:
        raise ConvergenceError(
            f"Sinkhorn did not converge: after {solution.iterations} iterations the marginal error is "
            f"{solution.column_error:.2e} and not {settings.tolerance:g}. Raise `eps` (now {eps:.4g}) or "
            "`max_iterations`, or set `allow_unconverged`."
        )
    rows = join_rows(call("rows"))
    f = rows.phi_N + eps * np.log(a_N)
    return TransportResult(
        score_N=calibrated_dual(f) if settings.mode == "dual" else rows.plan_cost_N,
        nearest_N=rows.nearest_N,
        mode=settings.mode,
        solver="sinkhorn",
        cost=float(a_N @ rows.plan_cost_N),
        f_N=f,
        g_M=solution.psi_M + eps * np.log(b_M),
        plan_NM=None,
        eps=eps,
        iterations=solution.iterations,
        row_error=0.0,
        column_error=solution.column_error,
        converged=solution.converged,
    )


def marginals(
    shape: tuple[int, int], a_N: np.ndarray | None = None, b_M: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Both marginals in float64, uniform where none is given.

    Raises:
        SelectionError: A marginal has another length, an entry that is not positive, or another sum than the other.
    """
    given = []
    for name, mass, size in (("pool", a_N, shape[0]), ("target", b_M, shape[1])):
        mass = np.full(size, 1 / size) if mass is None else np.asarray(mass, dtype=np.float64)
        if mass.shape != (size,) or not np.isfinite(mass).all() or mass.min() <= 0:
            raise SelectionError(f"The mass of the {name} must be {size} positive numbers, one for each row.")
        given.append(mass)
    sums = [float(mass.sum()) for mass in given]
    if abs(sums[0] - sums[1]) > _MASS_ERROR * max(sums):
        raise SelectionError(
            f"The mass of the pool adds up to {sums[0]:g} and that of the target to {sums[1]:g}; both must be equal."
        )
    return given[0], given[1]


def choose_eps(cost: Cost, settings: TransportSettings) -> float:
    """`eps`, or `eps_ratio` of the mean cost; 1 where all costs are 0 and any plan is optimal.

    Raises:
        SelectionError: It is not positive.
    """
    eps = settings.eps if settings.eps is not None else settings.eps_ratio * cost.mean() or 1.0
    if not eps > 0:
        raise SelectionError(f"`eps` is {eps}; it must be positive. For exact transport take `solver: emd`.")
    return eps


def calibrated_dual(f_N: np.ndarray) -> np.ndarray:
    """f_i less the mean of all others: free of the constant that may move between the potentials."""
    if len(f_N) == 1:
        return np.zeros(1)
    return f_N - (f_N.sum() - f_N) / (len(f_N) - 1)


def gibbs_plan(cost_NM: np.ndarray, f_N: np.ndarray, g_M: np.ndarray, eps: float) -> np.ndarray:
    """The entropic plan exp((f_i + g_j - C_ij) / eps) [N, M]."""
    return np.exp((f_N[:, None] + g_M - cost_NM) / eps)


def _pointwise(cost: Cost, b: np.ndarray) -> TransportResult:
    scores, nearest = np.empty(cost.shape[0]), np.empty(cost.shape[0], dtype=int)
    weights = torch.as_tensor(b / b.sum(), device=cost.device)
    for start, stop in spans(cost.shape[0], block_rows(cost.shape[1])):
        block_BM = cost.block(start, stop, torch.float64)
        scores[start:stop] = (block_BM @ weights).cpu().numpy()
        nearest[start:stop] = block_BM.argmin(dim=1).cpu().numpy()
    return TransportResult(
        scores, nearest, "pointwise", None, None, None, None, None, None, 0, 0.0, 0.0, True
    )


def _exact(cost: Cost, a: np.ndarray, b: np.ndarray, settings: TransportSettings) -> TransportResult:
    rows, targets = cost.shape
    if rows * targets > EXACT_UP_TO:
        raise SelectionError(
            f"Exact transport takes up to {EXACT_UP_TO} pairs of rows and targets; here are {rows} x {targets}. "
            "Take `solver: sinkhorn`, fewer targets, or a smaller pool."
        )
    matrix = cost.block(0, rows, torch.float64).cpu().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its warning is read from the log below
        found: Any = ot.emd(a, b, matrix, numItermax=10_000_000, log=True)
    plan, log = found
    if log["warning"] is not None:
        raise ConvergenceError(f"The exact solver ended early: {log['warning']}")
    # The best f for these g: equal rows get equal potentials, whichever of them the plan uses.
    f = (matrix - log["v"]).min(axis=1)
    plan_cost = (plan * matrix).sum(axis=1) / a
    return TransportResult(
        score_N=calibrated_dual(f) if settings.mode == "dual" else plan_cost,
        nearest_N=matrix.argmin(axis=1),
        mode=settings.mode,
        solver="emd",
        cost=float((plan * matrix).sum()),
        f_N=f,
        g_M=log["v"],
        plan_NM=plan,
        eps=None,
        iterations=0,
        row_error=float(np.abs(plan.sum(axis=1) - a).sum()),
        column_error=float(np.abs(plan.sum(axis=0) - b).sum()),
        converged=True,
    )
