"""Train a byte-level BPE tokenizer and a small Llama-style language model from text files.

    python -m eagleray.jobs.backbone.pretrain --config configs/backbone/pretrain_tiny.yaml data.paths='[books/*.txt]'

The result is an ordinary Hugging Face folder with a chat template, so every other job can start from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from pydantic import Field
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from eagleray.jobs.backbone.start import BackboneSection
from eagleray.jobs.language_model import LanguageModelTask
from eagleray.models.backbone.tokenizer import train_tokenizer
from eagleray.platform.data.examples import write_examples
from eagleray.platform.data.text import TextData, iter_texts, pack_tokens, text_hashes
from eagleray.platform.launch import TrainedRun, train
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import TrainingConfig

JOB = "backbone.pretrain"


class Config(TrainingConfig):
    """Config of `backbone.pretrain`."""

    job: Literal["backbone.pretrain"] = JOB
    backbone: BackboneSection = BackboneSection()
    data: TextData
    block_length: int = Field(default=512, ge=16)
    """Tokens of one training example."""


class BackboneTask(LanguageModelTask):
    """Next-token prediction on packed text, from random weights."""

    def __init__(self, cfg: Config, data_dir: Path) -> None:
        super().__init__(cfg, data_dir)
        self.cfg, self.data_dir = cfg, data_dir

    def build_model(self) -> nn.Module:
        return self.cfg.backbone.build(self._tokenizer(), seed=self.cfg.train.seed)

    def save_extras(self, path: Path) -> None:
        self._tokenizer().save_pretrained(path)

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.data_dir / "tokenizer")


def main(cfg: Config, **options: Any) -> TrainedRun:
    """Train the tokenizer on the driver and the model on the cluster."""
    return train(BackboneTask, cfg, job=JOB, prepare=lambda run: _prepare(cfg, run), **options)


def _prepare(cfg: Config, run: RunFolder) -> None:
    size = cfg.backbone
    tokenizer = train_tokenizer(
        iter_texts(cfg.data, "train"), vocab_size=size.vocab_size, max_length=size.max_length
    )
    tokenizer.save_pretrained(run.data / "tokenizer")
    parts: tuple[tuple[str, Literal["train", "dev"]], ...] = (("train", "train"), ("eval", "dev"))
    for name, part in parts:
        ids = (_text_ids(tokenizer, text) for text in iter_texts(cfg.data, part))
        blocks = pack_tokens(ids, block_length=cfg.block_length, eos_id=cast(int, tokenizer.eos_token_id))
        write_examples(run.data / f"{name}.arrow", _rows(name, blocks))
    run.update_manifest(data_hashes=text_hashes(cfg.data))


def _text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of plain text: what looks like a control token in it is text."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)  # type: ignore[return-value]


def _rows(name: str, blocks: np.ndarray) -> Iterator[dict[str, Any]]:
    for i, block in enumerate(blocks):
        yield {"id": f"{name}-{i}", "input_ids": block, "length": len(block), "start": 1}


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
