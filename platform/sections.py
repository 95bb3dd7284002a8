"""Config sections that every job shares; a job nests those it needs and adds its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PositiveInt, field_validator, model_validator

from eagleray.platform.config import Config
from eagleray.platform.remote import is_uri

Precision = Literal["fp32", "bf16", "fp16"]


def _absolute_if_local(path: str) -> str:
    # Ray's workers run in folders of their own.
    local = Path(path).expanduser()
    return str(local.absolute()) if local.exists() else path


ModelPath = Annotated[str, AfterValidator(_absolute_if_local)]
"""Model folder or hub name; a folder that is there is made absolute."""


class RunSection(Config):
    """Where the run is recorded."""

    dir: str | None = None
    """Run folder, a path or an fsspec URI; an existing one is resumed. Default: `<root>/<job>/<time>-<id>`."""
    root: str = "runs"
    """Folder or URI in which new run folders are made."""
    note: str = ""
    """Free text kept in the manifest."""


class RaySection(Config):
    """The cluster and the share of it that the job takes."""

    address: str | None = None
    """Address of a running cluster (`auto`, `ray://...`, `host:port`). Default: a private local one."""
    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Training workers (data-parallel ranks), or scoring actors for evaluation jobs. `[least, most]`: as many as
    the cluster has room for; when that changes the run goes on from its last checkpoint."""
    resize_every_s: float = Field(default=60, gt=0)
    """With `[least, most]` workers: seconds between two looks whether there is room for more."""
    cpus_per_worker: float = Field(default=1, gt=0)
    """CPU cores of one worker."""
    use_gpu: bool | Literal["auto"] = "auto"
    """One GPU a worker. `auto`: yes if the cluster has at least `num_workers` GPUs."""
    max_failures: int = Field(default=0, ge=-1)
    """How often a failed worker group is restarted from the last checkpoint (-1: without limit)."""

    @field_validator("num_workers")
    @classmethod
    def _least_comes_first(cls, workers: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(workers, tuple) and workers[0] > workers[1]:
            raise ValueError(f"`ray.num_workers` is {list(workers)}; it is a number or [least, most]")
        return workers

    @property
    def min_workers(self) -> int:
        """Workers without which the run can't go on."""
        return self.num_workers[0] if isinstance(self.num_workers, tuple) else self.num_workers

    @property
    def max_workers(self) -> int:
        """Workers that the run takes if there is room."""
        return self.num_workers[1] if isinstance(self.num_workers, tuple) else self.num_workers


class ModelSection(Config):
    """A Hugging Face model folder or hub name."""

    path: ModelPath
    """Local folder or hub name of the model to start from."""
    revision: str | None = None
    """Hub revision (commit, tag or branch)."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel passed to transformers."""


class LoraSection(Config):
    """Low-rank adapters through peft, for any job on a causal LM."""

    rank: int = Field(default=16, ge=1)
    """Rank r of the update BA."""
    alpha: int = Field(default=32, ge=1)
    """Scale: the update is multiplied by alpha / r."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter input."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the modules that get an adapter."""


class OptimSection(Config):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(default=1e-5, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay, on matrices only (not on biases and norms)."""
    schedule: Literal["cosine", "linear", "constant", "inverse_sqrt"] = "cosine"
    """Shape after warm-up: to zero by a half cosine or a line, flat, or with the inverse square root of the step."""
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps in which the rate rises from zero."""
    clip_norm: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 switches clipping off."""


class TrainSection(Config):
    """The training loop."""

    batch_size: int = Field(default=32, ge=1)
    """Examples of one optimiser step, over all workers (the global batch)."""
    micro_batch_size: int = Field(default=8, ge=1)
    """Examples of one forward pass of one worker; accumulation follows from it."""
    micro_batch_length: int | None = Field(default=None, ge=1)
    """Largest padded length (tokens, frames) of one forward pass: examples times the longest of them.
    `micro_batch_size` is then only the most examples of a pass."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the data; the sampler runs on across the border, so that every batch is full."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps; overrides `epochs`."""
    precision: Precision = "fp32"
    """Arithmetic of forward and backward; bf16 and fp16 keep fp32 master weights. fp16 needs a GPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    bucket_batches: int = Field(default=50, ge=0)
    """Examples of like length are batched within pools of this many batches; 0 switches bucketing off."""
    log_every: int = Field(default=10, ge=1)
    """Steps between two lines of metrics."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between two evaluations; default: ten in the run."""
    checkpoint_every: int | None = Field(default=None, ge=1)
    """Steps between two checkpoints, a multiple of the evaluations; default: at every evaluation."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many of the latest checkpoints stay, for resuming."""
    keep_model: Literal["best", "last"] = "best"
    """Which model ends in `model/`: the best by `metric` (the last if there is no evaluation), or the last."""
    average_best: int = Field(default=1, ge=1)
    """With 2 or more, `model/` is the mean of this many best models, which stay in `best/`."""
    metric: str | None = None
    """Evaluation metric that decides which model is kept; default: the task's own."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after this many evaluations without improvement of `metric`."""
    seed: int = Field(default=0, ge=0)
    """Seed of initialisation, data order and dropout."""
    start_from: str | None = None
    """Checkpoint folder of another run (`.../checkpoints/step-N`, a path or URI) to go on from: its weights, moments and step, but
    the learning rate, schedule and all else of this config."""
    stop_at: int | None = Field(default=None, ge=1)
    """End after this step, with an evaluation and a checkpoint; the schedule still runs to the last step."""

    @field_validator("start_from")
    @classmethod
    def _start_is_absolute(cls, path: str | None) -> str | None:
        # Ray's workers run in folders of their own.
        return path if path is None or is_uri(path) else str(Path(path).expanduser().absolute())


class DeepSpeedSection(Config):
    """What DeepSpeed partitions and offloads."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """ZeRO stage: 1 shards optimiser states, 2 gradients too, 3 parameters too."""
    offload_optimizer: bool = False
    """Keep optimiser states in CPU memory (stages 1 to 3)."""
    offload_params: bool = False
    """Keep parameters in CPU memory (stage 3)."""

    @model_validator(mode="after")
    def _offload_fits_stage(self) -> DeepSpeedSection:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("`deepspeed.offload_optimizer` needs `deepspeed.zero_stage` 1, 2 or 3")
        if self.offload_params and self.zero_stage != 3:
            raise ValueError("`deepspeed.offload_params` needs `deepspeed.zero_stage` 3")
        return self


class TrackingSection(Config):
    """Where metrics go besides the run folder's `metrics.jsonl`."""

    tensorboard: bool = True
    """Write TensorBoard events to `tb/` in the run folder."""
    mlflow: str | None = None
    """MLflow tracking URI (install `eagleray[mlflow]`)."""
    wandb: str | None = None
    """Weights & Biases project (install `eagleray[wandb]`)."""


class JobConfig(Config):
    """What every job has."""

    run: RunSection = RunSection()
    ray: RaySection = RaySection()


class TrainingConfig(JobConfig):
    """What every training job has; subclasses add `model`, `data` and the sections of their method."""

    train: TrainSection = TrainSection()
    optim: OptimSection = OptimSection()
    deepspeed: DeepSpeedSection = DeepSpeedSection()
    lora: LoraSection | None = None
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="after")
    def _average_is_of_the_best(self) -> Any:
        if self.train.average_best > 1 and (self.train.keep_model == "last" or self.lora is not None):
            raise ValueError(
                "`train.average_best` needs `train.keep_model: best` and whole models, without `lora`"
            )
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> Any:
        train = self.train
        # Passes that are cut by length hold what fits; then only the shares of the workers must be equal.
        by_count = train.micro_batch_length is None
        for workers in range(self.ray.min_workers, self.ray.max_workers + 1):
            per_pass = workers * (train.micro_batch_size if by_count else 1)
            if train.batch_size % per_pass:
                size = f" x `train.micro_batch_size` = {workers} x {train.micro_batch_size} = {per_pass}"
                raise ValueError(
                    f"`train.batch_size` is {train.batch_size}; it must be a multiple of `ray.num_workers`"
                    + (size if by_count else f", {workers}")
                )
        return self
