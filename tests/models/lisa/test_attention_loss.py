"""The attention term of phase B: against attention weights that the models give out, and where its gradients go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from eagleray.models.lisa.attention_loss import recording_scores, teach
from eagleray.models.lisa.convert import Start, convert
from eagleray.models.lisa.distill import set_trained
from eagleray.models.lisa.spec import AlignSpec, LisaSpec

Make = Callable[..., Any]


def distances(teacher: Any, student: Any, ids: Tensor, rows: Tensor | None = None) -> dict[int, Tensor]:
    rows = torch.ones_like(ids, dtype=torch.bool) if rows is None else rows
    with recording_scores(student) as scores:
        student(input_ids=ids, attention_mask=rows, use_cache=False)
    return teach(teacher, ids, scores, rows)[1]


def test_it_is_the_divergence_of_attention_weights(make_pair: Make, ids: Tensor) -> None:
    """Against a loop over the weights [B, H, T, T] of both models, with two padding tokens on the right."""
    teacher, student = make_pair()
    rows = torch.ones_like(ids, dtype=torch.bool)
    rows[0, -2:] = False
    found = distances(teacher, student, ids, rows)
    assert set(found) == {2, 3, 5}
    for model in (teacher, student):
        model.set_attn_implementation("eager")
    seen = {"attention_mask": rows, "output_attentions": True, "use_cache": False}
    full, shared = (model(input_ids=ids, **seen).attentions for model in (teacher, student))
    for layer, value in found.items():
        total, count = 0.0, 0
        for b, i in rows.nonzero().tolist():
            p, q = full[layer][b, :, i, : i + 1], shared[layer][b, :, i, : i + 1]
            total += (p * (p / q).log()).sum().item() / p.shape[0]
            count += 1
        assert value.item() == pytest.approx(total / count, rel=1e-5)


def test_a_student_that_attends_as_its_teacher_has_none(make_teacher: Make, ids: Tensor) -> None:
    """All rotary pairs copied and no alignment: the teacher's own scores."""
    teacher = make_teacher()
    spec = LisaSpec(shared_layers=(2, 3), rank=8, align=AlignSpec(kind="none"))
    student = convert(teacher, spec, [ids], start=Start(low_rank="pairs"))
    assert all(abs(value.item()) < 1e-9 for value in distances(teacher, student, ids).values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_flow_down_the_chain(make_pair: Make, ids: Tensor, checkpointing: bool) -> None:
    """The term of layer 3 alone moves layer 2, whose scores it takes; not layer 5 above, not the frozen weights."""
    teacher, student = make_pair()
    set_trained(student, "lisa")
    student.train()
    if checkpointing:
        student.activation_checkpointing_enable()
        student.enable_input_require_grads()
    distances(teacher, student, ids)[3].backward()
    moved = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    # b2 of layer 3 is a constant per row of its own scores.
    for layer, parts in (
        (2, ("align.m", "align.b1", "align.w2", "q_lr.weight")),
        (3, ("align.m", "k_lr.weight")),
    ):
        assert {f"model.layers.{layer}.self_attn.{part}" for part in parts} <= moved
    assert all(".layers.2." in name or ".layers.3." in name for name in moved)
    assert all(".align." in name or "_lr." in name for name in moved)


def test_shared_weights_have_a_distance_too(make_pair: Make, ids: Tensor) -> None:
    """The post-softmax baseline: finite, and zero scores are recorded as logarithms of its weights."""
    teacher, student = make_pair(stage="weights", rank=0, align=AlignSpec(kind="identity"), scatter=0.0)
    found = distances(teacher, student, ids)
    assert all(0 < value.item() < 20 for value in found.values())


def test_without_recorded_scores_there_are_logits_only(make_pair: Make, ids: Tensor) -> None:
    teacher, _ = make_pair()
    logits, found = teach(teacher, ids, {}, torch.ones_like(ids, dtype=torch.bool))
    torch.testing.assert_close(logits, teacher(input_ids=ids).logits)
    assert found == {} and not logits.requires_grad
