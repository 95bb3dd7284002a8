from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from eagleray.models.lisa.accounting import (
    added_parameters,
    cache_bytes_per_token,
    full_layer_flops,
    past_break_even,
    removed_parameters,
    score_share,
    shared_layer_flops,
)
from eagleray.models.lisa.config import LisaLlamaConfig
from eagleray.models.lisa.convert import Start, convert
from eagleray.models.lisa.distill import set_trained
from eagleray.models.lisa.layers import LisaDecoderLayer
from eagleray.models.lisa.model import ARCHITECTURES, LisaLlamaModel
from eagleray.models.lisa.spec import AlignSpec, LisaSpec

Make = Callable[..., Any]


def llama3_8b(n: int, *, rank: int = 20, key_heads: int | None = None, align: AlignSpec | None = None) -> Any:
    """Config of LLaMA3-8B whose last `n` layers share."""
    spec = LisaSpec(
        shared_layers=tuple(range(32 - n, 32)),
        rank=rank,
        key_heads=key_heads,
        align=align or AlignSpec(kind="ffn", width=32),
    )
    return LisaLlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        lisa_attention=spec.to_dict(),
    )


@pytest.mark.parametrize(
    ("n", "rank", "key_heads", "expected"),
    [(17, 20, 8, 55_741_504), (27, 20, 8, 88_530_624), (17, 20, 32, 89_164_864), (17, 16, 8, 44_600_384)],
)
def test_added_parameters_of_llama3_8b(n: int, rank: int, key_heads: int, expected: int) -> None:
    """Check 16: the integers of the specification, by formula and on the model itself (without memory)."""
    config = llama3_8b(n, rank=rank, key_heads=key_heads)
    spec = LisaSpec.from_dict(config.lisa_attention)
    assert added_parameters(config, spec) == expected
    with torch.device("meta"):
        model = LisaLlamaModel(config)
    set_trained(model, "lisa")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    plain = LisaLlamaConfig(**config.to_dict() | {"lisa_attention": None})
    with torch.device("meta"):
        full = LisaLlamaModel(plain)
    size, full_size = (sum(p.numel() for p in m.parameters()) for m in (model, full))
    assert full_size - size == removed_parameters(config, spec) - expected


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_conversion_adds_and_removes_what_the_formula_says(make_pair: Make, architecture: str) -> None:
    """Checks 16 and 18: no q_proj and k_proj in shared layers; the rest is counted, biases and norms too."""
    teacher, student = make_pair(architecture, align=AlignSpec(kind="glu", width=3))
    for i, layer in enumerate(student.model.layers):
        names = {name.split(".")[0] for name, _ in layer.self_attn.named_parameters()}
        assert ({"q_proj", "k_proj"} <= names) == (i not in (2, 3, 5))
        assert isinstance(layer, LisaDecoderLayer) == (i in (1, 2, 3, 4, 5))
        if i in (2, 3, 5):
            assert names == {"q_lr", "k_lr", "v_proj", "o_proj", "align"}
    spec = student.model.lisa
    before, after = (sum(p.numel() for p in m.parameters()) for m in (teacher, student))
    added, removed = added_parameters(student.config, spec), removed_parameters(student.config, spec)
    assert before - after == removed - added
    set_trained(student, "lisa")
    assert sum(p.numel() for p in student.parameters() if p.requires_grad) == added
    set_trained(student, "full")
    assert all(p.requires_grad for p in student.parameters())
    with pytest.raises(ValueError, match="must be 'lisa' or 'full'"):
        set_trained(student, "lora")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("n", "rank", "key_heads", "mebibytes"),
    [(17, 20, 8, 794.5), (27, 20, 8, 659.5), (17, 20, 32, 922), (27, 32, 32, 1024)],
)
def test_cache_of_llama3_8b(n: int, rank: int, key_heads: int, mebibytes: float) -> None:
    """Table of section 4 of the specification: bf16, 8,192 tokens."""
    config = llama3_8b(n, rank=rank, key_heads=key_heads)
    spec = LisaSpec.from_dict(config.lisa_attention)
    assert cache_bytes_per_token(config, spec, value_bytes=2) * 8192 / 2**20 == mebibytes


@pytest.mark.parametrize(
    ("rank", "width", "keys", "megaflops", "share"),
    [
        (20, 32, 2048, 76.3, 0.660),
        (20, 32, 8192, 159.9, 0.660),
        (32, 64, 8192, 203.7, 1.254),
        (20, 128, 8192, 260.6, 2.160),
    ],
)
def test_arithmetic_of_llama3_8b(rank: int, width: int, keys: int, megaflops: float, share: float) -> None:
    """Table of section 7: one token through a shared layer, and its scores over full ones."""
    config = llama3_8b(1, rank=rank, align=AlignSpec(kind="ffn", width=width))
    spec = LisaSpec.from_dict(config.lisa_attention)
    assert round(shared_layer_flops(config, spec, 31, keys) / 1e6, 1) == megaflops
    assert round(score_share(spec, 31, heads=32, size=128), 3) == share
    assert round(full_layer_flops(config, 8192) / 1e6, 1) == 218.1


@pytest.mark.parametrize("kind", ["identity", "linear", "ffn", "linear+ffn", "glu"])
def test_arithmetic_is_what_a_counter_counts(make_teacher: Make, kind: Any) -> None:
    """Check 19: within 1 % on one decode step of a shared layer, by torch's counter of matrix products."""
    teacher = make_teacher(
        "llama",
        hidden_size=512,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=32,
        dtype=torch.float32,
    )
    spec = LisaSpec(shared_layers=(2,), rank=8, align=AlignSpec(kind=kind))
    student = convert(teacher, spec, start=Start(align="identity"))
    layer, cache, keys = student.model.layers[2].self_attn, DynamicCache(config=student.config), 256
    with torch.no_grad():
        student(input_ids=torch.ones(1, keys - 1, dtype=torch.long), past_key_values=cache)
        with FlopCounterMode(display=False) as counter:
            student(input_ids=torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    counted = next(value for name, value in counts.items() if name.endswith("model.layers.2.self_attn"))
    expected = shared_layer_flops(student.config, student.model.lisa, 2, keys)
    assert layer.layer_idx == 2 and abs(counted / expected - 1) < 0.01


def test_past_break_even_warns(make_teacher: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Check 19: r + 2m > d for `ffn`."""
    with caplog.at_level(logging.WARNING, logger="eagleray"):
        convert(
            make_teacher(),
            LisaSpec(shared_layers=(2,), rank=8, align=AlignSpec(kind="ffn")),
            start=Start(align="identity"),
        )
    assert "Layer 2: its scores take 2.06 times the arithmetic of full ones" in caplog.text
    fits, over = (
        LisaSpec(shared_layers=(1,), rank=20, align=AlignSpec(kind="ffn", width=m)) for m in (53, 55)
    )
    assert not past_break_even(fits, heads=32, size=128) and past_break_even(over, heads=32, size=128)


def test_cache_formula_is_that_of_full_layers_without_sharing(ids: Tensor) -> None:
    config = LisaLlamaConfig(
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, hidden_size=32
    )
    assert cache_bytes_per_token(config, LisaSpec(), value_bytes=2) == 4 * 2 * 2 * 8 * 2
