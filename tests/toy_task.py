"""A tiny language-model task and a way to run the training loop in plain processes, for tests of the loop."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from eagleray.jobs.language_model import LanguageModelTask
from eagleray.platform.config import load_config
from eagleray.platform.data.examples import write_examples
from eagleray.platform.pretrained import add_lora, load_pretrained
from eagleray.platform.sections import ModelSection, TrainingConfig

VOCABULARY = 64


class ToyConfig(TrainingConfig):
    """The loop's config and one switch."""

    dropout: float = 0.0


class ToyTask(LanguageModelTask):
    """Learns to count upwards modulo the vocabulary; a test may let one call of the loss fail, or start from a saved model."""

    nan_at_call: ClassVar[int | None] = None
    crash_at_call: ClassVar[int | None] = None
    start: ClassVar[str | None] = None

    def __init__(self, cfg: ToyConfig, data_dir: Path) -> None:
        super().__init__(cfg, data_dir)
        self.cfg = cfg
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

    def loss(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        call, self.calls = self.calls, self.calls + 1
        if call == self.crash_at_call:
            raise ConnectionError("injected crash")
        total, further = super().loss(model, tensors)
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
    """Call `function(rank, *args)` in `world_size` fresh processes joined by gloo."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (world_size, f"file://{folder}/store", function, args), nprocs=world_size)


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
