"""Phase A: acceptance checks 21 and 23, and what it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from eagleray.models.lisa.baselines import direct_sharing, permuted_direct_sharing
from eagleray.models.lisa.convert import Start, convert
from eagleray.models.lisa.distill import LayerDistiller, LocalWeights, record_inputs, recorded_layers, sources
from eagleray.models.lisa.similarity import layer_similarity
from eagleray.models.lisa.spec import AlignSpec, LisaSpec

Make = Callable[..., Any]
KL = LocalWeights(kl=1.0, mse_out=0.0)


def texts(count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 64, (4, 24), generator=generator) for _ in range(count)]


@torch.no_grad()
def held_out(teacher: Any, student: Any, data: list[Tensor]) -> float:
    distiller = LayerDistiller(teacher, student)
    losses = [distiller(record_inputs(teacher, ids, layers=distiller.layers), weights=KL) for ids in data]
    return sum(sum(v.values()) for v in losses).item() / len(data)  # type: ignore[union-attr]


def train(teacher: Any, student: Any, data: list[Tensor], *, steps: int, lr: float = 1e-2) -> list[float]:
    distiller = LayerDistiller(teacher, student)
    optimiser = torch.optim.Adam([p for p in distiller.parameters() if p.requires_grad], lr=lr)
    inputs = [record_inputs(teacher, ids, layers=distiller.layers) for ids in data]
    curve = []
    for step in range(steps):
        optimiser.zero_grad()
        loss = torch.stack(list(distiller(inputs[step % len(inputs)]).values())).sum()
        loss.backward()
        optimiser.step()
        curve.append(loss.item())
    return curve


def test_learning_beats_direct_sharing(make_teacher: Make) -> None:
    """Check 21: the smoothed loss falls all the way; held-out KL below DS and DS with the best permutation."""
    teacher = make_teacher(dtype=torch.float32)
    data, held = texts(4, 0), texts(2, 1)
    spec = LisaSpec(shared_layers=(2, 3), rank=4)
    student = convert(teacher, spec, data)
    start = held_out(teacher, student, held)
    curve = train(teacher, student, data, steps=80)
    smooth = [sum(curve[i : i + 20]) for i in range(0, 80, 20)]
    assert smooth == sorted(smooth, reverse=True)
    direct = held_out(teacher, direct_sharing(teacher, (2, 3)), held)
    similarity = layer_similarity(teacher, list(torch.cat(data)[:4]), adjacent_only=True)
    permuted = held_out(teacher, permuted_direct_sharing(teacher, (2, 3), similarity), held)
    trained = held_out(teacher, student, held)
    assert trained < start < min(direct, permuted)


@pytest.mark.parametrize("low_rank", ["pairs", "lstsq"])
def test_more_rank_is_no_worse(make_teacher: Make, low_rank: Any) -> None:
    """Check 23: held-out KL over r = 0, 4, 8, where r = 8 is the head size."""
    teacher = make_teacher(dtype=torch.float32)
    data, held = texts(2, 0), texts(2, 1)
    found = []
    for rank in (0, 4, 8):
        spec = LisaSpec(shared_layers=(3,), rank=rank, align=AlignSpec(kind="linear"))
        student = convert(teacher, spec, data, start=Start(low_rank=low_rank, steps=40))
        train(teacher, student, data, steps=40)
        found.append(held_out(teacher, student, held))
    assert found[1] < found[0] and found[2] < found[0] and found[2] < found[1] * 1.05


def test_chosen_pairs_carry_the_residual(make_teacher: Make) -> None:
    """Only pairs 1 and 3 of layer 3 differ from zero, so they are the ones chosen, and nothing is left over."""
    teacher = make_teacher()
    attention = teacher.model.layers[3].self_attn
    with torch.no_grad():
        for pair in (0, 2):
            for row in (pair, pair + 4):
                attention.q_proj.weight[row::8] = 0
    spec = LisaSpec(shared_layers=(3,), rank=4, align=AlignSpec(kind="none"))
    student = convert(teacher, spec, texts(1, 0), start=Start(low_rank="pairs"))
    assert student.model.lisa.rope_pairs == (((1, 3), (1, 3)),)
    assert held_out(teacher, student, texts(1, 1)) < 1e-6


def test_only_added_weights_are_trained(make_teacher: Make) -> None:
    """One step moves every added weight and no other; teacher and student share the rest."""
    teacher = make_teacher(dtype=torch.float32)
    student = convert(teacher, LisaSpec(shared_layers=(2, 3), rank=4), texts(1, 0))
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    train(teacher, student, texts(2, 0), steps=3)
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    added = {name for name in before if "_lr." in name or ".align." in name}
    # The last bias is a constant per row: nothing that phase A compares depends on it.
    assert {name for name in added - moved if not name.endswith("align.b2")} == set() and moved <= added


def test_padding_does_not_count(make_teacher: Make) -> None:
    """A right-padded batch has the loss of its text alone."""
    teacher = make_teacher()
    student = convert(teacher, LisaSpec(shared_layers=(2, 3), rank=4), texts(1, 0))
    distiller = LayerDistiller(teacher, student)
    ids = texts(1, 3)[0][:1]
    padded = torch.cat([ids, torch.zeros_like(ids)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], 1)
    weights = LocalWeights(mse_scores=0.5)
    alone = distiller(record_inputs(teacher, ids, layers=distiller.layers), weights=weights)
    both = distiller(record_inputs(teacher, padded, mask, layers=distiller.layers), mask, weights=weights)
    summed = distiller(record_inputs(teacher, ids, layers=distiller.layers), weights=weights, reduction="sum")
    for layer, value in alone.items():
        torch.testing.assert_close(both[layer], value)
        torch.testing.assert_close(summed[layer], 24 * value)


def test_shared_weights_can_be_distilled(make_teacher: Make) -> None:
    """The post-softmax baseline, aligned: ridge on weights, finite loss, smaller after training."""
    teacher = make_teacher(dtype=torch.float32)
    spec = LisaSpec(shared_layers=(2,), stage="weights", rank=0, align=AlignSpec(kind="linear"))
    student = convert(teacher, spec, texts(2, 0))
    curve = train(teacher, student, texts(2, 0), steps=30, lr=1e-3)
    assert sum(curve[-2:]) < sum(curve[:2])


def test_sources_and_weights() -> None:
    spec = LisaSpec(shared_layers=(2, 3, 5))
    assert sources(spec, 6) == {2: 1, 3: 2, 5: 4} and recorded_layers(spec, 6) == (1, 2, 3, 4, 5)
    anchored = replace(spec, source="anchor")
    assert sources(anchored, 6) == {2: 1, 3: 1, 5: 4}
    for wrong in ({"kl": -1.0}, {"kl": 0.0, "mse_out": 0.0}):
        with pytest.raises(ValueError, match="none may be negative and one must be positive"):
            LocalWeights(**wrong)
