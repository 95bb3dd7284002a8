"""How the processes of a run compute on a CPU: threads, and the library that multiplies linear layers.

torch hands products in float32 to MKL. On processors of AMD with AVX-512 oneDNN, which torch carries too, is faster: the
products of a linear layer take about half as long, forward and backward, in float32 all the same
(docs/decisions/0016-linear-on-amd.md).
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_torch_linear = F.linear


def set_up_torch(threads: int | None = None) -> None:
    """Let this process multiply linear layers by the faster library, and compute with so many threads if given.

    It replaces `torch.nn.functional.linear`, which all linear layers call, so it is for processes of our own.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if one_dnn_is_faster():
        # oneDNN prepares a program for every shape and keeps 1,024 of them. With texts of all lengths they become many, and
        # lie between the large blocks of the heap, so that freed ones can't be joined: gigabytes in place of megabytes.
        for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
            os.environ.setdefault(name, "64")
        F.linear = linear


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
    if not _pays(input, weight):
        return _torch_linear(input, weight, bias)
    return (_OneDnnLinear.apply if torch.is_grad_enabled() else _multiply)(input, weight, bias)


class _OneDnnLinear(torch.autograd.Function):
    """The product, with gradients that are products of the same kind."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wants_input, wants_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(input if wants_weight else None, weight if wants_input else None)
        ctx.wide = len(weight) > weight.shape[1]
        return _multiply(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        input, weight = ctx.saved_tensors
        (grad,) = grads
        grad_NO = grad.flatten(0, -2)
        weight_grad: Tensor | None = None
        if input is not None:
            input_NI = input.flatten(0, -2)
            # oneDNN copies a transposed first factor, so that should be the smaller one.
            weight_grad = linear(input_NI.T, grad_NO.T).T if ctx.wide else linear(grad_NO.T, input_NI.T)
        return (
            None if weight is None else linear(grad, weight.T),
            weight_grad,
            grad_NO.sum(0) if ctx.needs_input_grad[2] else None,
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
    # Between 12 and 64 rows MKL was the faster one. Below 2^25 multiplications preparing a shape that never comes again
    # takes longer than oneDNN saves; few rows are steps of decoding, whose shapes come again.
    return work >= 2**19 and entries >= 2**18 if rows <= 12 else rows >= 64 and work >= 2**25
