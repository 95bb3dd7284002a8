"""The gateway: its throughput against the model in process and against a plain server, and its latency under load.

    python -m benchmarks.gateway [--quick] [--threads N]

A request asks `/v1/score` for the scores of 8 answers of 32 tokens to one prompt of 256 tokens against a reference: 16
judge prompts. Model of random weights, fp32, on the CPU. Clients run on the same cores as the servers and count
against them.

- `saturation`: requests a second through the gateway (HTTP proxy, gateway and model in processes of their own) with 8
  clients that always have a request open, over those of the judge called in process, one request after the other.
- `over_fastapi`: the same over those of the server that people write first: FastAPI and transformers, a forward pass
  for each judge prompt, no batches. Same clients, requests, model and threads. Scores must agree to 1e-4.
- `p99_half_load`: 99th percentile of the latency at half of the saturation rate, requests arriving at random (seeded
  exponential gaps), over the median of a single client.

`latency_s` in the JSON has the median at 1, 8 and 64 clients, and `in_process_s` the judge's own time for a request.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
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
from eagleray.models.gram.checkpoint import JudgeSettings
from eagleray.models.gram.judge import Judge
from eagleray.models.gram.prompts import JudgeTemplate

Request = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """Model, request and load."""

    width: int = 256
    layers: int = 6
    vocab_size: int = 16_384
    prompt: int = 256
    answer: int = 32
    answers: int = 8
    requests: int = 16
    """Requests of one round."""
    clients: int = 8
    rounds: int = 4
    crowd: int = 64
    """Most clients at a time."""
    arrivals: int = 100
    """Requests at half load; the 99th percentile is the second largest."""


QUICK = Size(
    width=32, layers=2, vocab_size=2000, prompt=24, answer=8, answers=2, requests=4, clients=2, rounds=1, crowd=4,
    arrivals=6,
)  # fmt: skip


def prepare(*, folder: Path, size: Size) -> list[Request]:
    """Write the model; return requests."""
    words = MadeUpWords(vocab_size=size.vocab_size, also=JudgeTemplate.load("eagleray").render("", "", ""))
    config = llama_config(
        vocab_size=size.vocab_size, width=size.width, layers=size.layers, heads=size.width // 32
    )
    build_llama(config, seed=0).save_pretrained(folder)
    words.tokenizer.save_pretrained(folder)
    JudgeSettings().save(folder)
    rng = random.Random(0)
    return [
        {
            "text_1": words.text(size.prompt, rng),
            "text_2": [words.text(size.answer, rng) for _ in range(size.answers)],
            "reference": words.text(size.answer, rng),
        }
        for _ in range(max(size.requests, size.crowd))
    ]


def build_judge(*, folder: Path) -> Callable[[list[Request]], tuple[float, list[list[float]]]]:
    """Scores requests one after the other; returns seconds and the scores of each."""
    judge = Judge.from_pretrained(folder, device="cpu")

    def work(requests: list[Request]) -> tuple[float, list[list[float]]]:
        started = time.perf_counter()
        scores = [judge.reward(r["text_1"], r["text_2"], r["reference"]) for r in requests]
        return time.perf_counter() - started, scores

    return work


def build_plain_server(*, folder: Path) -> Callable[[], str]:
    """FastAPI and transformers, a forward pass for each judge prompt; the call gives the address."""
    import torch
    import uvicorn
    from fastapi import FastAPI
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    encoder = Judge.from_pretrained(folder, device="cpu").encoder
    app = FastAPI()

    def probability(prompt: str, a: str, b: str) -> float:
        ids = torch.tensor([encoder.encode(prompt, a, b)])
        with torch.inference_mode():
            logits = model(ids).logits[0, -1, encoder.label_ids]
        return torch.softmax(logits.double(), 0)[0].item()

    @app.post("/v1/score")
    def score(request: Request) -> dict[str, Any]:
        prompt, reference = request["text_1"], request["reference"]
        scores = [
            (probability(prompt, answer, reference) + 1 - probability(prompt, reference, answer)) / 2
            for answer in request["text_2"]
        ]
        return {"data": [{"index": i, "score": value} for i, value in enumerate(scores)]}

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    threading.Thread(target=server.run, daemon=True).start()

    def address() -> str:
        while not server.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    return address


class Clients:
    """Ask one server."""

    def __init__(self, url: str, most: int) -> None:
        limits = httpx.Limits(max_connections=most, max_keepalive_connections=most)
        self._client = httpx.Client(base_url=url, timeout=240, limits=limits)
        self._url, self._limits = url, limits

    def ask(self, request: Request) -> tuple[float, list[float]]:
        """Seconds and scores."""
        started = time.perf_counter()
        answer = self._client.post("/v1/score", json=request)
        answer.raise_for_status()
        return time.perf_counter() - started, [row["score"] for row in answer.json()["data"]]

    def closed(self, requests: list[Request], clients: int) -> tuple[float, list[float], list[list[float]]]:
        """Each client always has a request open; returns requests/s, latencies and scores."""
        with ThreadPoolExecutor(clients) as pool:
            started = time.perf_counter()
            answers = list(pool.map(self.ask, requests))
            rate = len(requests) / (time.perf_counter() - started)
        return rate, [seconds for seconds, _ in answers], [scores for _, scores in answers]

    def open(self, requests: list[Request], *, rate: float, count: int) -> list[float]:
        """Requests come when they come, `rate` a second on average; returns their latencies."""
        rng = random.Random(0)
        gaps = [rng.expovariate(rate) for _ in range(count)]

        async def send() -> list[float]:
            async with httpx.AsyncClient(base_url=self._url, timeout=240, limits=self._limits) as client:

                async def ask(request: Request) -> float:
                    started = time.perf_counter()
                    (await client.post("/v1/score", json=request)).raise_for_status()
                    return time.perf_counter() - started

                tasks: list[asyncio.Task[float]] = []
                due = time.perf_counter()
                for i, gap in enumerate(gaps):
                    due += gap
                    await asyncio.sleep(max(0.0, due - time.perf_counter()))
                    tasks.append(asyncio.create_task(ask(requests[i % len(requests)])))
                return list(await asyncio.gather(*tasks))

        return asyncio.run(send())


def main() -> None:
    """Measure and print."""
    from eagleray.jobs.serve import serving

    options, machine = start(__doc__ or "", use_gpu=False)
    size, threads = QUICK if options.quick else Size(), options.threads
    with tempfile.TemporaryDirectory(prefix="eagleray-benchmark-") as name:
        folder = Path(name)
        requests = in_fresh_process(prepare, threads=threads, folder=folder, size=size)
        few = requests[: size.requests]
        with (
            Side(build_judge, threads=threads, folder=folder) as judge,
            Side(build_plain_server, threads=threads, folder=folder) as plain,
            serving(folder, cpus=threads) as url,
        ):
            gateway, naive = Clients(url, size.crowd), Clients(plain(), size.crowd)
            sides = {
                "in_process": lambda: judge(few),
                "gateway": lambda: gateway.closed(few, size.clients),
                "fastapi": lambda: naive.closed(few, size.clients),
            }
            worst = max(
                abs(a - b)
                for one in ([gateway.ask(few[0])[1]], [naive.ask(few[0])[1]])
                for a, b in zip(judge(few[:1])[1][0], one[0], strict=True)
            )
            if worst > 1e-4:
                raise AssertionError(f"the sides score alike to {worst:.2g} only; 1e-4 is allowed")
            found = interleave(sides, rounds=size.rounds, seconds=120)
            rates = {side: [turn[0] for turn in found[side]] for side in ("gateway", "fastapi")}
            rates["in_process"] = [len(few) / seconds for seconds, _ in found["in_process"]]
            alone = [gateway.ask(request)[0] for request in few]
            crowded = gateway.closed(requests[: size.crowd], size.crowd)[1]
            loaded = gateway.open(requests, rate=median(rates["gateway"]) / 2, count=size.arrivals)
    p99 = quantiles(loaded, n=100, method="inclusive")[98]
    middle = {side: median(values) for side, values in rates.items()}
    finish(
        "gateway",
        [
            Ratio(
                "saturation",
                "requests/s, gateway over in process",
                median_ratio(rates["gateway"], rates["in_process"]),
                0.6,
                "high",
                f"{middle['gateway']:.3g}, {middle['in_process']:.3g} requests/s",
            ),
            Ratio(
                "over_fastapi",
                "requests/s, gateway over a plain server",
                median_ratio(rates["gateway"], rates["fastapi"]),
                2.0,
                "high",
                f"{middle['gateway']:.3g}, {middle['fastapi']:.3g} requests/s",
            ),
            Ratio(
                "p99_half_load",
                "latency, p99 at half load over median alone",
                p99 / median(alone),
                3.0,
                "low",
                f"{1000 * p99:.0f}, {1000 * median(alone):.0f} ms",
            ),
        ],
        machine=machine,
        quick=options.quick,
        size=asdict(size),
        precision="fp32",
        requests_per_s=rates,
        in_process_s=1 / middle["in_process"],
        latency_s={
            "1": median(alone),
            str(size.clients): median([s for turn in found["gateway"] for s in turn[1]]),
            str(size.crowd): median(crowded),
        },
        largest_difference=worst,
    )


if __name__ == "__main__":
    main()
