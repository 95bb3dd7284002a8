"""What saving a checkpoint takes from training, beside and between the steps.

    python -m benchmarks.checkpoint_cost [--quick] [--threads N]

One engine (AdamW, fp32, so 12 bytes of state a weight) and one batch, in one process; the loop is the bare one of
`_Loop`, with the same calls of `Checkpointer`. Compared are the times of the same number of steps:

- `plain`: no checkpoint.
- `beside`: a checkpoint is begun before the first step and finished when its files are written, as in a run.
- `between`: the same, but finished before the next step; what saving costs where it stops training.

A measured round has one checkpoint over `STEPS` steps, fewer than the 50 of the target, so that rounds are short
and what the thread takes from the steps that run meanwhile still counts: the extra seconds of a round are divided
by the time of 50 plain steps.

- `share_of_step_time`: the extra seconds of `beside` over 50 plain steps of the same round, median.
- `beside_over_between`: the extra seconds, beside over between.

On few cores the thread competes with the steps for them, so the extra seconds are those of the whole round above
those of `plain`; but never less than `held_s`, the part in which training stood still, whatever the noise says.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness import Ratio, Side, finish, interleave, start
from eagleray.models.backbone.model import build_llama, llama_config
from eagleray.platform.checkpoints import Checkpointer, LoopState
from eagleray.platform.engine import build_engine
from eagleray.platform.remote import SharedFolder
from eagleray.platform.sections import TrainingConfig

SAVE_EVERY = 50
STEPS = 4
MODES = ("plain", "beside", "between")


@dataclass(frozen=True)
class Size:
    """Model and batch."""

    width: int = 384
    layers: int = 6
    vocab_size: int = 16_000
    batch: int = 4
    tokens: int = 256


QUICK = Size(width=64, layers=2, vocab_size=1000, batch=2, tokens=64)


def build_loop(*, size: Size) -> Callable[[str], tuple[float, float]]:
    """A round in one of `MODES`: its seconds, and those in which `begin` and `finish` held the steps up."""
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-cost-"))
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for it
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        init_method=f"file://{folder}/store",
        rank=0,
        world_size=1,
    )
    config = llama_config(
        vocab_size=size.vocab_size, width=size.width, layers=size.layers, heads=size.width // 64
    )
    engine = build_engine(build_llama(config, seed=0), TrainingConfig(), total_steps=10_000)
    checkpointer = Checkpointer(engine, SharedFolder(folder), config_hash="", keep=1)
    ids_BT = torch.randint(0, size.vocab_size, (size.batch, size.tokens), device=engine.device)
    state = LoopState()

    def loss(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss

    def step() -> None:
        engine.backward(engine(loss, ids_BT), scale_wrt_gas=False)
        engine.step()
        state.step += 1

    def run(mode: str) -> tuple[float, float]:
        held, started = 0.0, time.perf_counter()
        if mode != "plain":
            checkpointer.begin(state)
            if mode == "between":
                checkpointer.finish()
            held = time.perf_counter() - started
        for _ in range(STEPS):
            if mode == "beside" and checkpointer.written:
                checkpointer.finish()
            step()
        waiting = time.perf_counter()
        checkpointer.finish()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return time.perf_counter() - started, held + time.perf_counter() - waiting

    step()
    return run


def main() -> None:
    """Measure and print."""
    options, machine = start(__doc__ or "", use_gpu=True)
    size, rounds = (QUICK, 3) if options.quick else (Size(), 7)
    with Side(build_loop, threads=options.threads, size=size) as loop:
        sides = {mode: partial(loop, mode) for mode in MODES}
        interleave(sides, rounds=1)  # the first checkpoint makes buffers
        results = interleave(sides, rounds=rounds, seconds=120)
    seconds = {mode: [total for total, _ in results[mode]] for mode in MODES}
    held = {mode: [standing for _, standing in results[mode]] for mode in MODES}
    extra = {
        mode: [
            max(total - plain, standing)
            for total, plain, standing in zip(seconds[mode], seconds["plain"], held[mode], strict=True)
        ]
        for mode in ("beside", "between")
    }
    shares = [
        more / (plain / STEPS * SAVE_EVERY)
        for more, plain in zip(extra["beside"], seconds["plain"], strict=True)
    ]
    step_s, beside_s, between_s = (
        median(values) for values in (seconds["plain"], extra["beside"], extra["between"])
    )
    finish(
        "checkpoint_cost",
        [
            Ratio(
                "share_of_step_time",
                f"extra time of a checkpoint over {SAVE_EVERY} steps",
                median(shares),
                0.1,
                "low",
                f"{beside_s:.3g} s, {step_s / STEPS * SAVE_EVERY:.3g} s",
            ),
            Ratio(
                "beside_over_between",
                "extra time, written beside training over between two steps",
                beside_s / between_s,
                1.0,
                "low",
                f"{beside_s:.3g} s, {between_s:.3g} s",
            ),
        ],
        machine=machine,
        quick=options.quick,
        size=asdict(size),
        rounds=len(shares),
        seconds=seconds,
        held_s=held,
    )


if __name__ == "__main__":
    main()
