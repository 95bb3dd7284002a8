"""The whole platform on one method: backbone, stage 1, stage 2, baselines, evaluation, serving, one HTTP score.

make demo                          # generated pairs with a known rule
make demo DATA=path/to/pairs.jsonl # your pairs: TRL preference format or hh-rlhf transcripts
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
from pydantic import Field
from rich.console import Console

from eagleray.jobs.backbone import pretrain as backbone
from eagleray.jobs.backbone.start import BackboneSection
from eagleray.jobs.gram import discriminative, evaluate, finetune, pretrain
from eagleray.jobs.gram.generate import preference_files
from eagleray.jobs.serve import serving
from eagleray.models.gram.judge import Judge
from eagleray.models.gram.prompts import JudgeTemplate, render_pair
from eagleray.models.gram.synthetic import make_corpus
from eagleray.platform.cluster import connected
from eagleray.platform.config import Config as Section
from eagleray.platform.config import validate_config
from eagleray.platform.data.preferences import Preference, PreferenceData, load_preferences, split_by_prompt
from eagleray.platform.data.sources import SourceConfig
from eagleray.platform.runs import RunFinishedError, RunFolder
from eagleray.platform.sections import JobConfig, RaySection, RunSection

JOB = "gram.demo"
_RENDERED = 50
_TEMPLATE = JudgeTemplate.load("short")
logger = logging.getLogger(__name__)


class DemoData(Section):
    """Pairs of the demonstration."""

    pairs: str | None = None
    """Your preference file; default: generated pairs (the better answer gives its steps in order)."""
    generated: int = Field(default=4000, ge=100)
    """Labelled training pairs to generate; as many unlabelled ones are made for stage 1."""


class Steps(Section):
    """Optimiser steps of each stage."""

    backbone: int = Field(default=100, ge=1)
    """Language modelling."""
    pretrain: int = Field(default=50, ge=1)
    """Stage 1."""
    finetune: int = Field(default=80, ge=1)
    """Stage 2, and each trained baseline."""


class Config(JobConfig):
    """Config of `gram.demo`."""

    job: Literal["gram.demo"] = JOB
    run: RunSection = RunSection(dir="runs/demo")
    ray: RaySection = RaySection(num_workers=2)
    data: DemoData = DemoData()
    backbone: BackboneSection = BackboneSection(
        vocab_size=1024, width=128, layers=2, heads=4, max_length=1024
    )
    steps: Steps = Steps()
    seed: int = Field(default=0, ge=0)
    """Seed of everything."""


def main(cfg: Config) -> dict[str, Any]:
    """Run every stage, each as a run of its own under the demo's folder, and write `report.json`.

    Stages that an earlier, interrupted demo finished are not repeated.
    """
    console = Console()
    with RunFolder.create(JOB, cfg, shared=True).recording() as run, connected(cfg.ray):
        demo = _Demo(cfg, run.path)
        demo.write_data()
        demo.train_all()
        evaluation = demo.evaluate()
        scores = demo.score_over_http()
        accuracy = {
            name: figures["accuracy"]["value"]
            for name, figures in evaluation["sets"]["test"]["scorers"].items()
        }
        report = {"accuracy": accuracy, "wall_seconds": demo.seconds, **scores, "evaluation": evaluation}
        run.write_report(report)
    stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in demo.seconds.items())
    console.print(f"Seconds: {stages}; {sum(demo.seconds.values()):.0f} in all.")
    console.print(f"One pair: served {scores['served_score']:.6f}, offline {scores['offline_score']:.6f}.")
    console.print(
        f"Report: {run.report}, plots beside it. Serve it: eagleray serve gram={demo.model('finetune')}"
    )
    return report


class _Demo:
    def __init__(self, cfg: Config, folder: Path) -> None:
        self.cfg, self.folder = cfg, folder
        self.seconds: dict[str, float] = {}

    def model(self, stage: str) -> str:
        return str(self.folder / stage / "model")

    def write_data(self) -> None:
        """Text for the backbone, unlabelled pairs for stage 1, labelled pairs in three parts without common prompts."""
        folder = self.folder / "pairs"
        with self._timed("data"):
            if self.cfg.data.pairs is None:
                files = _generated(self.cfg.data.generated, self.cfg.seed)
            else:
                files = _from_file(self.cfg.data.pairs, self.cfg.seed)
            folder.mkdir(exist_ok=True)
            for name, rows in files.items():
                lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
                (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def train_all(self) -> None:
        """GRAM's two stages, and the baselines from the same backbone with the same steps."""
        steps, backbone_model = self.cfg.steps, {"path": self.model("backbone")}
        text = {"paths": [self._file("corpus.txt")]}
        sizes = {"backbone": self.cfg.backbone.model_dump(), "block_length": 128}
        self._train("backbone", backbone, steps.backbone, lr=3e-3, data=text, **sizes)
        unlabelled = {"train": self._source("unlabelled"), "eval": self._source("dev")}
        self._train(
            "pretrain",
            pretrain,
            steps.pretrain,
            lr=2e-3,
            model=backbone_model,
            data=unlabelled,
            max_length=512,
        )
        pairs = {"train": self._source("train"), "eval": self._source("dev")}
        judge: dict[str, Any] = {"data": pairs, "judge": {"max_length": 640, "template": _TEMPLATE.name}}
        stage_1 = {"path": self.model("pretrain")}
        self._train("finetune", finetune, steps.finetune, lr=2e-3, model=stage_1, **judge)
        self._train("no_stage_1", finetune, steps.finetune, lr=2e-3, model=backbone_model, **judge)
        discriminator: dict[str, Any] = {"data": pairs, "max_length": 512}
        self._train(
            "discriminative", discriminative, steps.finetune, lr=1e-3, model=backbone_model, **discriminator
        )

    def evaluate(self) -> dict[str, Any]:
        """GRAM and every baseline on the test pairs."""
        bag_of_words = {"kind": "bag_of_words", "train": self._source("train"), "dev": self._source("dev")}
        values = {
            "scorers": {
                "GRAM": {"kind": "judge", "path": self.model("finetune")},
                "generative, no stage 1": {"kind": "judge", "path": self.model("no_stage_1")},
                "discriminative": {"kind": "discriminative", "path": self.model("discriminative")},
                "bag of words": bag_of_words,
                "longer answer": {"kind": "longer_answer"},
            },
            "sets": {"test": {"pairs": self._source("test")}},
            "seed": self.cfg.seed,
            # Few pairs: most of the time goes into starting a process for every model.
            "ray": {**self.cfg.ray.model_dump(), "num_workers": 1},
        }
        with self._timed("evaluation"), contextlib.suppress(RunFinishedError):
            evaluate.main(self._config(evaluate, "evaluation", values))
        return json.loads((self.folder / "evaluation" / "report.json").read_text())

    def score_over_http(self) -> dict[str, Any]:
        """One test pair, by the served model and by the same model in this process."""
        row = json.loads(Path(self._file("test.jsonl")).read_text(encoding="utf-8").splitlines()[0])
        pair = {"prompt": row["prompt"], "a": row["chosen"], "b": row["rejected"]}
        with self._timed("serving"), serving(self.model("finetune")) as url:
            served = httpx.post(f"{url}/compare", json=pair, timeout=60).raise_for_status().json()
        offline = Judge.from_pretrained(self.model("finetune")).compare(
            [(pair["prompt"], pair["a"], pair["b"])]
        )[0]
        return {"served_score": served["p_a"], "offline_score": offline.p_a, "pair": pair}

    def _train(self, stage: str, job: Any, steps: int, *, lr: float, **values: Any) -> None:
        workers = self.cfg.ray.max_workers
        train = {
            "batch_size": 16 * workers,
            "micro_batch_size": 16,
            "max_steps": steps,
            "seed": self.cfg.seed,
        }
        train["eval_every"] = steps
        settings = {"train": train, "optim": {"lr": lr}, "tracking": {"tensorboard": False}}
        with self._timed(stage), contextlib.suppress(RunFinishedError):
            job.main(self._config(job, stage, {**values, **settings}))

    def _config(self, job: Any, stage: str, values: dict[str, Any]) -> Any:
        shared = {"run": {"dir": str(self.folder / stage), "note": stage}, "ray": self.cfg.ray.model_dump()}
        return validate_config(job.Config, {**shared, **values}, f"demo stage {stage}")

    def _source(self, name: str) -> dict[str, Any]:
        return {"sources": [{"path": self._file(f"{name}.jsonl")}], "on_error": "skip"}

    def _file(self, name: str) -> str:
        return str(self.folder / "pairs" / name)

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        logger.info("Stage: %s", stage)
        started = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - started, 1)


def _generated(count: int, seed: int) -> dict[str, list[Any]]:
    files = preference_files(count, seed, dev=100, test=300)
    return {**files, "corpus.txt": [make_corpus(1_000_000, seed), *_rendered(files["unlabelled.jsonl"])]}


def _from_file(path: str, seed: int) -> dict[str, list[Any]]:
    """The user's pairs, 80/10/10 by prompt; stage 1 and the backbone see the training part without its labels."""
    preferences, report = load_preferences(PreferenceData(sources=[SourceConfig(path=path)], on_error="skip"))
    logger.info("%s: %s.", path, report.summary())
    rest, test = split_by_prompt(preferences, fraction=0.1, seed=seed)
    train, dev = split_by_prompt(rest, fraction=0.1, seed=seed + 1)
    files: dict[str, list[Any]] = {
        f"{name}.jsonl": [_row(pair) for pair in part]
        for name, part in (("train", train), ("dev", dev), ("test", test))
    }
    texts = [f"{pair.prompt_text}\n{answer}\n" for pair in train for answer in (pair.chosen, pair.rejected)]
    unlabelled = [
        {"id": pair.id, "prompt": pair.prompt_text, "response_a": pair.chosen, "response_b": pair.rejected}
        for pair in train
    ]
    return {**files, "unlabelled.jsonl": unlabelled, "corpus.txt": [*texts, *_rendered(unlabelled)]}


def _rendered(unlabelled: list[dict[str, Any]]) -> list[str]:
    """A few pairs as both stages show them, so that the tokenizer has tokens for the markers; too few to teach the task."""
    texts = [(row["prompt"], row["response_a"], row["response_b"]) for row in unlabelled[:_RENDERED]]
    return ["".join(render_pair(*pair)) for pair in texts] + [_TEMPLATE.render(*pair) for pair in texts]


def _row(pair: Preference) -> dict[str, Any]:
    return {"id": pair.id, "prompt": pair.prompt_text, "chosen": pair.chosen, "rejected": pair.rejected}


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
