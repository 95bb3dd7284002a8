"""A tiny language-model task and a way to run the training loop in plain processes, for tests of the loop."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from eagleray.jobs.language_model import LanguageModelTask
from eagleray.jobs.launch import clean_exit, configure_logging
from eagleray.platform.config import load_config
from eagleray.platform.data.examples import write_examples
from eagleray.platform.launch import TrainedRun, train
from eagleray.platform.pretrained import add_lora, load_pretrained
from eagleray.platform.sections import ModelSection, TrainingConfig
from eagleray.platform.stopping import request_stop
from eagleray.platform.task import Batch
from eagleray.platform.training import run_training

VOCABULARY = 64


class ToyConfig(TrainingConfig):
    """The loop's config and two switches."""

    dropout: float = 0.0
    pause_s: float = 0.0
    """Sleep of every forward pass, so that there is time to disturb a run."""


class ToyTask(LanguageModelTask):
    """Learns to count upwards modulo the vocabulary; a test may let one call of the loss fail or ask to stop, or start
    from a saved model.

    The metric `order` is a checksum of which example stood where in the batch of a step: two runs that log the
    same saw the same samples in the same order.
    """

    nan_at_call: ClassVar[int | None] = None
    crash_at_call: ClassVar[int | None] = None
    stop_at_call: ClassVar[int | None] = None
    start: ClassVar[str | None] = None

    def __init__(self, cfg: ToyConfig, data_dir: Path) -> None:
        super().__init__(cfg, data_dir)
        self.cfg, self.run_dir = cfg, data_dir.parent
        self.calls = 0

    def build_model(self) -> nn.Module:
        if self.start is not None:
            # Under ZeRO-3 every parameter must have been partitioned as it was read.
            model = load_pretrained(AutoModelForCausalLM, ModelSection(path=self.start))
            assert all(hasattr(p, "ds_id") for p in model.parameters()) == (
                self.cfg.deepspeed.zero_stage == 3
            )
            return model
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            attention_dropout=self.cfg.dropout,
            tie_word_embeddings=True,
        )
        return add_lora(LlamaForCausalLM(config), self.cfg.lora, task_type="CAUSAL_LM")

    def train_batch(self, indices: Sequence[int], *, step: int) -> Batch:
        batch = super().train_batch(indices, step=step)
        places = [(place + 1) * zlib.crc32(name.encode()) for place, name in enumerate(batch.ids)]
        return replace(batch, tensors={**batch.tensors, "order": torch.tensor(float(sum(places) % 2**40))})

    def loss(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        call, self.calls = self.calls, self.calls + 1
        if call == self.crash_at_call:
            raise ConnectionError("injected crash")
        if call == self.stop_at_call:
            request_stop(self.run_dir)
        time.sleep(self.cfg.pause_s)
        tensors = dict(tensors)
        further = {"order": tensors.pop("order").double()}
        total, _ = super().loss(model, tensors)
        return (total * float("nan") if call == self.nan_at_call else total), further

    def save_extras(self, path: Path) -> None:
        (path / "extra.txt").write_text("extra")


def write_toy_data(data_dir: Path, *, train: int = 40, evaluation: int = 11) -> None:
    """Counting sequences of 4 to 12 tokens."""
    generator = np.random.default_rng(0)
    for name, count in (("train", train), ("eval", evaluation)):
        rows = []
        for i in range(count):
            length = int(generator.integers(4, 13))
            ids = [int((generator.integers(VOCABULARY) + k) % VOCABULARY) for k in range(length)]
            rows.append({"id": f"{name}-{i}", "input_ids": ids, "length": length, "start": 1 + i % 3})
        write_examples(data_dir / f"{name}.arrow", rows)


def toy_config(*overrides: str) -> ToyConfig:
    """Eight examples a step, twelve steps, every step logged."""
    base = ["train.batch_size=8", "train.micro_batch_size=8", "train.max_steps=12", "train.log_every=1"]
    base += ["train.eval_every=4", "optim.lr=0.01", "tracking.tensorboard=false"]
    return load_config(ToyConfig, None, [*base, *overrides])


def run_workers(function: Callable[..., None], world_size: int, *args: Any) -> None:
    """Call `function(rank, *args)` in `world_size` fresh processes joined by gloo.

    They are forked from a process that has imported the slow libraries, and has done nothing else.
    """
    multiprocessing.set_forkserver_preload(
        ["deepspeed", "transformers.modeling_utils", "eagleray.platform.training"]
    )
    with patch.dict(os.environ, DS_ACCELERATOR="cpu"):  # which DeepSpeed looks at when it is imported
        forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as folder:
        args = (world_size, f"file://{folder}/store", function, args)
        mp.start_processes(_worker, args, nprocs=world_size, start_method="forkserver")


def _worker(
    rank: int, world_size: int, store: str, function: Callable[..., None], args: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "DS_ACCELERATOR": "cpu",
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()
    # DeepSpeed still holds process groups of its own. A gloo thread that wants the interpreter while it shuts
    # down aborts the process ("terminate called without an active exception"), so leave without shutting down.
    sys.stdout.flush()
    os._exit(0)


def train_undisturbed(run_dir: Path, *overrides: str, workers: int = 1) -> None:
    """The toy task without Ray, what a run that was disturbed is compared with."""
    run_workers(_undisturbed, workers, run_dir, overrides)


def _undisturbed(rank: int, run_dir: Path, overrides: Sequence[str]) -> None:
    if rank == 0:
        write_toy_data(run_dir / "data")
    dist.barrier()
    cfg = toy_config(*overrides)
    assert run_training(ToyTask(cfg, run_dir / "data"), cfg, run_dir)


def train_toy(run_dir: Path, *overrides: str) -> TrainedRun:
    """The toy task through Ray."""
    cfg = toy_config(f"run.dir={run_dir}", *overrides)
    return train(ToyTask, cfg, job="toy", prepare=lambda run: write_toy_data(run.data))


def toy_command(run_dir: Path, *overrides: str) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of a driver process that trains the toy task."""
    tests = Path(__file__).resolve().parent
    path = os.pathsep.join([str(tests.parent), str(tests)])
    return [sys.executable, "-m", "toy_task", str(run_dir), *overrides], {**os.environ, "PYTHONPATH": path}


def read_run(run_dir: Path) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """All metrics of a run but those of the clock, and its final weights."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    clock = ("time", "tokens_per_s", "step_s")
    weights = load_file(run_dir / "model" / "model.safetensors")
    return [{k: v for k, v in record.items() if k not in clock} for record in records], weights


def assert_identical(run_dir: Path, other: Path) -> None:
    """Same samples in the same order, same metrics and same weights, bit for bit."""
    (records, weights), (other_records, other_weights) = read_run(run_dir), read_run(other)
    assert records == other_records
    assert weights.keys() == other_weights.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, other_weights[name]), name


if __name__ == "__main__":
    import toy_task  # under its own name: Ray's workers know no `__main__` of this process

    configure_logging()
    with clean_exit():
        toy_task.train_toy(Path(sys.argv[1]), *sys.argv[2:])
