"""The space of a sweep: which keys of a config vary, over which values, and by what trials are judged."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from ray.tune.search.sample import Categorical, Domain

from eagleray.platform import storage
from eagleray.platform.config import ConfigError, validate_config
from eagleray.platform.sections import TrainingConfig, TrainSection

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=TrainingConfig)
Mode = Literal["min", "max"]
SearchName = Literal["grid", "random", "optuna"]
SchedulerName = Literal["none", "asha", "pbt"]

SEED_KEY = "train.seed"


@dataclass(frozen=True)
class Objective:
    """An evaluation metric and which way is better."""

    metric: str
    mode: Mode

    @classmethod
    def parse(cls, text: str) -> Objective:
        """Read `metric:max` or `metric:min`.

        Raises:
            ConfigError: It is neither.
        """
        metric, _, mode = text.rpartition(":")
        if not metric or mode not in ("min", "max"):
            raise ConfigError(f"The objective {text!r} is not of the form metric:max or metric:min.")
        return cls(metric, mode)

    @property
    def sign(self) -> int:
        """What a value is multiplied by so that less is better."""
        return -1 if self.mode == "max" else 1


@dataclass(frozen=True)
class Space:
    """What a sweep varies and by what its trials are judged."""

    name: str
    domains: dict[str, Any]
    """Dotted config key -> Tune domain, `tune.grid_search`, or a value that all trials take."""
    metric: str
    """Evaluation metric that selects; must mean the same in every trial."""
    mode: Mode
    curves: tuple[str, ...] = ()
    """Evaluation metrics to draw against the varied keys."""
    further: tuple[Objective, ...] = ()
    """What is wanted besides: the sweep then tells which points no other beats in everything."""

    @property
    def varied(self) -> list[str]:
        """The keys that differ between trials."""
        return [key for key, domain in self.domains.items() if _is_varied(domain)]

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """All that is wanted; the first selects."""
        return (Objective(self.metric, self.mode), *self.further)

    def judged_by(self, objectives: Sequence[Objective]) -> Space:
        """The same space with other objectives; as it is if there are none."""
        if not objectives:
            return self
        first, *others = objectives
        return replace(self, metric=first.metric, mode=first.mode, further=tuple(others))


@dataclass(frozen=True)
class SweepPlan:
    """A sweep that has been checked; pickled to every trial."""

    main: Callable[..., Any]
    """`main(cfg, **options)` of a training job."""
    config_class: type[TrainingConfig]
    config: dict[str, Any]
    """Config of the trials, before the values of the space are set."""
    space: Space
    search: SearchName
    scheduler: SchedulerName
    samples: int
    """Trials for each seed, with a grid: how often it is tried."""
    seeds: tuple[int, ...]
    """Values of `train.seed` that each point is run with."""
    perturb_every: int | None = None
    """Population-based training: steps between two exploits."""

    @property
    def train(self) -> TrainSection:
        """The `train` section of the trials."""
        return validate_config(self.config_class, self.config, "trial").train


@dataclass(frozen=True)
class TrialOutcome:
    """How a trial ended, as Tune saw it."""

    name: str
    place: str
    """The trial's run folder, a path or URI."""
    point: dict[str, Any]
    """Its value of every key of the space, and its seed."""
    error: str | None
    """Why it failed; `None` for a trial that finished or was stopped by the scheduler."""


def check_space(space: Space, cls: type[C], config: dict[str, Any], *, search: SearchName) -> None:
    """Refuse a space that cannot work, before anything starts.

    Args:
        space: What to check.
        cls: Config class that the keys belong to.
        config: Config of the trials without the space's values.
        search: How points are chosen.

    Raises:
        ConfigError: The space does not fit the search, selects by something that cannot be compared, has a
            key that the config does not have, or values that the config does not allow.
    """
    _check_metric(space)
    source = f"space `{space.name}`"
    if not space.varied:
        raise ConfigError(f"{source}: nothing varies.")
    grids = [key for key in space.varied if is_grid(space.domains[key])]
    if search == "grid" and grids != space.varied:
        open_keys = ", ".join(f"`{key}`" for key in space.varied if key not in grids)
        raise ConfigError(f"{source}: {open_keys} has no grid. Use `search` random or optuna.")
    if search != "grid" and grids:
        raise ConfigError(f"{source}: `{grids[0]}` is a grid, which only `search` grid can try.")
    probes = {key: _probes(domain) for key, domain in space.domains.items()}
    first = {key: values[0] for key, values in probes.items()}
    for key, values in probes.items():
        for value in values:
            trial_config(cls, config, {**first, key: value}, source=source)


def limit_space(space: Space, key: str, cls: type[C], config: dict[str, Any]) -> Space:
    """The space without those values of a key that the config refuses beside some value of another key.

    Args:
        space: A space with a list of values for `key`.
        key: Whose values depend on the model or data.
        cls: Config class that the keys belong to.
        config: Config of the trials without the space's values.

    Raises:
        ConfigError: No value is left; with the reason for the last one.
    """
    domain = space.domains[key]
    others = {name: _probes(other) for name, other in space.domains.items() if name != key}
    first = {name: values[0] for name, values in others.items()}
    kept, reason = [], None
    for value in _probes(domain):
        try:
            for name, values in others.items():
                for other in values:
                    trial_config(
                        cls, config, {**first, name: other, key: value}, source=f"space `{space.name}`"
                    )
        except ConfigError as error:
            reason = error
            logger.info("`%s`: %s is left out: %s", key, shown(value), error)
        else:
            kept.append(value)
    if not kept and reason is not None:
        raise reason
    limited = {"grid_search": kept} if is_grid(domain) else Categorical(kept).uniform()
    return replace(space, domains={**space.domains, key: limited})


def trial_config(cls: type[C], config: Mapping[str, Any], point: Mapping[str, Any], *, source: str) -> C:
    """`config` with the values of a point set, validated.

    Raises:
        ConfigError: A key does not exist or a value is not allowed; `source` says who asked for it.
    """
    values = copy.deepcopy(dict(config))
    for key, value in point.items():
        *parents, leaf = key.split(".")
        node = values
        for name in parents:
            if not isinstance(node.get(name), dict):
                node[name] = {}
            node = node[name]
        node[leaf] = value
    return validate_config(cls, values, source)


def number_of_trials(plan: SweepPlan) -> int:
    """How many trials the sweep starts, whatever the scheduler does with them."""
    grids = [plan.space.domains[key] for key in plan.space.varied if is_grid(plan.space.domains[key])]
    return math.prod(len(grid["grid_search"]) for grid in grids) * plan.samples * len(plan.seeds)


def shown(value: Any) -> str:
    """A value of a point in few characters."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _check_metric(space: Space) -> None:
    varied_loss = [key for key in space.varied if key.split(".")[0] == "loss"]
    if varied_loss and "loss" in space.metric.replace("/", "_").split("_"):
        raise ConfigError(
            f"space `{space.name}` selects by `{space.metric}` and varies `{varied_loss[0]}`. A key under `loss` "
            "changes what the loss measures, so its values cannot be compared between trials and the least one "
            "says nothing. Select by a metric that is the same function for all trials, e.g. accuracy."
        )


def is_grid(domain: Any) -> bool:
    """Whether every value of a list is tried."""
    return isinstance(domain, dict) and set(domain) == {"grid_search"}


def _is_varied(domain: Any) -> bool:
    return is_grid(domain) or isinstance(domain, Domain)


def _probes(domain: Any) -> Sequence[Any]:
    """Values by which a domain is checked: all of a grid or of a choice, some of a range."""
    if is_grid(domain):
        return domain["grid_search"]
    if isinstance(domain, Categorical):
        return domain.categories
    if isinstance(domain, Domain):
        return storage.plain(domain.sample(size=20, random_state=0))
    return [domain]
