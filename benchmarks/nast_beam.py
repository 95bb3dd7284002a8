"""Prefix beam search against the encoder that feeds it.

    python -m benchmarks.nast_beam [--quick] [--threads N]

The paper's model (12 + 12 layers of width 512, 10,000 tokens) with random weights encodes 6 s of speech, and a beam of
width 5 with 40 candidate tokens a frame decodes. Random weights give nearly uniform posteriors, for which no
frame can be skipped and beams differ at every frame; trained posteriors cost the search no more.

- `over_encoder`: time of the search over that of the encoder, batch 1, in one process, in turn.
- In the JSON, `trained_like_s` is the search on posteriors like those of a trained model: blank in most frames.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from benchmarks.harness import Ratio, Side, finish, interleave, median_ratio, start
from eagleray.models.nast.config import NastConfig
from eagleray.models.nast.decoding import prefix_beam_search
from eagleray.models.nast.model import NastModel

FEATURE_FRAMES, LABELS = 598, 25
WIDTH, CANDIDATES = 5, 40
QUICK = {
    "vocab_size": 50,
    "width": 32,
    "heads": 2,
    "inner_width": 64,
    "subsampler_width": 64,
    "acoustic_layers": 2,
    "textual_layers": 2,
    "inner_source_layers": [],
    "inner_target_layers": [],
    "cross_layer_source": 1,
}


def build_decoder(*, quick: bool) -> Callable[[], tuple[float, float, float]]:
    """A round: seconds of the encoder, of the search on its logits, and of the search on trained-like logits."""
    torch.manual_seed(0)
    model = NastModel(NastConfig(**QUICK if quick else {})).eval()
    features, lengths = torch.randn(1, FEATURE_FRAMES, 80), torch.tensor([FEATURE_FRAMES])

    def search(logits: Tensor, frames: Tensor) -> float:
        started = time.perf_counter()
        prefix_beam_search(logits, frames, width=WIDTH, candidates=CANDIDATES)
        return time.perf_counter() - started

    def step() -> tuple[float, float, float]:
        started = time.perf_counter()
        with torch.inference_mode():
            output = model(features, lengths)
        encoded = time.perf_counter() - started
        return (
            encoded,
            search(output.target_logits, output.lengths),
            search(trained_like(output.target_logits), output.lengths),
        )

    return step


def trained_like(logits_BSV: Tensor) -> Tensor:
    """Confident blanks, with a confident label in every sixth frame."""
    peaked = logits_BSV.clone()
    peaked[..., 0] += 15.0
    frames = torch.arange(2, logits_BSV.shape[1], logits_BSV.shape[1] // LABELS)
    peaked[:, frames, 4 + frames % (logits_BSV.shape[2] - 4)] += 16.0
    return peaked


def main() -> None:
    """Measure and print."""
    options, machine = start(__doc__ or "", use_gpu=False)
    with Side(build_decoder, threads=options.threads, quick=options.quick) as side:
        side()
        readings = interleave({"round": side}, rounds=2 if options.quick else 25, seconds=120)["round"]
    encoder, beam, trained = ([reading[i] for reading in readings] for i in range(3))
    finish(
        "nast_beam",
        [
            Ratio(
                "over_encoder",
                "time, prefix beam search of width 5 over the encoder",
                median_ratio(beam, encoder),
                3,
                "low",
                f"{median(beam):.3g} s, {median(encoder):.3g} s",
            )
        ],
        machine=machine,
        quick=options.quick,
        beam_width=WIDTH,
        candidates=CANDIDATES,
        rounds=len(readings),
        encoder_s=encoder,
        beam_s=beam,
        trained_like_s=trained,
    )


if __name__ == "__main__":
    main()
