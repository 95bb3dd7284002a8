"""A tiny teacher and what it is converted into, in float64 so that equal means equal to 1e-9."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import Architecture, tiny_model
from torch import Tensor

from eagleray.models.lisa.convert import Start, convert
from eagleray.models.lisa.spec import AlignSpec, LisaSpec

LAYERS = 6


@pytest.fixture
def make_teacher() -> Callable[..., Any]:
    """A random model of 6 layers, width 32, 4 heads of 8 and 2 KV heads."""

    def make(
        architecture: Architecture = "llama", *, dtype: torch.dtype = torch.float64, **config: Any
    ) -> Any:
        options = {"vocab_size": 64, "num_hidden_layers": LAYERS, **config}
        model = tiny_model(architecture, **options).to(dtype)
        for name, parameter in model.named_parameters():  # norms and biases are constant in a fresh model
            if parameter.ndim == 1:
                with torch.no_grad():
                    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                    parameter.add_(0.1 * noise.to(parameter))
        return model

    return make


@pytest.fixture
def make_pair(make_teacher: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """A teacher and a student whose added weights are all random, so that nothing hides behind a zero."""

    def make(
        architecture: Architecture = "llama",
        *,
        shared: tuple[int, ...] = (2, 3, 5),
        align: AlignSpec | None = None,
        scatter: float = 0.3,
        config: dict[str, Any] | None = None,
        dtype: torch.dtype = torch.float64,
        **spec: Any,
    ) -> tuple[Any, Any]:
        teacher = make_teacher(architecture, dtype=dtype, **(config or {}))
        options: dict[str, Any] = {"rank": 4, **spec}
        student = convert(
            teacher,
            LisaSpec(shared_layers=shared, align=align or AlignSpec(), **options),
            start=Start(align="identity"),
        )
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                if "_lr." in name or ".align." in name:
                    parameter.add_(scatter * torch.randn(parameter.shape, generator=generator).to(parameter))
        return teacher, student

    return make


@pytest.fixture
def ids() -> Tensor:
    """Two texts of 14 tokens."""
    return torch.randint(1, 64, (2, 14), generator=torch.Generator().manual_seed(2))
