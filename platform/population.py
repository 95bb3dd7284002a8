"""Population-based training (Jaderberg et al., 2017): trials that do badly go on from those that do well.

All trials train a segment, then the worse quarter takes over weights, moments and step of trials of the better
quarter (exploit) and changes their values a little (explore), and so on to the last step.

Special here (docs/decisions/0005-population.md):
- A segment is a run of its own, with a folder, a config that says whence it starts (`train.start_from`) and how
  far it goes (`train.stop_at`), and a Ray Train name that no other run has. Nothing is changed in a run that began.
- The driver decides, between segments, from the run folders. `population.json` holds what it decided, so a killed
  sweep goes on where it was; chance is a function of the seed and the number of the segment.
- A trial that failed, say over a rate that was too high, takes over from a good one like the worst.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError
from ray.tune.search.sample import Integer, Quantized

from eagleray.platform import storage
from eagleray.platform.config import ConfigError
from eagleray.platform.imports import packed, unpacked
from eagleray.platform.leftovers import Leftovers
from eagleray.platform.remote import open_folder
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import TrainSection
from eagleray.platform.space import SEED_KEY, Space, SweepPlan, TrialOutcome, is_grid, shown
from eagleray.platform.tracking import read_metrics
from eagleray.platform.trial import is_finished, last_line, start_trial, trials_of

logger = logging.getLogger(__name__)

_FILE = "population.json"

_QUANTILE = 0.25
"""Share of the trials that take over, and of those that are taken over from."""

_RESAMPLE = 0.25
"""Chance that a value is drawn anew in place of changed a little."""

_CHANGE = 0.2
"""What a number is changed by otherwise, as a share of it."""

_CHANGEABLE = ("optim", "loss", "train.batch_size")
"""What may change in the middle of a run: it shapes neither the model nor the examples."""


@dataclass(frozen=True)
class Member:
    """What one trial does in one segment."""

    point: dict[str, Any]
    """Its value of every key of the space."""
    start_from: str | None = None
    """Checkpoint to go on from."""


@dataclass(frozen=True)
class Exploit:
    """One trial took over from another."""

    trial: str
    donor: str
    step: int
    """Optimiser steps that the donor had done."""
    old: dict[str, Any]
    """What the trial trained with until then: its value of every key that varies."""
    new: dict[str, Any]
    """What it trains with from then on."""


@dataclass
class Population:
    """What was decided so far; `population.json`."""

    segments: list[dict[str, Member]] = field(default_factory=list)
    """For each segment: trial name -> what it does."""
    exploits: list[Exploit] = field(default_factory=list)

    @classmethod
    def load(cls, run: RunFolder) -> Population:
        """What a sweep decided; empty if it has not begun."""
        path = run.path / _FILE
        if not path.exists():
            return cls()
        values = storage.read_json(path)
        segments = [{name: Member(**m) for name, m in segment.items()} for segment in values["segments"]]
        return cls(segments, [Exploit(**exploit) for exploit in values["exploits"]])

    def save(self, run: RunFolder) -> None:
        """Write it as a whole."""
        storage.write_json(run.path / _FILE, asdict(self))
        run.folder.send(_FILE)


def check_population(space: Space, train: TrainSection, *, size: int) -> None:
    """Refuse what population-based training cannot work with.

    Raises:
        ConfigError: A key cannot change in the middle of a run, a run has no known end, or nobody is there to
            take over from.
    """
    fixed = [key for key in space.varied if not any(f"{key}.".startswith(f"{c}.") for c in _CHANGEABLE)]
    if fixed:
        raise ConfigError(
            f"space `{space.name}` varies `{fixed[0]}`, which cannot change in the middle of a run; with `scheduler` "
            f"pbt a space may vary {', '.join(f'`{key}`' for key in _CHANGEABLE)}."
        )
    if train.max_steps is None:
        raise ConfigError(
            "`scheduler` is pbt, which needs `train.max_steps`, so that all trials have one length."
        )
    if train.patience is not None or train.start_from is not None or train.stop_at is not None:
        raise ConfigError(
            "`scheduler` is pbt, which starts and stops its trials itself; leave out `train.patience`, "
            "`train.start_from` and `train.stop_at`."
        )
    if size < 2:
        raise ConfigError("`scheduler` is pbt, which needs at least 2 trials; raise `num_samples`.")


def segment_ends(train: TrainSection, perturb_every: int | None) -> list[int]:
    """Last step of every segment.

    Args:
        train: The `train` section of the trials.
        perturb_every: Steps of a segment; default: a quarter of the run.

    Raises:
        ConfigError: There is one segment only.
    """
    assert train.max_steps is not None, "`check_population` has been asked"
    every = perturb_every or math.ceil(train.max_steps / 4)
    if every >= train.max_steps:
        raise ConfigError(
            f"`perturb_every` is {every} and a run has {train.max_steps} steps, so nobody would ever take over. "
            "Lower `perturb_every`, or raise `train.max_steps`."
        )
    return [*range(every, train.max_steps, every), train.max_steps]


def run_population(plan: SweepPlan, run: RunFolder, *, max_concurrent: int) -> list[list[TrialOutcome]]:
    """Run a population to its end, or go on with one. Ray must be connected.

    Args:
        plan: The sweep.
        run: Its run folder; segments are run folders `trials/<name>/segment-<number>` in it.
        max_concurrent: Trials that run at a time; the population may be larger.

    Returns:
        For each trial the outcomes of its segments.
    """
    population, space, trials = Population.load(run), plan.space, trials_of(run)
    if not population.segments:
        population.segments.append(first_members(plan))
        population.save(run)
    ends = segment_ends(plan.train, plan.perturb_every)
    idle: list[Any] = []
    while True:
        number, members = len(population.segments), population.segments[-1]
        errors = _run_segment(plan, trials, number, members, ends[number - 1], max_concurrent, idle)
        scores = {name: _score(_segment(trials, name, number), space) for name in members}
        if number == len(ends) or not any(score is not None for score in scores.values()):
            break
        following, exploits = next_members(
            space, members, scores, ends[number - 1], seed=(plan.seeds[0], number)
        )
        for exploit in exploits:
            logger.info("Step %d: %s.", exploit.step, describe_exploit(exploit))
        donors = {name: name for name in members} | {exploit.trial: exploit.donor for exploit in exploits}
        population.exploits += exploits
        population.segments.append(
            {
                name: Member(point, _newest_checkpoint(_segment(trials, donors[name], number)))
                for name, point in following.items()
            }
        )
        population.save(run)
        if number > 1:  # nobody starts from these any more
            for name in members:
                open_folder(_segment(trials, name, number - 1)).remove("checkpoints")
    return [_outcomes(plan, trials, population, name, errors) for name in members]


def describe_exploit(exploit: Exploit) -> str:
    """One line, e.g. `0002 goes on from 0001 with optim.lr 0.1 -> 0.012`."""
    changes = [f"{key} {shown(old)} -> {shown(exploit.new[key])}" for key, old in exploit.old.items()]
    return f"{exploit.trial} goes on from {exploit.donor} with {', '.join(changes)}"


def first_members(plan: SweepPlan) -> dict[str, Member]:
    """Every point of a grid, or as many random points as the plan has samples."""
    domains = plan.space.domains
    if plan.search == "grid":
        lists = [domain["grid_search"] if is_grid(domain) else [domain] for domain in domains.values()]
        points = [dict(zip(domains, values, strict=True)) for values in itertools.product(*lists)]
    else:
        rng = np.random.RandomState(plan.seeds[0])
        varied = plan.space.varied
        points = [
            {
                key: domain.sample(random_state=rng) if key in varied else domain
                for key, domain in domains.items()
            }
            for _ in range(plan.samples)
        ]
    return {f"{number:04d}": Member(storage.plain(point)) for number, point in enumerate(points, start=1)}


def next_members(
    space: Space,
    members: Mapping[str, Member],
    scores: Mapping[str, float | None],
    step: int,
    *,
    seed: Sequence[int],
) -> tuple[dict[str, dict[str, Any]], list[Exploit]]:
    """Who takes over from whom, and the points of the next segment.

    Args:
        space: What varies, and whether a high score is good.
        members: The trials of the segment that has ended.
        scores: Their metric at its end; `None` for one that failed. One of them at least is a number.
        step: Optimiser steps done by then.
        seed: Decides on chance.
    """
    rng = np.random.RandomState(list(seed))
    sign = space.objectives[0].sign
    losses = {name: sign * score for name, score in scores.items() if score is not None}
    ranked = sorted(losses, key=lambda name: losses[name])
    failed = [name for name in members if name not in losses]
    share = min(math.ceil(_QUANTILE * len(members)), len(members) // 2)
    worse = [*failed, *reversed(ranked)][: max(share, len(failed))]
    better = [name for name in ranked[:share] if name not in worse]
    points = {name: member.point for name, member in members.items()}
    exploits = []
    for name in worse:
        donor = better[rng.randint(len(better))]
        new = {key: explore(space.domains[key], members[donor].point[key], rng) for key in space.varied}
        old = {key: members[name].point[key] for key in space.varied}
        points[name] = {**members[donor].point, **new}
        exploits.append(Exploit(name, donor, step, old, new))
    return points, exploits


def explore(domain: Any, value: Any, rng: np.random.RandomState) -> Any:
    """A value near another one, or now and then any of the domain; never outside it.

    A number becomes a fifth smaller or larger; an item of a list becomes one of its neighbours.
    """
    items = domain["grid_search"] if is_grid(domain) else getattr(domain, "categories", None)
    if items is not None:
        place = items.index(value)
        near = [items[i] for i in (place - 1, place + 1) if 0 <= i < len(items)] or [value]
        choices = items if rng.rand() < _RESAMPLE else near
        return choices[rng.randint(len(choices))]
    if rng.rand() < _RESAMPLE:
        return storage.plain(domain.sample(random_state=rng))
    sampler, step = domain.get_sampler(), _CHANGE * abs(value)
    grain = sampler.q if isinstance(sampler, Quantized) else 1 if isinstance(domain, Integer) else None
    if grain is not None:
        step = max(round(step / grain), 1) * grain
    last = domain.upper - 1 if isinstance(domain, Integer) else domain.upper  # integers end before it
    near = [domain.cast(min(max(number, domain.lower), last)) for number in (value - step, value + step)]
    changed = [number for number in near if number != value] or [value]
    return changed[rng.randint(len(changed))]


def _run_segment(
    plan: SweepPlan,
    trials: str,
    number: int,
    members: Mapping[str, Member],
    end: int,
    max_concurrent: int,
    idle: list[Any],
) -> dict[str, str]:
    """Train all members to the end of a segment, unless they are there; returns why some failed.

    Args:
        idle: Actors of earlier segments, which are used again, as they have imported everything.
    """
    leftovers, running, errors = Leftovers(), {}, {}
    waiting = [name for name in members if not is_finished(_segment(trials, name, number))]
    start = ray.remote(num_cpus=0)(_SegmentTrainer).remote
    try:
        while waiting or running:
            while waiting and len(running) < max_concurrent:
                name, member = waiting[0], members[waiting.pop(0)]
                point = ", ".join(f"{key} = {shown(member.point[key])}" for key in plan.space.varied)
                logger.info("Trial %s trains to step %d: %s.", name, end, point)
                place, note = _segment(trials, name, number), f"trial {name}, segment {number}"
                trainer: Any = idle.pop() if idle else start(packed(plan), Path.cwd())
                running[trainer.train.remote(place, member, end, note)] = name, trainer
            done, _ = ray.wait(list(running), timeout=1.0)
            leftovers.release()
            for reference in done:
                name, trainer = running.pop(reference)
                try:
                    ray.get(reference)
                except RayError as error:
                    errors[name] = last_line(error)
                    logger.warning("Trial %s failed in segment %d: %s", name, number, errors[name])
                    ray.kill(trainer)  # nobody knows what it still holds
                else:
                    idle.append(trainer)
    finally:
        for _, trainer in running.values():
            ray.kill(trainer)
        leftovers.settle()
    return errors


class _SegmentTrainer:
    """An actor that trains segments, one after the other.

    No task: Ray keeps a placement group that a task made until the driver ends, one that an actor made can be told to
    have no owner any more (`platform/leftovers.py`).
    """

    def __init__(self, packed_plan: bytes, working_dir: Path) -> None:
        self._plan, self._working_dir = unpacked(packed_plan), working_dir

    def train(self, place: str, member: Member, end: int, note: str) -> None:
        start = member.start_from
        point = {
            **member.point,
            SEED_KEY: self._plan.seeds[0],
            "train.start_from": start,
            "train.stop_at": end,
        }
        data_of = None if start is None else start.rpartition("/checkpoints/")[0]
        start_trial(self._plan, place, point, working_dir=self._working_dir, note=note, data_of=data_of)


def _outcomes(
    plan: SweepPlan, trials: str, population: Population, name: str, errors: Mapping[str, str]
) -> list[TrialOutcome]:
    """How each segment of a trial ended; those before the last may have failed in an earlier attempt."""
    outcomes = []
    for number, members in enumerate(population.segments, start=1):
        place = _segment(trials, name, number)
        error = None if is_finished(place) else errors.get(name, "it failed")
        outcomes.append(TrialOutcome(name, place, {**members[name].point, SEED_KEY: plan.seeds[0]}, error))
    return outcomes


def _segment(trials: str, name: str, number: int) -> str:
    return f"{trials}/{name}/segment-{number:02d}"


def _newest_checkpoint(place: str) -> str:
    return f"{place}/checkpoints/{open_folder(place).checkpoints()[-1]}"


def _score(place: str, space: Space) -> float | None:
    """The metric of a segment's last evaluation, which is at its end."""
    metrics = RunFolder(place).fetch_records().metrics
    evaluations = [record for record in read_metrics(metrics) if record["kind"] == "eval"]
    return evaluations[-1].get(space.metric) if evaluations and is_finished(place) else None
