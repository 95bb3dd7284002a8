"""NAST against its autoregressive sibling, whole translations: latency of one utterance and rate of a batch.

    python -m benchmarks.nast_speed [--quick] [--threads N]

Sizes of the paper: NAST 12 + 12 layers with greedy decoding; the sibling 12 + 6 layers and 6 decoder layers with a cache
of keys and values, beam 5 or beam 1. Width 512, 10,000 tokens, random weights, fp32 (on a GPU, if there is one, with products in
TF32). Every clip is 6 s of speech; the sibling writes exactly 25 tokens, NAST as many as come out (its time does not depend
on that). Feature extraction is timed apart, as both sides need the same. Both compute all intermediate predictions that the
method feeds back.

- `beam5`, `beam1`: median over rounds of the sibling's time over NAST's, batch 1.
- `beam5_pds`: the same as `beam5` with the 8-fold progressive down-sampling encoder on both sides.
- In the JSON: mean and p95 latency, real-time factor (compute time over audio time), and the same ratios for a
  batch of `batch` clips (a budget of frames), where the sibling's decoder is used better.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import mean, median, quantiles
from typing import Any

import torch

from benchmarks.harness import Ratio, Side, finish, interleave, median_ratio, start
from eagleray.models.nast.autoregressive import AutoregressiveModel, beam_search
from eagleray.models.nast.config import AutoregressiveConfig, NastConfig
from eagleray.models.nast.decoding import greedy
from eagleray.models.nast.features import SAMPLE_RATE, fbank, normalise
from eagleray.models.nast.model import NastModel

SECONDS, TOKENS, BATCH = 6.0, 25, 8
PAPER = 5.67
"""Speedup that the paper reports on a GPU at beam 5."""
QUICK: dict[str, Any] = {
    "vocab_size": 50,
    "width": 32,
    "heads": 2,
    "inner_width": 64,
    "subsampler_width": 64,
    "acoustic_layers": 4,
    "textual_layers": 2,
    "inner_source_layers": [],
    "inner_target_layers": [],
    "cross_layer_source": 1,
}
SIDES = {
    "nast": ("nast", 1, "convolution"),
    "beam5": ("sibling", 5, "convolution"),
    "beam1": ("sibling", 1, "convolution"),
    "nast_pds": ("nast", 1, "progressive"),
    "beam5_pds": ("sibling", 5, "progressive"),
}


def build_translator(
    *, kind: str, beam: int, subsampling: str, quick: bool
) -> Callable[[int, int], list[float]]:
    """A side: called with a batch size and a number of calls, it returns the seconds of each call."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    changes = {**(QUICK if quick else {}), "subsampling": subsampling}
    model: NastModel | AutoregressiveModel
    if kind == "nast":
        model = NastModel(NastConfig(**changes)).eval().to(device)
    else:
        model = AutoregressiveModel(AutoregressiveConfig(**changes)).eval().to(device)
    features = normalise(fbank(0.1 * torch.randn(int(SECONDS * SAMPLE_RATE)))).to(device)

    def translate(batch: int) -> None:
        clips, lengths = features.expand(batch, -1, -1), torch.full((batch,), len(features), device=device)
        if isinstance(model, NastModel):
            with torch.inference_mode():
                output = model(clips, lengths)
                greedy(output.target_logits, output.lengths)
        else:
            beam_search(model, clips, lengths, width=beam, min_length=TOKENS, max_length=TOKENS)

    def step(batch: int, calls: int) -> list[float]:
        seconds = []
        for _ in range(calls):
            started = time.perf_counter()
            translate(batch)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        return seconds

    return step


def build_features() -> Callable[[], float]:
    """Seconds of feature extraction of one clip."""
    wave = 0.1 * torch.randn(int(SECONDS * SAMPLE_RATE))

    def step() -> float:
        started = time.perf_counter()
        normalise(fbank(wave))
        return time.perf_counter() - started

    return step


def main() -> None:
    """Measure and print."""
    options, machine = start(__doc__ or "", use_gpu=True)
    sides: dict[str, Side] = {}
    try:
        for name, (kind, beam, subsampling) in SIDES.items():
            sides[name] = Side(
                build_translator,
                threads=options.threads,
                kind=kind,
                beam=beam,
                subsampling=subsampling,
                quick=options.quick,
            )
        for side in sides.values():
            side(1, 1 if options.quick else 3)  # warm-up
        singles = interleave(
            {name: lambda side=side: side(1, 2) for name, side in sides.items()},
            rounds=2 if options.quick else 20,
            seconds=110,
        )
        batches = interleave(
            {name: lambda side=side: side(BATCH, 1) for name, side in sides.items()},
            rounds=2 if options.quick else 4,
            seconds=60,
        )
        with Side(build_features, threads=options.threads) as features:
            feature_s = [features() for _ in range(10)]
    finally:
        for side in sides.values():
            side.close()
    per_round = {name: [mean(calls) for calls in rounds] for name, rounds in singles.items()}
    batch_s = {name: [calls[0] for calls in rounds] for name, rounds in batches.items()}
    targets = {
        "beam5": ("nast", PAPER if machine["gpu"] else 2.0),
        "beam1": ("nast", 2.0),
        "beam5_pds": ("nast_pds", 3.0),
    }
    finish(
        "nast_speed",
        [
            Ratio(
                name,
                f"time of one clip, sibling ({name}) over {nast}",
                median_ratio(per_round[name], per_round[nast]),
                target,
                "high",
                f"{median(per_round[name]):.3g} s, {median(per_round[nast]):.3g} s",
            )
            for name, (nast, target) in targets.items()
        ],
        machine=machine,
        quick=options.quick,
        batch=BATCH,
        rounds=len(per_round["nast"]),
        latency={name: _latency(rounds) for name, rounds in singles.items()},
        batch_ratios={
            name: round(median_ratio(batch_s[name], batch_s[nast]), 4) for name, (nast, _) in targets.items()
        },
        batch_real_time_factor={name: median(s) / (BATCH * SECONDS) for name, s in batch_s.items()},
        features_s=median(feature_s),
    )


def _latency(rounds: list[list[float]]) -> dict[str, float]:
    calls = [seconds for some in rounds for seconds in some]
    return {
        "mean_s": mean(calls),
        "p95_s": quantiles(calls, n=20)[-1],
        "real_time_factor": mean(calls) / SECONDS,
        "calls": len(calls),
    }


if __name__ == "__main__":
    main()
