"""Where a training job's model comes from: a pretrained folder or hub name, or a small one made on the spot."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from eagleray.models.backbone.model import build_llama, llama_config
from eagleray.models.backbone.tokenizer import train_tokenizer
from eagleray.platform.config import Config as Section
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import ModelSection, TrainingConfig


class BackboneSection(Section):
    """Size of a small Llama-style model with random weights."""

    vocab_size: int = Field(default=8192, ge=300)
    """Tokens of the byte-level BPE vocabulary, special tokens included."""
    width: int = Field(default=256, ge=16)
    """Hidden size."""
    layers: int = Field(default=6, ge=1)
    """Transformer blocks."""
    heads: int = Field(default=8, ge=1)
    """Attention heads; must divide `width`."""
    kv_heads: int | None = Field(default=None, ge=1)
    """Key/value heads (grouped-query attention); default: as many as `heads`."""
    max_length: int = Field(default=2048, ge=16)
    """Positions the model takes."""

    def config_for(self, tokenizer: Any) -> Any:
        """The configuration of the model with this tokenizer."""
        return llama_config(
            vocab_size=len(tokenizer),
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            max_length=self.max_length,
            pad_id=tokenizer.pad_token_id,
            bos_id=tokenizer.bos_token_id,
            eos_id=tokenizer.eos_token_id,
        )

    def build(self, tokenizer: Any, *, seed: int) -> Any:
        """The model with random weights that depend on `seed` alone."""
        return build_llama(self.config_for(tokenizer), seed=seed)


class StartConfig(TrainingConfig):
    """A training job that starts from `model`, or from `scratch` to try the job without any download."""

    model: ModelSection | None = None
    scratch: BackboneSection | None = None

    @model_validator(mode="after")
    def _one_start(self) -> StartConfig:
        if (self.model is None) == (self.scratch is None):
            raise ValueError(
                "give either `model.path` (a pretrained model) or `scratch` (a small model made from random weights)"
            )
        return self

    def start_model(self, data_dir: Path) -> ModelSection:
        """The model to load: `model` as given, or what `prepare_start` wrote."""
        return self.model or ModelSection(path=str(data_dir / "scratch"))


def prepare_start(cfg: StartConfig, run: RunFolder, texts: Iterable[str]) -> ModelSection:
    """Write the model of `scratch`, with a tokenizer trained on `texts`, into the run's data; return the start model."""
    if cfg.scratch is not None:
        tokenizer = train_tokenizer(
            texts, vocab_size=cfg.scratch.vocab_size, max_length=cfg.scratch.max_length
        )
        for part in (tokenizer, cfg.scratch.build(tokenizer, seed=cfg.train.seed)):
            part.save_pretrained(run.data / "scratch")
    return cfg.start_model(run.data)
