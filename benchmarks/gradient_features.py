"""Projected LoRA gradients of preference pairs: one pass over a batch against a loop with one backward pass a pair.

    python -m benchmarks.gradient_features [--quick] [--threads N]

A visual reward model of random weights, fp32, on the CPU, and pairs without pictures. Both sides compute the gradients of
the same LoRA weights on the same tokens and project them with the same signs.

- `over_loop`: pairs/s of `Featuriser.features` over those of a loop that takes one pair, calls backward and projects.
- `difference`: largest difference of a number of the features, which are of unit length.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.harness import MadeUpWords, Ratio, Side, finish, interleave, median_ratio, start


@dataclass(frozen=True)
class Size:
    """Model and data of the comparison."""

    vocab_size: int = 4096
    width: int = 256
    layers: int = 4
    heads: int = 4
    rank: int = 8
    projection: int = 1024
    pairs: int = 64
    longest: int = 48
    """Tokens of an answer; prompts have a third."""


QUICK = Size(vocab_size=1024, width=32, layers=2, projection=64, pairs=12, longest=24)


def build_side(*, size: Size) -> Callable[[str], Any]:
    """One process with the model; called with `batched`, `loop` or `difference`."""
    import numpy as np
    import torch

    from eagleray.models.backbone.model import llama_config
    from eagleray.models.rovrm.encoding import VisualEncoder
    from eagleray.models.rovrm.features import FeatureSettings, Featuriser, VisualBody
    from eagleray.models.rovrm.losses import plackett_luce_loss
    from eagleray.models.rovrm.scoring import VisualScorer
    from eagleray.models.rovrm.scratch import add_image_token, build_llava, llava_config
    from eagleray.models.rovrm.templates import VisualTemplate
    from eagleray.models.selection.projection import RandomProjection

    words = MadeUpWords(vocab_size=size.vocab_size)
    image_id = add_image_token(words.tokenizer)
    text = llama_config(
        vocab_size=len(words.tokenizer), width=size.width, layers=size.layers, heads=size.heads
    )
    model = build_llava(llava_config(text, image_token_id=image_id, image_size=32, patch_size=16))
    encoder = VisualEncoder(words.tokenizer, None, model.family, VisualTemplate.named("llava", system=""))
    settings = FeatureSettings("lora_grad", rank=size.rank, width=size.projection)
    featuriser = Featuriser(VisualBody(VisualScorer(model, encoder)), settings, max_batch_tokens=4096)
    rng = random.Random(0)
    samples = [
        featuriser.prepare(
            words.text(rng.randint(4, size.longest // 3), rng),
            [words.text(rng.randint(8, size.longest), rng) for _ in range(2)],
            None,
        )
        for _ in range(size.pairs)
    ]
    weights = [p for p in model.parameters() if p.requires_grad]
    project = RandomProjection(size.projection)

    def loop() -> np.ndarray:
        rows = []
        for sample in samples:
            loss = plackett_luce_loss(featuriser.body.rewards(sample).view(1, -1), reduction="sum")
            block, total = 0, torch.zeros(1, size.projection)
            for gradient in torch.autograd.grad(loss, weights):
                total += project(gradient.reshape(1, -1), first_block=block)
                block += project.blocks(gradient.numel())
            rows.append((total[0] / total.norm()).numpy())
        return np.stack(rows)

    def step(what: str) -> float:
        if what == "difference":
            return float(np.abs(featuriser.features(samples) - loop()).max())
        started = time.perf_counter()
        {"batched": lambda: featuriser.features(samples), "loop": loop}[what]()
        return size.pairs / (time.perf_counter() - started)

    return step


def main() -> None:
    """Measure and print."""
    options, machine = start(__doc__ or "", use_gpu=False)
    size, rounds = (QUICK, 2) if options.quick else (Size(), 5)
    with Side(build_side, threads=options.threads, size=size) as side:
        difference = side("difference")
        sides: dict[str, Callable[[], Any]] = {
            "batched": lambda: side("batched"),
            "loop": lambda: side("loop"),
        }
        rates = interleave(sides, rounds=rounds, seconds=120)
    finish(
        "gradient_features",
        [
            Ratio(
                "over_loop",
                "pairs/s, batched over one pair at a time",
                median_ratio(rates["batched"], rates["loop"]),
                2,
                "high",
                f"{max(rates['batched']):.3g}, {max(rates['loop']):.3g} pairs/s",
            ),
            Ratio("difference", "largest difference of a number", difference, 1e-5, "low"),
        ],
        machine=machine,
        quick=options.quick,
        size=asdict(size),
        rates=rates,
    )


if __name__ == "__main__":
    main()
