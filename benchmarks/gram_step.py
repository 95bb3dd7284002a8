"""One fine-tuning step: the label position and two label rows, against the logits of the whole vocabulary.

    python -m benchmarks.gram_step [--quick] [--threads N]

Compared: forward, backward, clipping and fused AdamW of the same model on the same batch with the same loss
(`pair_logit_loss`). Ours computes `label_logits`; the other side the ordinary way, `model(...).logits` and then
the two labels at the last position. Nothing else differs: no padding, no attention mask and no cache on either
side, so the ratio is the gain of computing only what is read: no logits of other positions and words, and in the last
layer nothing but keys and values of other positions. The first losses must agree.

- `speedup`: steps per second, ours over the other.
- `memory`: peak resident memory of the process minus that before the model was made, ours over the other; so
  weights, gradients, both moments of AdamW and all activations count. Measured in further processes, one a side,
  where freed blocks return to the system at once, over three steps. The peaks of the timed processes, where the
  holes in glibc's heap come on top (on both sides, and more with every step), are `peak_bytes_with_heap`.
- `mfu`: model FLOPs of our step over its time times the matmul peak of the same round. Counted: 6 FLOPs for
  each weight of the blocks' linear layers and each position (2 forward, 4 backward), attention at its causal
  half (T(T+1)/2 scores a head, two products forward, four backward), the two head rows at the label positions. In the
  last layer all but keys and values counts at the label positions only, as it is computed there only.
  Not counted: norms, rotary code, softmax, embedding look-up, AdamW; nothing is recomputed. The peak is the
  best of square products of two sizes by both ways to multiply, in a process with as many threads.

On a GPU everything is in bf16 and memory is that of its allocator.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.harness import Ratio, Side, finish, interleave, median_ratio, start
from eagleray.models.backbone.model import build_llama, llama_config
from eagleray.models.gram.losses import pair_logit_loss
from eagleray.models.gram.scoring import label_logits

LABEL_IDS = (70, 71)


@dataclass(frozen=True)
class Size:
    """Model and batch."""

    width: int = 512
    layers: int = 8
    vocab_size: int = 32_000
    batch: int = 8
    tokens: int = 512


QUICK = Size(width=64, layers=2, vocab_size=2000, batch=2, tokens=64)


def step_flops(size: Size, *, mlp_width: int) -> float:
    """Model FLOPs of our step, counted as the module says."""
    positions, below = size.batch * size.tokens, size.layers - 1
    key_value, others = 2 * size.width**2, 2 * size.width**2 + 3 * size.width * mlp_width
    weights = (size.layers * key_value + below * others) * positions + others * size.batch
    scores = below * size.batch * size.tokens * (size.tokens + 1) / 2 + size.batch * size.tokens
    # Per score and product: 2 x width over all heads; two products forward and four backward.
    return 6 * weights + 6 * 2 * size.width * scores + 6 * 2 * size.width * size.batch


def build_step(*, narrow: bool, size: Size) -> Callable[[], tuple[float, float]]:
    """A step of one side; it returns its seconds and the loss before it."""
    device, dtype = _device()
    config = llama_config(
        vocab_size=size.vocab_size, width=size.width, layers=size.layers, heads=size.width // 64
    )
    model = build_llama(config, seed=0).to(device, dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, size.vocab_size, (size.batch, size.tokens), generator=generator).to(device)
    labels_B = torch.arange(size.batch, device=device) % 2
    mask_BT = torch.ones_like(ids_BT)

    def step() -> tuple[float, float]:
        _synchronize()
        started = time.perf_counter()
        outputs = None  # as in an ordinary loop, where they stay in scope until the step is over
        if narrow:
            logits_B2 = label_logits(model, ids_BT, mask_BT, LABEL_IDS)
        else:
            outputs = model(input_ids=ids_BT, use_cache=False)
            logits_B2 = outputs.logits[:, -1, list(LABEL_IDS)]
        loss = pair_logit_loss(logits_B2, labels_B, smoothing=0.1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _synchronize()
        return time.perf_counter() - started, loss.item()

    return step


def build_matmul(*, sizes: tuple[int, ...]) -> Callable[[], float]:
    """A measurement of the matmul peak in FLOP/s: the best of a few products of each size."""
    device, dtype = _device()
    factors = [torch.randn(2, n, n, device=device).to(dtype) for n in sizes]
    results = [torch.empty(n, n, device=device, dtype=dtype) for n in sizes]

    def peak() -> float:
        best = 0.0
        for (a, b), out in zip(factors, results, strict=True):
            for multiply in 4 * [partial(torch.mm, a, b, out=out), partial(F.linear, a, b)]:
                _synchronize()
                started = time.perf_counter()
                multiply()
                _synchronize()
                best = max(best, 2 * len(a) ** 3 / (time.perf_counter() - started))
        return best

    return peak


def main() -> None:
    """Measure and print."""
    options, machine = start(__doc__ or "", use_gpu=True)
    size, rounds = (QUICK, 2) if options.quick else (Size(), 7)
    mlp_width = llama_config(
        vocab_size=size.vocab_size, width=size.width, layers=size.layers, heads=1
    ).intermediate_size
    peak_sizes = (256,) if options.quick else (8192,) if machine["gpu"] else (2048, 3072)
    with (
        Side(build_step, threads=options.threads, narrow=True, size=size) as ours,
        Side(build_step, threads=options.threads, narrow=False, size=size) as full,
        Side(build_matmul, threads=options.threads, sizes=peak_sizes) as matmul,
    ):
        sides: dict[str, Any] = {"ours": ours, "matmul": matmul, "full": full}
        [[_, our_loss]], _, [[_, full_loss]] = interleave(sides, rounds=1).values()  # warm-up, no moments yet
        if abs(our_loss - full_loss) > (1e-5 if machine["gpu"] is None else 1e-2):
            raise AssertionError(f"the sides compute different losses: {our_loss} and {full_loss}")
        results = interleave(sides, rounds=rounds, seconds=120)
        with_heap = {"ours": ours.peak_memory(), "full": full.peak_memory()}
    memory = {name: _exact_peak(options.threads, narrow=name == "ours", size=size) for name in with_heap}
    seconds = {name: [reading[0] for reading in results[name]] for name in ("ours", "full")}
    flops = step_flops(size, mlp_width=mlp_width)
    rates = [flops / value for value in seconds["ours"]]
    ours_s, full_s, peak = (median(values) for values in (*seconds.values(), results["matmul"]))
    gib = {name: value / 2**30 for name, value in memory.items()}
    finish(
        "gram_step",
        [
            Ratio(
                "speedup",
                "steps/s, label rows only over full vocabulary",
                median_ratio(seconds["full"], seconds["ours"]),
                1.6,
                "high",
                f"{ours_s:.3g} s, {full_s:.3g} s",
            ),
            Ratio(
                "memory",
                "peak memory, label rows only over full vocabulary",
                memory["ours"] / memory["full"],
                0.7,
                "low",
                f"{gib['ours']:.2f} GiB, {gib['full']:.2f} GiB",
            ),
            Ratio(
                "mfu",
                "FLOP/s of our step over the matmul peak",
                median_ratio(rates, results["matmul"]),
                0.65,
                "high",
                f"{flops / ours_s / 1e9:.0f} GFLOP/s, {peak / 1e9:.0f} GFLOP/s",
            ),
        ],
        machine=machine,
        quick=options.quick,
        size=asdict(size),
        precision="bf16" if machine["gpu"] else "fp32",
        rounds=len(seconds["ours"]),
        step_flops=flops,
        step_s=seconds,
        peak_bytes=memory,
        peak_bytes_with_heap=with_heap,
        matmul_flops_per_s=results["matmul"],
    )


def _exact_peak(threads: int, *, narrow: bool, size: Size) -> int:
    with Side(build_step, threads=threads, exact_memory=True, narrow=narrow, size=size) as side:
        for _ in range(3):
            side()
        return side.peak_memory()


def _device() -> tuple[torch.device, torch.dtype]:
    gpu = torch.cuda.is_available()
    return torch.device("cuda" if gpu else "cpu"), torch.bfloat16 if gpu else torch.float32


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
