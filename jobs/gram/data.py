"""Config sections and data loading that the jobs of GRAM share."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Generic, Literal, TypeVar

from pydantic import Field, model_validator

from eagleray.models.gram.official import labelled_row, unlabelled_row
from eagleray.models.gram.prompts import JudgeEncoder, JudgeTemplate
from eagleray.models.gram.synthetic import make_preferences, make_unlabelled
from eagleray.platform.config import Config as Section
from eagleray.platform.config import ConfigError
from eagleray.platform.data.preferences import (
    Preference,
    PreferenceMixture,
    ReadReport,
    ResponsePair,
    load_preferences,
    load_response_pairs,
    split_by_prompt,
)

logger = logging.getLogger(__name__)

Row = TypeVar("Row", Preference, ResponsePair)


class SyntheticPairs(Section):
    """Generated pairs: the better answer is about the animal that the request names."""

    pairs: int = Field(default=1000, ge=10)
    """Training pairs; a tenth as many are made for evaluation, on other requests."""
    seed: int = Field(default=0, ge=0)
    """Seed of the generator."""
    label_noise: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of training labels that are flipped."""


class PairData(Section):
    """Pairs to train on, and pairs to choose the model by."""

    train: PreferenceMixture | None = None
    """Training pairs; a list mixes files whose columns have different names."""
    synthetic: SyntheticPairs | None = None
    """Generated pairs in place of `train`."""
    eval: PreferenceMixture | None = None
    """Evaluation pairs; default: `eval_fraction` of the training prompts."""
    eval_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of the training prompts that is held out if `eval` is not given."""
    limit: int | None = Field(default=None, ge=1)
    """Train on this many pairs only, drawn by `train.seed`; fewer of one seed are among more."""
    official: bool = False
    """The rows are official GRAM files: `instruction`, `input`, `output`."""

    @model_validator(mode="after")
    def _one_origin(self) -> PairData:
        if (self.train is None) == (self.synthetic is None):
            raise ValueError("give either `data.train` or `data.synthetic`")
        return self


class JudgeSection(Section):
    """How the judge is asked."""

    template: str = "eagleray"
    """Name of a judge template of ours, or a YAML file (official checkpoints need the official wording)."""
    label_strings: tuple[str, str] = ("A", "B")
    """What stands for "the first is better" and "the second is better"; one token each."""
    max_length: int = Field(default=2048, ge=32)
    """Longest prompt in tokens."""
    overlong: Literal["shorten", "drop"] = "shorten"
    """Longer pairs: cut both answers alike (never the instruction or the tail), or leave the pair out."""
    swap_average: Literal["prob", "logit", "none"] = "prob"
    """How the two orders of a pair are averaged."""

    def encoder(self, tokenizer: Any) -> JudgeEncoder:
        """The encoder with these settings; checks template and label strings against the tokenizer."""
        return JudgeEncoder(
            tokenizer,
            JudgeTemplate.load(self.template),
            label_strings=self.label_strings,
            max_length=self.max_length,
            overlong=self.overlong,
        )

    @model_validator(mode="after")
    def _template_exists(self) -> JudgeSection:
        JudgeTemplate.load(self.template)
        return self


@dataclass(frozen=True)
class Pairs(Generic[Row]):
    """Pairs in two parts that share no prompt, and where they came from."""

    train: list[Row]
    eval: list[Row]
    hashes: dict[str, str]
    counts: dict[str, Any]


def load_labelled(data: PairData, *, seed: int) -> Pairs[Preference]:
    """Labelled pairs of a job, stage 2."""
    if data.synthetic is not None:
        made = data.synthetic
        train = make_preferences(made.pairs, made.seed, label_noise=made.label_noise)
        held_out = make_preferences(_tenth(made), made.seed, split="dev")
        return _limited(_generated(train, held_out, _as_preference), data, seed)
    rewrite = labelled_row if data.official else None
    return _limited(_load(data, seed, lambda source: load_preferences(source, rewrite=rewrite)), data, seed)


def load_unlabelled(data: PairData, *, seed: int) -> Pairs[ResponsePair]:
    """Unlabelled pairs of a job, stage 1; labels that are there are dropped."""
    if data.synthetic is not None:
        made = data.synthetic
        held_out = make_unlabelled(_tenth(made), made.seed, split="dev")
        rows = make_unlabelled(made.pairs, made.seed)
        return _limited(_generated(rows, held_out, _as_response_pair), data, seed)
    rewrite = unlabelled_row if data.official else None
    pairs = _load(data, seed, lambda source: load_response_pairs(source, rewrite=rewrite))
    return _limited(pairs, data, seed)


def log_dropped(count: int, max_length: int) -> None:
    """Say how many pairs were left out as too long."""
    if count:
        logger.warning("Left out %d pair(s) longer than `max_length` %d tokens.", count, max_length)


def _load(data: PairData, seed: int, load: Any) -> Pairs[Any]:
    train, report = load(data.train)
    logger.info("Training pairs: %s.", report.summary())
    counts, hashes = {"train": _counts(report)}, dict(report.hashes)
    if data.eval is None:
        train, held_out = split_by_prompt(train, fraction=data.eval_fraction, seed=seed)
        return Pairs(train, held_out, hashes, counts)
    held_out, eval_report = load(data.eval)
    logger.info("Evaluation pairs: %s.", eval_report.summary())
    counts["eval"] = _counts(eval_report)
    return Pairs(train, held_out, hashes | eval_report.hashes, counts)


def _limited(pairs: Pairs[Row], data: PairData, seed: int) -> Pairs[Row]:
    if data.limit is None:
        return pairs
    if data.limit > len(pairs.train):
        raise ConfigError(
            f"`data.limit` is {data.limit}; there are {len(pairs.train)} training pairs. Lower it, or leave it out."
        )
    order = Random(f"limit {seed}").sample(range(len(pairs.train)), len(pairs.train))
    return replace(pairs, train=[pairs.train[i] for i in order[: data.limit]])


def _counts(report: ReadReport) -> dict[str, Any]:
    return {"read": report.read, "kept": report.kept, "skipped": dict(report.skipped)}


def _generated(train: list[dict[str, str]], held_out: list[dict[str, str]], build: Any) -> Pairs[Any]:
    counts = {"train": {"generated": len(train)}, "eval": {"generated": len(held_out)}}
    return Pairs([build(row) for row in train], [build(row) for row in held_out], {}, counts)


def _tenth(made: SyntheticPairs) -> int:
    return max(1, made.pairs // 10)


def _as_preference(row: dict[str, str]) -> Preference:
    prompt = [{"role": "user", "content": row["prompt"]}]
    return Preference(row["id"], prompt, row["chosen"], row["rejected"], margin=None, extra={})


def _as_response_pair(row: dict[str, str]) -> ResponsePair:
    prompt = [{"role": "user", "content": row["prompt"]}]
    return ResponsePair(row["id"], prompt, row["response_a"], row["response_b"], extra={})
