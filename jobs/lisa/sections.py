"""What the jobs of LiSA have in common: token blocks, which layers share and how, conversion."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from eagleray.models.lisa.accounting import past_break_even
from eagleray.models.lisa.config import head_dim, layer_kinds
from eagleray.models.lisa.convert import Start, convert
from eagleray.models.lisa.probe import probe_sharing
from eagleray.models.lisa.selection import greedy_layers, layer_count, periodic_layers
from eagleray.models.lisa.spec import AlignSpec, LisaSpec
from eagleray.platform.config import Config as Section
from eagleray.platform.config import ConfigError
from eagleray.platform.data.text import TextData, iter_texts, pack_tokens


class BlocksSection(TextData):
    """Text, tokenised and packed into blocks without padding."""

    block_length: int = Field(default=512, ge=16)
    """Tokens of a block."""
    max_blocks: int | None = Field(default=None, ge=1)
    """Use only so many blocks of each part, at equal distances, so that every file counts; default: all."""
    max_dev_blocks: int | None = Field(default=None, ge=1)
    """The same for the development part alone; default: as `max_blocks`."""

    def blocks(self, tokenizer: Any, part: Literal["train", "dev"]) -> np.ndarray:
        """Token ids, int32, [blocks, block_length]."""
        ids = (
            tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
            for text in iter_texts(self, part)
        )
        eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
        most = self.max_blocks if part == "train" else self.max_dev_blocks or self.max_blocks
        return _spread(pack_tokens(ids, block_length=self.block_length, eos_id=eos), most)


class AlignSection(Section):
    """The head-alignment network f."""

    kind: Literal["none", "identity", "linear", "ffn", "ffn_res", "linear+ffn", "glu"] = "linear+ffn"
    """Form of f; `identity` is direct sharing."""
    width: int | None = Field(default=None, ge=1)
    """Hidden units; default: the number of heads, half of it for `linear+ffn`."""
    act: Literal["silu", "relu", "gelu"] = "silu"
    """Non-linearity."""
    bias: bool = True
    """Whether the feed-forward part has biases."""

    @model_validator(mode="after")
    def _fits_together(self) -> AlignSection:
        self.spec()
        return self

    def spec(self) -> AlignSpec:
        """The same for `LisaSpec`."""
        return AlignSpec(**self.model_dump())


class ShareSection(Section):
    """Which layers share, and how."""

    layers: list[int] | None = None
    """The layers themselves; default: chosen as `select` says."""
    select: Literal["greedy", "periodic"] = "greedy"
    """`greedy`: those whose sharing alone raises the loss least. `periodic`: all but two at the bottom and then every
    `every`-th."""
    analysis: str | None = None
    """`report.json` of a `lisa.analyze` run for `greedy`; default: probe here."""
    fraction: float = Field(default=0.53, gt=0, lt=1)
    """Share of the layers (`greedy`); the paper's range is 0.53 to 0.84."""
    every: int = Field(default=2, ge=2)
    """Distance of full layers (`periodic`)."""
    max_chain: int | None = Field(default=None, ge=1)
    """Longest run of sharing layers (`greedy`)."""
    source: Literal["prev", "anchor"] = "prev"
    """Scores of the preceding layer, or of the nearest full one below."""
    rank: int = Field(default=20, ge=0)
    """Size of a low-rank query or key head; 0: alignment alone."""
    key_heads: int | None = Field(default=None, ge=1)
    """Low-rank key heads; default: the KV heads of the model."""
    align: AlignSection = AlignSection()
    rope: Literal["pairs", "scaled", "none"] = "pairs"
    """Rotary code of low-rank heads."""
    scale: float | None = Field(default=None, gt=0)
    """Factor of low-rank scores; default: 1/sqrt(head size) for `pairs`, else 1/sqrt(rank)."""
    stage: Literal["scores", "weights"] = "scores"
    """Handed on: scores before the softmax, or attention weights after it (a baseline; needs `rank: 0`)."""
    row_center: Literal["none", "max", "mean"] = "none"
    """Statistic over the visible keys that f does not get to see."""
    score_dtype: Literal["auto", "float32", "model"] = "auto"
    """Precision in which scores travel; `auto`: at least float32 for one query, else the model's."""
    past_break_even: Literal["refuse", "warn"] = "refuse"
    """Scores that take more arithmetic than full ones: refused, or allowed for the sake of the curve over ranks."""

    @model_validator(mode="after")
    def _rotary_rank_is_even(self) -> ShareSection:
        if self.rank % 2 and self.rope != "none":
            raise ValueError(f"`share.rank` is {self.rank}; with a rotary code it must be even")
        return self

    @model_validator(mode="after")
    def _weights_take_no_difference(self) -> ShareSection:
        if self.rank and self.stage == "weights":
            raise ValueError(
                f"`share.rank` is {self.rank} with `share.stage: weights`; a difference of scores can't be added to "
                "attention weights. Set `share.rank: 0`, or `share.stage: scores`"
            )
        return self

    def spec(self, layers: Sequence[int]) -> LisaSpec:
        """The specification for the chosen layers."""
        names = ("source", "stage", "rank", "key_heads", "rope", "scale", "row_center", "score_dtype")
        options = {name: getattr(self, name) for name in names}
        return LisaSpec(shared_layers=tuple(layers), align=self.align.spec(), **options)

    def check_model(self, config: Any) -> None:
        """Refuse what costs more than it saves.

        Raises:
            ConfigError: The scores of a shared layer take more arithmetic than full ones.
        """
        if self.past_break_even == "warn":
            return
        size = head_dim(config)
        for _, share in past_break_even(self.spec([1]), heads=config.num_attention_heads, size=size):
            raise ConfigError(
                f"`share.rank` {self.rank} with `share.align.kind` {self.align.kind!r} takes {share:.2f} times the "
                f"arithmetic of full scores at head size {size}. Lower `share.rank` or `share.align.width`."
            )


class StartSection(Section):
    """How the added weights start."""

    align: Literal["ridge", "identity", "random"] = "ridge"
    """The linear path of f: least squares on calibration text, direct sharing, or random."""
    low_rank: Literal["zero_k", "pairs", "lstsq"] = "zero_k"
    """The low-rank branch: no effect, the teacher's rotary pairs that explain most, or those fitted."""
    blocks: int = Field(default=32, ge=1)
    """Blocks of training text for calibration and probing."""


def choose_layers(share: ShareSection, model: Any, texts: Sequence[Tensor]) -> tuple[int, ...]:
    """The layers that share, by list, probe or period.

    Raises:
        ConfigError: The analysis was made of another model, or the choice is impossible.
    """
    count = model.config.num_hidden_layers
    if share.layers is not None:
        return tuple(share.layers)
    if share.select == "periodic":
        return periodic_layers(count, every=share.every)
    if share.analysis is None:
        rise = probe_sharing(model, texts, layers=range(2, count))
    else:
        report = json.loads(Path(share.analysis).read_text())
        if report["layers"] != count:
            raise ConfigError(
                f"`share.analysis` is of a model of {report['layers']} layers; this one has {count}."
            )
        rise = {int(layer): value for layer, value in report["rise"].items()}
    return greedy_layers(
        rise, layer_count(count, share.fraction), kinds=layer_kinds(model.config), max_chain=share.max_chain
    )


def write_probe(model: Any, texts: Sequence[Tensor], path: Path) -> None:
    """Leave what `choose_layers` reads: the rise of the loss when a layer alone shares."""
    count = model.config.num_hidden_layers
    rise = probe_sharing(model, texts, layers=range(2, count))
    path.write_text(json.dumps({"layers": count, "rise": rise}))


def convert_model(
    share: ShareSection, start: StartSection, model: Any, blocks: np.ndarray, *, seed: int
) -> Any:
    """Choose layers, calibrate, convert.

    Raises:
        ConfigError: The sections do not fit the model.
    """
    share.check_model(model.config)
    texts = as_texts(blocks, count=start.blocks)
    try:
        spec = share.spec(choose_layers(share, model, texts))
        return convert(model, spec, texts, start=Start(align=start.align, low_rank=start.low_rank, seed=seed))
    except ValueError as error:
        raise ConfigError(f"`share`: {error}") from error


def as_texts(blocks: np.ndarray, *, count: int | None = None, batch: int = 4) -> list[Tensor]:
    """Blocks, or `count` of them at equal distances, as batches of token ids [B, T]."""
    return list(torch.from_numpy(_spread(blocks, count).astype("int64")).split(batch))


def _spread(blocks: np.ndarray, count: int | None) -> np.ndarray:
    if count is None or count >= len(blocks):
        return blocks
    return blocks[np.linspace(0, len(blocks) - 1, count).round().astype(int)]
