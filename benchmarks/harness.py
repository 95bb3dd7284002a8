"""What the benchmarks share: fresh processes, interleaved rounds, honest ratios, the table and the JSON line.

How a comparison is measured:
- Each side lives in a process of its own, started fresh (not forked), so neither side's allocator, caches or
  imports touch the other's time or peak memory. All sides get the same number of threads.
- The sides run in turn, never at the same time, in rounds; every other round in the opposite order. A ratio is
  the median over rounds of the ratio within a round, so a slow moment of the machine hits both of its parts.
- Rounds stop after a number or, if at least `MIN_ROUNDS` are done, after a time budget.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, Literal, Self

from rich.console import Console
from rich.table import Table

MIN_ROUNDS = 3
_PACKAGES = ("torch", "transformers", "trl", "ray", "deepspeed")


@dataclass(frozen=True)
class Options:
    """Command line of a benchmark."""

    quick: bool
    """Tiny sizes and few rounds: shows that it runs; its numbers mean nothing."""
    threads: int
    """Threads of each side."""


@dataclass(frozen=True)
class Ratio:
    """One line of the table and one entry of `ratios`."""

    key: str
    label: str
    """What is compared with what."""
    value: float
    target: float
    better: Literal["high", "low"]
    parts: str = ""
    """The two measured numbers."""

    @property
    def met(self) -> bool:
        """Whether the target is reached."""
        return self.value >= self.target if self.better == "high" else self.value <= self.target


class SideError(RuntimeError):
    """A side failed; the message holds the traceback of its process."""


class Side:
    """One side of a comparison, in a fresh process; a context manager.

    Args:
        build: Importable top-level function; called once in the new process, returns what a round calls.
        arguments: Keyword arguments of `build`; they and all results travel between processes.
        threads: Threads of torch in the process.
        exact_memory: Have glibc map every block of a mebibyte or more on its own and return it when it is freed.
            The peak is then that of what is alive, without the holes in the heap, which differ from run to run;
            it costs time.
    """

    def __init__(
        self,
        build: Callable[..., Callable[..., Any]],
        *,
        threads: int,
        exact_memory: bool = False,
        **arguments: Any,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_side_process, args=(theirs, build, arguments, threads))
        with _environment({"MALLOC_MMAP_THRESHOLD_": str(2**20)} if exact_memory else {}):
            self._process.start()
        theirs.close()
        try:
            self._answer()
        except SideError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __call__(self, *args: Any) -> Any:
        """One round: call what `build` returned, in its process."""
        self._pipe.send(("call", args))
        return self._answer()

    def peak_memory(self) -> int:
        """Bytes at the peak so far minus those before `build`: on a GPU of its tensors, else resident."""
        self._pipe.send(("memory", ()))
        return self._answer()

    def close(self) -> None:
        """End the process; one that does not end within a minute (Ray shutting down) is terminated."""
        self._pipe.close()
        self._process.join(60)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def _answer(self) -> Any:
        try:
            failed, value = self._pipe.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            raise SideError(f"The process of a side ended with exit code {code} (out of memory?).") from None
        if failed:
            raise SideError(value)
        return value


def in_fresh_process(function: Callable[..., Any], *, threads: int, **arguments: Any) -> Any:
    """Result of a top-level function, called once in a fresh process."""
    with Side(_once, threads=threads, function=function, arguments=arguments) as side:
        return side()


def interleave(
    sides: Mapping[str, Callable[[], Any]], *, rounds: int, seconds: float = 1e9
) -> dict[str, list[Any]]:
    """What the sides returned, round by round; in every other round the last side goes first.

    Args:
        sides: Name -> what a round calls.
        rounds: Rounds at most.
        seconds: Once it is used up, no round starts after the first `MIN_ROUNDS`.
    """
    results: dict[str, list[Any]] = {name: [] for name in sides}
    started = time.perf_counter()
    for number in range(rounds):
        if number >= MIN_ROUNDS and time.perf_counter() - started > seconds:
            break
        for name in list(sides) if number % 2 == 0 else reversed(list(sides)):
            results[name].append(sides[name]())
    return results


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median over rounds of the ratio within a round.

    >>> median_ratio([2.0, 20.0, 3.0], [1.0, 10.0, 1.0])
    2.0
    """
    return median(a / b for a, b in zip(numerators, denominators, strict=True))


def resident_bytes(field: Literal["VmRSS", "VmHWM"] = "VmRSS") -> int:
    """Resident memory of this process now, or at its peak (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}.")


def describe_machine(threads: int) -> dict[str, Any]:
    """What the numbers were measured on; `load` is the one before the benchmark began to compute."""
    import torch

    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        "",
    )
    return {
        "cpu": model or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _PACKAGES},
    }


def start(
    description: str, *, use_gpu: bool, spare_cores: int = 0, workers: int = 1
) -> tuple[Options, dict[str, Any]]:
    """Read the command line and fix the environment that every process started from here on inherits.

    Args:
        description: What `--help` prints.
        use_gpu: Whether the sides may see a GPU.
        spare_cores: How many cores the sides leave alone unless `--threads` says otherwise.
        workers: Processes of a side that compute at a time and share the cores.

    Returns:
        The options and the description of the machine.
    """
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, no more")
    threads = max(1, (cores - spare_cores) // workers)
    parser.add_argument(
        "--threads", type=int, default=threads, help=f"threads of each side (default: {threads})"
    )
    options = Options(**vars(parser.parse_args()))
    if not 1 <= options.threads <= cores:
        parser.error(f"--threads is {options.threads}; this process may use 1 to {cores} cores")
    # Both variables are read when torch is loaded, which has happened here but not in the sides.
    os.environ.update({name: str(options.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")})
    os.environ.update({"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"})
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["RAY_worker_niceness"] = "0"  # Ray's default of 15 would let other work slow its sides only
    if not use_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return options, describe_machine(options.threads)


def finish(
    name: str, ratios: Sequence[Ratio], *, machine: Mapping[str, Any], quick: bool, **details: Any
) -> None:
    """Print the table and, as the last line, the JSON object."""
    table = Table(title=f"{name}{' (quick: tiny sizes, numbers mean nothing)' if quick else ''}")
    table.add_column("key")
    table.add_column("what")
    table.add_column("measured")
    for column in ("ratio", "target"):
        table.add_column(column, justify="right")
    table.add_column("")
    for ratio in ratios:
        sign = "≥" if ratio.better == "high" else "≤"
        verdict = "" if quick else "met" if ratio.met else "missed"
        row = [ratio.key, ratio.label, ratio.parts, f"{ratio.value:.3f}", f"{sign} {ratio.target:g}", verdict]
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 150, markup=False).print(table)
    record = {
        "benchmark": name,
        "ratios": {ratio.key: round(ratio.value, 4) for ratio in ratios},
        "targets": {
            ratio.key: {"at least" if ratio.better == "high" else "at most": ratio.target} for ratio in ratios
        },
        "quick": quick,
        **details,
        "machine": dict(machine),
    }
    print(json.dumps(record), flush=True)


class MadeUpWords:
    """Texts of made-up words with an exact number of tokens, and a tokenizer to which each word is one token."""

    def __init__(self, *, vocab_size: int, also: str = "") -> None:
        """Make words and train the tokenizer.

        Args:
            vocab_size: Largest number of tokens; there are about half as many words, as a word takes two merges.
            also: Text that the tokenizer should know too, e.g. an empty judge prompt.
        """
        from eagleray.models.backbone.tokenizer import train_tokenizer

        rng = random.Random(0)
        syllables = [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in "aeiou"]
        words = sorted(
            {"".join(rng.choices(syllables, k=3)) for _ in range(max(50, (vocab_size - 800) // 2))}
        )
        corpus = [" " + " ".join(rng.sample(words, len(words))) for _ in range(3)] + [also or " "] * 20
        self.tokenizer = train_tokenizer(corpus, vocab_size=vocab_size)
        encoded = self.tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"]
        self._words = [word for word, ids in zip(words, encoded, strict=True) if len(ids) == 1]

    def text(self, tokens: int, rng: random.Random) -> str:
        """A text of `tokens` tokens."""
        return "".join(f" {word}" for word in rng.choices(self._words, k=tokens))


def _side_process(
    pipe: Connection, build: Callable[..., Callable[..., Any]], arguments: dict[str, Any], threads: int
) -> None:
    import torch
    from transformers.utils import logging

    from eagleray.platform.cpu import set_up_torch

    logging.disable_progress_bar()
    set_up_torch(threads)
    baseline = resident_bytes()

    def peak() -> int:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        return resident_bytes("VmHWM") - baseline

    with suppress(
        EOFError, BrokenPipeError, ConnectionResetError
    ):  # the other end closed: nobody waits any more
        try:
            step = build(**arguments)
            pipe.send((False, None))
            while True:
                command, args = pipe.recv()
                pipe.send((False, peak() if command == "memory" else step(*args)))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except Exception:  # noqa: BLE001 - whatever it is, the other process raises it
            pipe.send((True, traceback.format_exc()))


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables that processes started inside the block inherit."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _once(function: Callable[..., Any], arguments: dict[str, Any]) -> Callable[[], Any]:
    return lambda: function(**arguments)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
