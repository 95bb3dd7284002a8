"""Selecting what the earlier phases train on: backwards, each for what was selected for the phase after it.

RoVRM section 4.4. A model is warmed up on a few samples of every phase, features of all samples are computed with it
(job `features`), and the pools are selected from in turn (job `select`). Each part is a run or a store in the folder
`selection`, so an interrupted chain goes on with the part that is missing.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from eagleray.jobs import select
from eagleray.jobs.features import FeatureSection, RewardModelSection, encode_samples
from eagleray.jobs.rovrm.data import Sample, VisualData, load_parts
from eagleray.jobs.selection.methods import CosineSection, TransportSection
from eagleray.platform.config import Config as Section
from eagleray.platform.config import validate_config
from eagleray.platform.runs import RunFinishedError
from eagleray.platform.sections import RaySection
from eagleray.platform.storage import read_json

logger = logging.getLogger(__name__)


class ShareSection(Section):
    """How much of a phase's samples to select."""

    count: int | None = Field(default=None, ge=1)
    """Samples."""
    fraction: float | None = Field(default=None, gt=0, le=1)
    """Share of them, in place of `count`."""

    @model_validator(mode="after")
    def _one_size(self) -> ShareSection:
        if (self.count is None) == (self.fraction is None):
            raise ValueError("give either `count` or `fraction`")
        return self


class WarmUpSection(Section):
    """The short training of the model that features are computed with."""

    samples: int = Field(default=500, ge=1)
    """Samples of each phase, at most."""
    train: dict[str, Any] = Field(default={"epochs": 1})
    """Keys of `train` that differ from what all phases share."""
    optim: dict[str, Any] = Field(default={})
    """Keys of `optim` that differ."""


class SelectionSection(Section):
    """How samples of phases with `select` are selected."""

    method: Literal["transport", "cosine", "random"] = "transport"
    """`cosine` on gradient features is gradient matching; `random` is the baseline of equal size and needs no model."""
    chained: bool = True
    """Select for what was selected for the phase after it; else every phase for the samples of the last one."""
    model: str | None = None
    """Reward model whose features are compared. Default: the one of `warm_up`."""
    warm_up: WarmUpSection = WarmUpSection()
    features: FeatureSection = FeatureSection()
    transport: TransportSection = TransportSection()
    cosine: CosineSection = CosineSection()
    clusters: int | Literal["auto"] | None = None
    """As in `select`: take from each k-means cluster in proportion to its size."""

    @field_validator("model")
    @classmethod
    def _local_folders_are_absolute(cls, path: str | None) -> str | None:
        return None if path is None else RewardModelSection(path=path).path


@dataclass(frozen=True)
class Pool:
    """Training samples of a phase."""

    name: str
    data: VisualData
    share: ShareSection | None


@dataclass(frozen=True)
class Selection:
    """What was selected."""

    files: dict[str, str]
    """Name of a pool -> file with the rows that were taken from it."""
    report: dict[str, Any]


def select_for(
    pools: Sequence[Pool],
    section: SelectionSection,
    folder: Path,
    *,
    warm_up: Callable[[Path], str],
    seed: int,
    ray: RaySection,
) -> Selection:
    """Select from all pools but the last, from the last but one backwards.

    A pool between others whose `share` is None is taken whole, and is the target of the pool before it.

    Args:
        pools: Samples of the phases, in their order; the last is what the others are selected for.
        section: How.
        folder: Where warm-up, features and selection are kept.
        warm_up: Trains the model that features are computed with into a folder, and gives the model's path.
        seed: Of the data's splits and limits, as in training.
        ray: Workers.
    """
    first = next(place for place, pool in enumerate(pools) if pool.share is not None)
    pools = pools[first:]
    samples = {pool.name: load_parts(pool.data, seed=seed).train for pool in pools}
    if section.method == "random":
        vectors = {name: _write_ids(folder / "ids", name, found) for name, found in samples.items()}
    else:
        model = section.model or warm_up(folder / "warm-up")
        vectors = {}
        for pool in pools:
            store = folder / "features" / pool.name
            vectors[pool.name] = str(store)
            found = samples[pool.name]
            encode_samples(store, found, section.features, model, pool.data.images, ray)
    *earlier, target = pools
    values = {
        "target": {"vectors": vectors[target.name]},
        "pools": {
            pool.name: {
                "vectors": vectors[pool.name],
                **(pool.share or ShareSection(fraction=1.0)).model_dump(),
            }
            for pool in reversed(earlier)
        },
        "overlap": "allow",  # a picture and its caption may share an id; `load_parts` keeps evaluation data out
        "features": {"name": "stored"},
        "seed": seed,
        "ray": ray.model_dump(),
        "run": {"dir": str(folder / "selected")},
        **section.model_dump(include={"method", "chained", "transport", "cosine", "clusters"}),
    }
    with contextlib.suppress(RunFinishedError):
        select.main(validate_config(select.Config, values, "`selection`"))
    done = folder / "selected"
    files = {pool.name: str(done / "selected" / f"{pool.name}.jsonl") for pool in earlier if pool.share}
    return Selection(files, read_json(done / "report.json"))


def _write_ids(folder: Path, name: str, samples: Sequence[Sample]) -> str:
    """A store without vectors, for a selection that compares nothing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.parquet"
    columns = {"id": [s.record.id for s in samples], "source": [s.source for s in samples]}
    pq.write_table(pa.table(columns), path)
    return str(path)
