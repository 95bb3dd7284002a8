"""Perplexity, speed and cache of models side by side, e.g. a teacher and what became of it.

    python -m eagleray.jobs.lisa.evaluate --config configs/lisa/evaluate_tiny.yaml

The first model is the reference. Speed depends on the machine and its load: the models take turns, and a figure is the
median over rounds.
"""

from __future__ import annotations

import math
import time
from statistics import median
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import eagleray.models.lisa.model  # noqa: F401 - registers the converted models
from eagleray.jobs.lisa.sections import BlocksSection, as_texts
from eagleray.models.lisa.cache import cache_bytes
from eagleray.models.lisa.probe import token_loss
from eagleray.platform.config import Config as Section
from eagleray.platform.pretrained import load_pretrained, load_tokenizer
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import JobConfig, ModelSection

JOB = "lisa.evaluate"


class SpeedSection(Section):
    """What is timed."""

    batch_size: int = Field(default=4, ge=1)
    """Sequences."""
    prompt: int = Field(default=128, ge=1)
    """Tokens of a prompt; at most a block."""
    new_tokens: int = Field(default=16, ge=1)
    """Tokens decoded after it."""
    rounds: int = Field(default=3, ge=1)
    """Repetitions; the first of them warms up and does not count if there are more."""


class Config(JobConfig):
    """Config of `lisa.evaluate`."""

    job: Literal["lisa.evaluate"] = JOB
    models: dict[str, ModelSection] = Field(min_length=1)
    """Name -> model; the first is the reference."""
    data: BlocksSection
    speed: SpeedSection | None = SpeedSection()
    """Null: perplexity only."""


def main(cfg: Config) -> dict[str, Any]:
    """Evaluate all models, report."""
    with RunFolder.create(JOB, cfg).recording() as run:
        models = {
            name: load_pretrained(AutoModelForCausalLM, section).eval()
            for name, section in cfg.models.items()
        }
        tokenizer = load_tokenizer(next(iter(cfg.models.values())))
        texts = as_texts(cfg.data.blocks(tokenizer, "dev"))
        report: dict[str, Any] = {}
        for name, model in models.items():
            loss = token_loss(model, texts)
            report[name] = {
                "loss": loss,
                "perplexity": math.exp(min(loss, 700.0)),
                "parameters": sum(p.numel() for p in model.parameters()),
            }
        if cfg.speed is not None:
            ids = texts[0][:1, : cfg.speed.prompt].expand(cfg.speed.batch_size, -1)
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in models}
            for _ in range(cfg.speed.rounds):
                for name, model in models.items():
                    runs[name].append(measure(model, ids, new_tokens=cfg.speed.new_tokens))
            for name, found in runs.items():
                counted = found[1:] or found
                report[name] |= {key: median(f[key] for f in counted) for key in counted[0]}
        run.write_report(report)
    return report


@torch.no_grad()
def measure(model: Any, ids: Tensor, *, new_tokens: int) -> dict[str, float]:
    """Seconds of a prompt [B, T], decoded tokens a second, bytes of the cache at the end."""
    cache = DynamicCache(config=model.config)
    started = time.perf_counter()
    token = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    prompted = time.perf_counter()
    for _ in range(new_tokens):
        token = model(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)
    seconds = time.perf_counter() - prompted
    return {
        "prompt_seconds": prompted - started,
        "tokens_per_second": len(ids) * new_tokens / seconds,
        "cache_bytes": cache_bytes(cache),
    }


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
