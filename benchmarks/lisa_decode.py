"""Decoding with shared attention scores: tokens a second, prefill time and cache bytes against the full model.

    python -m benchmarks.lisa_decode [--quick] [--threads N]

Random weights, fp32, CPU, batch 8, static caches filled with random numbers (neither side's time depends on them).
Six layers of head size 128; five of them (83 %) share, rank 20, `linear+ffn` alignment: the defaults. The layers are
those of LLaMA2 (as many KV heads as query heads) and LLaMA3 (four query heads to a KV head) with fewer heads, which
flatters alignment, whose arithmetic grows with the square of the heads; docs/lisa.md has the formula.

- `mha_8k`, `gqa_8k`, `mha_2k`: decoded tokens a second over those of the base, at 8,192 and 2,048 tokens. The base is
  the faster of transformers' SDPA and of grouped matrix products (which read a KV head once for all its queries and
  choose the factor order that streams keys fastest), measured in the same rounds, on transformers' static cache.
- `same_layout`, beside the ratios: the same over a base whose values lie in memory as ours do (`models/lisa/cache.py`), which
  transformers does not offer; what is left then is sharing alone.
- `prefill`: time of a prompt of 2,048 tokens over that of the base with SDPA, the larger of both shapes.
- `cache_bytes_error`: bytes of the shared cache less those of the formula, summed over all caches; exact.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.harness import Ratio, Side, finish, interleave, median_ratio, start

_LAYERS = 6
_SHAPES = {"mha": (4, 4), "gqa": (4, 1)}
"""Query heads and KV heads."""
_KERNELS = ("sdpa", "lisa_grouped")


class Subject:
    """One model with its cache, in the process of a side."""

    def __init__(self, *, shape: str, shared: bool, batch: int, head_size: int, rank: int) -> None:
        from transformers import LlamaForCausalLM

        from eagleray.models.backbone.model import llama_config
        from eagleray.models.lisa.convert import Start, convert
        from eagleray.models.lisa.spec import LisaSpec

        torch.manual_seed(0)
        torch.set_grad_enabled(False)
        self.batch = batch
        heads, kv_heads = _SHAPES[shape]
        config = llama_config(
            vocab_size=1024,
            width=heads * head_size,
            layers=_LAYERS,
            heads=heads,
            kv_heads=kv_heads,
            max_length=2**14,
        )
        self.model: Any = LlamaForCausalLM(config).eval()
        if shared:
            spec = LisaSpec(shared_layers=tuple(range(1, _LAYERS)), rank=rank, score_budget=16)
            self.model = convert(self.model, spec, start=Start(align="identity"))
        self.spec: LisaSpec = self.model.model.lisa if shared else LisaSpec()
        self.cache: Any = None

    def fill(self, context: int, steps: int, our_layout: bool = False) -> int:
        """Make a static cache with `context` tokens in it; bytes it has beyond the formula."""
        from transformers import StaticCache

        from eagleray.models.lisa.accounting import cache_bytes_per_token
        from eagleray.models.lisa.cache import Layout, LisaStaticLayer, cache_bytes, prepare_cache

        self.cache = None
        config, self.context, self.steps = self.model.config, context, steps
        cache = StaticCache(config=config, max_cache_len=context + steps)
        prepare_cache(cache, config, self.spec.shared_layers)
        groups, size = config.num_key_value_heads, config.head_dim
        if our_layout:
            layout = Layout(config.num_attention_heads // groups, low_rank_keys=False)
            cache.layers = [LisaStaticLayer(layout, max_cache_len=context + steps) for _ in range(_LAYERS)]
        for i in range(_LAYERS):
            width = self.spec.rank_of(i) if i in self.spec.shared_layers else size
            cache.update(
                torch.randn(self.batch, groups, context, width),
                torch.randn(self.batch, groups, context, size),
                i,
            )
        self.cache = cache
        per_token = cache_bytes_per_token(config, self.spec, value_bytes=4)
        return abs(cache_bytes(cache) - self.batch * (context + steps) * per_token)

    def decode(self, kernel: str) -> float:
        """Tokens a second."""
        self.model.set_attn_implementation(kernel)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context)
        token = torch.ones(self.batch, 1, dtype=torch.long)
        self.model(input_ids=token, past_key_values=self.cache)
        started = time.perf_counter()
        for _ in range(self.steps - 1):
            logits = self.model(input_ids=token, past_key_values=self.cache).logits
            token = logits[:, -1:].argmax(-1)
        return self.batch * (self.steps - 1) / (time.perf_counter() - started)

    def prefill(self, length: int, batch: int) -> float:
        """Seconds for the prompts of a batch, with an empty static cache."""
        from transformers import StaticCache

        self.cache = None
        self.model.set_attn_implementation("sdpa")
        ids = torch.ones(batch, length, dtype=torch.long)
        cache = StaticCache(config=self.model.config, max_cache_len=length)
        started = time.perf_counter()
        self.model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        return time.perf_counter() - started


def build(**options: Any) -> Callable[..., Any]:
    """A subject; what a round calls names one of its methods."""
    subject = Subject(**options)
    return lambda method, *args: getattr(subject, method)(*args)


def main() -> None:
    """Measure and print."""
    options, machine = start(__doc__ or "", use_gpu=False)
    quick = options.quick
    rounds, steps = (3, 3) if quick else (7, 9)
    sizes = {"batch": 2, "head_size": 32, "rank": 4} if quick else {"batch": 8, "head_size": 128, "rank": 20}
    contexts = (
        {"mha": {"8k": 256, "2k": 64}, "gqa": {"8k": 256}}
        if quick
        else {"mha": {"8k": 8192, "2k": 2048}, "gqa": {"8k": 8192}}
    )
    prompt = (64, 1) if quick else (2048, 2)
    speed: dict[str, dict[str, list[float]]] = {}
    prefill: dict[str, dict[str, list[float]]] = {}
    bytes_error = 0
    for shape, lengths in contexts.items():
        side = {"threads": options.threads, "shape": shape, **sizes}
        with (
            Side(build, shared=False, **side) as base,
            Side(build, shared=False, **side) as relaid,
            Side(build, shared=True, **side) as lisa,
        ):
            for name, context in lengths.items():
                bytes_error += base("fill", context, steps) + lisa("fill", context, steps)
                relaid("fill", context, steps, True)
                parts = {kernel: lambda k=kernel: base("decode", k) for kernel in _KERNELS}
                parts["our_layout"] = lambda: relaid("decode", "lisa_grouped")
                speed[f"{shape}_{name}"] = interleave(
                    parts | {"lisa": lambda: lisa("decode", "sdpa")}, rounds=rounds
                )
            prefill[shape] = interleave(
                {"base": lambda: base("prefill", *prompt), "lisa": lambda: lisa("prefill", *prompt)}, rounds=3
            )
    ratios = [
        _decode_ratio(key, speed[key], target)
        for key, target in (("mha_8k", 1.5), ("gqa_8k", 1.3), ("mha_2k", 1.2))
    ]
    slower = {shape: median_ratio(parts["lisa"], parts["base"]) for shape, parts in prefill.items()}
    worst = max(slower, key=lambda shape: slower[shape])
    times = " / ".join(f"{median(prefill[worst][side]):.2f} s" for side in ("lisa", "base"))
    ratios += [
        Ratio(
            "prefill",
            f"prompt of {prompt[0]} tokens, {worst}: time over base",
            slower[worst],
            1.3,
            "low",
            times,
        ),
        Ratio("cache_bytes_error", "cache bytes beyond the formula", bytes_error, 0, "low"),
    ]
    decoded = {
        key: {name: round(median(values), 2) for name, values in parts.items()}
        for key, parts in speed.items()
    }
    finish(
        "lisa_decode",
        ratios,
        machine=machine,
        quick=quick,
        tokens_per_second=decoded,
        same_layout={
            key: round(median_ratio(parts["lisa"], parts["our_layout"]), 3) for key, parts in speed.items()
        },
        prefill={k: round(v, 3) for k, v in slower.items()},
    )


def _decode_ratio(key: str, parts: dict[str, list[float]], target: float) -> Ratio:
    fastest = max(_KERNELS, key=lambda kernel: median(parts[kernel]))
    measured = f"{median(parts['lisa']):.1f} / {median(parts[fastest]):.1f} tokens/s"
    label = f"decoding, {key.replace('_', ' at ')}: shared over full ({fastest})"
    return Ratio(key, label, median_ratio(parts["lisa"], parts[fastest]), target, "high", measured)


if __name__ == "__main__":
    main()
