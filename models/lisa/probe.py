"""Which layers bear sharing: how much worse the model gets when one layer alone takes its predecessor's scores.

In the spirit of section 4 of the paper: shallow layers are sensitive to small deviations of attention. The figure
is the rise of the mean negative log-likelihood of held-out text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eagleray.models.lisa.teacher import LayerView, Visit, observing

NOISE = (0.05, 0.1, 0.2, 0.5)
"""Standard deviations of the noise, in those of the scores."""


def token_loss(model: Any, texts: Sequence[Tensor]) -> float:
    """Mean negative log-likelihood of token ids [B, T] under a causal language model."""
    counts = torch.tensor([len(row) - 1 for ids in texts for row in ids])
    return (text_losses(model, texts) @ counts.double() / counts.sum()).item()


@torch.no_grad()
def text_losses(model: Any, texts: Sequence[Tensor]) -> Tensor:
    """Mean negative log-likelihood of each text, float64, [N]; token ids are batches [B, T] without padding."""
    losses = []
    for ids in texts:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss_N = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        losses.append(loss_N.double().view(len(ids), -1).mean(1).cpu())
    return torch.cat(losses)


def probe_sharing(
    model: Any,
    texts: Sequence[Tensor],
    *,
    layers: Sequence[int] | None = None,
    permutations: Mapping[int, Sequence[int]] | None = None,
) -> dict[int, float]:
    """Layer -> rise of the loss when it alone uses the scores of the layer below.

    Args:
        model: An unconverted causal language model.
        texts: Token ids [B, T], without padding.
        layers: Layers to try; default: all but layer 0.
        permutations: For each layer the order of heads in which it takes the scores; default: as they are.

    Raises:
        ValueError: Layer 0 is among the layers.
    """
    chosen = range(1, model.config.num_hidden_layers) if layers is None else layers
    if any(i < 1 for i in chosen):
        raise ValueError("Layer 0 can't be probed: there is no layer below it. Start at 1.")
    base = token_loss(model, texts)
    found = {}
    for i in chosen:
        order = None if permutations is None else list(permutations[i])

        def share(view: LayerView, order: list[int] | None = order) -> Tensor:
            assert view.below is not None, "the source is given below"
            return view.below if order is None else view.below[:, order]

        found[i] = _loss_with(model, texts, share, {i: i - 1}) - base
    return found


def probe_noise(
    model: Any, texts: Sequence[Tensor], *, sigmas: Sequence[float] = NOISE, seed: int = 0
) -> dict[int, dict[float, float]]:
    """Layer -> noise -> rise of the loss when that layer's scores get Gaussian noise.

    Args:
        model: An unconverted causal language model.
        texts: Token ids [B, T], without padding.
        sigmas: Standard deviations, in those of the layer's visible scores.
        seed: Of the noise; every layer and strength gets the same.
    """
    base = token_loss(model, texts)
    found: dict[int, dict[float, float]] = {}
    for i in range(model.config.num_hidden_layers):
        found[i] = {}
        for sigma in sigmas:
            generator = torch.Generator().manual_seed(seed)

            def disturb(
                view: LayerView, sigma: float = sigma, generator: torch.Generator = generator
            ) -> Tensor:
                spread = view.scores[view.mask.expand_as(view.scores)].std()
                noise = torch.randn(view.scores.shape, generator=generator).to(view.scores)
                return view.scores + sigma * spread * noise

            found[i][sigma] = _loss_with(model, texts, disturb, {i: None}) - base
    return found


def _loss_with(model: Any, texts: Sequence[Tensor], visit: Visit, layers: Mapping[int, int | None]) -> float:
    with observing(model, visit, layers=layers):
        return token_loss(model, texts)
