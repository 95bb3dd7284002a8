"""The discriminative baseline: a scalar reward model trained with the Bradley-Terry loss.

    python -m eagleray.jobs.gram.discriminative --config configs/gram/discriminative_tiny.yaml

Same loop, same data and same evaluation as GRAM, so that the two differ in the method only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from eagleray.jobs.backbone.start import StartConfig, prepare_start
from eagleray.jobs.gram.data import PairData, load_labelled
from eagleray.models.gram.batching import pad_right
from eagleray.models.gram.discriminative import (
    RewardEncoder,
    RewardSettings,
    bradley_terry_loss,
    sequence_rewards,
)
from eagleray.models.gram.metrics import expected_calibration_error
from eagleray.platform.config import Config as Section
from eagleray.platform.data.examples import write_examples
from eagleray.platform.data.margins import read_margins
from eagleray.platform.data.preferences import Preference
from eagleray.platform.data.sources import SourceConfig, file_hashes
from eagleray.platform.launch import TrainedRun, train
from eagleray.platform.pretrained import add_lora, load_pretrained, load_tokenizer
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import OptimSection
from eagleray.platform.task import Batch, Task

JOB = "gram.discriminative"
logger = logging.getLogger(__name__)


class LossSection(Section):
    """Bradley-Terry loss and its variants (spec section 8)."""

    use_margin: bool = False
    """Use the pair's margin, where the data has one; without one it is 0."""
    margin_form: Literal["subtract", "scale"] = "subtract"
    """`subtract`: ask for a difference of at least `margin_scale` times the margin; `scale`: weigh each pair by its
    margin over the mean margin of the training pairs."""
    margin_scale: float = Field(default=1.0, ge=0)
    """Factor λ of the margin for `subtract`; 0 is the plain loss."""
    smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the label that goes to the other answer."""
    centring: float = Field(default=0.0, ge=0)
    """Weight of (r_w + r_l)², which keeps rewards around zero; TRL recommends 0.01."""
    positive_regulariser: float = Field(default=0.0, ge=0)
    """Weight of −log σ(r_w)."""


class Config(StartConfig):
    """Config of `gram.discriminative`."""

    job: Literal["gram.discriminative"] = JOB
    data: PairData
    margins: SourceConfig | None = None
    """Rows with `id` and `margin`, e.g. `margins.jsonl` of `lrhp.margin`, in place of the margins in `data`; a pair
    without one has margin 0. Needs `loss.use_margin`."""
    max_length: int = Field(default=2048, ge=16)
    """Longest prompt with its answer, in tokens."""
    loss: LossSection = LossSection()
    optim: OptimSection = OptimSection(lr=1e-5)

    @model_validator(mode="after")
    def _margins_are_used(self) -> Config:
        if self.margins is not None and not self.loss.use_margin:
            raise ValueError("`margins` is given, but `loss.use_margin` is false; set it to true")
        return self


class DiscriminativeTask(Task):
    """Pairs of conversations; rows 2k and 2k + 1 of a batch are the chosen and the rejected one of pair k."""

    metric: ClassVar[str] = "accuracy"
    mode: ClassVar[Literal["min", "max"]] = "max"

    def __init__(self, cfg: Config, data_dir: Path) -> None:
        super().__init__(cfg, data_dir)
        self.cfg = cfg
        self.start = cfg.start_model(data_dir)
        self.tokenizer = load_tokenizer(self.start)
        self.mean_margin = float(self.train.column("margin").mean())
        if cfg.loss.use_margin and cfg.loss.margin_form == "scale" and self.mean_margin <= 0:
            raise ValueError(
                f"The mean margin of the training pairs is {self.mean_margin:g}; `loss.margin_form: scale` divides by "
                "it. Give pairs with margins, or use `subtract`."
            )

    def build_model(self) -> nn.Module:
        model = load_pretrained(
            AutoModelForSequenceClassification,
            self.start,
            num_labels=1,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        # The head is new: an adapter that did not save it would load with a random one.
        return add_lora(model, self.cfg.lora, task_type="SEQ_CLS", modules_to_save=["score"])

    def loss(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        loss, (chosen_B, rejected_B) = self.cfg.loss, self._rewards(model, tensors)
        form = loss.margin_form if loss.use_margin else None
        total = bradley_terry_loss(
            chosen_B,
            rejected_B,
            margin_B=tensors["margin"] if form == "subtract" else None,
            margin_scale=loss.margin_scale,
            weight_B=tensors["margin"] / self.mean_margin if form == "scale" else None,
            smoothing=loss.smoothing,
            centring=loss.centring,
            positive_regulariser=loss.positive_regulariser,
            reduction="sum",
        )
        difference_B = (chosen_B - rejected_B).detach()
        return total, {"accuracy": (difference_B > 0).sum(), "margin": difference_B.sum()}

    def evaluate_batch(self, model: nn.Module, tensors: dict[str, Tensor]) -> list[Any]:
        chosen_B, rejected_B = self._rewards(model, tensors)
        return list(zip(chosen_B.tolist(), rejected_B.tolist(), strict=True))

    def summarise(self, records: list[Any]) -> dict[str, float]:
        rewards_N2 = np.array(records)
        difference_N = rewards_N2[:, 0] - rewards_N2[:, 1]
        return {
            "accuracy": float((difference_N > 0).mean()),
            "nll": float(np.logaddexp(0, -difference_N).mean()),
            "ece": expected_calibration_error(1 / (1 + np.exp(-difference_N))),
            "margin": float(difference_N.mean()),
            "mean_reward": float(rewards_N2.mean()),
        }

    def save_extras(self, path: Path) -> None:
        self.tokenizer.save_pretrained(path)
        RewardSettings(max_length=self.cfg.max_length).save(path)

    def _rewards(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        rewards_B2 = sequence_rewards(model, tensors["input_ids"], tensors["attention_mask"]).view(-1, 2)
        return rewards_B2[:, 0], rewards_B2[:, 1]

    def collate(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """Right-padded `input_ids` and `attention_mask` [2B, T], and `margin` [B] (0 where the data has none)."""
        conversations = [row[answer] for row in rows for answer in ("chosen", "rejected")]
        input_ids_2BT, attention_mask_2BT = pad_right(conversations, pad_id=self.tokenizer.pad_token_id)
        margin_B = torch.tensor([row["margin"] for row in rows])
        return Batch(
            {"input_ids": input_ids_2BT, "attention_mask": attention_mask_2BT, "margin": margin_B},
            weight=len(rows),
            ids=tuple(row["id"] for row in rows),
            tokens=int(attention_mask_2BT.sum()),
        )


def main(cfg: Config, **options: Any) -> TrainedRun:
    """Encode the pairs on the driver, then train."""
    return train(DiscriminativeTask, cfg, job=JOB, prepare=lambda run: _prepare(cfg, run), **options)


def _prepare(cfg: Config, run: RunFolder) -> None:
    pairs = load_labelled(cfg.data, seed=cfg.train.seed)
    texts = (text for pair in pairs.train for text in (pair.prompt_text, pair.chosen, pair.rejected))
    encoder = RewardEncoder(load_tokenizer(prepare_start(cfg, run, texts)), max_length=cfg.max_length)
    hashes, train_pairs = dict(pairs.hashes), pairs.train
    if cfg.margins is not None:
        hashes |= file_hashes(cfg.margins)
        train_pairs = with_margins(train_pairs, read_margins(cfg.margins))
    for name, chosen in (("train", train_pairs), ("eval", pairs.eval)):
        write_examples(run.data / f"{name}.arrow", _rows(encoder, chosen))
    run.update_manifest(data_hashes=hashes, data=pairs.counts)


def with_margins(pairs: Sequence[Preference], margins: Mapping[str, float]) -> list[Preference]:
    """The pairs with their margins by id; 0 for those without one, of which the number is logged.

    Raises:
        ValueError: No pair has one: the ids are those of other data.
    """
    found = sum(pair.id in margins for pair in pairs)
    if not found:
        shown = ", ".join(pair.id for pair in pairs[:3])
        raise ValueError(
            f"None of the {len(margins)} margins is for a training pair (these are {shown}, ...)."
        )
    if found < len(pairs):
        logger.warning("%d of %d training pairs have no margin; theirs is 0.", len(pairs) - found, len(pairs))
    return [replace(pair, margin=margins.get(pair.id, 0.0)) for pair in pairs]


def _rows(encoder: RewardEncoder, preferences: Sequence[Preference]) -> Iterator[dict[str, Any]]:
    for pair in preferences:
        answers = [encoder.encode(pair.prompt_text, answer) for answer in (pair.chosen, pair.rejected)]
        yield {
            "id": pair.id,
            "chosen": answers[0],
            "rejected": answers[1],
            "length": max(map(len, answers)),
            "margin": float(pair.margin or 0.0),
        }


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
