"""Timing one model on one prompt: prefill, steps of decoding, peak memory, bytes of the cache.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from eagleray.models.lisa.cache import cache_bytes

CacheKind = Literal["dynamic", "static"]


@torch.no_grad()
def time_decoding(
    model: Any, ids: Tensor, *, new_tokens: int, cache: CacheKind = "static"
) -> dict[str, float]:
    """Run prompts [B, T] and decode greedily after them.

    Args:
        model: A causal language model, in evaluation mode.
        ids: Token ids on the model's device.
        new_tokens: Steps of decoding, at least 1.
        cache: `dynamic` grows with every token; `static` has its full length from the start.

    Returns:
        `prefill_seconds`; `step_seconds`, the median over steps; `tokens_per_second` of the batch while decoding;
        `cache_bytes` at the end; `peak_bytes`, the most memory at any time beyond what was in use before: of tensors
        on a GPU, of the process on a CPU under Linux.
    """
    device = ids.device
    length = ids.shape[1] + new_tokens
    room = (
        StaticCache(config=model.config, max_cache_len=length)
        if cache == "static"
        else DynamicCache(config=model.config)
    )
    before = _reset_peak(device)
    marks = [_now(device)]
    token = ids
    for _ in range(1 + new_tokens):
        output = model(input_ids=token, past_key_values=room, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
        marks.append(_now(device))
    steps = [after - start for start, after in pairwise(marks[1:])]
    return {
        "prefill_seconds": marks[1] - marks[0],
        "step_seconds": median(steps),
        "tokens_per_second": len(ids) * new_tokens / sum(steps),
        "cache_bytes": cache_bytes(room),
        "peak_bytes": max(0, _peak(device) - before),
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _reset_peak(device: torch.device) -> int:
    """Forget the highest use of memory; bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
