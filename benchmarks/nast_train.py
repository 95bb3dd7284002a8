"""Training: what the method costs on top of plain CTC, and how much of a batch is padding.

    python -m benchmarks.nast_train [--quick] [--threads N]

Both sides are the paper's encoders (12 + 12 layers of width 512, 10,000 tokens) in fp32, and see the same clips: `BATCH` clips
of 4 to 6 s with 25 target and 15 source pieces. A step is forward, backward and AdamW. The plain side has the CTC
losses at the top of both encoders and nothing else; the other adds intermediate CTC, prediction-aware encoding, the
adapter, cross-layer attention and curriculum mixing at the paper's ratio.

- `over_plain_ctc`: frames/s of the method over those of plain CTC, median over rounds. In the JSON, `parts`: the same for
  the method without mixing, which leaves out the pass that draws the oracle.
- `padding`: share of padding in the passes that the sampler cuts from batches of 512 clips at 40,000 frames a pass (the
  paper's budget); 100,000 clips whose lengths are log-normal around 5 s, between 0.5 and 30 s, as in talks. Beside it in the
  JSON: without batching by length.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Ratio, Side, finish, interleave, median_ratio, start
from eagleray.models.nast.config import NastConfig
from eagleray.models.nast.curriculum import Mixing
from eagleray.models.nast.losses import nast_loss
from eagleray.models.nast.model import NastModel
from eagleray.platform.data.sampler import BatchSampler, padding_share

PLAIN: dict[str, Any] = {
    "inner_source_layers": [],
    "inner_target_layers": [],
    "adapter": "none",
    "cross_layer_source": None,
}


@dataclass(frozen=True)
class Size:
    """Clips of one step, and the model where it is not the paper's."""

    clips: int = 4
    frames: int = 600
    source: int = 15
    target: int = 25
    model: dict[str, Any] | None = None


QUICK = Size(
    clips=2,
    frames=80,
    source=3,
    target=4,
    model={
        "vocab_size": 50,
        "width": 32,
        "heads": 2,
        "inner_width": 64,
        "subsampler_width": 64,
        "acoustic_layers": 3,
        "textual_layers": 3,
        "inner_source_layers": [1],
        "inner_target_layers": [2],
        "cross_layer_source": 1,
    },
)


def build_step(*, size: Size, changes: dict[str, Any], ratio: float) -> Callable[[], tuple[float, float]]:
    """A side; a round trains one step and returns frames a second and the loss."""
    torch.manual_seed(0)
    model = NastModel(NastConfig(**{**(size.model or {}), **changes})).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    lengths = torch.linspace(size.frames, size.frames * 2 // 3, size.clips).long()
    features = torch.randn(size.clips, size.frames, 80)
    labels = [torch.randint(4, model.config.vocab_size, (size.clips, n)) for n in (size.source, size.target)]
    counts = [torch.full((size.clips,), n) for n in (size.source, size.target)]
    batch = (features, lengths, labels[0], counts[0], labels[1], counts[1])

    def step() -> tuple[float, float]:
        started = time.perf_counter()
        loss, _ = nast_loss(model, *batch, mixing=Mixing(ratio=ratio))
        (loss / (counts[1] + 1).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        return int(lengths.sum()) / (time.perf_counter() - started), loss.item()

    return step


def measure_padding(*, clips: int, batches: int, bucket_batches: int) -> float:
    """Padding share of `batches` batches of 512 clips, cut at 40,000 frames a pass."""
    seconds = np.random.default_rng(0).lognormal(np.log(5.0), 0.7, clips).clip(0.5, 30.0)
    lengths = (seconds * 100).astype(int)
    sampler = BatchSampler(
        lengths,
        batch_size=512,
        micro_batch_size=512,
        seed=0,
        bucket_batches=bucket_batches,
        micro_batch_length=40_000,
    )
    passes = [piece for step in range(batches) for piece in sampler.micro_batches(step, rank=0, world_size=1)]
    return padding_share(passes, lengths)


def main() -> None:
    """Measure and print."""
    options, machine = start(__doc__ or "", use_gpu=False)
    size, rounds = (QUICK, 2) if options.quick else (Size(), 12)

    def side(changes: dict[str, Any], ratio: float) -> Side:
        return Side(build_step, threads=options.threads, size=size, changes=changes, ratio=ratio)

    with side({}, 0.8) as full, side({}, 0.0) as unmixed, side(PLAIN, 0.0) as plain:
        sides = {"method": full, "without_mixing": unmixed, "plain_ctc": plain}
        interleave(sides, rounds=1)
        results = interleave(sides, rounds=rounds, seconds=180)
    rates = {name: [rate for rate, _ in readings] for name, readings in results.items()}
    batches = 4 if options.quick else 190
    padding, unsorted_padding = (
        measure_padding(clips=100_000, batches=batches, bucket_batches=n) for n in (50, 0)
    )
    finish(
        "nast_train",
        [
            Ratio(
                "over_plain_ctc",
                "training frames/s, the method over plain CTC",
                median_ratio(rates["method"], rates["plain_ctc"]),
                0.5,
                "high",
                f"{median(rates['method']):.4g}, {median(rates['plain_ctc']):.4g}",
            ),
            Ratio(
                "padding",
                "share of padding, batches by length",
                padding,
                0.1,
                "low",
                f"{padding:.3f}; {unsorted_padding:.3f} in random order",
            ),
        ],
        machine=machine,
        quick=options.quick,
        size=asdict(size),
        rounds=len(rates["method"]),
        parts={"without_mixing": round(median_ratio(rates["without_mixing"], rates["plain_ctc"]), 4)},
        padding_in_random_order=round(unsorted_padding, 4),
        frames_per_s=rates,
    )


if __name__ == "__main__":
    main()
