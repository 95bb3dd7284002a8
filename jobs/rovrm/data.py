"""Config sections and data loading that the jobs of RoVRM share.

Rows are read by the platform, understood by `models.rovrm.records`, and their pictures are decoded once here, so that
a broken one is found before training, with its row.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from eagleray.models.rovrm.images import ImageError, ImageLimits, ImageStore, decode_image
from eagleray.models.rovrm.records import Form, RecordError, VisualPreference, in_form, read_row
from eagleray.models.rovrm.synthetic import make_text, make_visual
from eagleray.platform.config import Config as Section
from eagleray.platform.data.preferences import PreferenceData, ReadReport, load_preferences
from eagleray.platform.data.sources import DataError, Row, SourceConfig, file_hashes, read_rows

logger = logging.getLogger(__name__)


class ImageSection(Section):
    """What pictures may be; beyond it a row does not fit."""

    max_bytes: int = Field(default=20 * 2**20, ge=1)
    """Largest file."""
    max_pixels: int = Field(default=2**25, ge=1)
    """Most pixels, read from the header before anything is decoded."""
    min_side: int = Field(default=4, ge=1)
    """Shortest side in pixels."""
    max_aspect: float = Field(default=20.0, ge=1)
    """Longer side over the shorter one."""

    def limits(self) -> ImageLimits:
        """The limits as the library takes them."""
        return ImageLimits(**self.model_dump())


class VisualSource(SourceConfig):
    """Rows of one origin and the pictures they name."""

    layout: Literal[
        "auto", "ranked", "official", "pairs", "choices", "vl_reward_bench", "verdicts", "text"
    ] = "auto"
    """How rows are read (docs/rovrm.md has the table). `text`: preference data without pictures in any format that the
    jobs of GRAM read, such as hh-rlhf transcripts."""
    images: str | None = None
    """Folder of the pictures, or a zip archive of them, which is read without being unpacked."""
    form: Form = "image"
    """What a phase sees: the picture (`image`), its `caption` as text in its place, or neither (`question`)."""
    label: str | None = None
    """Name of the source in tables. Default: the file's."""
    on_error: Literal["raise", "skip"] = "raise"
    """At a row or picture that does not fit: stop, or leave it out and count it by reason."""

    @field_validator("images")
    @classmethod
    def _images_are_absolute(cls, images: str | None) -> str | None:
        # Ray's workers run in folders of their own.
        return None if images is None else str(Path(images).expanduser().absolute())

    @property
    def shown(self) -> str:
        """Name in tables."""
        return self.label or Path(self.path).name


class SyntheticVisual(Section):
    """Generated samples: facts about coloured shapes, or counts in a list of words."""

    kind: Literal["visual", "caption", "text"] = "visual"
    """Facts with their picture, the same with the caption in its place, or text alone."""
    samples: int = Field(default=200, ge=10)
    """Training samples; a quarter as many are made for evaluation, on other pictures."""
    seed: int = Field(default=0, ge=0)
    """Seed of the generator."""


class VisualData(Section):
    """Samples to train a phase on, and samples to choose its model by."""

    train: list[VisualSource] = Field(default=[])
    """Training samples; several sources make a mixture."""
    synthetic: list[SyntheticVisual] = Field(default=[])
    """Generated samples, besides or in place of `train`."""
    eval: list[VisualSource] = Field(default=[])
    """Evaluation samples; default: `eval_fraction` of the training pictures (or prompts, where there is no picture)."""
    eval_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share that is held out if `eval` is not given."""
    held_out: list[VisualSource] = Field(default=[])
    """Further data, e.g. benchmarks, whose pictures no training sample may show or describe; such samples are left out."""
    limit: int | None = Field(default=None, ge=1)
    """Train on this many samples only, drawn by `train.seed`."""
    limit_each: int | None = Field(default=None, ge=1)
    """Train on this many samples of each source at most, drawn by `train.seed`: an equal mixture."""
    only: str | None = None
    """Train on the samples of a selection only: its `selected/NAME.jsonl`, or any JSONL file with the column `id`."""
    images: ImageSection = ImageSection()

    @field_validator("only")
    @classmethod
    def _only_is_absolute(cls, path: str | None) -> str | None:
        return None if path is None else str(Path(path).expanduser().absolute())

    @model_validator(mode="after")
    def _has_rows(self) -> VisualData:
        if not self.train and not self.synthetic:
            raise ValueError("give `data.train`, `data.synthetic` or both")
        return self


@dataclass(frozen=True)
class Sample:
    """A record with where it came from, and its picture."""

    record: VisualPreference
    source: str
    image: bytes | None = None

    @cached_property
    def picture(self) -> str | None:
        """Hash of the picture's file."""
        return None if self.image is None else hashlib.sha256(self.image).hexdigest()

    @property
    def cluster(self) -> str:
        """What may not lie on both sides of a split: the picture, also where only its caption is shown."""
        return self.record.image or self.record.origin or self.record.prompt


@dataclass
class Loaded:
    """Samples and what became of the rows they were read from."""

    samples: list[Sample]
    hashes: dict[str, str] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Parts:
    """Samples in two parts that share no picture."""

    train: list[Sample]
    eval: list[Sample]
    hashes: dict[str, str]
    counts: dict[str, Any]


def load_parts(data: VisualData, *, seed: int) -> Parts:
    """Training and evaluation samples of a phase.

    A training sample whose picture is also in the evaluation part or in `held_out` is left out and counted, whether it
    shows the picture or its caption.

    Raises:
        DataError: A source cannot be read, or a row or picture does not fit.
    """
    train = load_sources(data.train, data.images) if data.train else Loaded([])
    held_out = load_sources(data.eval, data.images) if data.eval else Loaded([])
    for made in data.synthetic:
        train.samples += generated(made, made.samples, "train")
        held_out.samples += generated(made, max(4, made.samples // 4), "dev") if not data.eval else []
    if not held_out.samples:
        train.samples, held_out.samples = _split(train.samples, data.eval_fraction, seed)
    counts: dict[str, Any] = {**train.counts, **{f"eval/{name}": v for name, v in held_out.counts.items()}}
    others = load_sources(data.held_out, data.images).samples if data.held_out else []
    kept = _without_leaks(train.samples, [*held_out.samples, *others])
    if len(kept) < len(train.samples):
        counts["in_evaluation"] = len(train.samples) - len(kept)
        logger.warning(
            "Left out %d sample(s) whose picture is in the evaluation data.", counts["in_evaluation"]
        )
    kept = _limited(kept, data, seed)
    hashes = train.hashes | held_out.hashes
    if data.only is not None:
        kept = _only(kept, data.only)
        hashes |= file_hashes(SourceConfig(path=data.only))
    return Parts(kept, held_out.samples, hashes, counts)


def load_sources(sources: Sequence[VisualSource], images: ImageSection) -> Loaded:
    """Samples of several sources, in order, with their pictures.

    Raises:
        DataError: A source cannot be read, a row or picture does not fit (unless `on_error` is `skip`), an id occurs
            twice, or nothing is left.
    """
    loaded = Loaded([])
    ids: set[str] = set()
    for source in sources:
        report = ReadReport(hashes=file_hashes(source) if source.layout != "text" else {})
        before = len(loaded.samples)
        for sample in _read_source(source, images, report, ids):
            loaded.samples.append(sample)
        report.kept = len(loaded.samples) - before
        if not report.kept:
            raise DataError(
                source.path, "no row is left", "; for example ".join([report.summary(), *report.examples[:1]])
            )
        logger.info("%s: %s.", source.shown, report.summary())
        loaded.hashes |= report.hashes
        loaded.counts[source.shown] = {
            "read": report.read,
            "kept": report.kept,
            "skipped": dict(report.skipped),
            "examples": report.examples,
        }
    return loaded


def _read_source(
    source: VisualSource, images: ImageSection, report: ReadReport, ids: set[str]
) -> Iterator[Sample]:
    if source.layout == "text":
        yield from _read_text(source, report, ids)
        return
    store = _store(source, images)
    checked: dict[str, bytes] = {}
    for row in read_rows(source):
        report.read += 1
        where = row.where
        try:
            if isinstance(row, DataError):
                raise row
            samples = []
            for record in read_row(row.values, source.layout):
                record = in_form(record, source.form)
                if record.id in ids:
                    raise RecordError("the id occurs twice", record.id)
                samples.append(Sample(record, source.shown, _picture(record, store, images, checked)))
        except (RecordError, ImageError, DataError) as problem:
            name = "" if isinstance(problem, DataError) else f"row {row.values.get('id')!r}: "  # type: ignore[union-attr]
            error = DataError(where, problem.reason, f"{name}{problem.detail}".removesuffix(": "))
            if source.on_error == "raise":
                raise error from None
            report.leave_out(error.reason, str(error))
            continue
        ids.update(sample.record.id for sample in samples)
        yield from samples


def _picture(
    record: VisualPreference, store: ImageStore | None, images: ImageSection, checked: dict[str, bytes]
) -> bytes | None:
    if record.image is None:
        return None
    if store is None:
        raise RecordError("the row has an image and its source no `images`", "name the folder or zip archive")
    if record.image not in checked:
        content = store.read(record.image)
        try:
            decode_image(content, images.limits())
        except ImageError as error:
            raise ImageError(error.reason, f"{record.image}: {error.detail}") from None
        checked[record.image] = content
    return checked[record.image]  # one object, however many rows show it


def _read_text(source: VisualSource, report: ReadReport, ids: set[str]) -> Iterator[Sample]:
    plain = SourceConfig.model_validate({name: getattr(source, name) for name in SourceConfig.model_fields})
    pairs, read = load_preferences(PreferenceData(sources=[plain], on_error=source.on_error))
    report.read, report.skipped, report.examples, report.hashes = (
        read.read,
        read.skipped,
        read.examples,
        read.hashes,
    )
    for pair in pairs:
        if pair.id in ids:
            raise DataError(source.path, "the id occurs twice", pair.id)
        ids.add(pair.id)
        yield Sample(VisualPreference(pair.id, pair.prompt_text, (pair.chosen, pair.rejected)), source.shown)


def _store(source: VisualSource, images: ImageSection) -> ImageStore | None:
    if source.images is None:
        return None
    try:
        return ImageStore(source.images, images.limits())
    except ImageError as error:
        raise DataError(source.images, error.reason) from None


def generated(made: SyntheticVisual, count: int, split: str) -> list[Sample]:
    """Generated samples with their pictures; parts share none."""
    label = f"generated {made.kind}"
    if made.kind == "text":
        return [Sample(read_row(row)[0], label) for row in make_text(count, made.seed, split=split)]
    rows, files = make_visual(count, made.seed, split=split)
    records = [read_row(row)[0] for row in rows]
    if made.kind == "caption":
        return [Sample(in_form(record, "caption"), label) for record in records]
    return [Sample(record, label, files[record.image or ""]) for record in records]


def _split(samples: list[Sample], fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    rest, held_out = [], []
    for sample in samples:
        (held_out if _position(sample.cluster, seed) < fraction else rest).append(sample)
    if not rest or not held_out:
        raise ValueError(
            f"Holding out `data.eval_fraction` {fraction} of {len({s.cluster for s in samples})} picture(s) or prompt(s) "
            "leaves one side empty. Give `data.eval`, or another fraction."
        )
    return rest, held_out


def _limited(samples: list[Sample], data: VisualData, seed: int) -> list[Sample]:
    if data.limit is None and data.limit_each is None:
        return samples
    kept: list[Sample] = []
    taken: Counter[str] = Counter()
    for sample in sorted(samples, key=lambda s: _position(s.record.id, seed)):
        taken[sample.source] += 1
        if data.limit_each is None or taken[sample.source] <= data.limit_each:
            kept.append(sample)
    return kept[: data.limit]


def _only(samples: list[Sample], path: str) -> list[Sample]:
    """The samples that a selection names, in their order.

    Raises:
        DataError: It names samples that are not there, or none.
    """
    rows = [row for row in read_rows(SourceConfig(path=path)) if isinstance(row, Row)]
    ids = {str(row.values.get("id")) for row in rows}
    kept = [sample for sample in samples if sample.record.id in ids]
    if missing := sorted(ids - {sample.record.id for sample in kept}):
        raise DataError(
            path,
            f"{len(missing)} of {len(ids)} selected samples are not in the data",
            f"for example {', '.join(missing[:3])}; give the data that was selected from",
        )
    return kept


def _without_leaks(train: list[Sample], held_out: list[Sample]) -> list[Sample]:
    names = {name for s in held_out for name in (s.record.image, s.record.origin) if name}
    pictures = {s.picture for s in held_out if s.image is not None}
    return [
        s
        for s in train
        if not ({s.record.image, s.record.origin} & names or (s.image is not None and s.picture in pictures))
    ]


def _position(key: str, seed: int) -> float:
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") / 2**64
