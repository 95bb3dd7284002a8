"""Gradients of single samples from one pass, against sums done by hand and against a loop of backward passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from eagleray.models.selection.gradients import SampleGradients, add_probes
from eagleray.models.selection.projection import RandomProjection
from eagleray.models.selection.rows import SelectionError


class _Whole(RandomProjection):
    """Keeps every number, layer behind layer."""

    def __call__(self, rows_BD: Tensor, *, first_block: int = 0) -> Tensor:
        return nn.functional.pad(rows_BD, (first_block, self.width - first_block - rows_BD.shape[1]))

    def blocks(self, width: int) -> int:
        return width


def test_the_gradient_of_a_sample_is_the_sum_of_outer_products_over_its_rows() -> None:
    """Two samples of two rows on y = w·x, loss of a sample = first output − 2 · second: gradient = x_1 − 2 x_2."""
    layer = nn.Linear(2, 1, bias=False)
    x_RI = torch.tensor([[1.0, 2.0], [3.0, 5.0], [0.5, 0.0], [1.0, -1.0]])
    signs_R = torch.tensor([1.0, -2.0, 1.0, -2.0])
    found = SampleGradients({"w": layer}, _Whole(8))(lambda: (layer(x_RI)[:, 0] * signs_R).sum(), answers=2)
    torch.testing.assert_close(found[:, :2], torch.tensor([[-5.0, -8.0], [-1.5, 2.0]]))
    assert layer.weight.grad is None and not found[:, 2:].any()


def test_sequences_equal_a_loop_and_padding_adds_nothing() -> None:
    torch.manual_seed(0)
    layers = nn.ModuleDict({"a": nn.Linear(6, 5, bias=False), "b": nn.Linear(5, 3, bias=False)})
    x_RTI = torch.randn(6, 4, 6)

    def losses(rows: Tensor) -> Tensor:
        hidden = torch.tanh(layers["a"](rows)).cumsum(1)
        read_R = layers["b"](hidden)[:, 2].square().sum(-1)  # the last place is padding
        return (read_R.view(-1, 2) * torch.tensor([1.0, -0.5])).sum(1)

    named = dict(layers.items())
    found = SampleGradients(named, _Whole(48))(lambda: losses(x_RTI).sum(), answers=2)  # type: ignore[arg-type]
    weights = [layer.weight for layer in layers.values()]
    for sample in range(3):
        rows = x_RTI[2 * sample : 2 * sample + 2]
        expected = torch.autograd.grad(losses(rows).sum(), weights)  # type: ignore[arg-type]
        torch.testing.assert_close(found[sample, :45], torch.cat([g.flatten() for g in expected]))


def test_pieces_of_a_row_add_up_to_its_projection() -> None:
    project = RandomProjection(16, seed=3, block=8)
    x_BD = torch.randn(4, 24)
    pieces = project(x_BD[:, :8]) + project(x_BD[:, 8:], first_block=project.blocks(8))
    torch.testing.assert_close(pieces, project(x_BD))


def test_probes_leave_outputs_as_they_were_and_are_equal_for_equal_seeds() -> None:
    def body() -> nn.Module:
        torch.manual_seed(5)
        return nn.ModuleDict({"q_proj": nn.Linear(4, 4), "mlp": nn.Linear(4, 4)})

    model, x_BI = body(), torch.randn(2, 4)
    before = model["q_proj"](x_BI)  # type: ignore[index]
    state = torch.random.get_rng_state()
    probes = add_probes(model, rank=2, targets=["q_proj"], seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert [probe.weight.shape for probe in probes.values()] == [(4, 2)]
    torch.testing.assert_close(model["q_proj"](x_BI), before)  # type: ignore[index]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 1 and "lora_B" in trained[0]
    gradients = []
    for seed in (1, 1, 2):
        again = body()
        probes = add_probes(again, rank=2, targets=["q_proj"], seed=seed)
        found = SampleGradients(probes, _Whole(8))
        gradients.append(found(lambda m=again: m["q_proj"](x_BI).square().sum(), answers=1))
    assert torch.equal(gradients[0], gradients[1]) and not torch.equal(gradients[0], gradients[2])
    with pytest.raises(SelectionError, match="no linear layer named k_proj; it has mlp, q_proj"):
        add_probes(body(), rank=2, targets=["k_proj"], seed=0)
