"""The chain of phases: texts, then captions, then pictures, and one report on all of them.

    python -m eagleray.jobs.rovrm.progressive --config configs/rovrm/progressive_tiny.yaml

Each phase is a run of `rovrm.train` in a folder of its own and starts from the weights that the one before left; their
hash is checked at every border. A chain that was cut short goes on at the last border. Which phases there are is a list:
one of phase 3 alone, or of 1 and 3, or one whose data is a mixture, are the baselines.

A phase with `select` trains on a part of its samples, selected for the phase after it before anything is trained
(`jobs/rovrm/selection.py`).
"""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from eagleray.jobs.rovrm import evaluate, train
from eagleray.jobs.rovrm.data import VisualData, load_parts
from eagleray.jobs.rovrm.selection import Pool, Selection, SelectionSection, ShareSection, select_for
from eagleray.jobs.rovrm.start import StartSection, prepare_start
from eagleray.models.rovrm.checkpoint import CheckpointMismatch, VisualSettings, weights_sha256
from eagleray.platform.cluster import connected
from eagleray.platform.config import Config as Section
from eagleray.platform.config import validate_config
from eagleray.platform.runs import RunFinishedError, RunFolder
from eagleray.platform.sections import (
    DeepSpeedSection,
    JobConfig,
    OptimSection,
    TrackingSection,
    TrainSection,
)
from eagleray.platform.storage import read_json

JOB = "rovrm.progressive"
logger = logging.getLogger(__name__)


class PhaseSection(Section):
    """One phase: its data, and where it differs from what all phases share."""

    phase: Literal[1, 2, 3]
    """1: texts, 2: captions, 3: pictures or a mixture; see `rovrm.train`."""
    data: VisualData
    select: ShareSection | None = None
    """Train on this much of the samples, selected for the phase after this one. Default: on all."""
    train_vision_tower: bool = False
    """Train the vision tower too, in phase 3."""
    train: dict[str, Any] = Field(default={})
    """Keys of `train` that differ in this phase, e.g. `epochs`."""
    optim: dict[str, Any] = Field(default={})
    """Keys of `optim` that differ in this phase, e.g. `lr`."""


class Config(JobConfig, StartSection):
    """Config of `rovrm.progressive`."""

    job: Literal["rovrm.progressive"] = JOB
    phases: list[PhaseSection] = Field(min_length=1)
    """The phases in order; each begins where the one before ended."""
    selection: SelectionSection = SelectionSection()
    """How samples are selected for phases that say `select`."""
    train: TrainSection = TrainSection()
    optim: OptimSection = OptimSection(lr=1e-6, betas=(0.9, 0.95))
    deepspeed: DeepSpeedSection = DeepSpeedSection()
    tracking: TrackingSection = TrackingSection()
    sets: dict[str, evaluate.EvaluationSet] = Field(default={})
    """Sets on which the model of every phase, its picture-blind self and the longer answer are compared at the end."""
    bootstrap: int = Field(default=1000, ge=100)
    """Bootstrap replicates of an interval."""

    @model_validator(mode="after")
    def _phases_are_valid(self) -> Config:
        for place, phase in enumerate(self.phases):
            _phase_config(self, phase, folder=Path("run"), model=None if place == 0 else "start", sha256=None)
            if place and phase.phase < self.phases[place - 1].phase:
                raise ValueError(
                    f"phase {phase.phase} stands behind phase {self.phases[place - 1].phase} in `phases`"
                )
        if self.phases[-1].select is not None:
            raise ValueError("the last of the `phases` cannot `select`: there is no later one to select for")
        return self

    @property
    def selects(self) -> bool:
        """Whether any phase trains on a selection."""
        return any(phase.select is not None for phase in self.phases)


def main(cfg: Config) -> dict[str, Any]:
    """Run every phase that is not finished, evaluate, and write one report.

    Returns:
        The report: `selection`, `phases` (one entry each: summary, hashes, trained parameters) and `evaluation`.
    """
    with RunFolder.create(JOB, cfg, shared=True).recording() as run, connected(cfg.ray):
        model = start = _start(cfg, run)
        selection = _select(cfg, run, start) if cfg.selects else None
        phases: list[dict[str, Any]] = []
        for place, section in enumerate(cfg.phases):
            name = _name(place, section)
            if selection is not None and name in selection.files:
                data = section.data.model_copy(update={"only": selection.files[name]})
                section = section.model_copy(update={"data": data})
            phases.append(_train(cfg, section, run.path / name, model if place else None, start))
            model = str(run.path / name / "model")
        report: dict[str, Any] = {
            "selection": None if selection is None else selection.report,
            "phases": phases,
            "evaluation": _evaluate(cfg, run, phases),
        }
        run.write_report(report)
    return report


def _start(cfg: Config, run: RunFolder) -> str:
    """The model of the first phase; one made from random weights has a tokenizer that knows the words of all phases."""
    folder = run.data / "start"
    if cfg.scratch is None or (folder / "rovrm.json").exists():
        return str(folder) if cfg.model is None else cfg.model.path
    seed = cfg.train.seed
    samples = [s for phase in cfg.phases for s in load_parts(_data(cfg, phase), seed=seed).train]
    texts = [text for s in samples for text in (s.record.prompt, *s.record.responses)]
    return prepare_start(cfg, folder, texts, seed=seed).path


def _data(cfg: Config, phase: PhaseSection) -> VisualData:
    """The data of a phase; what is evaluated on at the end is kept out of all of them."""
    evaluated = [source for section in cfg.sets.values() for source in section.sources]
    return phase.data.model_copy(update={"held_out": [*phase.data.held_out, *evaluated]})


def _name(place: int, section: PhaseSection) -> str:
    return f"{place + 1}-phase-{section.phase}"


def _select(cfg: Config, run: RunFolder, start: str) -> Selection:
    """Select for all phases that ask for it."""
    pools = [
        Pool(_name(place, phase), _data(cfg, phase), phase.select) for place, phase in enumerate(cfg.phases)
    ]

    def warm_up(folder: Path) -> str:
        _train(cfg, _warm_up_phase(cfg), folder, None, start)
        return str(folder / "model")

    folder = run.path / "selection"
    return select_for(pools, cfg.selection, folder, warm_up=warm_up, seed=cfg.train.seed, ray=cfg.ray)


def _warm_up_phase(cfg: Config) -> PhaseSection:
    """An equal mixture of the samples of all phases, trained as phase 3."""
    sources = [
        source.model_copy(update={"label": f"phase {phase.phase}"})
        for phase in cfg.phases
        for source in phase.data.train
    ]
    data = VisualData(
        train=sources,
        synthetic=[made for phase in cfg.phases for made in phase.data.synthetic],
        limit_each=cfg.selection.warm_up.samples,
        images=cfg.phases[-1].data.images,
    )
    tower = any(phase.train_vision_tower for phase in cfg.phases)
    section = cfg.selection.warm_up
    return PhaseSection(
        phase=3, data=data, train_vision_tower=tower, train=section.train, optim=section.optim
    )


def _train(cfg: Config, section: PhaseSection, folder: Path, model: str | None, start: str) -> dict[str, Any]:
    """Run a phase unless it is finished, from an earlier phase's model or from `start`; what it left."""
    origin = model or start
    sha256 = weights_sha256(origin) if Path(origin).is_dir() else None
    logger.info("Phase %d, from %s.", section.phase, origin)
    if model is None and cfg.model is None:
        model = start
    with contextlib.suppress(RunFinishedError):
        train.main(_phase_config(cfg, section, folder=folder, model=model, sha256=sha256))
    return _phase_report(folder, section.phase, sha256)


def _phase_config(
    cfg: Config, phase: PhaseSection, *, folder: Path, model: str | None, sha256: str | None
) -> train.Config:
    """Config of a phase that starts from an earlier one's model, or without one from `cfg.model`."""
    first = model is None and cfg.model is not None
    values = {
        "phase": phase.phase,
        "data": _data(cfg, phase).model_dump(),
        "train_vision_tower": phase.train_vision_tower,
        "train": {**cfg.train.model_dump(), **phase.train},
        "optim": {**cfg.optim.model_dump(), **phase.optim},
        "deepspeed": cfg.deepspeed.model_dump(),
        "tracking": cfg.tracking.model_dump(),
        "ray": cfg.ray.model_dump(),
        "run": {"dir": str(folder), "note": f"phase {phase.phase}"},
        "model": cfg.model.model_dump() if cfg.model is not None and first else {"path": model or "start"},
        "input_sha256": sha256,
    }
    if first:
        # The layout of the first phase's model is handed on with it; a body from elsewhere has none yet.
        values["template"] = None if cfg.template is None else cfg.template.model_dump()
        values["max_length"] = cfg.max_length
    return validate_config(train.Config, values, f"`phases`: phase {phase.phase}")


def _phase_report(folder: Path, phase: int, sha256: str | None) -> dict[str, Any]:
    """What a finished phase left; the weights that went in must be those that this chain handed over.

    Raises:
        CheckpointMismatch: The phase's model says it started from others.
    """
    settings = VisualSettings.load(folder / "model")
    record = settings.lineage[-1]
    if (record.phase, record.input_sha256) != (phase, sha256):
        raise CheckpointMismatch(
            f"{folder} was trained as phase {record.phase} from {str(record.input_sha256)[:12]}..., not as phase {phase} "
            f"from {str(sha256)[:12]}...: an earlier phase has changed since. Remove the folder to train it again."
        )
    return {
        "phase": phase,
        "run": str(folder),
        "input_sha256": sha256,
        "output_sha256": settings.weights_sha256,
        "trained_count": record.trained_count,
        "data_hashes": record.data_hashes,
        "summary": read_json(folder / "report.json"),
    }


def _evaluate(cfg: Config, run: RunFolder, phases: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not cfg.sets:
        return None
    models = {f"{place} phase {p['phase']}": f"{p['run']}/model" for place, p in enumerate(phases, 1)}
    *_, last = models
    scorers: dict[str, Any] = {last: {"path": models[last]}}
    scorers |= {name: {"path": path} for name, path in models.items() if name != last}
    scorers[f"{last}, picture-blind"] = {"path": models[last], "blind": True}
    scorers["longer answer"] = {"kind": "longer_answer"}
    folder = run.path / "evaluation"
    values = {
        "scorers": scorers,
        "sets": {name: section.model_dump() for name, section in cfg.sets.items()},
        "bootstrap": cfg.bootstrap,
        "seed": cfg.train.seed,
        "ray": cfg.ray.model_dump(),
        "run": {"dir": str(folder)},
    }
    with contextlib.suppress(RunFinishedError):
        evaluate.main(validate_config(evaluate.Config, values, "evaluation of the phases"))
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
