"""How the processes of a run compute on a CPU: threads, and the library that multiplies linear layers.

torch hands products in float32 to MKL, which leaves half of the vector units of AMD's processors with AVX-512 idle. oneDNN,
which torch carries too, uses them: on two cores the products of a linear layer then take 0.45 times as long, forward and
backward (docs/decisions/0016-linear-on-amd.md). It computes in float32 all the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_mkl_linear = F.linear


def set_up_torch(threads: int | None = None) -> None:
    """Let this process multiply linear layers by the faster library, and compute with so many threads if given.

    It replaces `torch.nn.functional.linear`, which all linear layers call, so it is for processes of our own.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    F.linear = linear if one_dnn_is_faster() else _mkl_linear


def one_dnn_is_faster() -> bool:
    """Whether this is a processor of AMD with AVX-512, and torch has oneDNN."""
    maker = torch.cpu.get_capabilities().get("cpu_name", "")
    return (
        "AMD" in maker
        and "AVX512" in torch.backends.cpu.get_cpu_capability()
        and torch.backends.mkldnn.is_available()
    )


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`input` [..., I] times `weight` [O, I] transposed, plus `bias` [O]: oneDNN if it pays, else what torch does.

    It pays in float32 on a CPU, for products that are not too small and have few or many rows.
    """
    if _pays(input, weight):
        return (
            _OneDnnLinear.apply(input, weight, bias)
            if torch.is_grad_enabled()
            else _multiply(input, weight, bias)
        )
    return _mkl_linear(input, weight, bias)


class _OneDnnLinear(torch.autograd.Function):
    """The product, with gradients that are products of the same kind."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        return _multiply(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        input, weight = ctx.saved_tensors
        wants_input, wants_weight, wants_bias = ctx.needs_input_grad
        (grad,) = grads
        grad_NO, input_NI = grad.flatten(0, -2), input.flatten(0, -2)
        weight_grad: Tensor | None = None
        if wants_weight:
            # oneDNN copies a transposed first factor, so that should be the smaller one.
            wide = len(weight) > weight.shape[1]
            weight_grad = linear(input_NI.T, grad_NO.T).T if wide else linear(grad_NO.T, input_NI.T)
        return (
            linear(grad, weight.T) if wants_input else None,
            weight_grad,
            grad_NO.sum(0) if wants_bias else None,
        )


def _multiply(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")


def _pays(input: Tensor, weight: Tensor) -> bool:
    if input.dtype != torch.float32 or weight.dtype != torch.float32 or weight.dim() != 2 or input.dim() < 2:
        return False
    if input.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    work, entries = input.numel() * weight.shape[0], weight.numel()
    rows = work // max(1, entries)
    # Between 12 and 64 rows MKL was the faster one, and for small products the way to oneDNN takes longer than they do.
    return work >= 2**19 and entries >= 2**18 if rows <= 12 else rows >= 64 and work >= 2**23
