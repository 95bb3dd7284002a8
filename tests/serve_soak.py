"""Load and faults: what becomes of requests to the gateway when replicas die, models change and clients misbehave.

    make soak [MINUTES=10] [SEED=0]

One judge with two replicas, deployed with `serve deploy` on a cluster of its own; every answer is compared with the
offline one. Three parts, one table:

- faults: requests at 80 % of what two replicas can do; a replica is killed every 20 s, and in the middle the model is
  replaced by another one. Clients repeat what was answered 429 or 503, ever more slowly, and nothing else.
- overload: five times as many requests as can be answered, which nobody repeats.
- malformed: 10,000 requests of which none is right.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import yaml
from builders import tiny_tokenizer
from rich.console import Console
from rich.table import Table

from eagleray.jobs.serve import gateway, parse_models
from eagleray.models.backbone.model import build_llama, llama_config
from eagleray.models.gram.judge import Judge
from eagleray.models.gram.prompts import JudgeEncoder, JudgeTemplate
from eagleray.platform.local_cluster import local_cluster
from eagleray.platform.serving import free_port, serve_yaml

WORDS = ("river", "forest", "answer", "short", "useful", "numbers", "comma", "request", "better", "Peru")
KILL_EVERY_S = 20
MALFORMED = 10_000
AT_A_TIME = 16


@dataclass
class Part:
    """What became of the requests of one part."""

    name: str
    asked: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    """Of every answer, those that were followed by a repetition included."""
    wrong: int = 0
    lost: list[str] = field(default_factory=list)
    """Errors of connections, and refusals that no client repeats."""
    seconds: list[float] = field(default_factory=list)
    """From the first attempt to the right answer."""
    kills: int = 0
    gigabytes: list[float] = field(default_factory=list)
    """Memory of the gateway and the replicas, once a second."""


class Soak:
    """A gateway, its offline counterpart, and the load."""

    def __init__(self, url: str, folders: list[Path], seed: int) -> None:
        self.random = random.Random(seed)
        self.url = url
        self.pairs = [
            {k: self._text(n) for k, n in (("prompt", 60), ("a", 30), ("b", 30))} for _ in range(40)
        ]
        asked = [(pair["prompt"], pair["a"], pair["b"]) for pair in self.pairs]
        self.expected = [
            [found.p_a for found in Judge.from_pretrained(folder, device="cpu").compare(asked)]
            for folder in folders
        ]

    def _text(self, words: int) -> str:
        return " ".join(self.random.choices(WORDS, k=words))

    async def saturation(self, seconds: float) -> float:
        """Requests/s that are answered when clients never pause."""
        part, end = Part("saturation"), time.monotonic() + seconds
        async with self._client() as client:

            async def ask_on() -> None:
                while time.monotonic() < end:
                    await self._ask(client, part)

            await asyncio.gather(*(ask_on() for _ in range(AT_A_TIME)))
        return part.statuses[200] / seconds

    async def load(self, part: Part, *, rate: float, seconds: float, repeat: bool) -> None:
        """Requests that come when they come, `rate` a second on average."""
        async with self._client() as client, self._watched(part):
            tasks, due, end = [], time.monotonic(), time.monotonic() + seconds
            while due < end:
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                tasks.append(asyncio.create_task(self._ask(client, part, repeat=repeat)))
                due += self.random.expovariate(rate)
            await asyncio.gather(*tasks)

    async def kill_replicas(self, part: Part, seconds: float) -> None:
        """SIGKILL for one of the model's replicas, every now and then."""
        end = time.monotonic() + seconds
        while time.monotonic() + KILL_EVERY_S < end:
            await asyncio.sleep(KILL_EVERY_S)
            replicas = [p for p in _processes() if "ServeReplica:gram" in _title(p)]
            with contextlib.suppress(psutil.Error, IndexError):
                self.random.choice(replicas).kill()
                part.kills += 1

    async def malformed(self, part: Part) -> None:
        """Ask what has no right answer."""
        async with self._client() as client, self._watched(part):
            turn = asyncio.Semaphore(AT_A_TIME)

            async def send() -> None:
                async with turn:
                    method, path, body = self._malformed()
                    part.asked += 1
                    try:
                        answer = await client.request(
                            method, path, content=body, headers={"Content-Type": "application/json"}
                        )
                    except httpx.TransportError as error:
                        part.lost.append(type(error).__name__)
                        return
                    part.statuses[answer.status_code] += 1
                    if not 400 <= answer.status_code < 500:
                        part.wrong += 1
                        print(answer.status_code, method, path, body[:200])

            await asyncio.gather(*(send() for _ in range(MALFORMED)))

    async def _ask(self, client: httpx.AsyncClient, part: Part, *, repeat: bool = False) -> None:
        number, started = self.random.randrange(len(self.pairs)), time.monotonic()
        part.asked += 1
        for attempt in itertools.count():
            try:
                answer = await client.post("/compare", json=self.pairs[number])
            except httpx.TransportError as error:
                part.lost.append(type(error).__name__)
                return
            part.statuses[answer.status_code] += 1
            if answer.status_code in (429, 503):
                if not repeat:
                    return
                asked_for_s = float(answer.headers.get("retry-after", 1))
                await asyncio.sleep(asked_for_s + min(2**attempt, 64) * self.random.uniform(0.5, 1.5))
                continue
            if answer.status_code != 200:
                part.lost.append(str(answer.status_code))
                return
            found = answer.json()["p_a"]
            part.wrong += min(abs(found - values[number]) for values in self.expected) > 1e-6
            part.seconds.append(time.monotonic() - started)
            return

    def _malformed(self) -> tuple[str, str, bytes]:
        path, right = self.random.choice(
            [
                ("/compare", dict(self.random.choice(self.pairs))),
                ("/rank", {"prompt": self._text(9), "responses": [self._text(3), self._text(3)]}),
                ("/reward", {"prompt": self._text(9), "response": self._text(3), "reference": self._text(3)}),
                ("/v1/score", {"text_1": self._text(9), "text_2": [self._text(3)]}),
                ("/v1/rerank", {"query": self._text(9), "documents": [self._text(3), self._text(3)]}),
            ]
        )
        whole = json.dumps(right).encode()
        key = self.random.choice(list(right))
        nonsense: Any = self.random.choice([{}, 5, True, None, [[]], {"a": [1]}, 1e300])
        kinds = {
            "cut off": ("POST", path, whole[: self.random.randrange(len(whole))]),
            "field missing": (
                "POST",
                path,
                json.dumps({k: v for k, v in right.items() if k != key}).encode(),
            ),
            "wrong type": ("POST", path, json.dumps(right | {key: nonsense}).encode()),
            "unknown field": ("POST", path, json.dumps(right | {"colour": 1}).encode()),
            "no JSON": ("POST", path, self.random.randbytes(self.random.randrange(1, 200))),
            "nested": ("POST", path, b"[" * 5000),
            "no UTF-8": ("POST", path, whole.replace(b'": "', b'": "\xff', 1)),
            "unknown path": ("POST", f"/{self._text(1)}", whole),
            "wrong method": (self.random.choice(["GET", "PUT", "DELETE"]), path, b""),
            "too large": ("POST", path, b'{"prompt": "' + b"x" * 2**22 + b'"}'),
        }
        often = [1.0] * (len(kinds) - 1) + [0.02]
        return self.random.choices(list(kinds.values()), often)[0]

    def _client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
        return httpx.AsyncClient(base_url=self.url, timeout=120, limits=limits)

    @contextlib.asynccontextmanager
    async def _watched(self, part: Part) -> AsyncIterator[None]:
        async def watch() -> None:
            while True:
                served = [p for p in _processes() if "ServeReplica" in _title(p) or "ProxyActor" in _title(p)]
                part.gigabytes.append(sum(_memory(p) for p in served) / 1e9)
                await asyncio.sleep(1)

        task = asyncio.create_task(watch())
        try:
            yield
        finally:
            task.cancel()


def _processes() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def _memory(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):
        return process.memory_info().rss
    return 0


def write_judge(folder: Path, seed: int) -> Path:
    """A judge from random weights, slow enough that the model and not the client is what is loaded."""
    tokenizer = tiny_tokenizer(chat=False)
    config = llama_config(vocab_size=len(tokenizer), width=256, layers=4, heads=8)
    model = build_llama(config, seed=seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    encoder = JudgeEncoder(tokenizer, JudgeTemplate.load("eagleray"), max_length=512)
    Judge(model, encoder).save_settings(folder)
    return folder


@contextlib.contextmanager
def deployed(folder: Path, model: Path) -> Iterator[tuple[str, Any]]:
    """The gateway and a judge with two replicas; yields the address and a function that replaces the model."""
    environment = {"RAY_AUTH_MODE": "disabled"}
    with local_cluster(cpus_per_node=4, environment=environment) as cluster:
        port = free_port("127.0.0.1")

        def deploy(model: Path) -> None:
            values = yaml.safe_load(
                serve_yaml(gateway(), parse_models([f"gram={model}"]), host="127.0.0.1", port=port)
            )
            [judge] = [a for a in values["applications"] if a["name"] == "gram"]
            judge["args"] |= {"cpus": 1, "max_pending": 16, "max_responses": 4}
            [deployment] = judge["deployments"]
            deployment.pop("autoscaling_config", None)
            deployment["num_replicas"] = 2
            path = folder / "gateway.yaml"
            path.write_text(yaml.safe_dump(values))
            command = [
                str(Path(sys.executable).parent / "serve"),
                "deploy",
                str(path),
                "-a",
                cluster.dashboard,
            ]
            subprocess.run(command, check=True, env={**os.environ, **environment}, capture_output=True)

        deploy(model)
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(url)
        yield url, deploy


def _wait_until_ready(url: str, timeout_s: float = 300) -> None:
    deadline, said = time.monotonic() + timeout_s, "nothing"
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.get(f"{url}/healthz", timeout=5)
            if answer.status_code == 200:
                return
            said = answer.text
        time.sleep(1)
    sys.exit(f"The gateway at {url} is not ready after {timeout_s:g} s; it says {said}.")


async def run(soak: Soak, deploy: Any, replacement: Path, minutes: float) -> list[Part]:
    """All parts, one after the other."""
    rate = await soak.saturation(20)
    print(f"Two replicas answer {rate:.1f} requests/s.", flush=True)
    seconds, faults = 60 * minutes, Part("faults")

    async def replace_model() -> None:
        await asyncio.sleep(seconds / 2)
        await asyncio.to_thread(deploy, replacement)

    load = soak.load(faults, rate=0.8 * rate, seconds=seconds, repeat=True)
    await asyncio.gather(load, soak.kill_replicas(faults, seconds), replace_model())
    print(_row(faults), flush=True)
    await asyncio.sleep(30)  # until both replicas are there again
    overload = Part("overload")
    await soak.load(overload, rate=5 * rate, seconds=min(60.0, seconds), repeat=False)
    print(_row(overload), flush=True)
    malformed = Part("malformed")
    await soak.malformed(malformed)
    return [faults, overload, malformed]


def _row(part: Part) -> list[str]:
    statuses = ", ".join(f"{status}: {count}" for status, count in sorted(part.statuses.items()))
    p50, p99 = np.percentile(part.seconds, [50, 99]) if part.seconds else (float("nan"), float("nan"))
    memory = part.gigabytes
    latency = f"{p50:.2f}, {p99:.2f} s" if part.seconds else ""
    lost = f"{len(part.lost)}" + (f" ({', '.join(sorted(set(part.lost)))})" if part.lost else "")
    shown = f"{memory[0]:.2f}, {max(memory):.2f}, {memory[-1]:.2f}"
    return [part.name, str(part.asked), statuses, str(part.wrong), lost, str(part.kills), latency, shown]


def main() -> None:
    """Deploy, load, print the table; exit code 1 if an answer was lost or wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="serve-soak-"))
    first, second = (write_judge(folder / name, seed) for seed, name in enumerate(("first", "second")))
    with deployed(folder, first) as (url, deploy):
        os.nice(15)  # as Ray's workers are: clients must not take the cores from those that they ask
        soak = Soak(url, [first, second], options.seed)
        parts = asyncio.run(run(soak, deploy, second, options.minutes))
    table = Table(title=f"{options.minutes:g} minutes of faults, seed {options.seed}")
    for column in (
        "part",
        "requests",
        "answers",
        "wrong",
        "lost",
        "kills",
        "p50, p99",
        "GB first, most, last",
    ):
        table.add_column(column, justify="left" if column in ("part", "answers") else "right")
    for part in parts:
        table.add_row(*_row(part))
    Console().print(table)
    if any(part.wrong or part.lost for part in parts):
        sys.exit("An answer was lost or wrong.")


if __name__ == "__main__":
    main()
