"""Features of preference data from a reward model, for `eagleray select`: projected gradients or hidden states, by id.

    python -m eagleray.jobs.features --config configs/select/features_tiny.yaml model.path=... store=...

A streaming Ray Data job that can be stopped and run again: what a store holds already is not computed again, and
features of another model or of another kind are refused. Every set gets a store of its own, `STORE/NAME`, which is the
`vectors` of a target or a pool.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from eagleray.jobs.encoding import Encoded, Item, encode
from eagleray.jobs.rovrm.data import (
    ImageSection,
    Sample,
    SyntheticVisual,
    VisualSource,
    generated,
    load_sources,
)
from eagleray.models.rovrm.features import FeatureKind, FeatureSettings, Featuriser
from eagleray.models.rovrm.images import ImageLimits
from eagleray.models.rovrm.scoring import TooLongError
from eagleray.models.selection.store import VectorStore, model_hash, text_hash
from eagleray.platform.config import Config as Section
from eagleray.platform.runs import RunFolder
from eagleray.platform.scoring import Row, Score
from eagleray.platform.sections import JobConfig, RaySection

JOB = "features"


class RewardModelSection(Section):
    """The model whose gradients or states are taken."""

    path: str
    """Folder of a visual reward model (`rovrm.train`), or a reward model of texts (`gram.discriminative`, a sequence
    classifier of the hub)."""

    @field_validator("path")
    @classmethod
    def _local_folders_are_absolute(cls, path: str) -> str:
        local = Path(path).expanduser()
        return str(local.absolute()) if local.exists() else path


class FeatureSection(Section):
    """Which features, and of what size."""

    kind: FeatureKind = "lora_grad"
    """`lora_grad`: projected gradient of LoRA weights (matching by cosine is gradient matching); `head_grad`: gradient of
    the reward head; `hidden`: states of the best and the worst answer. The last two need no backward pass."""
    rank: int = Field(default=16, ge=1)
    """Rank of the LoRA weights."""
    targets: list[str] = Field(default=["q_proj", "k_proj", "v_proj", "o_proj"], min_length=1)
    """Linear layers of the language model that get LoRA weights, by the last part of their names."""
    width: int = Field(default=2048, ge=8, multiple_of=8)
    """Numbers of a gradient after the projection."""
    seed: int = Field(default=0, ge=0)
    """Seed of the LoRA weights and of the projection."""
    max_batch_tokens: int = Field(default=16384, ge=1)
    """Tokens of one pass, padding included; changes nothing but speed and memory."""

    def settings(self) -> FeatureSettings:
        """As the library takes them."""
        return FeatureSettings(self.kind, self.rank, tuple(self.targets), self.width, self.seed)

    def hash(self, path: str) -> str:
        """Hash of everything that decides a feature: the model and these settings."""
        used = self.settings() if self.kind == "lora_grad" else self.kind
        return model_hash(Path(path).expanduser(), repr(used))


class SampleSet(Section):
    """Samples to compute features of."""

    sources: list[VisualSource] = Field(default=[])
    """Preference data with or without pictures; `layout: text` reads what `select` reads as `pairs`, under the same ids."""
    synthetic: list[SyntheticVisual] = Field(default=[])
    """Generated samples, besides or in place of `sources`."""

    @model_validator(mode="after")
    def _has_rows(self) -> SampleSet:
        if not self.sources and not self.synthetic:
            raise ValueError("give `sources`, `synthetic` or both")
        return self


class Config(JobConfig):
    """Config of `features`."""

    job: Literal["features"] = JOB
    model: RewardModelSection
    sets: dict[str, SampleSet] = Field(min_length=1)
    """Sets of samples by name. Ids must differ within a set."""
    features: FeatureSection = FeatureSection()
    images: ImageSection = ImageSection()
    store: str | None = None
    """Folder of the stores, one a set; those that exist are added to. Default: `features` in the run folder."""
    shard_rows: int = Field(default=2048, ge=1)
    """Rows of a shard, which is also what an interruption costs at most."""

    @field_validator("sets")
    @classmethod
    def _names_are_folder_names(cls, sets: dict[str, SampleSet]) -> dict[str, SampleSet]:
        if bad := [name for name in sets if not name.replace("_", "").replace("-", "").isalnum()]:
            raise ValueError(f"`{bad[0]}` cannot name a set; take letters, digits, _ and -")
        return sets


def main(cfg: Config) -> dict[str, Any]:
    """Compute what is missing.

    Returns:
        The report: hash of model and settings, and for each set its store and counts.
    """
    with RunFolder.create(JOB, cfg, shared=cfg.store is None).recording() as run:
        folder = Path(cfg.store).expanduser().absolute() if cfg.store else run.path / "features"
        report: dict[str, Any] = {"model_hash": cfg.features.hash(cfg.model.path), "sets": {}}
        hashes: dict[str, str] = {}
        for name, section in cfg.sets.items():
            loaded = load_sources(section.sources, cfg.images) if section.sources else None
            samples = [*(loaded.samples if loaded else [])]
            for made in section.synthetic:
                samples += generated(made, made.samples, "train")
            hashes |= loaded.hashes if loaded else {}
            run.update_manifest(data_hashes=hashes)
            done = encode_samples(
                folder / name,
                samples,
                cfg.features,
                cfg.model.path,
                cfg.images,
                cfg.ray,
                shard_rows=cfg.shard_rows,
            )
            report["sets"][name] = {
                "store": str(folder / name),
                "samples": len(samples),
                "computed": done.computed,
                "left_out": done.left_out,
            }
        run.write_report(report)
    return report


def encode_samples(
    folder: Path,
    samples: Sequence[Sample],
    features: FeatureSection,
    path: str,
    images: ImageSection,
    ray: RaySection,
    *,
    shard_rows: int = 2048,
) -> Encoded:
    """Features of samples into a store; what is there already stays.

    Raises:
        StoreError: The store is of another model or of other settings, or a sample has changed.
    """
    store = VectorStore(folder, model_hash=features.hash(path))
    arguments = {
        "path": path,
        "features": features.model_dump(),
        "limits": images.model_dump(),
    }
    items = [_item(sample) for sample in samples]
    return encode(store, items, build_featuriser, arguments, ray, shard_rows=shard_rows)


def build_featuriser(path: str, features: dict[str, Any], limits: dict[str, Any]) -> Score:
    """For the workers: rows with prompt, answers (JSON) and picture to `h`, and whether the sample `fits`."""
    section = FeatureSection.model_validate(features)
    featuriser = Featuriser.from_pretrained(
        path,
        section.settings(),
        limits=ImageLimits(**limits),
        max_batch_tokens=section.max_batch_tokens,
    )

    def score(rows: list[Row]) -> list[Row]:
        prepared: list[list[Any]] = []
        for row in rows:
            answers, image = json.loads(row["answers"]), bytes(row["image"]) or None
            try:
                prepared.append(featuriser.prepare(row["prompt"], answers, image))
            except TooLongError:
                prepared.append([])
        fits = [bool(sample) for sample in prepared]
        found = iter(featuriser.features([sample for sample in prepared if sample]))
        # Of the type of a feature: Ray Data cannot join a batch in which nothing fits with others otherwise.
        nothing = np.zeros(featuriser.width, dtype=np.float32)
        return [{"h": next(found) if fit else nothing, "fits": fit} for fit in fits]

    return score


def _item(sample: Sample) -> Item:
    record = sample.record
    answers = json.dumps(record.responses)
    columns = {
        "id": record.id,
        "source": sample.source,
        "pair_hash": text_hash(record.prompt, *record.responses, sample.picture or ""),
    }
    row = {"prompt": record.prompt, "answers": answers, "image": sample.image or b""}
    return Item(columns, row, length=len(record.prompt) * len(record.responses) + len(answers))


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
