"""What the jobs that train a policy with trl share: config, the trainer in Ray Train workers, metrics, resuming.

trl brings the algorithm and its own loop; here it gets what every run of ours has: a run folder, checkpoints that are
resumed after whatever happened, a stop on a signal that loses no step, metrics in `metrics.jsonl`, plots, and the model in
`model/`. Rank and address come from Ray Train through the environment that accelerate reads.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from eagleray.jobs.align.generation import PromptFormat, formatted
from eagleray.platform.cluster import check_placement, check_shared_folder, connected
from eagleray.platform.config import Config as Section
from eagleray.platform.config import validate_config
from eagleray.platform.launch import TrainedRun, run_workers
from eagleray.platform.plots import plot_training
from eagleray.platform.pretrained import load_pretrained, load_tokenizer
from eagleray.platform.progress import training_progress
from eagleray.platform.remote import SharedFolder
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import (
    DeepSpeedSection,
    JobConfig,
    LoraSection,
    ModelSection,
    OptimSection,
    TrackingSection,
)
from eagleray.platform.stopping import stop_requested
from eagleray.platform.storage import write_text
from eagleray.platform.tracking import MetricsSink

logger = logging.getLogger(__name__)

Rows = list[dict[str, Any]]

_NOISE = ("epoch", "clip_ratio", "terminated", "min_length", "max_length", "runtime", "per_second")
"""Parts of the names of trl's metrics that nobody would look at a plot of."""


class PolicyTrainSection(Section):
    """The training loop of trl."""

    max_steps: int = Field(default=500, ge=1)
    """Optimiser steps."""
    batch_size: int = Field(default=64, ge=1)
    """Completions (of `align.policy`) or pairs (of `align.dpo`) of one step, over all workers."""
    micro_batch_size: int = Field(default=8, ge=1)
    """Of them in one forward pass of one worker."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    log_every: int = Field(default=10, ge=1)
    """Steps between two lines of metrics."""
    eval_every: int = Field(default=50, ge=1)
    """Steps between two looks at the held-out prompts or pairs."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Steps between two checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many of the latest checkpoints stay."""
    seed: int = Field(default=0, ge=0)
    """Seed of order, sampling and dropout."""


class PolicyConfig(JobConfig):
    """What the jobs that train a policy have."""

    model: ModelSection
    """The policy to start from; it also is the reference that the KL divergence is measured from."""
    lora: LoraSection | None = None
    train: PolicyTrainSection = PolicyTrainSection()
    optim: OptimSection = OptimSection(lr=1e-6, schedule="constant", warmup_ratio=0.0)
    deepspeed: DeepSpeedSection | None = None
    """Shard the policy with DeepSpeed; default: plain data parallelism."""
    tracking: TrackingSection = TrackingSection()
    prompt_format: PromptFormat = "chat"
    """`chat`: by the policy's chat template. `plain`: the prompt and a newline, for a model that has read plain text."""

    @model_validator(mode="after")
    def _batch_divides(self) -> Any:
        if self.ray.min_workers != self.ray.max_workers:
            raise ValueError(
                "trl trains with a fixed number of workers; give `ray.num_workers` as one number"
            )
        size = self.ray.max_workers * self.train.micro_batch_size
        if self.train.batch_size % size:
            raise ValueError(
                f"`train.batch_size` is {self.train.batch_size}; it must be a multiple of `ray.num_workers` x "
                f"`train.micro_batch_size` = {size}"
            )
        return self

    def formatted(self, prompt: str) -> Any:
        """A prompt as trl takes it."""
        return formatted(prompt, self.prompt_format)

    def load(self) -> tuple[Any, Any]:
        """The policy and what makes its inputs."""
        return load_pretrained(AutoModelForCausalLM, self.model), load_tokenizer(self.model)


BuildTrainer = Callable[[Any, Any, Any, Path, dict[str, Any]], Any]
"""Config, model, tokenizer or processor, the run's data folder and trainer arguments to a trl trainer."""


def train_policy(
    job: str, cfg: PolicyConfig, build: BuildTrainer, *, prepare: Callable[[RunFolder], None]
) -> TrainedRun:
    """Train a policy: run folder, data, workers, report, plots.

    Args:
        job: The job's name.
        cfg: Its config.
        build: Makes the trainer in each worker; an importable top-level function.
        prepare: Writes the data into `run.data`; called for a new run only.
    """
    with RunFolder.create(job, cfg, shared=True).recording() as run:
        if not run.resumed:
            run.data.mkdir(exist_ok=True)
            prepare(run)
        loop = {
            "build": f"{build.__module__}:{build.__name__}",
            "config": cfg.model_dump(mode="json"),
            "config_class": f"{type(cfg).__module__}:{type(cfg).__qualname__}",
            "run_dir": str(run.path),
            "threads": max(1, int(cfg.ray.cpus_per_worker)),
        }
        with connected(cfg.ray):
            check_placement(cfg.ray)
            check_shared_folder(cfg.ray, run.folder)
            with training_progress(
                run.path, total_steps=cfg.train.max_steps, description=cfg.run.note or job
            ):
                summary = run_workers(_train_worker, loop, cfg.ray, run)
        run.write_report(summary)
        plot_training(run.path)
    return TrainedRun(run.path, summary)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One JSON object a line; the file appears as a whole."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_rows_back(path: Path) -> Rows:
    """What `write_rows` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def whole_checkpoint(folder: Path) -> str | None:
    """The latest checkpoint of trl that was written to its end: its trainer state comes last."""
    while folder.is_dir() and (found := get_last_checkpoint(str(folder))) is not None:
        if (Path(found) / "trainer_state.json").is_file():
            return found
        Path(found).rename(Path(found).with_name(f"cut-off-{Path(found).name}"))
    return None


def _train_worker(loop: dict[str, Any]) -> dict[str, float] | None:
    import torch
    from transformers.utils import logging as transformers_logging

    from eagleray.platform.cpu import set_up_torch

    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("eagleray").setLevel(logging.INFO)
    transformers_logging.disable_progress_bar()
    set_up_torch(loop["threads"])
    # Ray Train has set rank and address; accelerate asks for these two besides.
    os.environ["ACCELERATE_USE_CPU"] = str(not torch.cuda.is_available()).lower()
    cfg: PolicyConfig = validate_config(_load(loop["config_class"]), loop["config"], "worker")
    run_dir = Path(loop["run_dir"])
    model, processor = cfg.load()
    callback = _Recorder(run_dir, cfg)
    trainer = _load(loop["build"])(cfg, model, processor, run_dir / "data", trainer_arguments(cfg, run_dir))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(callback)
    checkpoint = whole_checkpoint(run_dir / "checkpoints")
    trainer.args.eval_on_start = checkpoint is None
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.state.global_step < cfg.train.max_steps:
        return None
    trainer.save_model(str(run_dir / "model"))
    return callback.summary(trainer.state.global_step)


def trainer_arguments(cfg: PolicyConfig, run_dir: Path) -> dict[str, Any]:
    """Arguments of every trl trainer's config."""
    import torch

    train, optim = cfg.train, cfg.optim
    workers = cfg.ray.max_workers
    schedules = {"constant": "constant_with_warmup" if optim.warmup_ratio else "constant"}
    return {
        "output_dir": str(run_dir / "checkpoints"),
        "max_steps": train.max_steps,
        "per_device_train_batch_size": train.micro_batch_size,
        "per_device_eval_batch_size": train.micro_batch_size,
        "gradient_accumulation_steps": train.batch_size // (workers * train.micro_batch_size),
        "bf16": train.precision == "bf16",
        "gradient_checkpointing": train.gradient_checkpointing,
        "learning_rate": optim.lr,
        "adam_beta1": optim.betas[0],
        "adam_beta2": optim.betas[1],
        "adam_epsilon": optim.eps,
        "weight_decay": optim.weight_decay,
        "lr_scheduler_type": schedules.get(optim.schedule, optim.schedule),
        "warmup_steps": optim.warmup_ratio,
        "max_grad_norm": optim.clip_norm,
        "logging_steps": train.log_every,
        "eval_strategy": "steps",
        "eval_steps": train.eval_every,
        "eval_on_start": True,  # not of a run that is resumed
        "save_steps": train.checkpoint_every,
        "save_total_limit": train.keep_checkpoints,
        "seed": train.seed,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        **({} if cfg.deepspeed is None else {"deepspeed": _deepspeed(cfg.deepspeed)}),
    }


def _deepspeed(section: DeepSpeedSection) -> dict[str, Any]:
    """DeepSpeed's JSON, whose other values the trainer fills in."""
    zero: dict[str, Any] = {"stage": section.zero_stage}
    if section.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if section.offload_params:
        zero["offload_param"] = {"device": "cpu"}
    auto = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )
    return {"zero_optimization": zero, "bf16": {"enabled": "auto"}, **dict.fromkeys(auto, "auto")}


class _Recorder(TrainerCallback):
    """Metrics into the run folder, and a stop at which all workers agree."""

    def __init__(self, run_dir: Path, cfg: PolicyConfig) -> None:
        self._folder, self._cfg = SharedFolder(run_dir), cfg
        self._sink: MetricsSink | None = None
        self._last: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._sink = MetricsSink(self._folder.path, self._cfg.tracking, state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if self._sink is None or not logs or "train_runtime" in logs:
            return
        kind = "eval" if any(key.startswith("eval_") for key in logs) else "train"
        values = {
            "lr" if key == "learning_rate" else key.removeprefix("eval_").replace("/", "_"): float(value)
            for key, value in logs.items()
            # What is only looked at on held-out prompts is NaN in training.
            if isinstance(value, int | float) and not math.isnan(value) and not any(n in key for n in _NOISE)
        }
        self._sink.log(state.global_step, values, kind=kind)
        if kind == "eval":
            self._last = values

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        from accelerate.utils import broadcast_object_list

        [stop] = broadcast_object_list([stop_requested(self._folder)])
        if stop:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._sink is not None:
            self._sink.close()

    def summary(self, steps: int) -> dict[str, float]:
        """What worker 0 returns: the last evaluation."""
        return {
            **{key: value for key, value in self._last.items() if "per_second" not in key},
            "steps": steps,
        }


def _load(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
