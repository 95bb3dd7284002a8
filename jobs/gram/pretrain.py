"""GRAM stage 1: pre-train a causal LM to write both answers of unlabelled pairs (paper section 2).

    python -m eagleray.jobs.gram.pretrain --config configs/gram/pretrain_tiny.yaml

Loss: −log π([y_a, y_b] | x), every token of the rendered pair a target, the prompt masked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import nn
from transformers import AutoModelForCausalLM

from eagleray.jobs.backbone.start import StartConfig, prepare_start
from eagleray.jobs.gram.data import PairData, load_unlabelled, log_dropped
from eagleray.jobs.language_model import LanguageModelTask
from eagleray.models.gram.prompts import PairEncoder, shuffled_order
from eagleray.platform.data.examples import write_examples
from eagleray.platform.data.preferences import ResponsePair
from eagleray.platform.launch import TrainedRun, train
from eagleray.platform.pretrained import add_lora, load_pretrained, load_tokenizer
from eagleray.platform.runs import RunFolder

JOB = "gram.pretrain"


class Config(StartConfig):
    """Config of `gram.pretrain`; defaults follow the paper's released settings."""

    job: Literal["gram.pretrain"] = JOB
    data: PairData
    max_length: int = Field(default=2048, ge=32)
    """Longest example in tokens; longer pairs have both answers shortened alike."""


class PretrainTask(LanguageModelTask):
    """Rendered pairs, predicted from the end of the prompt on."""

    def __init__(self, cfg: Config, data_dir: Path) -> None:
        super().__init__(cfg, data_dir)
        self.cfg = cfg
        self.start = cfg.start_model(data_dir)

    def build_model(self) -> nn.Module:
        model = load_pretrained(AutoModelForCausalLM, self.start)
        return add_lora(model, self.cfg.lora, task_type="CAUSAL_LM")

    def save_extras(self, path: Path) -> None:
        load_tokenizer(self.start).save_pretrained(path)


def main(cfg: Config, **options: Any) -> TrainedRun:
    """Encode the pairs on the driver, then train."""
    return train(PretrainTask, cfg, job=JOB, prepare=lambda run: _prepare(cfg, run), **options)


def _prepare(cfg: Config, run: RunFolder) -> None:
    pairs = load_unlabelled(cfg.data, seed=cfg.train.seed)
    texts = (text for pair in pairs.train for text in (pair.prompt_text, pair.response_a, pair.response_b))
    encoder = PairEncoder(load_tokenizer(prepare_start(cfg, run, texts)), max_length=cfg.max_length)
    for name, chosen in (("train", pairs.train), ("eval", pairs.eval)):
        write_examples(run.data / f"{name}.arrow", _rows(encoder, chosen, cfg.train.seed))
    run.update_manifest(data_hashes=pairs.hashes, data=pairs.counts)


def _rows(encoder: PairEncoder, pairs: Sequence[ResponsePair], seed: int) -> Iterator[dict[str, Any]]:
    dropped = 0
    for pair in pairs:
        answers = (pair.response_a, pair.response_b)
        # The order carries no meaning, so a seeded half is swapped: no answer's source sticks to a slot.
        encoded = encoder.encode(
            pair.prompt_text, *(answers[::-1] if shuffled_order(seed, pair.id) else answers)
        )
        if encoded is None:
            dropped += 1
            continue
        ids, start = encoded
        yield {"id": pair.id, "input_ids": ids, "length": len(ids), "start": start}
    log_dropped(dropped, encoder.max_length)


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
