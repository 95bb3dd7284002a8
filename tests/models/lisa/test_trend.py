"""Acceptance check 24, as far as it runs here: the trend, on a small model trained to copy."""

from __future__ import annotations

import torch
from builders import tiny_model
from torch import Tensor

from eagleray.models.lisa.baselines import direct_sharing
from eagleray.models.lisa.convert import convert
from eagleray.models.lisa.distill import LayerDistiller, record_inputs
from eagleray.models.lisa.probe import token_loss
from eagleray.models.lisa.spec import LisaSpec


def copies(seed: int, batch: int = 24) -> Tensor:
    """Eight random tokens, twice: the second half can be known, and only by attending to the first."""
    first = torch.randint(1, 32, (batch, 8), generator=torch.Generator().manual_seed(seed))
    return torch.cat([first, first], 1)


def test_direct_sharing_collapses_and_lisa_stays_close() -> None:
    """Layers 2 and 3 of a model that has learned to copy share: as they are, and as converted and distilled."""
    model = tiny_model(
        "llama", vocab_size=32, num_hidden_layers=4, num_key_value_heads=4, head_dim=16, initializer_range=0.1
    )
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(250):
        optimiser.zero_grad()
        ids = copies(step)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimiser.step()
    held = [copies(10_000, 64)]
    full = token_loss(model, held)
    assert full < 0.7 * token_loss(tiny_model("llama", vocab_size=32), held), "the model has learned"
    direct = token_loss(direct_sharing(model, (2, 3)), held) - full
    student = convert(model, LisaSpec(shared_layers=(2, 3), rank=4), [copies(9_000)])
    distiller = LayerDistiller(model, student)
    added = torch.optim.Adam([p for p in distiller.parameters() if p.requires_grad], lr=5e-3)
    inputs = [record_inputs(model, copies(9_000 + i), layers=distiller.layers) for i in range(4)]
    for step in range(60):
        added.zero_grad()
        torch.stack(list(distiller(inputs[step % 4]).values())).sum().backward()
        added.step()
    shared = token_loss(student, held) - full
    assert shared < direct / 4, f"{full:.3f} rises by {direct:.3f} and {shared:.3f}"
