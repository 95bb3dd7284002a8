"""Config sections of speech data, and the way from manifests to the example files that training reads."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator

from eagleray.models.nast.audio import SAMPLE_RATE, read_clips, to_pcm
from eagleray.models.nast.errors import SpeechDataError
from eagleray.models.nast.features import NYQUIST, frame_count
from eagleray.models.nast.frontend import Frontend
from eagleray.models.nast.layouts import Layout, read_layout
from eagleray.models.nast.manifest import (
    Utterance,
    check_utterance,
    clips_to_text,
    join_utterances,
    unique_ids,
)
from eagleray.models.nast.subsampler import subsampled_length
from eagleray.models.nast.synthetic import write_corpus
from eagleray.models.nast.vocabulary import Kind, Vocabulary, ctc_length, save_vocabularies
from eagleray.platform.config import Config as Section
from eagleray.platform.data.examples import write_examples

logger = logging.getLogger(__name__)

SUMMARY_FILE = "prepared.json"
_CACHED_AT_ONCE = 256
"""Utterances whose audio is in memory at a time."""
_SHOWN_ERRORS = 5
_PUNCTUATION = re.compile(r"[^\w\s']|_")


class SpeechSource(Section):
    """One data set, or a part of one."""

    path: str = Field(min_length=1)
    """Folder of a data set, or a table (`.tsv`, `.csv`); relative to `data.root`."""
    layout: Layout = "auto"
    """`mustc`, `easy` (MuST-C folders without YAML) or `table`; `auto` looks at the files."""
    split: str = "train"
    """Part of the data set, e.g. `train`, `dev`, `tst-COMMON`."""
    audio_dir: str | None = None
    """Folder that audio paths of a table are relative to; default: the table's. Relative to `data.root`."""
    where: dict[str, str] = Field(default={})
    """Only rows of a table whose columns have these values, e.g. `{kind: seq}`."""
    limit: int | None = Field(default=None, ge=1)
    """Only this many rows, from the start."""

    @model_validator(mode="after")
    def _only_tables_have_columns(self) -> SpeechSource:
        if self.where and self.layout in ("mustc", "easy"):
            raise ValueError(f"`where` is for tables; `layout` is {self.layout!r}")
        return self


class SyntheticSpeech(Section):
    """Generated recordings of numbers from 10 to 99, spoken digit by digit, with their German words."""

    utterances: int = Field(default=400, ge=4)
    """Recordings to train on; a fifth as many are made for evaluation."""
    seed: int = Field(default=0, ge=0)
    """Seed of the generator."""


class SpeechRules(Section):
    """How rows are read and which of them can be used."""

    root: str = "."
    """Folder that all paths are relative to."""
    source_language: str = "en"
    """Ending of the transcripts' file in the MuST-C and easy layouts."""
    target_language: str = "de"
    """Ending of the translations' file there."""
    source_text: Literal["raw", "lower", "plain"] = "raw"
    """Transcripts as they are, in lower case, or (`plain`) also without punctuation except the apostrophe."""
    min_seconds: float = Field(default=0.065, gt=0)
    """Shortest utterance; the default is five frames."""
    max_seconds: float = Field(default=30.0, gt=0)
    """Longest utterance."""
    on_error: Literal["raise", "skip"] = "raise"
    """At a row that cannot be used: stop, or leave it out and count it by reason."""

    @field_validator("root")
    @classmethod
    def _root_is_absolute(cls, root: str) -> str:
        # Ray's workers run in folders of their own.
        return str(Path(root).expanduser().absolute())

    def read(self, sources: Sequence[SpeechSource], *, need_target: bool = True) -> LoadedSpeech:
        """The rows of all sources that can be used.

        Raises:
            SpeechDataError: A row cannot be used and `on_error` is `raise`, or nothing is left.
        """
        loaded = self.usable(
            (row for source in sources for row in self._rows(source)), need_target=need_target
        )
        return replace(loaded, utterances=unique_ids(loaded.utterances))

    def usable(
        self, rows: Iterable[Utterance | SpeechDataError], *, need_target: bool = True
    ) -> LoadedSpeech:
        """Those rows that can be used; the headers of their audio files are read.

        Raises:
            SpeechDataError: A row cannot be used and `on_error` is `raise`, or nothing is left.
        """
        loaded = LoadedSpeech()
        for row in rows:
            self._take(row, loaded, need_target=need_target)
        if not loaded.utterances:
            raise SpeechDataError(self.root, "no row can be used", loaded.reasons() or "there is none")
        if loaded.skipped:
            logger.warning(
                "%d rows were left out: %s; e.g. %s",
                loaded.skipped.total(),
                loaded.reasons(),
                loaded.errors[0],
            )
        return loaded

    def _rows(self, source: SpeechSource) -> Iterator[Utterance | SpeechDataError]:
        rows = read_layout(
            Path(self.root, source.path),
            layout=source.layout,
            split=source.split,
            source_language=self.source_language,
            target_language=self.target_language,
            audio_dir=Path(self.root, source.audio_dir) if source.audio_dir else None,
            where=source.where,
        )
        return islice(rows, source.limit)

    def _take(self, row: Utterance | SpeechDataError, loaded: LoadedSpeech, *, need_target: bool) -> None:
        try:
            if isinstance(row, SpeechDataError):
                raise row
            limits = {"min_seconds": self.min_seconds, "max_seconds": self.max_seconds}
            seconds = check_utterance(row, **limits, need_target=need_target)
        except SpeechDataError as error:
            if self.on_error == "raise":
                hint = f"{error.detail}; " if error.detail else ""
                detail = f"{hint}`data.on_error: skip` leaves such rows out"
                raise SpeechDataError(error.where, error.reason, detail) from None
            loaded.skipped[error.reason] += 1
            loaded.errors.append(str(error))
            return
        loaded.utterances.append(replace(row, source=self._source(row.source)))
        loaded.seconds.append(seconds)

    def _source(self, text: str) -> str:
        if self.source_text == "raw":
            return text
        text = text.lower() if self.source_text == "lower" else _PUNCTUATION.sub(" ", text.lower())
        return " ".join(text.split())


class SpeechData(SpeechRules):
    """What a model is trained on and chosen by."""

    train: list[SpeechSource] = Field(default=[])
    """Training data."""
    eval: list[SpeechSource] = Field(default=[])
    """Data to choose the model by."""
    synthetic: SyntheticSpeech | None = None
    """Generated recordings in place of `train` and `eval`."""
    prepared: str | None = None
    """Folder of a run of `nast.prepare` in their place."""
    drop_infeasible: bool = False
    """Leave out training utterances whose target is longer than CTC allows; they are counted in any case."""
    joined: int = Field(default=0, ge=0)
    """Training utterances to add, each of two of one speaker in a row: longer ones, and words in other company."""
    join_pause: float = Field(default=0.3, ge=0, le=5)
    """Seconds of silence between the two."""
    cache: Literal["none", "audio", "features"] = "none"
    """What the example files keep, at 32 kB a second: decoded `audio` saves reading and resampling at every step;
    `features` also save computing them, and leave SpecAugment as the only augmentation."""

    @model_validator(mode="after")
    def _one_origin(self) -> SpeechData:
        given = [bool(self.train and self.eval), self.synthetic is not None, self.prepared is not None]
        if sum(given) != 1 or bool(self.train) != bool(self.eval):
            raise ValueError(
                "give either `data.train` and `data.eval`, or `data.synthetic`, or `data.prepared`"
            )
        if self.joined and self.prepared is not None:
            raise ValueError("`data.joined` is for `nast.prepare` where the data are `data.prepared`")
        return self

    def join(self, loaded: LoadedSpeech, seed: int) -> int:
        """Add the joined utterances to those loaded; how many."""
        rows, lengths = join_utterances(
            loaded.utterances,
            loaded.seconds,
            count=self.joined,
            pause=self.join_pause,
            max_seconds=self.max_seconds,
            seed=seed,
        )
        if len(rows) < self.joined:
            logger.warning(
                "%d of %d utterances were joined: few pairs are short enough.", len(rows), self.joined
            )
        loaded.utterances = unique_ids([*loaded.utterances, *rows])
        loaded.seconds += lengths
        return len(rows)


class VocabularySection(Section):
    """Pieces of transcripts and translations."""

    size: int = Field(default=10_000, ge=8)
    """Pieces, the four special symbols included (paper: 10,000); lowered if the text cannot fill it."""
    kind: Kind = "unigram"
    """`unigram` (paper), `bpe`, or `word` for a closed set of words."""
    joint: bool = True
    """One vocabulary for both languages (paper); the two CTC heads can then share their weights."""
    source_size: int = Field(default=5_000, ge=8)
    """Pieces of the transcripts' own vocabulary where it is not joint."""


class FrontendSection(Section):
    """From waveforms to features."""

    level: float | None = Field(default=None, gt=0, le=0.5)
    """Root mean square that every waveform is scaled to, e.g. 0.05 where recordings differ in loudness. Without it
    loudness matters in so far as `dither` and rounding are relatively stronger in quiet recordings."""
    dither: float = Field(default=0.0, ge=0, lt=0.1)
    """Standard deviation of noise added to every waveform, always the same; for audio with digital silence."""
    max_frequency: float = Field(default=NYQUIST, ge=2000, le=NYQUIST)
    """Upper end of the mel filters in Hz; 4000 for telephone speech."""

    def build(self) -> Frontend:
        """The front end with these settings."""
        return Frontend(**self.model_dump())


@dataclass
class LoadedSpeech:
    """Rows that can be used, how long they are, and what was left out."""

    utterances: list[Utterance] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)

    def reasons(self) -> str:
        """Why rows were left out, the most frequent reason first."""
        return "; ".join(f"{count} x {reason}" for reason, count in self.skipped.most_common())

    def summary(self) -> dict[str, Any]:
        """Counts for reports."""
        return {
            "utterances": len(self.utterances),
            "hours": round(sum(self.seconds) / 3600, 4),
            "skipped": dict(self.skipped),
            "errors": self.errors[:_SHOWN_ERRORS],
        }

    def content_hash(self) -> str:
        """sha256 over ids, places of the audio and texts."""
        digest = hashlib.sha256()
        for row in self.utterances:
            places = [(Path(c.path).name, c.offset, c.duration, c.pause) for c in row.clips]
            digest.update(json.dumps([row.id, places, row.source, row.target]).encode())
        return digest.hexdigest()


def prepare_examples(
    data: SpeechData,
    vocabulary: VocabularySection,
    frontend: Frontend,
    folder: Path,
    *,
    strides: tuple[int, ...],
    seed: int,
) -> dict[str, Any]:
    """Write examples, vocabularies and a summary into `folder`, or link those of a prepared run.

    Args:
        data: Which data, and its rules.
        vocabulary: Pieces to learn.
        frontend: For cached features.
        folder: Where to write.
        strides: Subsampling of the model, which decides how long a target may be.
        seed: Seed of the vocabulary's sample.

    Returns:
        The summary: counts of both parts, sizes of the vocabularies, hashes.
    """
    if data.prepared is not None:
        return _link_prepared(Path(data.prepared), frontend, folder)
    parts = {name: data.read(sources) for name, sources in _sources(data, folder).items()}
    target, source = _train_vocabularies(parts["train"], vocabulary, seed)
    joined = data.join(parts["train"], seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_vocabularies(folder, target, source)
    summary: dict[str, Any] = {
        "vocabulary": len(target),
        "source_vocabulary": len(source),
        "joined": joined,
    }
    for name, loaded in parts.items():
        counts = Counter[str]()
        drop = data.drop_infeasible and name == "train"
        rows = _rows(loaded, (target, source), strides, counts, drop=drop)
        if data.cache != "none":
            rows = _with_cache(rows, loaded, frontend if data.cache == "features" else None)
        write_examples(folder / f"{name}.arrow", rows)
        summary[name] = {**loaded.summary(), **counts, "sha256": loaded.content_hash()}
        _warn_of_infeasible(name, summary[name])
    summary["frontend"], summary["cached"] = frontend.settings(), data.cache
    (folder / SUMMARY_FILE).write_text(json.dumps(summary, indent=1, ensure_ascii=False), encoding="utf-8")
    return summary


def _sources(data: SpeechData, folder: Path) -> dict[str, list[SpeechSource]]:
    if data.synthetic is None:
        return {"train": data.train, "eval": data.eval}
    made, audio = data.synthetic, folder.absolute() / "audio"
    train = write_corpus(audio, utterances=made.utterances, seed=made.seed, split="train")
    dev = write_corpus(audio, utterances=max(2, made.utterances // 5), seed=made.seed, split="dev")
    return {"train": [SpeechSource(path=str(train))], "eval": [SpeechSource(path=str(dev))]}


def _train_vocabularies(
    loaded: LoadedSpeech, section: VocabularySection, seed: int
) -> tuple[Vocabulary, Vocabulary]:
    targets = [row.target for row in loaded.utterances]
    sources = [row.source for row in loaded.utterances]
    if section.joint or not any(sources):
        joint = Vocabulary.train([*sources, *targets], size=section.size, kind=section.kind, seed=seed)
        return joint, joint
    target = Vocabulary.train(targets, size=section.size, kind=section.kind, seed=seed)
    return target, Vocabulary.train(sources, size=section.source_size, kind=section.kind, seed=seed)


def _rows(
    loaded: LoadedSpeech,
    vocabularies: tuple[Vocabulary, Vocabulary],
    strides: tuple[int, ...],
    counts: Counter[str],
    *,
    drop: bool,
) -> Iterator[dict[str, Any]]:
    target, source = vocabularies
    counts.update(infeasible_targets=0, infeasible_sources=0, without_transcript=0)
    for row, seconds in zip(loaded.utterances, loaded.seconds, strict=True):
        source_ids, target_ids = source.encode(row.source), target.encode(row.target)
        frames = frame_count(round(seconds * SAMPLE_RATE))
        room = subsampled_length(frames, strides)
        infeasible = ctc_length(target_ids) > room
        counts.update(
            infeasible_targets=infeasible,
            infeasible_sources=ctc_length(source_ids) > room,
            without_transcript=not row.source,
        )
        if infeasible and drop:
            continue
        yield {
            "id": row.id,
            "length": frames,
            "clips": clips_to_text(row.clips),
            "source": row.source,
            "target": row.target,
            "source_ids": source_ids,
            "target_ids": target_ids,
        }


def _with_cache(
    rows: Iterator[dict[str, Any]], loaded: LoadedSpeech, frontend: Frontend | None
) -> Iterator[dict[str, Any]]:
    """Rows with features, or without a front end with 16-bit audio."""
    clips = {row.id: row.clips for row in loaded.utterances}

    def cached(row: dict[str, Any]) -> dict[str, Any]:
        waveform_N = read_clips(clips[row["id"]])
        if frontend is None:
            return {**row, "audio": to_pcm(waveform_N)}
        features_TF = frontend(waveform_N)
        return {**row, "length": len(features_TF), "features": features_TF.numpy().ravel()}

    # An utterance is too short for torch's threads to share; they would mostly wait for each other.
    with ThreadPoolExecutor(
        torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        while part := list(islice(rows, _CACHED_AT_ONCE)):
            yield from pool.map(cached, part)


def _warn_of_infeasible(name: str, counts: dict[str, Any]) -> None:
    count, total = counts["infeasible_targets"], counts["utterances"]
    if count:
        logger.warning(
            "%d of %d targets of the %s data are longer than CTC allows; they add nothing to the loss.",
            count,
            total,
            name,
        )


def _link_prepared(prepared: Path, frontend: Frontend, folder: Path) -> dict[str, Any]:
    origin = prepared / "data" if (prepared / "data").is_dir() else prepared
    if not (origin / SUMMARY_FILE).is_file():
        raise ValueError(
            f"`data.prepared` is {str(prepared)!r}; it holds no {SUMMARY_FILE}. Give the folder of a finished run of "
            "`nast.prepare`."
        )
    summary = json.loads((origin / SUMMARY_FILE).read_text(encoding="utf-8"))
    if summary["cached"] == "features" and summary["frontend"] != frontend.settings():
        raise ValueError(
            f"The features of {origin} were computed with {summary['frontend']}, the config has "
            f"{frontend.settings()}. Prepare them again, or take over the settings."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for file in origin.iterdir():
        if file.suffix in (".arrow", ".model", ".json"):
            try:
                os.link(file, folder / file.name)
            except OSError:  # another file system
                shutil.copy2(file, folder / file.name)
    return summary
