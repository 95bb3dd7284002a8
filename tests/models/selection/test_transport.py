"""Transport against hand-worked plans, POT and its own invariances (checks 1 to 14 of the RoVRM specification)."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import ot
import pytest
import torch

from eagleray.models.selection.chain import FeatureSet, select_chain
from eagleray.models.selection.choice import best_first, how_many
from eagleray.models.selection.costs import FeatureCost, MatrixCost
from eagleray.models.selection.rows import SelectionError
from eagleray.models.selection.sinkhorn import ConvergenceError
from eagleray.models.selection.transport import (
    TransportResult,
    TransportSettings,
    calibrated_dual,
    gibbs_plan,
    transport,
)

A = np.array([[0.10, 0.80, 0.90], [0.70, 0.20, 0.60], [0.90, 0.50, 0.30], [0.95, 0.90, 0.85]])


def emd(cost: Any, mode: Any = "plan_cost", **masses: Any) -> TransportResult:
    settings = TransportSettings(solver="emd", mode=mode)
    return transport(MatrixCost(np.asarray(cost, dtype=float)), settings=settings, **masses)


def entropic(cost: Any, eps: float, *, shards: int = 1, mode: Any = "plan_cost") -> TransportResult:
    settings = TransportSettings(eps=eps, mode=mode, tolerance=1e-12)
    return transport(MatrixCost(np.asarray(cost, dtype=float)), settings=settings, shards=shards)


def plan_of(result: TransportResult) -> np.ndarray:
    assert result.plan_NM is not None
    return result.plan_NM


def smallest(scores: np.ndarray, count: int) -> set[int]:
    return set(best_first(scores, [str(i) for i in range(len(scores))], highest=False)[:count].tolist())


def test_check_1_the_exact_plan() -> None:
    result = emd(A)
    np.testing.assert_allclose(12 * plan_of(result), [[3, 0, 0], [0, 3, 0], [0, 0, 3], [1, 1, 1]], atol=1e-9)
    assert result.cost == pytest.approx(0.375)
    np.testing.assert_allclose(plan_of(result).sum(1), 1 / 4)
    np.testing.assert_allclose(plan_of(result).sum(0), 1 / 3)


def test_check_2_scores_of_the_plan_and_of_single_rows() -> None:
    by_plan, alone = emd(A).score_N, emd(A, "pointwise").score_N
    np.testing.assert_allclose(by_plan, [0.1, 0.2, 0.3, 0.9], atol=1e-9)
    np.testing.assert_allclose(alone, [0.6, 0.5, 0.566667, 0.9], atol=1e-6)
    assert by_plan.mean() == pytest.approx(0.375)
    assert (smallest(by_plan, 1), smallest(alone, 1)) == ({0}, {1})
    assert smallest(by_plan, 3) == smallest(alone, 3) == {0, 1, 2}


def test_check_3_duals() -> None:
    result = emd(A, "dual")
    f, g = result.f_N, result.g_M
    assert f is not None and g is not None
    shift = f[0] + 0.1375
    np.testing.assert_allclose(f - shift, [-0.1375, 0.0125, 0.1625, 0.7125], atol=1e-9)
    np.testing.assert_allclose(g + shift, [0.2375, 0.1875, 0.1375], atol=1e-9)
    slack = A - f[:, None] - g
    assert slack.min() > -1e-12
    assert np.abs(slack[plan_of(result) > 0]).max() < 1e-12
    assert f.mean() + g.mean() == pytest.approx(0.375)
    np.testing.assert_allclose(result.score_N, [-0.433333, -0.233333, -0.033333, 0.7], atol=1e-6)


@pytest.mark.parametrize(
    ("eps", "cost", "scores", "duals"),
    [
        (0.5, 0.522523, [0.334097, 0.407283, 0.453336, 0.895375], None),
        (
            0.1,
            0.383549,
            [0.100442, 0.214191, 0.325407, 0.894154],
            [-0.386911, -0.160427, -0.045591, 0.592929],
        ),
        (0.02, 0.375021, None, None),
        (0.005, 0.375, [0.1, 0.2, 0.3, 0.9], None),
    ],
)
def test_check_4_sinkhorn(eps: float, cost: float, scores: Any, duals: Any) -> None:
    result = entropic(A, eps)
    assert result.cost == pytest.approx(cost, abs=1e-9 if eps == 0.005 else 1e-6)
    if scores is not None:
        np.testing.assert_allclose(result.score_N, scores, atol=1e-9 if eps == 0.005 else 1e-6)
    if duals is not None:
        np.testing.assert_allclose(entropic(A, eps, mode="dual").score_N, duals, atol=1e-6)


def test_check_4_the_linear_cost_falls_with_eps() -> None:
    costs = [entropic(A, eps).cost or 0.0 for eps in (2.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.005)]
    assert all(late <= early + 1e-12 for early, late in itertools.pairwise(costs))
    assert min(costs) >= 0.375 - 1e-12


@pytest.mark.parametrize(
    ("cost", "total", "scores"),
    [
        (A + 0.3, 0.675, [0.4, 0.5, 0.6, 1.2]),
        (2 * A, 0.75, [0.2, 0.4, 0.6, 1.8]),
        (A + np.array([[0.1], [0.2], [0.3], [0.4]]), 0.625, [0.2, 0.4, 0.6, 1.3]),
        (A + np.array([0.1, 0.2, 0.3]), 0.575, [0.2, 0.4, 0.6, 1.1]),
    ],
)
def test_check_5_offsets_and_scale_keep_the_plan(cost: np.ndarray, total: float, scores: list[float]) -> None:
    result = emd(cost)
    np.testing.assert_allclose(plan_of(result), plan_of(emd(A)), atol=1e-12)
    assert result.cost == pytest.approx(total)
    np.testing.assert_allclose(result.score_N, scores, atol=1e-9)


@pytest.mark.parametrize("solve", [emd, lambda cost: entropic(cost, 0.1)])
def test_check_6_permutations_and_duplicated_targets(solve: Any) -> None:
    base, rows, columns = solve(A), [2, 0, 3, 1], [1, 2, 0]
    np.testing.assert_allclose(solve(A[rows]).score_N, base.score_N[rows], atol=1e-9)
    np.testing.assert_allclose(solve(A[:, columns]).score_N, base.score_N, atol=1e-9)
    doubled = solve(np.hstack([A, A]))
    assert doubled.cost == pytest.approx(base.cost)
    np.testing.assert_allclose(doubled.score_N, base.score_N, atol=1e-9)
    ids = ["a", "b", "c", "d"]
    chosen = {ids[i] for i in best_first(base.score_N, ids, highest=False)[:2]}
    moved = [ids[i] for i in rows]
    assert {moved[i] for i in best_first(solve(A[rows]).score_N, moved, highest=False)[:2]} == chosen


def test_check_7_duplicate_rows() -> None:
    twice = np.vstack([A, A[:1]])
    exact = emd(twice, "dual")
    assert exact.cost == pytest.approx(0.36)
    assert exact.score_N[0] == pytest.approx(exact.score_N[4], abs=1e-12)
    scores = entropic(twice, 0.1).score_N
    np.testing.assert_allclose(scores, [0.222118, 0.208233, 0.321157, 0.867432, 0.222118], atol=1e-6)
    assert scores[0] == pytest.approx(scores[4], abs=1e-14)


def test_check_8_other_marginals() -> None:
    result = emd([[0, 1], [2, 0.5]], a_N=np.array([0.6, 0.4]), b_M=np.array([0.5, 0.5]))
    np.testing.assert_allclose(plan_of(result), [[0.5, 0.1], [0, 0.4]], atol=1e-12)
    assert result.cost == pytest.approx(0.3)
    result = emd([[1, 2, 3], [2, 4, 6], [3, 6, 9.5]])
    np.testing.assert_allclose(3 * plan_of(result), np.eye(3)[::-1], atol=1e-12)
    assert result.cost == pytest.approx(10 / 3)


def test_check_8_sinkhorn_with_other_marginals() -> None:
    a, b = np.array([0.6, 0.4]), np.array([0.5, 0.5])
    settings = TransportSettings(eps=0.01, tolerance=1e-12)
    result = transport(MatrixCost(np.array([[0, 1], [2, 0.5]])), a_N=a, b_M=b, settings=settings)
    assert result.cost == pytest.approx(0.3, abs=1e-9)


def test_check_9_edges() -> None:
    for result in (emd(np.zeros((3, 2))), transport(MatrixCost(np.zeros((3, 2))))):
        assert result.cost == 0
        assert best_first(result.score_N, ["c", "a", "b"], highest=False).tolist() == [1, 2, 0]
    np.testing.assert_allclose(emd(A[:1]).score_N, A[:1].mean(1))
    np.testing.assert_allclose(entropic(A[:, :1], 0.1).score_N, A[:, 0], atol=1e-12)
    np.testing.assert_allclose(emd(A[:, :1], "pointwise").score_N, A[:, 0])
    assert (how_many(4, count=0), how_many(4, count=4), how_many(5, fraction=0.5)) == (0, 4, 3)
    with pytest.raises(SelectionError, match="5 rows are to be selected from a pool of 4"):
        how_many(4, count=5)
    with pytest.raises(SelectionError, match="adds up to 1 and that of the target to 2"):
        emd(A, b_M=np.array([0.5, 0.5, 1]))
    with pytest.raises(SelectionError, match="mass of the pool must be 4 positive numbers"):
        emd(A, a_N=np.array([0.5, 0.5, 0, 0]))
    for bad in (math.nan, math.inf):
        with pytest.raises(SelectionError, match="NaN or infinite"):
            emd([[bad, 1.0]])
    with pytest.raises(SelectionError, match="must not be negative"):
        emd([[-1.0, 1.0]])


def test_check_10_a_single_source_costs_its_pointwise_score() -> None:
    alone = emd(A, "pointwise").score_N
    np.testing.assert_allclose([emd(A[i : i + 1]).cost or 0.0 for i in range(4)], alone)


@pytest.mark.parametrize("eps", [0.5, 0.05])
def test_check_11_shards_agree(eps: float) -> None:
    cost = np.random.default_rng(0).random((37, 11))
    whole = entropic(cost, eps)
    for shards in (2, 4):
        result = entropic(cost, eps, shards=shards)
        plans = [
            gibbs_plan(cost, r.f_N, r.g_M, eps)
            for r in (whole, result)
            if r.f_N is not None and r.g_M is not None
        ]
        assert np.abs(plans[0] - plans[1]).max() < 1e-10
        np.testing.assert_allclose(result.score_N, whole.score_N, atol=1e-10)


def angles(*degrees: float) -> np.ndarray:
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1)


PHASES = {
    "visual": angles(0, 90),
    "caption": angles(10, 80, 45, 170),
    "text": angles(5, 20, 75, 100, 200, 45),
}
DEGREES = {"caption": ["010", "080", "045", "170"], "text": ["005", "020", "075", "100", "200", "045"]}


def chain(
    mode: Any, target: np.ndarray, *, chained: bool = True
) -> tuple[dict[str, np.ndarray], list[set[str]]]:
    """Scores by pool and the selected ids, with 2 captions and 3 texts."""
    scores: dict[str, np.ndarray] = {}
    counts = {"caption": 2, "text": 3}

    def select(pool: FeatureSet, goal: FeatureSet) -> np.ndarray:
        settings = TransportSettings(mode=mode, solver="emd")
        scores[pool.name] = transport(FeatureCost(pool.rows, goal.rows), settings=settings).score_N
        return best_first(scores[pool.name], pool.ids, highest=False)[: counts[pool.name]]

    pools = [FeatureSet(name, DEGREES[name], PHASES[name]) for name in ("caption", "text")]
    ids = [str(i) for i in range(len(target))]
    chosen = select_chain(FeatureSet("visual", ids, target), pools, select, chained=chained)
    return scores, [{pool.ids[int(i)] for i in rows} for pool, rows in zip(pools, chosen, strict=True)]


def test_check_12_chaining() -> None:
    scores, chosen = chain("plan_cost", PHASES["visual"])
    np.testing.assert_allclose(scores["caption"], [0.015192, 0.015192, 0.292893, 0.826352], atol=1e-6)
    np.testing.assert_allclose(
        scores["text"], [0.003805, 0.015192, 0.003805, 0.060307, 1.5, 0.180848], atol=1e-6
    )
    assert chosen == [{"010", "080"}, {"005", "020", "075"}]
    scores, chosen = chain("plan_cost", PHASES["visual"], chained=False)
    np.testing.assert_allclose(
        scores["text"], [0.003805, 0.060307, 0.034074, 0.015192, 1.342020, 0.292893], atol=1e-6
    )
    assert chosen[1] == {"005", "075", "100"}
    assert chain("plan_cost", angles(90))[1] == [{"080", "045"}, {"045", "075", "100"}]


def test_check_13_chaining_pointwise() -> None:
    scores, chosen = chain("pointwise", PHASES["visual"])
    np.testing.assert_allclose(scores["caption"], [0.420772, 0.420772, 0.292893, 1.405580], atol=1e-6)
    np.testing.assert_allclose(
        scores["text"], [0.118880, 0.054442, 0.355678, 0.713212, 1.945558, 0.090424], atol=1e-6
    )
    assert chosen == [{"010", "045"}, {"005", "020", "045"}]


def test_check_14_costs_of_features() -> None:
    x, y = np.array([[0.6, 0.8]]), np.array([[1.0, 0.0]])
    assert FeatureCost(x, y).block(0, 1, torch.float64).item() == pytest.approx(0.4)
    assert FeatureCost(x, y, "sqeuclid").block(0, 1, torch.float64).item() == pytest.approx(0.8)
    assert FeatureCost(7 * x, 3 * y).block(0, 1, torch.float64).item() == pytest.approx(0.4)


@pytest.mark.parametrize("kind", ["cosine", "sqeuclid"])
def test_costs_by_blocks_are_those_of_a_loop(kind: Any) -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(7, 5)), rng.normal(size=(4, 5))
    loop = np.array([[_cost(p, q, kind) for q in y] for p in x])
    cost = FeatureCost(x, y, kind)
    np.testing.assert_allclose(cost.block(0, 7, torch.float64).numpy(), loop, atol=1e-12)
    np.testing.assert_allclose(cost.part(2, 7).block(1, 3, torch.float64).numpy(), loop[3:5], atol=1e-12)
    assert cost.mean() == pytest.approx(loop.mean())
    assert cost.largest >= loop.max()


def _cost(p: np.ndarray, q: np.ndarray, kind: str) -> float:
    if kind == "sqeuclid":
        return float(((p - q) ** 2).sum())
    return 1 - float(p @ q) / float(np.linalg.norm(p) * np.linalg.norm(q))


def clusters(rows: int, targets: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A pool of eight clusters, and targets from three of them."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(8, 24))
    pool = centres[rng.integers(0, 8, rows)] + 0.6 * rng.normal(size=(rows, 24))
    target = centres[rng.integers(0, 3, targets)] + 0.6 * rng.normal(size=(targets, 24))
    return pool.astype(np.float32), target.astype(np.float32)


@pytest.mark.parametrize("eps", [0.2, 0.03])
def test_sinkhorn_agrees_with_pot(eps: float) -> None:
    x, y = clusters(120, 40)
    cost = FeatureCost(x, y).block(0, 120, torch.float64).numpy()
    result = entropic(cost, eps)
    assert result.f_N is not None and result.g_M is not None
    a, b = np.full(120, 1 / 120), np.full(40, 1 / 40)
    plan: Any = ot.sinkhorn(a, b, cost, eps, method="sinkhorn_log", stopThr=1e-12, numItermax=20_000)
    np.testing.assert_allclose(gibbs_plan(cost, result.f_N, result.g_M, eps), plan, atol=1e-11)
    np.testing.assert_allclose(result.score_N, 120 * (plan * cost).sum(1), atol=1e-8)


def test_a_small_eps_comes_near_the_exact_cost() -> None:
    x, y = clusters(200, 100)
    cost = FeatureCost(x, y)
    exact = transport(cost, settings=TransportSettings(solver="emd")).cost
    near = transport(cost, settings=TransportSettings(eps_ratio=0.01, tolerance=1e-5)).cost
    assert near == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("eps_ratio", [0.3, 0.05])
def test_the_float32_kernel_gives_the_result_of_the_float64_one(
    eps_ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = clusters(300, 150)
    settings = TransportSettings(eps_ratio=eps_ratio)
    double = transport(FeatureCost(x, y), settings=settings)
    monkeypatch.setattr("eagleray.models.selection.sinkhorn._DOUBLE_UP_TO", 0)
    single = transport(FeatureCost(x, y), settings=settings)
    assert single.column_error < 1e-6
    np.testing.assert_allclose(single.score_N, double.score_N, atol=1e-5)
    assert single.f_N is not None and single.g_M is not None and single.eps is not None
    plan = gibbs_plan(
        FeatureCost(x, y).block(0, 300, torch.float64).numpy(), single.f_N, single.g_M, single.eps
    )
    assert np.abs(plan.sum(1) - 1 / 300).sum() < 2e-6
    assert np.abs(plan.sum(0) - 1 / 150).sum() < 2e-6


@pytest.mark.parametrize("kernel_bytes", [0, 40_000])
def test_blocks_that_are_not_held_change_nothing(kernel_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eagleray.models.selection.sinkhorn._BLOCK_VALUES", 2000)
    x, y = clusters(90, 100)
    whole = transport(FeatureCost(x, y))
    part = transport(FeatureCost(x, y), settings=TransportSettings(kernel_bytes=kernel_bytes))
    assert np.array_equal(part.score_N, whole.score_N)


def test_columns_out_of_reach_of_floats() -> None:
    """The kernel of the last target is exp(-1175) at most: zero, in any float; the log domain does not care."""
    result = entropic(A + np.array([0, 0, 2.05]), 0.002)
    assert result.cost == pytest.approx(0.375 + 2.05 / 3, abs=1e-9)
    np.testing.assert_allclose(result.score_N, [0.1, 0.2, 2.35, 0.9 + 2.05 / 3], atol=1e-9)


def test_ending_early_is_an_error_unless_allowed() -> None:
    tight = {"eps": 0.02, "max_iterations": 3, "tolerance": 1e-12}
    with pytest.raises(ConvergenceError, match=r"after 3 iterations the marginal error is .* Raise `eps`"):
        transport(MatrixCost(A), settings=TransportSettings(**tight))
    result = transport(MatrixCost(A), settings=TransportSettings(**tight, allow_unconverged=True))
    assert not result.converged and result.iterations == 3


def test_the_exact_solver_refuses_what_is_too_large() -> None:
    rows = np.ones((2001, 2))
    with pytest.raises(SelectionError, match="here are 2001 x 2001"):
        transport(FeatureCost(rows, rows), settings=TransportSettings(solver="emd"))


def test_calibrated_duals_are_free_of_the_constant() -> None:
    f = np.array([0.3, -0.2, 0.9])
    np.testing.assert_allclose(calibrated_dual(f + 5), calibrated_dual(f))
    assert calibrated_dual(f)[0] == pytest.approx(0.3 - 0.35)
    assert calibrated_dual(f[:1]).tolist() == [0.0]
