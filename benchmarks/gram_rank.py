"""Ranking with a judge: shared prefixes, the server, and the padding of training batches.

    python -m benchmarks.gram_rank [--quick] [--threads N]

A request ranks 16 responses of 64 tokens to one prompt of 512 tokens against one reference: 32 judge prompts.
Model of random weights, fp32, on the CPU; every request is another one, so nothing is remembered between them.

- `prefix_sharing`: requests a second of the judge with prefix sharing over the same judge without it, which
  computes the 32 prompts whole; same process, same weights, in turn. Rewards must agree to 1e-5.
- `served`: requests a second of `/rank` over HTTP, with several clients that always have a request open, over
  those of the judge called in process, one request after the other. Same folder, same limits, prefix sharing on
  both sides and as many threads; the two run in turn and the idle one takes no time. The clients run on the same
  cores as the server and count against it. Scores must agree to 1e-6.
- `padding`: share of positions that hold padding when judge prompts are batched by the sampler of the training
  loop, batch 32 in micro-batches of 8, over one epoch. On the hh_harmless pairs if `../shared/data/hh_harmless` is there,
  else on generated pairs; `padding_data` in the JSON says which.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks.harness import (
    MadeUpWords,
    Ratio,
    Side,
    finish,
    in_fresh_process,
    interleave,
    median_ratio,
    start,
)
from eagleray.models.backbone.model import build_llama, llama_config
from eagleray.models.backbone.tokenizer import train_tokenizer
from eagleray.models.gram.checkpoint import JudgeSettings
from eagleray.models.gram.judge import Judge
from eagleray.models.gram.prompts import JudgeEncoder, JudgeTemplate, shuffled_order
from eagleray.models.gram.ranking import rank
from eagleray.models.gram.synthetic import make_preferences

HH_HARMLESS = Path(__file__).resolve().parents[2] / "shared/data/hh_harmless/train.jsonl"


@dataclass(frozen=True)
class Size:
    """Model, request and load."""

    width: int = 256
    layers: int = 6
    vocab_size: int = 16_384
    prompt: int = 512
    response: int = 64
    responses: int = 16
    requests: int = 8
    """Requests of one round of the comparison with the server."""
    clients: int = 4
    rounds: int = 5
    padding_pairs: int = 100_000


QUICK = Size(
    width=64, layers=2, vocab_size=2000, prompt=96, response=16, responses=4, requests=4, clients=2, rounds=2,
    padding_pairs=200,
)  # fmt: skip

Request = dict[str, Any]


def prepare(*, folder: Path, size: Size) -> list[Request]:
    """Write the model; return requests, as `/rank` takes them."""
    template = JudgeTemplate.load("eagleray")
    words = MadeUpWords(vocab_size=size.vocab_size, also=template.render("", "", ""))
    config = llama_config(
        vocab_size=size.vocab_size, width=size.width, layers=size.layers, heads=size.width // 32
    )
    build_llama(config, seed=0).save_pretrained(folder)
    words.tokenizer.save_pretrained(folder)
    JudgeSettings().save(folder)
    rng = random.Random(0)
    return [
        {
            "prompt": words.text(size.prompt, rng),
            "responses": [words.text(size.response, rng) for _ in range(size.responses)],
            "method": "reference",
            "reference": words.text(size.response, rng),
        }
        for _ in range(size.requests)
    ]


def build_judge(*, folder: Path) -> Callable[[list[Request], bool], tuple[float, list[tuple[float, ...]]]]:
    """Ranks requests one after the other; returns requests a second and the scores of each."""
    judge = Judge.from_pretrained(folder, device="cpu")
    compares = {True: judge.compare, False: Judge(judge.model, judge.encoder, share_prefix=False).compare}

    def work(requests: list[Request], shared: bool) -> tuple[float, list[tuple[float, ...]]]:
        started = time.perf_counter()
        scores = [
            rank(
                compares[shared], r["prompt"], r["responses"], method=r["method"], reference=r["reference"]
            ).scores
            or ()
            for r in requests
        ]
        return len(requests) / (time.perf_counter() - started), scores

    return work


def padding(*, pairs: int, path: Path | None) -> float:
    """Padding share of one epoch at batch 32 and micro-batch 8."""
    from eagleray.platform.data.preferences import PreferenceData, load_preferences
    from eagleray.platform.data.sampler import BatchSampler, padding_share
    from eagleray.platform.data.sources import SourceConfig

    if path is None:
        rows = [
            (row["id"], row["prompt"], row["chosen"], row["rejected"]) for row in make_preferences(1600, 0)
        ]
    else:
        loaded, _ = load_preferences(PreferenceData(sources=[SourceConfig(path=str(path))]))
        rows = [(pair.id, pair.prompt_text, pair.chosen, pair.rejected) for pair in loaded]
    rows = rows[:pairs]
    tokenizer = train_tokenizer((text for _, *texts in rows for text in texts), vocab_size=8192)
    encoder = JudgeEncoder(tokenizer, JudgeTemplate.load("eagleray"))
    lengths = []
    for name, prompt, chosen, rejected in rows:
        answers = (rejected, chosen) if shuffled_order(0, name) else (chosen, rejected)
        lengths.append(len(encoder.encode(prompt, *answers) or []))
    sampler = BatchSampler(lengths, batch_size=32, micro_batch_size=8, seed=0)
    steps = range(max(1, len(lengths) // 32))
    return padding_share(
        [micro for step in steps for micro in sampler.micro_batches(step, rank=0, world_size=1)], lengths
    )


def main() -> None:
    """Measure and print."""
    from eagleray.jobs.serve import serving

    options, machine = start(__doc__ or "", use_gpu=False)
    size, threads = QUICK if options.quick else Size(), options.threads
    data = HH_HARMLESS if HH_HARMLESS.is_file() else None
    padded = in_fresh_process(padding, threads=threads, pairs=size.padding_pairs, path=data)
    with tempfile.TemporaryDirectory(prefix="eagleray-benchmark-") as name:
        folder = Path(name)
        requests = in_fresh_process(prepare, threads=threads, folder=folder, size=size)
        with Side(build_judge, threads=threads, folder=folder) as judge:
            sharing = _sharing(judge, requests, size)
            with serving(folder, cpus=threads) as url:
                served, worst = _served(judge, url, requests, size)
    rates = {**sharing, **served}
    middle = {side: median(values) for side, values in rates.items()}
    finish(
        "gram_rank",
        [
            Ratio(
                "prefix_sharing",
                "requests/s in process, prefixes shared over not",
                median_ratio(rates["shared"], rates["separate"]),
                2.0,
                "high",
                f"{middle['shared']:.3g}, {middle['separate']:.3g} requests/s",
            ),
            Ratio(
                "served",
                "requests/s, HTTP over in process",
                median_ratio(rates["http"], rates["in_process"]),
                0.6,
                "high",
                f"{middle['http']:.3g}, {middle['in_process']:.3g} requests/s",
            ),
            Ratio("padding", "padding share of training batches", padded, 0.1, "low"),
        ],
        machine=machine,
        quick=options.quick,
        size=asdict(size),
        precision="fp32",
        padding_data="hh_harmless" if data else "generated pairs",
        largest_difference_to_server=worst,
        requests_per_s=rates,
    )


def _sharing(judge: Side, requests: list[Request], size: Size) -> dict[str, list[float]]:
    """Rates with and without prefix sharing; one request a turn."""
    few = requests[:1]
    sides = {"shared": lambda: judge(few, True), "separate": lambda: judge(few, False)}
    interleave(sides, rounds=1)
    results = interleave(sides, rounds=size.rounds, seconds=60)
    _largest_difference(results["shared"][0][1], results["separate"][0][1], allowed=1e-5)
    return {side: [rate for rate, _ in turns] for side, turns in results.items()}


def _served(
    judge: Side, url: str, requests: list[Request], size: Size
) -> tuple[dict[str, list[float]], float]:
    """Rates over HTTP and in process, and the largest difference of a score."""
    with (
        httpx.Client(base_url=url, timeout=120) as client,
        ThreadPoolExecutor(max_workers=size.clients) as clients,
    ):

        def ask(request: Request) -> tuple[float, ...]:
            response = client.post("/rank", json=request)
            response.raise_for_status()
            return tuple(response.json()["scores"])

        def http() -> tuple[float, list[tuple[float, ...]]]:
            started = time.perf_counter()
            scores = list(clients.map(ask, requests))
            return len(requests) / (time.perf_counter() - started), scores

        sides = {"in_process": lambda: judge(requests, True), "http": http}
        ask(requests[0])
        results = interleave(sides, rounds=size.rounds, seconds=90)
    worst = _largest_difference(results["in_process"][0][1], results["http"][0][1], allowed=1e-6)
    return {side: [rate for rate, _ in turns] for side, turns in results.items()}, worst


def _largest_difference(
    first: list[tuple[float, ...]], second: list[tuple[float, ...]], *, allowed: float
) -> float:
    difference = max(
        abs(a - b)
        for left, right in zip(first, second, strict=True)
        for a, b in zip(left, right, strict=True)
    )
    if difference > allowed:
        raise AssertionError(f"the two sides score alike to {difference:.2g} only; {allowed:g} is allowed")
    return difference


if __name__ == "__main__":
    main()
