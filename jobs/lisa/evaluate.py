"""Quality of models side by side, e.g. a teacher and what became of it: perplexity on held-out text, benchmark tasks.

    python -m eagleray.jobs.lisa.evaluate --config configs/lisa/evaluate_tiny.yaml

The first model is the reference. Perplexities, and their ratios to the reference's, have 95 % bootstrap intervals over
blocks of text; a ratio is of the same blocks, and so surer than either of the two. With `baselines` each converted model
stands beside two models that nobody trained: the reference with plain sharing at the same layers, and with the heads in
the order that fits best. `tasks` needs lm-evaluation-harness (`pip install 'eagleray[lm-eval]'`). Speed, memory and
cache are the business of `lisa.measure`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
from pydantic import Field
from torch import Tensor
from transformers import AutoModelForCausalLM

import eagleray.models.lisa.model  # noqa: F401 - registers the converted models
from eagleray.jobs.lisa.sections import BlocksSection, as_texts
from eagleray.models.gram.metrics import bootstrap
from eagleray.models.lisa.accounting import added_parameters
from eagleray.models.lisa.baselines import direct_sharing, permuted_direct_sharing
from eagleray.models.lisa.probe import text_losses
from eagleray.models.lisa.similarity import layer_similarity
from eagleray.models.lisa.spec import LisaSpec
from eagleray.platform.config import Config as Section
from eagleray.platform.config import ConfigError
from eagleray.platform.cpu import set_up_torch
from eagleray.platform.pretrained import load_pretrained, load_tokenizer
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import JobConfig, ModelSection

JOB = "lisa.evaluate"


class TasksSection(Section):
    """Benchmarks of lm-evaluation-harness."""

    names: list[str] = Field(min_length=1)
    """Tasks or groups, e.g. `[piqa, mmlu, hellaswag, arc_easy]`."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples in a prompt; default: each task's own."""
    limit: int | None = Field(default=None, ge=1)
    """Documents of each task; default: all."""
    batch_size: int = Field(default=8, ge=1)
    """Requests at a time."""
    folder: str | None = None
    """Folder with tasks of your own, as YAML files of the harness."""


class Config(JobConfig):
    """Config of `lisa.evaluate`."""

    job: Literal["lisa.evaluate"] = JOB
    models: dict[str, ModelSection] = Field(min_length=1)
    """Name -> model; the first is the reference, whose tokenizer all of them use."""
    data: BlocksSection
    baselines: bool = False
    """Also evaluate what sharing without training makes of the reference, at the layers of each converted model (once
    for models with the same layers)."""
    order_blocks: int = Field(default=4, ge=1)
    """Blocks of training text that decide the order of heads of the second baseline."""
    tasks: TasksSection | None = None
    """Benchmark tasks; default: perplexity only."""


def main(cfg: Config) -> dict[str, Any]:
    """Evaluate all models, report."""
    if cfg.tasks is not None:
        _harness()  # missing is better known before than after hours
    with RunFolder.create(JOB, cfg).recording() as run:
        set_up_torch()
        tokenizer = load_tokenizer(next(iter(cfg.models.values())))
        texts = as_texts(cfg.data.blocks(tokenizer, "dev"))
        report: dict[str, Any] = {}
        reference = None
        for name, model in _subjects(cfg, tokenizer):
            losses = text_losses(model, texts).numpy()
            reference = losses if reference is None else reference
            spec = LisaSpec.from_dict(getattr(model.config, "lisa_attention", None) or {})
            report[name] = {
                "loss": float(losses.mean()),
                "perplexity": _exponential(losses),
                "perplexity_over_reference": _exponential(losses - reference),
                "parameters": model.num_parameters(),
                "added_parameters": added_parameters(model.config, spec),
                "shared_layers": list(spec.shared_layers),
            }
            if cfg.tasks is not None:
                report[name]["tasks"] = _run_tasks(cfg.tasks, model, tokenizer)
        run.write_report(report)
    return report


def _subjects(cfg: Config, tokenizer: Any) -> Iterator[tuple[str, Any]]:
    """Name and model; the reference stays in memory, of the others one at a time."""
    reference, orders, done = None, None, set[tuple[int, ...]]()
    for name, section in cfg.models.items():
        model = load_pretrained(AutoModelForCausalLM, section).eval()
        yield name, model
        reference = model if reference is None else reference
        layers = LisaSpec.from_dict(getattr(model.config, "lisa_attention", None) or {}).shared_layers
        if not cfg.baselines or not layers or layers in done:
            continue
        done.add(layers)
        if orders is None:
            train = cfg.data.blocks(tokenizer, "train")
            text: list[Tensor] = [row for batch in as_texts(train, count=cfg.order_blocks) for row in batch]
            orders = layer_similarity(reference, text, adjacent_only=True)
        yield f"{name}: direct sharing", direct_sharing(reference, layers)
        yield f"{name}: direct sharing, heads permuted", permuted_direct_sharing(reference, layers, orders)


def _exponential(losses: np.ndarray) -> dict[str, float]:
    """exp of the mean of one number a block, with its interval."""
    found = bootstrap(lambda means_RK: np.exp(np.minimum(means_RK[:, 0], 700.0)), losses[:, None])
    return asdict(found)


def _harness() -> Any:
    try:
        import lm_eval  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError(
            "`tasks` needs lm-evaluation-harness, which is not installed. Run `pip install 'eagleray[lm-eval]'`, or "
            "leave `tasks` out."
        ) from None
    return lm_eval


def _run_tasks(tasks: TasksSection, model: Any, tokenizer: Any) -> dict[str, dict[str, float]]:
    """Task -> metric -> value, standard errors included."""
    harness = _harness()
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    subject = HFLM(model, tokenizer=tokenizer, batch_size=tasks.batch_size, device=str(model.device))
    found = harness.simple_evaluate(
        subject,
        tasks=tasks.names,
        num_fewshot=tasks.num_fewshot,
        limit=tasks.limit,
        task_manager=TaskManager(include_path=tasks.folder),
        log_samples=False,
    )
    return {
        task: {key.removesuffix(",none"): value for key, value in values.items() if isinstance(value, float)}
        for task, values in found["results"].items()
    }


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
