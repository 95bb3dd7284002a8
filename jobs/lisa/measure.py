"""Throughput, latency, memory and cache of models side by side, e.g. a base and what became of it.

    python -m eagleray.jobs.lisa.measure --config configs/lisa/measure_tiny.yaml

Either `models` (the first is the reference), or `shape`: a Llama of that shape with random weights and what `share`
makes of it, as sharing costs the same whatever the weights are. With `timed: false` nothing is run or even held in
memory: parameters, cache, arithmetic and traffic of a token follow from the shape, so shapes that do not fit this
machine can be compared too. Times depend on the machine and its load: the models take turns, and a figure is the median
over rounds. A batch that does not fit into the memory of the GPU is recorded as such, and larger ones of that model are left
out, so `batch_sizes` may go beyond what fits: `throughput` of the report is the most that each model reaches with any of
them. `report.json`, `table.md` and `plots/throughput.png` hold what came out.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import eagleray.models.lisa.model  # noqa: F401 - registers the converted models
from eagleray.jobs.lisa.sections import ShareSection
from eagleray.models.lisa.accounting import added_parameters, decode_cost, removed_parameters
from eagleray.models.lisa.config import resolve
from eagleray.models.lisa.convert import Start, convert
from eagleray.models.lisa.plots import plot_throughput
from eagleray.models.lisa.selection import layer_count
from eagleray.models.lisa.spec import LisaSpec
from eagleray.models.lisa.speed import time_decoding
from eagleray.platform.config import ConfigError
from eagleray.platform.cpu import set_up_torch
from eagleray.platform.pretrained import load_pretrained
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import JobConfig, ModelSection
from eagleray.platform.sweep_results import to_markdown

JOB = "lisa.measure"
logger = logging.getLogger(__name__)
_BASE = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
SHAPES: dict[str, dict[str, int]] = {
    "llama2-7b": _BASE | {"intermediate_size": 11008, "num_key_value_heads": 32},
    "llama2-13b": _BASE
    | {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40}
    | {"intermediate_size": 13824, "num_key_value_heads": 40},
    "llama3-8b": _BASE | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256},
}


class Config(JobConfig):
    """Config of `lisa.measure`."""

    job: Literal["lisa.measure"] = JOB
    models: dict[str, ModelSection] = Field(default={})
    """Name -> model; the first is the reference."""
    shape: Literal["llama2-7b", "llama2-13b", "llama3-8b"] | None = None
    """In place of `models`: random weights of this shape, once full and once sharing."""
    share: ShareSection = ShareSection()
    """With `shape`: how it shares; without `layers`, the `fraction` of them at the top."""
    batch_sizes: list[int] = Field(default=[1], min_length=1)
    """Sequences decoded together."""
    contexts: list[int] = Field(default=[128], min_length=1)
    """Tokens of each prompt."""
    new_tokens: int = Field(default=16, ge=1)
    """Tokens decoded after it."""
    cache: Literal["static", "dynamic"] = "static"
    """Cache of all models."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Weights and cache of all models."""
    timed: bool = True
    """Run the models. False: arithmetic on their shapes only."""
    rounds: int = Field(default=3, ge=1)
    """Repetitions; the first of them warms up and does not count if there are more."""
    seed: int = Field(default=0, ge=0)
    """Of random weights and prompts."""

    @model_validator(mode="after")
    def _one_kind_of_subject(self) -> Config:
        if bool(self.models) == (self.shape is not None):
            raise ValueError("give either `models` (folders or hub names) or `shape` (random weights)")
        if min(*self.batch_sizes, *self.contexts) < 1:
            raise ValueError("`batch_sizes` and `contexts` must be at least 1")
        return self


@dataclass(frozen=True)
class Subject:
    """A model, or its shape alone."""

    config: Any
    spec: LisaSpec
    parameters: int
    model: Any = None


def main(cfg: Config) -> dict[str, Any]:
    """Measure every model at every batch size and context, report."""
    with RunFolder.create(JOB, cfg).recording() as run:
        set_up_torch()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        subjects = _of_shape(cfg, device) if cfg.shape else _loaded(cfg, device)
        rows: list[dict[str, Any]] = []
        too_much: set[tuple[str, int]] = set()
        for batch in sorted(cfg.batch_sizes):
            for context in cfg.contexts:
                timed: dict[str, dict[str, float]] = {}
                if cfg.timed:
                    fit = {name: s.model for name, s in subjects.items() if (name, context) not in too_much}
                    timed = _time(cfg, fit, batch, context, device)
                    too_much |= {(name, context) for name in fit.keys() - timed.keys()}
                for name, subject in subjects.items():
                    cost = decode_cost(
                        subject.config,
                        subject.spec,
                        parameters=subject.parameters,
                        batch=batch,
                        context=context + cfg.new_tokens,
                        value_bytes=2 if cfg.precision == "bf16" else 4,
                    )
                    cell = {"model": name, "batch": batch, "context": context}
                    rows.append(cell | asdict(cost) | timed.get(name, {}))
        blank = dict.fromkeys(key for row in rows for key in row)
        rows = [blank | row for row in rows]
        table = to_markdown(rows)
        report = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "cells": rows}
        if cfg.timed:
            if "measured_tokens_per_second" not in blank:
                raise ConfigError(
                    "no model fits into the memory of the GPU with any of `batch_sizes` and `contexts`"
                )
            measured = [row for row in rows if row["measured_tokens_per_second"] is not None]
            report["throughput"] = _throughput(measured, reference=next(iter(subjects)))
            table += f"\n{to_markdown(report['throughput'])}"
            run.plots.mkdir(exist_ok=True)
            plot_throughput(measured, run.plots / "throughput.png")
        (run.path / "table.md").write_text(table)
        run.write_report(report)
    return report


def _loaded(cfg: Config, device: torch.device) -> dict[str, Subject]:
    subjects = {}
    for name, section in cfg.models.items():
        config = AutoConfig.from_pretrained(section.path, revision=section.revision)
        model = load_pretrained(AutoModelForCausalLM, section).eval().to(device, _dtype(cfg))
        spec = LisaSpec.from_dict(getattr(config, "lisa_attention", None) or {})
        subjects[name] = Subject(config, spec, model.num_parameters(), model)
    return subjects


def _of_shape(cfg: Config, device: torch.device) -> dict[str, Subject]:
    assert cfg.shape is not None
    longest = max(cfg.contexts) + cfg.new_tokens
    config = LlamaConfig(**SHAPES[cfg.shape], max_position_embeddings=longest)  # type: ignore[arg-type]
    config.dtype = _dtype(cfg)
    layers = config.num_hidden_layers
    cfg.share.check_model(config)
    first = layers - layer_count(layers, cfg.share.fraction)
    spec = resolve(config, cfg.share.spec(cfg.share.layers or range(first, layers)))
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    change = added_parameters(config, spec) - removed_parameters(config, spec)
    full, shared = Subject(config, LisaSpec(), parameters), Subject(config, spec, parameters + change)
    if cfg.timed:
        torch.manual_seed(cfg.seed)
        with device:
            base = AutoModelForCausalLM.from_config(config, dtype=_dtype(cfg)).eval()
        student = convert(base, spec, start=Start(align="identity", seed=cfg.seed))
        full, shared = replace(full, model=base), replace(shared, model=student)
    return {"full": full, "shared": shared}


def _time(
    cfg: Config, models: dict[str, Any], batch: int, context: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Figures of the models for which there is memory enough."""
    if not models:
        return {}
    generator = torch.Generator().manual_seed(cfg.seed)
    vocabulary = min(model.config.vocab_size for model in models.values())
    ids = torch.randint(vocabulary, (batch, context), generator=generator).to(device)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for _ in range(cfg.rounds):
        for name in list(found):
            try:
                found[name].append(
                    time_decoding(models[name], ids, new_tokens=cfg.new_tokens, cache=cfg.cache)
                )
            except torch.OutOfMemoryError:
                logger.warning(
                    "%s: %d prompts of %d tokens need more memory than there is", name, batch, context
                )
                del found[name]
            if name not in found:  # not before the exception has let go of the tensors
                torch.cuda.empty_cache()
    counted = {name: rounds[1:] or rounds for name, rounds in found.items()}
    return {
        name: {f"measured_{key}": median(round_[key] for round_ in rounds) for key in rounds[0]}
        for name, rounds in counted.items()
    }


def _throughput(rows: list[dict[str, Any]], reference: str) -> list[dict[str, Any]]:
    """The most tokens a second of each model at each context, with any batch size, and by which share that is more."""
    key = "measured_tokens_per_second"
    best: dict[tuple[int, str], dict[str, Any]] = {}
    for row in rows:
        place = (row["context"], row["model"])
        if place not in best or row[key] > best[place][key]:
            best[place] = row
    return [
        {
            "context": context,
            "model": model,
            "batch": row["batch"],
            "tokens_per_second": row[key],
            "gain": row[key] / best[context, reference][key] - 1 if (context, reference) in best else None,
        }
        for (context, model), row in best.items()
    ]


def _dtype(cfg: Config) -> torch.dtype:
    return torch.bfloat16 if cfg.precision == "bf16" else torch.float32


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
