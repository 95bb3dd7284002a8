"""Train what conversion added: layer by layer from recorded inputs of the teacher, then end to end.

    python -m eagleray.jobs.lisa.train --config configs/lisa/train_tiny.yaml model.path=... phase=local
    python -m eagleray.jobs.lisa.train --config configs/lisa/train_tiny.yaml model.path=... phase=end_to_end \
        student.path=runs/lisa.train/<run>/model

`model` is the teacher. Without `student` it is converted first, as `share` and `start` say. The teacher's inputs are
recorded once by the driver (phase `local`); the workers map them into memory and never run the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import eagleray.models.lisa.model  # noqa: F401 - registers the converted models
from eagleray.jobs.lisa.sections import BlocksSection, ShareSection, StartSection, as_texts, convert_model
from eagleray.models.lisa.distill import (
    LayerDistiller,
    LocalWeights,
    record_inputs,
    recorded_layers,
    set_trained,
)
from eagleray.models.lisa.losses import logit_distillation, next_token_loss
from eagleray.platform.config import Config as Section
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
        """Known before anything runs if the model is a local folder, so a sweep refuses such a point."""
        if self.student is None and (Path(self.model.path) / "config.json").is_file():
            self.share.check_model(AutoConfig.from_pretrained(self.model.path))
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
        self.inputs = {}
        if cfg.phase == "local":
            self.inputs = {
                part: np.load(data_dir / f"{part}.npy", mmap_mode="r") for part in ("train", "eval")
            }

    def build_model(self) -> nn.Module:
        student = load_pretrained(AutoModelForCausalLM, self.cfg.start_student(self.data_dir))
        self.teacher = load_pretrained(AutoModelForCausalLM, self.cfg.model).eval().requires_grad_(False)
        set_trained(student, self.cfg.trained)
        if self.cfg.phase == "local":
            self.distiller = LayerDistiller(self.teacher, student)
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
        if self.inputs:
            found = np.stack([self.inputs[row["part"]][row["row"]] for row in rows]).astype("float32")
            tensors["inputs"] = torch.from_numpy(found)
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
            parts = self._parts(model, {name: tensor[i : i + 1] for name, tensor in tensors.items()})
            records.append(({k: v.item() for k, v in parts.items()}, tensors["input_ids"].shape[1]))
        return records

    def summarise(self, records: list[Any]) -> dict[str, float]:
        tokens = sum(count for _, count in records)
        means = {name: sum(parts[name] for parts, _ in records) / tokens for name in records[0][0]}
        return means | {"distance": sum(means.values())}

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
        logits = model(input_ids=ids, use_cache=False).logits
        parts = {"language_model": next_token_loss(logits, ids, rows, reduction="sum")}
        if loss.distillation:
            with torch.no_grad():
                target = self.teacher.to(ids.device)(input_ids=ids, use_cache=False).logits
            kl = logit_distillation(target, logits, rows, temperature=loss.temperature, reduction="sum")
            parts["distillation"] = loss.distillation * kl
        return parts


def main(cfg: Config, **options: Any) -> TrainedRun:
    """Convert, record and encode on the driver, then train."""
    return train(LisaTask, cfg, job=JOB, prepare=lambda run: _prepare(cfg, run), **options)


def _prepare(cfg: Config, run: RunFolder) -> None:
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
            _record(teacher, student, ids, run.data / f"{part}.npy")
    run.update_manifest(data_hashes=text_hashes(cfg.data))


def _rows(part: str, blocks: np.ndarray) -> Iterator[dict[str, Any]]:
    for i, block in enumerate(blocks):
        yield {"id": f"{part}-{i}", "part": part, "row": i, "input_ids": block, "length": len(block)}


def _record(teacher: Any, student: Any, blocks: np.ndarray, path: Path) -> None:
    """The teacher's inputs to every layer that matters, float16, [blocks, K, T, width]."""
    layers = recorded_layers(student.base_model.lisa, teacher.config.num_hidden_layers)
    shape = (len(blocks), len(layers), blocks.shape[1], teacher.config.hidden_size)
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    for i, ids in enumerate(as_texts(blocks, batch=1)):
        out[i] = record_inputs(teacher, ids, layers=layers)[0].float().numpy()
    out.flush()


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
