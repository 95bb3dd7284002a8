"""GRAM stage 2: fine-tune a causal LM as a pairwise judge with label smoothing (paper eq. 3 and 4).

    python -m eagleray.jobs.gram.finetune --config configs/gram/finetune_tiny.yaml optim.lr=2e-5

Start from a stage-1 model (`gram.pretrain`) for GRAM, or from the bare backbone for the generative
baseline without stage 1. The result is a Hugging Face folder with `gram.json`, which `gram.evaluate` and
`eagleray serve` read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from eagleray.jobs.backbone.start import StartConfig, prepare_start
from eagleray.jobs.gram.data import JudgeSection, PairData, load_labelled, log_dropped
from eagleray.models.gram.batching import pad_right
from eagleray.models.gram.checkpoint import JudgeSettings
from eagleray.models.gram.judge import read_out
from eagleray.models.gram.losses import full_vocab_loss, pair_logit_loss
from eagleray.models.gram.metrics import expected_calibration_error
from eagleray.models.gram.prompts import JudgeEncoder, shuffled_order
from eagleray.models.gram.scoring import label_logits
from eagleray.platform.config import Config as Section
from eagleray.platform.data.examples import write_examples
from eagleray.platform.data.preferences import Preference
from eagleray.platform.launch import TrainedRun, train
from eagleray.platform.pretrained import add_lora, load_pretrained, load_tokenizer
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import OptimSection
from eagleray.platform.task import Batch, Task

JOB = "gram.finetune"


class LossSection(Section):
    """Preference loss on the two label logits."""

    smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Label smoothing ε; the release recommends 0.05, 0.1 or 0.15 in the torch convention."""
    convention: Literal["torch", "paper"] = "torch"
    """`paper`: ε is the mass on the wrong label (eq. 3). `torch`: ε is spread over both labels, so the wrong one
    gets ε/2, as in the released code."""
    label_space: Literal["two_way", "full_vocab"] = "two_way"
    """Softmax over the two labels, or over the vocabulary (if the model must also write the letter)."""


class Config(StartConfig):
    """Config of `gram.finetune`; defaults follow the paper's released settings."""

    job: Literal["gram.finetune"] = JOB
    data: PairData
    judge: JudgeSection = JudgeSection()
    loss: LossSection = LossSection()
    optim: OptimSection = OptimSection(lr=2e-5)


class FinetuneTask(Task):
    """Judge prompts with their label; evaluated in both orders of each pair (eq. 5)."""

    metric: ClassVar[str] = "accuracy"
    mode: ClassVar[Literal["min", "max"]] = "max"

    def __init__(self, cfg: Config, data_dir: Path) -> None:
        super().__init__(cfg, data_dir)
        self.cfg = cfg
        self.start = cfg.start_model(data_dir)
        self.tokenizer = load_tokenizer(self.start)
        self.encoder = cfg.judge.encoder(self.tokenizer)

    def build_model(self) -> nn.Module:
        model = load_pretrained(AutoModelForCausalLM, self.start)
        return add_lora(model, self.cfg.lora, task_type="CAUSAL_LM")

    def loss(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        inputs, labels_B, loss = (
            (tensors["input_ids"], tensors["attention_mask"]),
            tensors["label"],
            self.cfg.loss,
        )
        options: dict[str, Any] = {
            "smoothing": loss.smoothing,
            "convention": loss.convention,
            "reduction": "sum",
        }
        if loss.label_space == "full_vocab":
            logits_BV = label_logits(model, *inputs, self.encoder.label_ids, label_space="full_vocab")
            total = full_vocab_loss(logits_BV, labels_B, self.encoder.label_ids, **options)
            logits_B2 = logits_BV[:, list(self.encoder.label_ids)]
        else:
            logits_B2 = label_logits(model, *inputs, self.encoder.label_ids)
            total = pair_logit_loss(logits_B2, labels_B, **options)
        delta_B = (logits_B2[:, 0] - logits_B2[:, 1]).detach() * (1 - 2 * labels_B)
        return total, {"accuracy": (delta_B > 0).sum(), "margin": delta_B.sum()}

    def evaluate_batch(self, model: nn.Module, tensors: dict[str, Tensor]) -> list[Any]:
        logits_B2 = label_logits(
            model, tensors["input_ids"], tensors["attention_mask"], self.encoder.label_ids
        )
        return (logits_B2[:, 0] - logits_B2[:, 1]).tolist()

    def summarise(self, records: list[Any]) -> dict[str, float]:
        # Rows 2k and 2k + 1 are the two orders of pair k: the chosen answer in slot A, then in slot B.
        delta_N2 = np.array(records).reshape(-1, 2)
        swap_average = self.cfg.judge.swap_average
        p_chosen_N = np.array([read_out(*pair, swap_average=swap_average).p_a for pair in delta_N2.tolist()])
        signed_N2 = delta_N2 * [1, -1]
        return {
            "accuracy": float((p_chosen_N > 0.5).mean()),
            # Plain cross-entropy: unlike the smoothed loss it can be compared across values of ε.
            "nll": float(np.logaddexp(0, -signed_N2).mean()),
            "ece": expected_calibration_error(p_chosen_N),
            "consistency": float((np.sign(signed_N2[:, 0]) == np.sign(signed_N2[:, 1])).mean()),
            "slot_a_rate": float((delta_N2 > 0).mean()),
            "margin": float(signed_N2.mean()),
        }

    def save_extras(self, path: Path) -> None:
        self.tokenizer.save_pretrained(path)
        judge, loss = self.cfg.judge, self.cfg.loss
        JudgeSettings(
            template=self.encoder.template,
            label_strings=judge.label_strings,
            max_length=judge.max_length,
            overlong=judge.overlong,
            swap_average=judge.swap_average,
            label_smoothing=loss.smoothing,
            smoothing_convention=loss.convention,
        ).save(path)

    def collate(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """Right-padded `input_ids` and `attention_mask` [B, T], and `label` [B] (0: A, 1: B)."""
        input_ids_BT, attention_mask_BT = pad_right([row["input_ids"] for row in rows])
        label_B = torch.tensor([row["label"] for row in rows])
        return Batch(
            {"input_ids": input_ids_BT, "attention_mask": attention_mask_BT, "label": label_B},
            weight=len(rows),
            ids=tuple(row["id"] for row in rows),
            tokens=int(attention_mask_BT.sum()),
        )


def main(cfg: Config, **options: Any) -> TrainedRun:
    """Encode the pairs on the driver, then train."""
    return train(FinetuneTask, cfg, job=JOB, prepare=lambda run: _prepare(cfg, run), **options)


def _prepare(cfg: Config, run: RunFolder) -> None:
    pairs = load_labelled(cfg.data, seed=cfg.train.seed)
    texts = (text for pair in pairs.train for text in (pair.prompt_text, pair.chosen, pair.rejected))
    encoder = cfg.judge.encoder(load_tokenizer(prepare_start(cfg, run, texts)))
    write_examples(run.data / "train.arrow", _train_rows(encoder, pairs.train, cfg.train.seed))
    write_examples(run.data / "eval.arrow", _eval_rows(encoder, pairs.eval))
    run.update_manifest(data_hashes=pairs.hashes, data=pairs.counts)


def _train_rows(
    encoder: JudgeEncoder, preferences: Sequence[Preference], seed: int
) -> Iterator[dict[str, Any]]:
    """One row a pair, with the better answer in slot A for a seeded half of them."""
    dropped = 0
    for pair in preferences:
        swapped = shuffled_order(seed, pair.id)
        answers = (pair.rejected, pair.chosen) if swapped else (pair.chosen, pair.rejected)
        ids = encoder.encode(pair.prompt_text, *answers)
        if ids is None:
            dropped += 1
            continue
        yield {"id": pair.id, "input_ids": ids, "length": len(ids), "label": int(swapped)}
    log_dropped(dropped, encoder.max_length)


def _eval_rows(encoder: JudgeEncoder, preferences: Sequence[Preference]) -> Iterator[dict[str, Any]]:
    """Two rows a pair, one for each order."""
    for pair in preferences:
        orders = [(pair.chosen, pair.rejected), (pair.rejected, pair.chosen)]
        encoded = [encoder.encode(pair.prompt_text, *answers) for answers in orders]
        for label, ids in enumerate(encoded):
            if ids is not None and None not in encoded:
                yield {"id": f"{pair.id}/{'AB'[label]}", "input_ids": ids, "length": len(ids), "label": label}


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
