"""Train a pair encoder: in which order are the two answers shown (spec 3)?

    python -m eagleray.jobs.lrhp.train --config configs/lrhp/train_tiny.yaml optim.lr=2e-5

The result in `model/` is a Hugging Face folder (or adapter) with the tokenizer, the row of `<|PREFERENCE|>`, the head
and `lrhp.json`; `lrhp.encode`, `lrhp.evaluate` and `eagleray serve lrhp=FOLDER` read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import AutoModel

from eagleray.jobs.backbone.start import StartConfig, prepare_start
from eagleray.jobs.lrhp.data import TrainingPairs
from eagleray.models.gram.batching import pad_right
from eagleray.models.gram.prompts import shuffled_order
from eagleray.models.lrhp.checkpoint import (
    PairSettings,
    load_row_and_head,
    save_tokenizer_and_settings,
)
from eagleray.models.lrhp.losses import order_loss, symmetry_penalty
from eagleray.models.lrhp.metrics import order_metrics
from eagleray.models.lrhp.model import PairModel
from eagleray.models.lrhp.prompts import (
    TEMPLATE,
    PairTemplate,
    PreferenceEncoder,
    add_preference_token,
)
from eagleray.platform.config import Config as Section
from eagleray.platform.data.examples import write_examples
from eagleray.platform.data.preferences import Preference
from eagleray.platform.launch import TrainedRun, train
from eagleray.platform.pretrained import add_lora, load_pretrained, load_tokenizer, whole_parameters
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import OptimSection
from eagleray.platform.task import Batch, Task

JOB = "lrhp.train"


class LossSection(Section):
    """Binary cross-entropy of the order."""

    order: Literal["both", "random", "fixed"] = "both"
    """`both`: each pair is shown in both orders in every batch it is in; `random`: in one, by a seeded coin; `fixed`:
    always with the chosen answer first, which teaches nothing and is there to show that."""
    symmetry: float = Field(default=0.0, ge=0)
    """Weight λ of (u(x, y_1, y_2) + u(x, y_2, y_1))², the mean over pairs; needs `order: both`."""
    smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Label smoothing ε: z becomes z (1 − ε) + ε/2."""

    @model_validator(mode="after")
    def _symmetry_needs_both_orders(self) -> LossSection:
        if self.symmetry and self.order != "both":
            raise ValueError(f"`loss.symmetry` needs `loss.order: both`; it is {self.order!r}")
        return self


class PairSection(Section):
    """How a pair is put to the model."""

    template: str = TEMPLATE
    """Text around `{prompt}`, `{first}` and `{second}`; `<|PREFERENCE|>` comes after it."""
    max_length: int = Field(default=2048, ge=32)
    """Longest sequence in tokens; both answers are cut alike, then the start of the prompt."""
    pool: Literal["at_token", "before_token"] = "at_token"
    """Take the hidden state at `<|PREFERENCE|>`, or at the token before it."""

    @model_validator(mode="after")
    def _template_is_whole(self) -> PairSection:
        PairTemplate(self.template)
        return self


class LrhpOptim(OptimSection):
    """AdamW with the betas of the group's reward models."""

    lr: float = Field(default=1e-5, gt=0)
    """Peak learning rate; with LoRA 1e-4 is usual."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the first and second moment."""


class Config(StartConfig):
    """Config of `lrhp.train`."""

    job: Literal["lrhp.train"] = JOB
    data: TrainingPairs
    pair: PairSection = PairSection()
    loss: LossSection = LossSection()
    optim: LrhpOptim = LrhpOptim()  # pyright: ignore[reportIncompatibleVariableOverride]  # frozen


class LrhpTask(Task):
    """Pairs; rows 2k and 2k + 1 of a batch in both orders are the two orders of pair k."""

    metric: ClassVar[str] = "accuracy"
    mode: ClassVar[Literal["min", "max"]] = "max"

    def __init__(self, cfg: Config, data_dir: Path) -> None:
        super().__init__(cfg, data_dir)
        self.cfg = cfg
        self.start = cfg.start_model(data_dir)
        self.tokenizer = load_tokenizer(self.start)
        self.known_tokens = len(self.tokenizer)
        self.token_id = add_preference_token(self.tokenizer)

    def build_model(self) -> nn.Module:
        backbone = load_pretrained(AutoModel, self.start)
        embedding = backbone.get_input_embeddings()
        model = PairModel(
            add_lora(backbone, self.cfg.lora, task_type="FEATURE_EXTRACTION"),
            token_id=self.token_id,
            pool=self.cfg.pair.pool,
        )
        if not load_row_and_head(model, self.start.path):  # there is one if an LRHP model is trained further
            with whole_parameters(embedding):
                model.start_row(min(self.known_tokens, len(embedding.weight)))
        return model

    def loss(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.cfg.loss
        _, u_R = model(tensors["input_ids"], tensors["attention_mask"])
        total = order_loss(u_R, tensors["label"], smoothing=loss.smoothing, reduction="sum")
        if loss.symmetry:
            # Twice, as the loop divides by rows and there are two of them a pair.
            total = total + 2 * loss.symmetry * symmetry_penalty(u_R[0::2], u_R[1::2])
        right_R = (u_R.detach() > 0) == (tensors["label"] > 0)
        return total, {"accuracy": right_R.sum()}

    def evaluate_batch(self, model: nn.Module, tensors: dict[str, Tensor]) -> list[Any]:
        _, u_R = model(tensors["input_ids"], tensors["attention_mask"])
        return u_R.view(-1, 2).tolist()

    def summarise(self, records: list[Any]) -> dict[str, float]:
        return order_metrics(np.array(records))

    def save_extras(self, path: Path) -> None:
        pair = self.cfg.pair
        settings = PairSettings(self.token_id, PairTemplate(pair.template), pair.max_length, pair.pool)
        save_tokenizer_and_settings(self.tokenizer, settings, path)

    def train_batch(self, indices: Sequence[int], *, step: int) -> Batch:
        return _collate([self.train[i] for i in indices], lambda row: self._shown(row["id"]))

    def collate(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """Right-padded `input_ids` and `attention_mask` [2B, T] in both orders, and `label` [2B]."""
        return _collate(rows, lambda row: ("forward", "backward"))

    def _shown(self, pair_id: str) -> tuple[str, ...]:
        if self.cfg.loss.order == "both":
            return ("forward", "backward")
        coin = self.cfg.loss.order == "random" and shuffled_order(self.cfg.train.seed, pair_id)
        return ("backward",) if coin else ("forward",)


def main(cfg: Config, **options: Any) -> TrainedRun:
    """Encode the pairs on the driver, then train."""
    return train(LrhpTask, cfg, job=JOB, prepare=lambda run: _prepare(cfg, run), **options)


def _collate(rows: Sequence[dict[str, Any]], orders: Any) -> Batch:
    shown = [(row, order) for row in rows for order in orders(row)]
    input_ids_RT, attention_mask_RT = pad_right([row[order] for row, order in shown])
    label_R = torch.tensor([float(order == "forward") for _, order in shown])
    return Batch(
        {"input_ids": input_ids_RT, "attention_mask": attention_mask_RT, "label": label_R},
        weight=len(shown),
        ids=tuple(row["id"] for row in rows),
        tokens=int(attention_mask_RT.sum()),
    )


def _prepare(cfg: Config, run: RunFolder) -> None:
    loaded, held_out = cfg.data.load(seed=cfg.train.seed)
    texts = (text for pair in loaded.pairs for text in (pair.prompt_text, pair.chosen, pair.rejected))
    tokenizer = load_tokenizer(prepare_start(cfg, run, texts))
    add_preference_token(tokenizer)
    encoder = PreferenceEncoder(tokenizer, PairTemplate(cfg.pair.template), max_length=cfg.pair.max_length)
    for name, pairs in (("train", loaded.pairs), ("eval", held_out)):
        write_examples(run.data / f"{name}.arrow", _rows(encoder, pairs))
    run.update_manifest(data_hashes=loaded.hashes, data=loaded.counts)


def _rows(encoder: PreferenceEncoder, pairs: Sequence[Preference]) -> Iterator[dict[str, Any]]:
    for pair in pairs:
        forward, backward = encoder.encode_orders(pair.prompt_text, pair.chosen, pair.rejected)
        yield {
            "id": pair.id,
            "forward": forward.ids,
            "backward": backward.ids,
            "length": max(len(forward.ids), len(backward.ids)),
        }


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
