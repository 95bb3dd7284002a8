"""Acceptance checks 1 to 7 and 22: limits in which the shared layer is something known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from eagleray.models.lisa.baselines import direct_sharing, permuted_direct_sharing, shared_weights
from eagleray.models.lisa.convert import Start, convert, copy_pairs, fit_alignment
from eagleray.models.lisa.kernels import add_low_rank
from eagleray.models.lisa.model import ARCHITECTURES
from eagleray.models.lisa.similarity import layer_similarity
from eagleray.models.lisa.spec import AlignSpec, LisaSpec
from eagleray.models.lisa.teacher import LayerView, observing

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

Make = Callable[..., Any]


@torch.no_grad()
def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    return model(input_ids=ids, use_cache=False, **options).logits


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_without_shared_layers_nothing_changes(make_teacher: Make, ids: Tensor, architecture: str) -> None:
    """Check 1: bit-identical logits."""
    teacher = make_teacher(architecture)
    for kernel in ("eager", "sdpa"):
        teacher.set_attn_implementation(kernel)
        assert torch.equal(logits(convert(teacher, LisaSpec()), ids), logits(teacher, ids))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("key_heads", [2, 4])
def test_full_rank_without_alignment_is_the_teacher(
    make_teacher: Make, ids: Tensor, architecture: str, key_heads: int
) -> None:
    """Check 2: r = d with all pairs, in any order, and f = 0; Qwen2 has biases."""
    teacher = make_teacher(architecture)
    orders = tuple(tuple(torch.randperm(4).tolist()) for _ in range(key_heads))
    spec = LisaSpec(
        shared_layers=(2, 3),
        rank=8,
        key_heads=key_heads,
        rope_pairs=(orders,) * 2,
        align=AlignSpec(kind="none"),
    )
    student = convert(teacher, spec, start=Start(align="identity"))
    for i in (2, 3):
        copy_pairs(teacher.model.layers[i].self_attn, student.model.layers[i].self_attn)
    torch.testing.assert_close(logits(student, ids), logits(teacher, ids), rtol=1e-9, atol=1e-9)


def test_identity_and_no_low_rank_is_direct_sharing(make_teacher: Make, ids: Tensor) -> None:
    """Check 3: S_3 equals S_2 exactly, and the logits are those of a model whose scores were replaced by hand."""
    teacher = make_teacher()
    spec = LisaSpec(shared_layers=(3,), rank=4, align=AlignSpec(kind="identity"))
    student = convert(teacher, spec, start=Start(align="identity"))
    scores = _scores(student, ids)
    assert torch.equal(scores[3], scores[2])

    def share(view: LayerView) -> Tensor | None:
        return view.below

    with observing(teacher, share, layers={3: 2}):
        expected = logits(teacher, ids)
    torch.testing.assert_close(logits(student, ids), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits(direct_sharing(teacher, (3,)), ids), expected, rtol=1e-9, atol=1e-9)


def test_scores_of_disjoint_pairs_add_up(make_teacher: Make, ids: Tensor) -> None:
    """Check 4."""
    teacher = make_teacher()
    parts = []
    for pairs in ((0, 1, 2, 3), (3, 0), (1,), (2,)):
        spec = LisaSpec(
            shared_layers=(3,),
            rank=2 * len(pairs),
            rope_pairs=((pairs, pairs),),
            align=AlignSpec(kind="none"),
        )
        student = convert(teacher, spec, start=Start(align="identity"))
        copy_pairs(teacher.model.layers[3].self_attn, student.model.layers[3].self_attn)
        parts.append(_scores(student, ids)[3])
    torch.testing.assert_close(parts[0], parts[1] + parts[2] + parts[3], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["linear", "ffn"])
def test_order_of_the_producers_heads_does_not_matter(make_pair: Make, ids: Tensor, kind: Any) -> None:
    """Check 5: permute the producer's KV groups with the rows of W_O and the columns of W1 or M."""
    _, student = make_pair(shared=(3,), align=AlignSpec(kind=kind))
    before = logits(student, ids)
    order = torch.tensor([2, 3, 0, 1])  # heads, in whole groups of two
    producer, shared = student.model.layers[2].self_attn, student.model.layers[3].self_attn
    heads = (order[:, None] * 8 + torch.arange(8)).flatten()
    groups = (torch.tensor([1, 0])[:, None] * 8 + torch.arange(8)).flatten()
    with torch.no_grad():
        for module, rows in ((producer.q_proj, heads), (producer.k_proj, groups), (producer.v_proj, groups)):
            module.weight.copy_(module.weight[rows].clone())
        producer.o_proj.weight.copy_(producer.o_proj.weight[:, heads].clone())
        first = shared.align.m if kind == "linear" else shared.align.w1
        first.copy_(first[:, order].clone())
    torch.testing.assert_close(logits(student, ids), before, rtol=1e-9, atol=1e-9)


def test_last_bias_matters_to_a_relay_only(make_pair: Make, ids: Tensor) -> None:
    """Check 6: a constant per row is nothing to the softmax, but something to the next network."""
    _, student = make_pair(shared=(2, 3), align=AlignSpec(kind="ffn"))
    before = logits(student, ids)
    for layer, same in ((3, True), (2, False)):
        bias = student.model.layers[layer].self_attn.align.b2
        with torch.no_grad():
            bias.add_(1.0)
        assert torch.allclose(logits(student, ids), before, rtol=1e-9, atol=1e-9) == same


@pytest.mark.parametrize("kind", ["linear", "linear+ffn"])
def test_start_is_least_squares_aligned_direct_sharing(make_teacher: Make, ids: Tensor, kind: Any) -> None:
    """Check 7: at step 0 the scores are M* S below, and M* beats every other matrix tried."""
    teacher = make_teacher()
    spec = LisaSpec(shared_layers=(3,), rank=4, align=AlignSpec(kind=kind))
    student = convert(teacher, spec, [ids], start=Start(ridge=0.0))
    scores = _scores(student, ids)
    matrix = student.model.layers[3].self_attn.align.m.detach()
    torch.testing.assert_close(
        scores[3], torch.einsum("hg,bgqk->bhqk", matrix, scores[2]), rtol=1e-9, atol=1e-9
    )
    own, mask = _own_scores(teacher, ids)
    best = _centred_error(own[3], scores[3], mask)
    for seed in range(3):
        other = matrix + 0.01 * torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)).double()
        assert _centred_error(own[3], torch.einsum("hg,bgqk->bhqk", other, scores[2]), mask) > best


@pytest.mark.parametrize("kind", ["linear", "linear+ffn"])
def test_alignment_finds_permuted_heads(make_teacher: Make, kind: Any) -> None:
    """Check 22: layer 3 is layer 2 with shuffled heads, on the same input; calibration undoes the shuffling."""
    teacher = make_teacher(num_key_value_heads=4)
    source, target = (teacher.model.layers[i] for i in (2, 3))
    order = torch.tensor([2, 0, 3, 1])
    rows = (order[:, None] * 8 + torch.arange(8)).flatten()
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(target.self_attn, name).weight.copy_(getattr(source.self_attn, name).weight[rows])
        target.input_layernorm.weight.copy_(source.input_layernorm.weight)
        source.self_attn.o_proj.weight.zero_()  # layer 2 adds nothing, so layer 3 sees the same input
        source.mlp.down_proj.weight.zero_()
    texts = [torch.randint(1, 64, (2, 32), generator=torch.Generator().manual_seed(s)) for s in range(2)]
    spec = LisaSpec(shared_layers=(3,), rank=0, align=AlignSpec(kind=kind))
    matrix = fit_alignment(teacher, spec, texts, ridge=1e-6)[3]
    assert matrix.argmax(1).tolist() == order.tolist()
    student = convert(teacher, spec, texts, start=Start(ridge=1e-6))
    own, mask = _own_scores(teacher, texts[0])
    mine = _scores(student, texts[0])[3]
    hidden = ~mask
    log_p, log_q = (s.masked_fill(hidden, -1e30).log_softmax(-1) for s in (own[3], mine))
    assert (log_p.exp() * (log_p - log_q)).sum(-1).mean() < 1e-4
    similarity = layer_similarity(teacher, [texts[0][0]], adjacent_only=True)
    assert similarity.permutation(2, 3).tolist() == order.tolist()
    assert similarity.reduce("one_to_one")[2, 3] < 1e-6 < similarity.reduce("same_head")[2, 3]
    aligned = permuted_direct_sharing(teacher, (3,), similarity)
    torch.testing.assert_close(logits(aligned, texts[0]), logits(teacher, texts[0]), rtol=1e-7, atol=1e-7)


def test_shared_weights_without_alignment_are_direct_sharing(make_teacher: Make, ids: Tensor) -> None:
    """Handing on P or S is the same function as long as f is the identity."""
    teacher = make_teacher()
    for source in ("prev", "anchor"):
        torch.testing.assert_close(
            logits(shared_weights(teacher, (2, 3), source=source), ids),
            logits(direct_sharing(teacher, (2, 3)), ids),
            rtol=1e-9,
            atol=1e-9,
        )


def test_anchor_takes_the_producers_scores(make_pair: Make, ids: Tensor) -> None:
    """With `anchor` layer 3 starts from layer 1; with `prev` from layer 2, which changed them."""
    for source, below in (("anchor", 1), ("prev", 2)):
        _, student = make_pair(shared=(2, 3), source=source, align=AlignSpec(kind="identity"), rank=0)
        with torch.no_grad():
            scores = _scores(student, ids)
        assert torch.equal(scores[3], scores[below])
    _, student = make_pair(shared=(2, 3), source="anchor", align=AlignSpec(kind="linear"), rank=0)
    matrix = student.model.layers[3].self_attn.align.m
    scores = _scores(student, ids)
    torch.testing.assert_close(scores[3], torch.einsum("hg,bgqk->bhqk", matrix, scores[1]))


def test_low_rank_scores_by_hand() -> None:
    """Two query heads on one key head: S + 0.5 q k^T."""
    scores = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    q, k = torch.tensor([[[[1.0, 0.0]], [[0.0, 2.0]]]]), torch.tensor([[[[4.0, 6.0], [8.0, 10.0]]]])
    assert add_low_rank(scores, q, k, 0.5).tolist() == [[[[3.0, 6.0]], [[9.0, 14.0]]]]


@torch.no_grad()
def _scores(student: Any, ids: Tensor) -> dict[int, Tensor]:
    """What each layer of a chain hands on."""
    found: dict[int, Tensor] = {}
    handles = [
        layer.self_attn.register_forward_hook(
            lambda module, args, out: found.update({module.layer_idx: out[2]})
        )
        for layer in student.model.layers
        if type(layer).__name__ == "LisaDecoderLayer"
    ]
    logits(student, ids)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def _own_scores(teacher: Any, ids: Tensor) -> tuple[dict[int, Tensor], Tensor]:
    found: dict[int, LayerView] = {}
    with observing(teacher, lambda view: found.update({view.index: view})):
        teacher(input_ids=ids, use_cache=False)
    return {i: view.scores for i, view in found.items()}, found[0].mask


def _centred_error(target: Tensor, scores: Tensor, mask: Tensor) -> float:
    error = (target - scores).masked_fill(~mask, 0.0)
    error = error - error.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    return error.masked_fill(~mask, 0.0).square().sum().item()
