"""Encoding preference pairs: how much of the bare model's speed is left, and how much of a batch is padding.

    python -m benchmarks.lrhp_encode [--quick] [--threads N]

Model of random weights, fp32, on the CPU. Pairs are of lengths drawn from a wide range, as in real data.

- `over_forward`: tokens a second of `Representer.represent`, from texts to representations in their order, over those
  of the bare backbone's forward on the very batches that it makes, already tokenised and padded. Same process, same
  weights, in turn. Tokenising, cutting into batches, the special row, pooling and the head are what the rest goes to.
- `padding`: share of positions that hold padding in those batches, of pairs handed over in the groups that `lrhp.encode`
  hands to its workers.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import MadeUpWords, Ratio, Side, finish, interleave, median_ratio, start

GROUP = 256
"""Pairs that `lrhp.encode` hands to a worker at a time."""


@dataclass(frozen=True)
class Size:
    """Model and data of the comparison."""

    vocab_size: int = 8192
    width: int = 512
    layers: int = 6
    heads: int = 8
    pairs: int = 256
    shortest: int = 8
    longest: int = 192
    """Tokens of an answer; prompts have a third."""
    max_batch_tokens: int = 8192


QUICK = Size(vocab_size=1024, width=64, layers=2, heads=4, pairs=64, longest=64)


def build_side(*, folder: str, size: Size, pairs: list[tuple[str, str, str]]) -> Callable[[str], Any]:
    """One process with the model; called with `represent`, `forward` or `padding`."""
    import torch

    from eagleray.models.gram.batching import pad_right
    from eagleray.models.lrhp.representer import Representer

    representer = Representer.from_pretrained(
        folder, untrained=True, device="cpu", max_batch_tokens=size.max_batch_tokens
    )
    groups = [pairs[i : i + GROUP] for i in range(0, len(pairs), GROUP)]
    batches = []
    for group in groups:
        ids = [representer.encoder.encode(*pair).ids for pair in group]
        for members in representer.batches(ids):
            batches.append(pad_right([ids[i] for i in members]))
    tokens = sum(int(mask_BT.sum()) for _, mask_BT in batches)
    known = len(representer.model.backbone.get_input_embeddings().weight)

    def represent() -> None:
        for group in groups:
            representer.represent(group)

    def forward() -> None:
        with torch.inference_mode():
            for ids_BT, _ in batches:
                representer.model.backbone(input_ids=ids_BT.clamp(max=known - 1), use_cache=False)

    def step(what: str) -> Any:
        if what == "padding":
            return 1 - tokens / sum(mask_BT.numel() for _, mask_BT in batches), tokens
        started = time.perf_counter()
        {"represent": represent, "forward": forward}[what]()
        return tokens / (time.perf_counter() - started)

    return step


def write_model(folder: Path, size: Size) -> list[tuple[str, str, str]]:
    """Save a random model with its tokenizer; returns pairs of texts, like lengths together as the job sorts them."""
    from eagleray.models.backbone.model import build_llama, llama_config

    words = MadeUpWords(vocab_size=size.vocab_size, also="[User] \n[Response 1] \n[Response 2] \n")
    config = llama_config(
        vocab_size=len(words.tokenizer),
        width=size.width,
        layers=size.layers,
        heads=size.heads,
        max_length=4 * size.longest + 64,
    )
    build_llama(config, seed=0).save_pretrained(folder)
    words.tokenizer.save_pretrained(folder)
    rng = random.Random(0)

    def text(share: float = 1.0) -> str:
        # Uniform in the logarithm: many short answers, a few long ones.
        length = size.shortest * (size.longest / size.shortest) ** rng.random()
        return words.text(max(1, round(share * length)), rng)

    pairs = [(text(1 / 3), text(), text()) for _ in range(size.pairs)]
    return sorted(pairs, key=lambda pair: sum(map(len, pair)))


def main() -> None:
    """Measure and print."""
    options, machine = start(__doc__ or "", use_gpu=False)
    size, rounds = (QUICK, 2) if options.quick else (Size(), 7)
    with tempfile.TemporaryDirectory() as name:
        pairs = write_model(Path(name), size)
        with Side(build_side, threads=options.threads, folder=name, size=size, pairs=pairs) as side:
            padding, tokens = side("padding")
            sides: dict[str, Callable[[], Any]] = {
                "represent": lambda: side("represent"),
                "forward": lambda: side("forward"),
            }
            interleave(sides, rounds=1)  # warm-up
            rates = interleave(sides, rounds=rounds, seconds=120)
    finish(
        "lrhp_encode",
        [
            Ratio(
                "over_forward",
                "tokens/s, texts to representations over the bare forward",
                median_ratio(rates["represent"], rates["forward"]),
                0.8,
                "high",
                f"{max(rates['represent']):.0f}, {max(rates['forward']):.0f} tokens/s",
            ),
            Ratio("padding", "share of padding in the batches", padding, 0.1, "low", f"{tokens} tokens"),
        ],
        machine=machine,
        quick=options.quick,
        size=asdict(size),
        rates=rates,
    )


if __name__ == "__main__":
    main()
