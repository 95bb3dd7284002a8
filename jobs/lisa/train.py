"""Train what conversion added: layer by layer from recorded inputs of the teacher, then end to end.

    python -m eagleray.jobs.lisa.train --config configs/lisa/train_tiny.yaml model.path=... phase=local
    python -m eagleray.jobs.lisa.train --config configs/lisa/train_tiny.yaml model.path=... phase=end_to_end \
        student.path=runs/lisa.train/<run>/model

`model` is the teacher. Without `student` it is converted first, as `share` and `start` say. The teacher's inputs are
recorded once by the driver (phase `local`), for all trials of a sweep together; the workers map them into memory and
never run the teacher.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import eagleray.models.lisa.model  # noqa: F401 - registers the converted models
from eagleray.jobs.lisa.recording import Recording, check_recording, is_recorded, record
from eagleray.jobs.lisa.sections import (
    BlocksSection,
    ShareSection,
    StartSection,
    as_texts,
    convert_model,
    write_probe,
)
from eagleray.models.lisa.accounting import cache_bytes_per_token, decode_cost
from eagleray.models.lisa.attention_loss import recording_scores, teach
from eagleray.models.lisa.distill import (
    LayerDistiller,
    LocalWeights,
    recorded_layers,
    set_trained,
)
from eagleray.models.lisa.losses import logit_distillation, next_token_loss
from eagleray.models.lisa.spec import LisaSpec
from eagleray.platform.config import Config as Section
from eagleray.platform.cpu import set_up_torch
from eagleray.platform.data.examples import write_examples
from eagleray.platform.data.text import text_hashes
from eagleray.platform.launch import TrainedRun, train
from eagleray.platform.pretrained import add_lora, load_pretrained, load_tokenizer
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import ModelSection, OptimSection, TrainingConfig
from eagleray.platform.task import Batch, Task

JOB = "lisa.train"
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Modules that `lora.target_modules: all-linear` stands for."""
ADDED = ("align", "q_lr", "k_lr")
"""Modules that conversion added; an adapter holds them whole."""


class LossSection(Section):
    """Weights of the losses of both phases."""

    kl: float = Field(default=1.0, ge=0)
    """`local`: KL of attention rows."""
    mse_scores: float = Field(default=0.0, ge=0)
    """`local`: squared error of centred scores."""
    mse_out: float = Field(default=1.0, ge=0)
    """`local`: relative squared error of the attention output."""
    distillation: float = Field(default=1.0, ge=0)
    """`end_to_end`: KL of the logits, beside the language-model loss."""
    attention: float = Field(default=0.1, ge=0)
    """`end_to_end`: KL of attention rows, summed over the shared layers."""
    temperature: float = Field(default=1.0, gt=0)
    """`end_to_end`: of both logits."""


class Config(TrainingConfig):
    """Config of `lisa.train`."""

    job: Literal["lisa.train"] = JOB
    model: ModelSection
    """The teacher."""
    student: ModelSection | None = None
    """A converted model to go on with; default: convert the teacher."""
    phase: Literal["local", "end_to_end"] = "local"
    """`local`: every shared layer by itself. `end_to_end`: the whole model."""
    recorded: str | None = None
    """`local`: folder with the teacher's inputs to its layers, as a sweep leaves it in `recorded/`; default: record."""
    trained: Literal["lisa", "full"] = "lisa"
    """`end_to_end`: only what conversion added (and `lora`, if given), or everything."""
    data: BlocksSection
    share: ShareSection = ShareSection()
    start: StartSection = StartSection()
    loss: LossSection = LossSection()
    optim: OptimSection = OptimSection(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01, warmup_ratio=0.03)

    @model_validator(mode="after")
    def _phase_fits(self) -> Config:
        if self.deepspeed.zero_stage == 3:
            raise ValueError(
                "`deepspeed.zero_stage` is 3; the teacher runs beside the engine, which must not split it. Stage 2 "
                "shards the states of the few weights that are trained"
            )
        if self.phase == "local" and (
            self.lora or self.trained == "full" or self.train.gradient_checkpointing
        ):
            raise ValueError(
                "`phase: local` trains the added weights only, without a pass through the model: leave `lora`, "
                "`trained` and `train.gradient_checkpointing` at their defaults, or take `phase: end_to_end`"
            )
        if self.lora and self.trained == "full":
            raise ValueError("`lora` adapts frozen weights and `trained: full` trains them; leave one out")
        if self.phase == "local" and not (self.loss.kl or self.loss.mse_scores or self.loss.mse_out):
            raise ValueError(
                "`loss.kl`, `loss.mse_scores` and `loss.mse_out` are all 0; phase `local` has no loss"
            )
        return self

    @model_validator(mode="after")
    def _sharing_pays(self) -> Config:
        """Known before anything runs if the model is on this machine, so a sweep leaves such a point out."""
        if self.student is None:
            with contextlib.suppress(OSError):
                path, revision = self.model.path, self.model.revision
                self.share.check_model(
                    AutoConfig.from_pretrained(path, revision=revision, local_files_only=True)
                )
        return self

    def start_student(self, data_dir: Path) -> ModelSection:
        """The converted model to load: `student` as given, or what the driver wrote."""
        return self.student or ModelSection(path=str(data_dir / "student"))


class LisaTask(Task):
    """Blocks of tokens; which loss they get depends on the phase."""

    metric: ClassVar[str] = "distance"
    mode: ClassVar[Literal["min", "max"]] = "min"

    def __init__(self, cfg: Config, data_dir: Path) -> None:
        super().__init__(cfg, data_dir)
        self.cfg, self.data_dir = cfg, data_dir
        self.recording: Recording | None = None

    def build_model(self) -> nn.Module:
        student = load_pretrained(AutoModelForCausalLM, self.cfg.start_student(self.data_dir))
        self.teacher = load_pretrained(AutoModelForCausalLM, self.cfg.model).eval().requires_grad_(False)
        self.costs = _costs(student.config)
        set_trained(student, self.cfg.trained)
        if self.cfg.phase == "local":
            self.distiller = LayerDistiller(self.teacher, student)
            self.recording = Recording(recording_folder(self.cfg, self.data_dir), self.distiller.layers)
            del self.teacher
            return student
        lora = self.cfg.lora
        if lora and lora.target_modules == "all-linear":  # what was added is trained itself, not adapted
            lora = lora.model_copy(update={"target_modules": list(ADAPTED)})
        return add_lora(student, lora, task_type="CAUSAL_LM", modules_to_save=list(ADDED))

    def collate(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """`input_ids` [B, T], and for phase `local` the teacher's `inputs` [B, K, T, width]."""
        tensors = {
            "input_ids": torch.from_numpy(np.stack([row["input_ids"] for row in rows]).astype("int64"))
        }
        if self.recording is not None:
            found = [self.recording.read(row["part"], row["row"]) for row in rows]
            tensors["inputs"] = torch.from_numpy(np.stack(found))
        tokens = tensors["input_ids"].numel()
        return Batch(tensors, weight=tokens, ids=tuple(row["id"] for row in rows), tokens=tokens)

    def loss(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        parts = self._parts(model, tensors)
        return torch.stack(list(parts.values())).sum(), {
            k: v.detach() for k, v in parts.items() if len(parts) > 1
        }

    def evaluate_batch(self, model: nn.Module, tensors: dict[str, Tensor]) -> list[Any]:
        records = []
        for i in range(len(tensors["input_ids"])):
            one = {name: tensor[i : i + 1] for name, tensor in tensors.items()}
            parts = self._parts(model, one)
            whole = parts.get("language_model")
            if whole is None:  # phase A does without the whole model, but this is what it is for
                ids = one["input_ids"]
                logits = model(input_ids=ids, use_cache=False).logits
                whole = next_token_loss(logits, ids, torch.ones_like(ids, dtype=torch.bool), reduction="sum")
            records.append(
                ({k: v.item() for k, v in parts.items()}, whole.item(), tensors["input_ids"].shape[1])
            )
        return records

    def summarise(self, records: list[Any]) -> dict[str, float]:
        """Losses per token. `distance` is the sum of those that are trained on; `language_model` is that of the whole
        student in both phases, and the same function whatever is shared."""
        tokens = sum(count for *_, count in records)
        means = {name: sum(parts[name] for parts, *_ in records) / tokens for name in records[0][0]}
        distance = sum(means.values())
        targets = tokens - len(records)  # the first token of a block has nothing before it
        loss = sum(whole for _, whole, _ in records) / targets
        return means | {"distance": distance, "language_model": loss, **self.costs}

    def save_extras(self, path: Path) -> None:
        load_tokenizer(self.cfg.model).save_pretrained(path)

    def _parts(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of a batch by name, summed over tokens."""
        ids, loss = tensors["input_ids"], self.cfg.loss
        if self.cfg.phase == "local":
            weights = LocalWeights(kl=loss.kl, mse_scores=loss.mse_scores, mse_out=loss.mse_out)
            like = next(model.parameters())
            distiller = self.distiller.to(device=like.device, dtype=like.dtype)
            losses = distiller(tensors["inputs"].to(like.dtype), weights=weights, reduction="sum")
            return {f"layer_{i}": value for i, value in losses.items()}
        rows = torch.ones_like(ids, dtype=torch.bool)
        with recording_scores(model) as scores:
            logits = model(input_ids=ids, use_cache=False).logits
        parts = {"language_model": next_token_loss(logits, ids, rows, reduction="sum")}
        if loss.distillation or loss.attention:
            followed = scores if loss.attention else {}
            target, distances = teach(self.teacher.to(ids.device), ids, followed, rows, reduction="sum")
            if loss.distillation:
                kl = logit_distillation(target, logits, rows, temperature=loss.temperature, reduction="sum")
                parts["distillation"] = loss.distillation * kl
            if loss.attention:
                parts["attention"] = loss.attention * torch.stack(list(distances.values())).sum()
        return parts


def main(cfg: Config, **options: Any) -> TrainedRun:
    """Convert, record and encode on the driver, then train."""
    return train(LisaTask, cfg, job=JOB, prepare=lambda run: _prepare(cfg, run), **options)


def _prepare(cfg: Config, run: RunFolder) -> None:
    set_up_torch()
    teacher = load_pretrained(AutoModelForCausalLM, cfg.model).eval()
    tokenizer = load_tokenizer(cfg.model)
    blocks = {"train": cfg.data.blocks(tokenizer, "train"), "eval": cfg.data.blocks(tokenizer, "dev")}
    if cfg.student is None:
        student = convert_model(cfg.share, cfg.start, teacher, blocks["train"], seed=cfg.train.seed)
        student.save_pretrained(run.data / "student")
    else:
        student = load_pretrained(AutoModelForCausalLM, cfg.student)
    for part, ids in blocks.items():
        write_examples(run.data / f"{part}.arrow", _rows(part, ids))
    if cfg.phase == "local":
        layers = recorded_layers(student.base_model.lisa, teacher.config.num_hidden_layers)
        if cfg.recorded is None:
            record(teacher, blocks, layers, recording_folder(cfg, run.data), model=cfg.model.path)
        else:
            check_recording(Path(cfg.recorded), blocks, layers, model=cfg.model.path)
    run.update_manifest(data_hashes=text_hashes(cfg.data))


def prepare_sweep(cfg: Config, folder: Path) -> dict[str, Any]:
    """What all trials of a sweep have in common: the inputs to all layers, and the probe that chooses layers.

    Args:
        cfg: Config of the trials.
        folder: Of the sweep; a resumed one holds both already.

    Returns:
        Dotted config key -> value that the trials get.
    """
    set_up_torch()
    found: dict[str, Any] = {}
    teacher, tokenizer = load_pretrained(AutoModelForCausalLM, cfg.model).eval(), load_tokenizer(cfg.model)
    blocks = {"train": cfg.data.blocks(tokenizer, "train"), "eval": cfg.data.blocks(tokenizer, "dev")}
    if cfg.phase == "local" and cfg.recorded is None:
        found["recorded"] = str(folder / "recorded")
        layers = range(teacher.config.num_hidden_layers)
        if not is_recorded(folder / "recorded"):
            record(teacher, blocks, layers, folder / "recorded", model=cfg.model.path)
    share = cfg.share
    if cfg.student is None and share.layers is None and share.select == "greedy" and share.analysis is None:
        found["share.analysis"] = str(folder / "probe.json")
        if not (folder / "probe.json").exists():
            write_probe(teacher, as_texts(blocks["train"], count=cfg.start.blocks), folder / "probe.json")
    return found


def recording_folder(cfg: Config, data_dir: Path) -> Path:
    """Where a run's recording is."""
    return Path(cfg.recorded) if cfg.recorded is not None else data_dir / "recorded"


def _costs(config: Any) -> dict[str, float]:
    """What decoding takes that a sweep may weigh against quality, by arithmetic: it is the same on a busy machine."""
    spec, context = LisaSpec.from_dict(config.lisa_attention), 2048
    cost = decode_cost(config, spec, parameters=0, batch=1, context=context, value_bytes=2)
    return {
        "cache_values_per_token": cache_bytes_per_token(config, spec, value_bytes=1),
        "decode_mflops": cost.flops / 1e6,
    }


def _rows(part: str, blocks: np.ndarray) -> Iterator[dict[str, Any]]:
    for i, block in enumerate(blocks):
        yield {"id": f"{part}-{i}", "part": part, "row": i, "input_ids": block, "length": len(block)}


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
