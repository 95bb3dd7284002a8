"""Gradients of every sample's loss with respect to low-rank weights, from one pass over a batch (RoVRM section 4.3).

A weight W [O, I] of a linear layer y = x W^T gets the gradient sum_t g_t x_t^T from one sequence, with g the gradient of
the loss with respect to y. Inputs and output gradients of a batch hold those of its samples apart, so one forward and
one backward pass give all of them; none is computed in a loop. Each layer's gradients are projected as soon as they are
there: what is held at a time is those of one layer.

The idea of comparing data by projected LoRA gradients is that of LESS (arXiv 2402.04333).

Shape letters: B samples, R rows of the model's batch (the answers of a sample lie together), T tokens, K numbers after
projection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from eagleray.models.selection.projection import RandomProjection
from eagleray.models.selection.rows import SelectionError


def add_probes(body: nn.Module, *, rank: int, targets: Sequence[str], seed: int) -> dict[str, nn.Linear]:
    """Give linear layers a new LoRA adapter and freeze everything else.

    The second factor of a new adapter is zero: outputs stay what they were, the gradient of the first factor is zero, and
    that of the second is the gradient of the whole weight seen through the first, random one. So only the second
    factors are returned.

    Args:
        body: Where the layers are; changed in place.
        rank: Of the adapters.
        targets: Last parts of the names of the layers, e.g. `q_proj`.
        seed: Of the random factors; the global random state stays as it was.

    Returns:
        The second factors by name, in the order of the model.

    Raises:
        SelectionError: There is no such layer.
    """
    names = [name for name, layer in body.named_modules() if isinstance(layer, nn.Linear)]
    if not any(name.rpartition(".")[2] in targets for name in names):
        known = sorted({name.rpartition(".")[2] for name in names})
        raise SelectionError(
            f"The model has no linear layer named {' or '.join(targets)}; it has {', '.join(known)}."
        )
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, body)
    probes: dict[str, nn.Linear] = {}
    for name, module in body.named_modules():
        if isinstance(module, nn.Linear) and ".lora_B." in name:
            probes[name] = module
    for parameter in body.parameters():
        parameter.requires_grad_(False)
    for probe in probes.values():
        probe.weight.requires_grad_(True)
    return probes


class SampleGradients:
    """Projected gradients of single samples with respect to the weights of some linear layers.

    Args:
        layers: The layers by name; each must be used once in a forward pass, on inputs [R, T, I] or [R, I].
        projection: Applied to the gradients of all layers as one long row.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], projection: RandomProjection) -> None:
        self._layers, self._project = dict(layers), projection
        sizes = [projection.blocks(layer.weight.numel()) for layer in self._layers.values()]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self._first_block = dict(zip(self._layers, starts, strict=True))

    def __call__(self, loss: Callable[[], Tensor], *, answers: int) -> Tensor:
        """Gradients of B samples.

        Args:
            loss: Runs the model and gives the sum of the samples' losses, each of which depends on its own rows only.
            answers: Rows of a sample; R = B · answers.

        Returns:
            Projected gradients [B, K] in float32.
        """
        total: list[Tensor] = []

        def add(name: str, input_: Tensor, gradient: Tensor) -> None:
            rows_BKK = _per_sample(input_, gradient, answers)
            found = self._project(rows_BKK.flatten(1), first_block=self._first_block[name])
            total[:] = [found if not total else total[0] + found]

        with ExitStack() as hooks, torch.enable_grad():
            for name, layer in self._layers.items():
                hooks.enter_context(_watched(name, layer, add))
            loss().backward()
        for layer in self._layers.values():
            layer.weight.grad = None
        return total[0]


def _per_sample(input_: Tensor, gradient: Tensor, answers: int) -> Tensor:
    """sum_t g_t x_t^T over all rows of each sample: [B, O, I] in float32."""
    x = input_.float().reshape(
        -1, answers * (input_.numel() // len(input_) // input_.shape[-1]), input_.shape[-1]
    )
    g = gradient.float().reshape(len(x), -1, gradient.shape[-1])
    return g.transpose(1, 2) @ x


class _watched:
    """While entered, `add` gets a layer's input and the gradient of its output, once a backward pass."""

    def __init__(self, name: str, layer: nn.Linear, add: Callable[[str, Tensor, Tensor], None]) -> None:
        self._name, self._layer, self._add = name, layer, add

    def __enter__(self) -> None:
        self._handle = self._layer.register_forward_hook(self._seen)

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _seen(self, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        kept = inputs[0].detach()
        output.register_hook(lambda gradient: self._add(self._name, kept, gradient))
