"""Select from pools of preference data what matches a target.

    python -m eagleray.jobs.select --config configs/select/transport_tiny.yaml

Several pools are selected from in turn, each for what was selected from the one before (RoVRM section 4.4). For each,
the run folder gets `selected/NAME.jsonl`, which training jobs read as preference data, `scores/NAME.parquet` with all
rows of the pool, plots, and a part of `report.json`. An interrupted run goes on after the last pool that was done.
"""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from eagleray.jobs.selection.data import (
    DataSection,
    LoadedSet,
    Overlap,
    PoolSection,
    WithoutVector,
    check_models,
    load_set,
    output_row,
    separated,
)
from eagleray.jobs.selection.methods import (
    METHODS,
    Context,
    CosineSection,
    Method,
    Scored,
    TransportSection,
)
from eagleray.models.selection.chain import FeatureSet, select_chain
from eagleray.models.selection.choice import best_first, cluster, how_many, take_by_quota
from eagleray.models.selection.cosine import nearest_targets
from eagleray.models.selection.features import tfidf
from eagleray.models.selection.plots import plot_scores, plot_sources
from eagleray.models.selection.rows import check_rows, check_same_width
from eagleray.platform import storage
from eagleray.platform.cluster import connected
from eagleray.platform.config import Config as Section
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import JobConfig

JOB = "select"
logger = logging.getLogger(__name__)


class FeatureSection(Section):
    """What rows are compared by; `random` and `longest` need nothing."""

    name: Literal["tfidf", "stored"] = "tfidf"
    """`tfidf`: words; `stored`: the vectors of every pool and target, e.g. representations or projected gradients."""
    text: Literal["prompt", "pair"] = "prompt"
    """Which words count for `tfidf`: those of the prompt, or of the answers too."""
    max_terms: int = Field(default=20_000, ge=1)
    """Most frequent words and pairs of words that count for `tfidf`."""
    order: str | None = None
    """Take only vectors with this value in the column `order`."""


class Config(JobConfig):
    """Config of `select`."""

    job: Literal["select"] = JOB
    target: DataSection
    """What the first pool is selected for."""
    pools: dict[str, PoolSection] = Field(min_length=1)
    """Pools by name, in the order in which they are selected from."""
    chained: bool = True
    """Select from each pool for what was selected from the one before; else all of them for the target."""
    held_out: DataSection | None = None
    """Test prompts of the target; no pool may hold them."""
    overlap: Overlap = "raise"
    """Rows of a pool that the target or `held_out` has too: an error, left out, or allowed."""
    without_vector: WithoutVector = "raise"
    """Pairs without a stored vector, e.g. those too long for the model of `features`: an error, or left out."""
    method: Method = "transport"
    """`cosine` (LRHP), `transport` (RoVRM), or a baseline: `random`, or `longest` chosen answer."""
    features: FeatureSection = FeatureSection()
    cosine: CosineSection = CosineSection()
    transport: TransportSection = TransportSection()
    clusters: int | Literal["auto"] | None = None
    """Keep the selection diverse: take from each k-means cluster of the pool in proportion to its size. How many
    clusters; `auto`: a tenth of the rows to select."""
    seed: int = Field(default=0, ge=0)
    """Seed of k-means and of `random`."""

    @field_validator("pools")
    @classmethod
    def _names_are_file_names(cls, pools: dict[str, PoolSection]) -> dict[str, PoolSection]:
        bad = [name for name in pools if not name.replace("_", "").replace("-", "").isalnum()]
        if bad or "target" in pools:
            raise ValueError(f"`{(bad or ['target'])[0]}` cannot name a pool; take letters, digits, _ and -")
        return pools

    @model_validator(mode="after")
    def _data_fits_the_method(self) -> Config:
        sets = {"target": self.target, **{f"pools.{name}": pool for name, pool in self.pools.items()}}
        for name, section in sets.items():
            if self.uses_vectors and section.vectors is None:
                raise ValueError(f"`features.name` is stored, so `{name}` needs `vectors`")
            if self.method == "longest" and not section.has_texts:
                raise ValueError(f"`method` longest needs `pairs` in `{name}`")
            if self.uses_features and not self.uses_vectors and not section.has_texts:
                raise ValueError(f"`features.name` is tfidf, so `{name}` needs `pairs`")
        return self

    @property
    def uses_features(self) -> bool:
        """Whether rows are compared."""
        return self.method in ("cosine", "transport") or self.clusters is not None

    @property
    def uses_vectors(self) -> bool:
        """Whether rows are compared by stored vectors."""
        return self.uses_features and self.features.name == "stored"


def main(cfg: Config) -> dict[str, Any]:
    """Select and write.

    Returns:
        The report: name of a pool -> figures of its selection.
    """
    with RunFolder.create(JOB, cfg).recording() as run:
        target, pools = _load(cfg)
        hashes = {path: value for loaded in (target, *pools) for path, value in loaded.hashes.items()}
        run.update_manifest(data_hashes=hashes)
        for folder in (run.checkpoints, run.plots, run.path / "scores", run.path / "selected"):
            folder.mkdir(exist_ok=True)
        report: dict[str, Any] = {}
        loaded_by_name = {pool.name: pool for pool in pools}

        def select(pool: FeatureSet, goal: FeatureSet) -> np.ndarray:
            chosen, report[pool.name] = _select(cfg, run, pool, goal, loaded_by_name[pool.name])
            return chosen

        with connected(cfg.ray) if cfg.ray.min_workers > 1 else nullcontext():
            goal, *rows = _features(cfg, [target, *pools])
            select_chain(goal, rows, select, chained=cfg.chained)
        run.write_report(report)
    return report


def _load(cfg: Config) -> tuple[LoadedSet, list[LoadedSet]]:
    options: dict[str, Any] = {
        "with_vectors": cfg.uses_vectors,
        "order": cfg.features.order,
        "without_vector": cfg.without_vector,
    }
    target = load_set(cfg.target, "target", **options)
    pools = [load_set(section, name, **options) for name, section in cfg.pools.items()]
    check_models([target, *pools])
    pools = [separated(pool, target, what="target", overlap=cfg.overlap) for pool in pools]
    if cfg.held_out is not None:
        held_out = load_set(cfg.held_out, "held_out", with_vectors=False)
        pools = [separated(pool, held_out, what="test data", overlap=cfg.overlap) for pool in pools]
    return target, pools


def _features(cfg: Config, sets: list[LoadedSet]) -> list[FeatureSet]:
    rows: list[Any] = [None] * len(sets)
    if cfg.uses_vectors:
        rows = [loaded.vectors_ND for loaded in sets]
    elif cfg.uses_features:
        rows = list(
            tfidf([_texts(loaded, cfg.features.text) for loaded in sets], max_terms=cfg.features.max_terms)
        )
    found = [FeatureSet(loaded.name, loaded.ids, row) for loaded, row in zip(sets, rows, strict=True)]
    if cfg.uses_features:
        for part in found:
            check_rows(part.rows, part.ids, part.name)
            check_same_width(part.rows, found[0].rows)
    return found


def _texts(loaded: LoadedSet, which: str) -> list[str]:
    assert loaded.pairs is not None
    if which == "prompt":
        return loaded.prompts
    return [f"{pair.prompt_text}\n{pair.chosen}\n{pair.rejected}" for pair in loaded.pairs]


def _select(
    cfg: Config, run: RunFolder, pool: FeatureSet, goal: FeatureSet, loaded: LoadedSet
) -> tuple[np.ndarray, dict[str, Any]]:
    """Rows taken from one pool, best first, and what the report says of it."""
    done, table = run.checkpoints / f"{pool.name}.json", run.path / "scores" / f"{pool.name}.parquet"
    if done.exists():
        logger.info("%s: selected before the interruption.", pool.name)
        return _read_chosen(table), storage.read_json(done)
    section = cfg.pools[pool.name]
    count = how_many(len(pool.ids), count=section.count, fraction=section.fraction)
    state = run.checkpoints / f"{pool.name}.npy"
    context = Context(cfg.ray, cfg.cosine, cfg.transport, cfg.seed, state)
    scored = METHODS[cfg.method](pool, goal, loaded, context)
    order = best_first(scored.score_N, pool.ids, highest=scored.highest_is_best)
    chosen = order[:count]
    if cfg.clusters is not None and count:
        clusters = max(1, count // 10) if cfg.clusters == "auto" else cfg.clusters
        chosen = take_by_quota(order, cluster(pool.rows, clusters, seed=cfg.seed)[0], count)
    nearest = _nearest(scored, pool, goal, chosen)
    _write_scores(table, pool, scored, order, chosen, nearest)
    _write_selected(run.path / "selected" / f"{pool.name}.jsonl", loaded, scored, chosen)
    report = _report(cfg, loaded, goal, scored, chosen)
    plot_scores(
        scored.score_N,
        chosen,
        run.plots / f"{pool.name}_scores.png",
        title=pool.name,
        label=f"{cfg.method} score",
    )
    plot_sources(report["sources"], run.plots / f"{pool.name}_sources.png", title=pool.name)
    storage.write_json(done, report)
    state.unlink(missing_ok=True)
    logger.info("%s: selected %d of %d rows.", pool.name, count, len(pool.ids))
    return chosen, report


def _nearest(scored: Scored, pool: FeatureSet, goal: FeatureSet, chosen: np.ndarray) -> list[str | None]:
    """Id of the most similar target: of all rows where the method knows it, else of those chosen."""
    nearest: list[str | None] = [None] * len(pool.ids)
    if scored.nearest_N is not None:
        return [goal.ids[number] for number in scored.nearest_N]
    if pool.rows is not None and goal.rows is not None and len(chosen):
        for row, number in zip(chosen, nearest_targets(pool.rows[chosen], goal.rows), strict=True):
            nearest[row] = goal.ids[number]
    return nearest


def _write_scores(
    path: Path,
    pool: FeatureSet,
    scored: Scored,
    order: np.ndarray,
    chosen: np.ndarray,
    nearest: list[str | None],
) -> None:
    """All rows in the order of the pool; ranks begin with 1."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rank, selected = np.empty(len(order), dtype=np.int64), np.zeros(len(order), dtype=bool)
    rank[order] = np.arange(1, len(order) + 1)
    selected[chosen] = True
    columns = {
        "id": pa.array(pool.ids, pa.string()),
        "score": scored.score_N,
        "rank": rank,
        "selected": selected,
    }
    columns["argmax_target_id"] = pa.array(nearest, pa.string())
    temporary = path.with_suffix(".tmp")
    pq.write_table(pa.table(columns), temporary)
    temporary.replace(path)


def _read_chosen(path: Path) -> np.ndarray:
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["rank", "selected"]).to_pydict()
    rows = np.flatnonzero(table["selected"])
    return rows[np.argsort(np.array(table["rank"])[rows])]


def _write_selected(path: Path, loaded: LoadedSet, scored: Scored, chosen: np.ndarray) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for rank, row in enumerate(chosen, start=1):
            values = output_row(loaded, int(row), float(scored.score_N[row]), rank)
            file.write(json.dumps(storage.plain(values), ensure_ascii=False) + "\n")
    temporary.replace(path)


def _report(
    cfg: Config, loaded: LoadedSet, goal: FeatureSet, scored: Scored, chosen: np.ndarray
) -> dict[str, Any]:
    sources = np.array(loaded.sources)
    picked = sources[chosen]
    by_source = {
        str(name): {
            "pool": int((sources == name).sum()),
            "selected": int((picked == name).sum()),
            "share_of_pool": float((sources == name).mean()),
            "share_of_selection": float((picked == name).mean()) if len(picked) else 0.0,
        }
        for name in np.unique(sources)
    }
    return {
        "method": cfg.method,
        "features": cfg.features.name if cfg.uses_features else None,
        "model_hash": loaded.model_hash,
        "pool": len(loaded.ids),
        "without_vector": loaded.without_vector,
        "target": goal.name,
        "targets": len(goal.ids),
        "selected": len(chosen),
        "cut": float(scored.score_N[chosen[-1]]) if len(chosen) else None,
        "seed": cfg.seed,
        **scored.facts,
        "sources": by_source,
    }


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
