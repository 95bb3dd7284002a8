"""Similarity of layers, the probes, selection, plots."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from eagleray.models.lisa.plots import plot_neighbours, plot_sensitivity, plot_similarity
from eagleray.models.lisa.probe import probe_noise, probe_sharing, token_loss
from eagleray.models.lisa.selection import greedy_layers, layer_count, periodic_layers
from eagleray.models.lisa.similarity import js_divergence, layer_similarity
from eagleray.models.lisa.teacher import observing

Make = Callable[..., Any]


def test_divergence_by_hand() -> None:
    """Equal: 0. Disjoint: ln 2. (1/2, 1/2) against (1, 0): H(3/4, 1/4) - H(1/2, 1/2) / 2."""
    p = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    q = torch.tensor([[0.5, 0.5], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    mixed = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert js_divergence(p, q).tolist() == pytest.approx([0.0, math.log(2), mixed - math.log(2) / 2])


@pytest.mark.parametrize("drop", [False, True])
def test_similarity_agrees_with_a_loop(make_teacher: Make, drop: bool) -> None:
    """All heads of all layers against attention weights of transformers' own eager kernel, row by row."""
    teacher = make_teacher(num_hidden_layers=3)
    texts = [
        torch.randint(1, 64, (length,), generator=torch.Generator().manual_seed(length)) for length in (6, 9)
    ]
    found = layer_similarity(teacher, texts, drop_first_key=drop)
    teacher.set_attn_implementation("eager")
    sums, averaged, rows = np.zeros((3, 3, 4, 4)), np.zeros((3, 3)), 0
    for ids in texts:
        weights = torch.cat(teacher(input_ids=ids[None], output_attentions=True).attentions).detach()
        for row in range(2 if drop else 1, len(ids)):
            p_LHT = weights[:, :, row, int(drop) : row + 1].double()
            p_LHT = p_LHT / p_LHT.sum(-1, keepdim=True)
            for i in range(3):
                for j in range(3):
                    sums[i, j] += js_divergence(p_LHT[i][:, None], p_LHT[j][None]).numpy()
                    averaged[i, j] += js_divergence(p_LHT[i].mean(0), p_LHT[j].mean(0)).item()
            rows += 1
    assert found.rows == rows
    other = ~np.eye(3, dtype=bool)
    np.testing.assert_allclose(found.heads[other], (sums / rows)[other], atol=1e-6)
    np.testing.assert_allclose(found.averaged[other], (averaged / rows)[other], atol=1e-6)
    cost = found.heads[0, 1]
    assert found.reduce("same_head")[0, 1] == pytest.approx(np.diag(cost).mean())
    assert found.reduce("best_match")[0, 1] == pytest.approx(cost.min(0).mean())
    assert found.reduce("head_average")[0, 1] == found.averaged[0, 1]
    order = found.permutation(0, 1)
    assert sorted(order) == [0, 1, 2, 3]
    assert found.reduce("one_to_one")[0, 1] == pytest.approx(cost[order, range(4)].mean())
    assert (
        found.reduce("best_match")[0, 1]
        <= found.reduce("one_to_one")[0, 1]
        <= found.reduce("same_head")[0, 1]
    )
    with pytest.raises(ValueError, match="must be same_head"):
        found.reduce("median")  # type: ignore[arg-type]


def test_neighbours_only(make_teacher: Make, ids: Tensor, tmp_path: Path) -> None:
    teacher = make_teacher()
    some, every = (layer_similarity(teacher, list(ids), adjacent_only=only) for only in (True, False))
    for how in ("same_head", "head_average", "best_match", "one_to_one"):
        near, full = some.reduce(how), every.reduce(how)
        assert np.isnan(near[0, 2]) and np.isfinite(full[0, 2]) and np.isnan(full[1, 1])
        np.testing.assert_allclose(near[2, 3], full[2, 3])
    with pytest.raises(ValueError, match="Layers 0 and 2 were not compared"):
        some.permutation(0, 2)
    with pytest.raises(ValueError, match="at least three tokens"):
        layer_similarity(teacher, [ids[0, :1]])
    plot_similarity(every, tmp_path / "map.png")
    plot_neighbours(some, tmp_path / "neighbours.png")
    plot_sensitivity({"shared": {1: 0.2, 2: 0.1}, "permuted": {1: 0.1}}, tmp_path / "probe.png")
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("map.png", "neighbours.png", "probe.png"))


def test_probes(make_teacher: Make, ids: Tensor) -> None:
    """A layer that is a copy of the one below loses nothing by sharing; noise grows into loss."""
    teacher = make_teacher(num_key_value_heads=4)
    source, target = (teacher.model.layers[i] for i in (2, 3))
    order = [1, 3, 0, 2]
    rows = (torch.tensor(order)[:, None] * 8 + torch.arange(8)).flatten()
    with torch.no_grad():
        for name in ("q_proj", "k_proj"):
            getattr(target.self_attn, name).weight.copy_(getattr(source.self_attn, name).weight[rows])
        target.input_layernorm.weight.copy_(source.input_layernorm.weight)
        source.self_attn.o_proj.weight.zero_()
        source.mlp.down_proj.weight.zero_()
    before = token_loss(teacher, [ids])
    raw = probe_sharing(teacher, [ids])
    assert set(raw) == {1, 2, 3, 4, 5} and abs(raw[3]) > 1e-3
    permuted = probe_sharing(teacher, [ids], layers=[3], permutations={3: order})
    assert abs(permuted[3]) < 1e-6
    noise = probe_noise(teacher, [ids], sigmas=(0.0, 0.5))
    assert set(noise) == set(range(6)) and all(
        abs(noise[i][0.0]) < 1e-6 < abs(noise[i][0.5]) for i in (0, 1, 4, 5)
    )
    assert token_loss(teacher, [ids]) == before
    with pytest.raises(ValueError, match="Layer 0 can't be probed"):
        probe_sharing(teacher, [ids], layers=[0])


def test_observing_keeps_only_needed_scores(make_teacher: Make, ids: Tensor) -> None:
    """An anchor two layers down is still there; a replaced layer hands on what it got."""
    teacher = make_teacher()
    seen: dict[int, Any] = {}
    replaced = torch.zeros(2, 4, 14, 14, dtype=torch.float64)

    def visit(view: Any) -> Tensor | None:
        seen[view.index] = view
        return replaced if view.index == 3 else None

    with observing(teacher, visit, layers={1: None, 3: 1, 4: 3}), torch.no_grad():
        teacher(input_ids=ids)
    assert set(seen) == {1, 3, 4} and seen[1].below is None
    assert seen[3].below is seen[1].scores and seen[4].below is replaced


def test_greedy_selection() -> None:
    """Least harm first, never layers 0 and 1, no longer runs than allowed, equal masks only."""
    rise = {1: -1.0, 2: 0.5, 3: 0.1, 4: 0.2, 5: 0.3, 6: 0.4}
    assert greedy_layers(rise, 3) == (3, 4, 5)
    assert greedy_layers(rise, 3, max_chain=2) == (3, 4, 6)
    assert greedy_layers(rise, 1, prefix=1) == (1,)
    kinds = ["full_attention"] * 3 + ["sliding_attention"] * 4
    assert greedy_layers(rise, 3, kinds=kinds) == (4, 5, 6)
    with pytest.raises(ValueError, match="5 layers were found"):
        greedy_layers(rise, 6)
    with pytest.raises(ValueError, match=r"in runs of at most 1\. Choose 1 to 2"):
        greedy_layers(rise, 4, max_chain=1)


def test_periodic_selection_and_counts() -> None:
    assert periodic_layers(9, every=4, prefix=1) == (2, 3, 4, 6, 7, 8)
    assert layer_count(40, 0.53) == 21
    with pytest.raises(ValueError, match="must be at least 2 and 1"):
        periodic_layers(9, every=1)
    with pytest.raises(ValueError, match="between 0 and 1"):
        layer_count(32, 53)
