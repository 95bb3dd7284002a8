"""Linear layers by oneDNN: the same values and gradients as torch's own, and only where it pays."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eagleray.platform import cpu


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the inputs that oneDNN got."""
    shapes: list[tuple[int, ...]] = []

    def counted(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shapes.append(tuple(input.shape))
        return multiply(input, weight, bias)

    multiply = cpu._multiply
    monkeypatch.setattr(cpu, "_multiply", counted)
    return shapes


def _gradients(function: object, x: Tensor, w: Tensor, b: Tensor | None) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (x, w, b) if t is not None]
    out = function(*leaves, *([None] if b is None else []))  # type: ignore[operator]
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out, *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("shape", [(256,), (8, 40), (2, 3, 64)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(320, 512), (512, 320)])
def test_values_and_gradients_are_those_of_torch(
    shape: tuple[int, ...], bias: bool, inputs: int, outputs: int, calls: list[tuple[int, ...]]
) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(*shape, inputs), torch.randn(outputs, inputs)
    b = torch.randn(outputs) if bias else None
    ours, theirs = _gradients(cpu.linear, x, w, b), _gradients(F.linear, x, w, b)
    assert len(calls) == 3, "the product and both gradients"
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-4)


def test_strided_factors_and_second_derivatives(calls: list[tuple[int, ...]]) -> None:
    """As in a tied head or a product with a table: the weight is a transposed view, the input a slice."""
    torch.manual_seed(0)
    x = torch.randn(640, 300)[:, ::2].T.requires_grad_()
    w = torch.randn(640, 512).T.requires_grad_()

    def second(function: object) -> list[Tensor]:
        out = function(x, w).square().sum()  # type: ignore[operator]
        first = torch.autograd.grad(out, [x, w], create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), [x, w])]

    for mine, its in zip(second(cpu.linear), second(F.linear), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4 * its.detach().abs().max().item())
    assert calls


def test_a_frozen_weight_needs_neither_its_gradient_nor_the_input(calls: list[tuple[int, ...]]) -> None:
    x, w = torch.randn(256, 320, requires_grad=True), torch.randn(512, 320)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        out = cpu.linear(x, w)
    out.sum().backward()
    assert kept == [(512, 320)] and x.grad is not None and len(calls) == 2
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        cpu.linear(x.detach(), torch.randn(512, 320, requires_grad=True))
    assert kept == [(256, 320)], "the input, not the weight"


@pytest.mark.parametrize(
    ("rows", "width", "dtype"),
    [
        (64, 64, torch.float32),
        (32, 1024, torch.float32),
        (256, 512, torch.float64),
        (256, 512, torch.bfloat16),
    ],
    ids=["too small", "neither few nor many rows", "double", "half"],
)
def test_what_does_not_pay_is_left_to_torch(
    rows: int, width: int, dtype: torch.dtype, calls: list[tuple[int, ...]]
) -> None:
    x, w = torch.randn(rows, width, dtype=dtype), torch.randn(width, width, dtype=dtype)
    assert torch.equal(cpu.linear(x, w), F.linear(x, w))
    assert not calls


def test_autocast_and_empty_inputs_are_left_to_torch(calls: list[tuple[int, ...]]) -> None:
    x, w = torch.randn(256, 512), torch.randn(512, 512)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cpu.linear(x, w).dtype == torch.bfloat16
    assert cpu.linear(x[:0], w).shape == (0, 512)
    assert cpu.linear(x[0], w).shape == (512,)
    assert not calls


@pytest.mark.parametrize(
    ("maker", "vectors", "faster"),
    [("AMD EPYC", "AVX512", True), ("AMD EPYC", "AVX2", False), ("Intel(R) Xeon(R)", "AVX512", False)],
)
def test_only_processors_where_it_is_faster_use_it(
    maker: str, vectors: str, faster: bool, monkeypatch: pytest.MonkeyPatch, calls: list[tuple[int, ...]]
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": maker})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    cpu.set_up_torch(1)
    assert torch.get_num_threads() == 1
    assert os.environ.get("LRU_CACHE_CAPACITY") == ("64" if faster else None)
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7", "what the user has set stays"
    layer, x = nn.Linear(512, 512), torch.randn(4, 64, 512)
    layer(x)
    assert calls == ([(4, 64, 512)] if faster else [])
