"""Readers of the layouts that speech translation data comes in: MuST-C, its easy form without YAML, and tables.

A fault in one row is handed on as a `SpeechDataError` in the stream, so that the caller decides whether to stop or
to count it; a fault that shifts rows against each other (a text file with another number of lines) is raised.

Tables are tab-separated with a header row, no quoting and a backslash as escape, or CSV. Columns go by their usual
names (`_NAMES`); the audio column may be a path, `path:first_frame:frames`, clips as JSON (as `nast.distill` writes them), or, with a column `gaps`, several
recordings to be joined with that many samples of silence after each.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import yaml

from eagleray.models.nast.audio import AUDIO_SUFFIXES, Clip, probe
from eagleray.models.nast.errors import SpeechDataError
from eagleray.models.nast.manifest import Utterance, clips_from_text

Layout = Literal["auto", "mustc", "easy", "table"]
Rows = Iterator[Utterance | SpeechDataError]

_TABLE_SUFFIXES = (".tsv", ".csv")
_NAMES = {
    "id": ("id", "utt_id", "name"),
    "audio": ("audio", "wavs", "wav", "path", "file", "file_name", "filename", "audio_filepath"),
    "offset": ("offset", "start"),
    "duration": ("duration",),
    "source": ("src_text", "source", "transcript", "sentence", "text"),
    "target": ("tgt_text", "target", "translation"),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "gaps": ("gaps",),
}
"""What each field is called in the tables that people have; the first name found wins."""


def read_layout(
    path: Path,
    *,
    layout: Layout = "auto",
    split: str = "train",
    source_language: str = "en",
    target_language: str = "de",
    audio_dir: Path | None = None,
    where: Mapping[str, str] | None = None,
) -> Rows:
    """Utterances of a data set in file order.

    Args:
        path: Folder of a data set, or a table.
        layout: What it is; `auto` looks at the files.
        split: Part of the data set; of a folder with tables, the table `<split>.tsv` or `<split>.csv`.
        source_language: Ending of the transcripts' file.
        target_language: Ending of the translations' file.
        audio_dir: Where relative audio paths of a table start; default: the table's folder.
        where: Only rows of a table whose columns have these values.

    Raises:
        SpeechDataError: Nothing there fits, or rows would shift.
    """
    if layout == "table" or (layout == "auto" and path.is_file()):
        return read_table(_table_of(path, split), audio_dir=audio_dir, where=where)
    if not path.is_dir():
        raise SpeechDataError(str(path), "there is no such file or folder")
    root = _split_folder(path, split)
    if layout == "mustc" or (layout == "auto" and (root / "txt" / f"{split}.yaml").is_file()):
        return _read_mustc(root, split, source_language, target_language)
    if layout == "easy" or (layout == "auto" and (root / "txt" / f"{split}.audio").is_file()):
        return _read_easy(root, split, source_language, target_language)
    return read_table(_table_of(path, split), audio_dir=audio_dir, where=where)


def read_table(path: Path, *, audio_dir: Path | None = None, where: Mapping[str, str] | None = None) -> Rows:
    """Utterances of a TSV or CSV table; with `where`, of the rows whose columns have these values.

    Raises:
        SpeechDataError: The file is missing or not UTF-8, or has no column of audio or of `where`.
    """
    text = _read_text(path)
    dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "escapechar": "\\"}
    reader = csv.DictReader(io.StringIO(text, newline=""), **({} if path.suffix == ".csv" else dialect))
    header = reader.fieldnames or []
    columns = {
        field: next((name for name in names if name in header), None) for field, names in _NAMES.items()
    }
    if columns["audio"] is None:
        raise SpeechDataError(
            f"{path}:1",
            "the table has no column of audio",
            f"it has {', '.join(header) or 'nothing'}; name it one of {', '.join(_NAMES['audio'])}",
        )
    if missing := [name for name in where or {} if name not in header]:
        raise SpeechDataError(
            f"{path}:1", f"the table has no column {missing[0]!r}", f"it has {', '.join(header)}"
        )
    return _table_rows(reader, path, columns, audio_dir or path.parent, where or {})


def _table_rows(
    reader: csv.DictReader[str],
    path: Path,
    columns: Mapping[str, str | None],
    audio_dir: Path,
    wanted: Mapping[str, str],
) -> Rows:
    for number, row in enumerate(reader, start=1):
        where = f"{path}:{reader.line_num}"
        if row.get(None) or None in row.values():  # type: ignore[call-overload]
            yield SpeechDataError(where, "the row has another number of fields than the header")
            continue
        if any(row[name] != value for name, value in wanted.items()):
            continue
        fields = {field: row[name].strip() if name else "" for field, name in columns.items()}
        try:
            clips = _clips(fields, audio_dir, where)
        except SpeechDataError as error:
            yield error
            continue
        yield Utterance(
            id=fields["id"] or f"{path.stem}_{number}",
            clips=clips,
            source=fields["source"],
            target=fields["target"],
            speaker=fields["speaker"],
            where=where,
        )


def _clips(fields: Mapping[str, str], audio_dir: Path, where: str) -> tuple[Clip, ...]:
    if not fields["audio"]:
        raise SpeechDataError(where, "the audio column is empty")
    if fields["gaps"]:
        paths, gaps = fields["audio"].split(), fields["gaps"].split(",")
        if len(paths) != len(gaps):
            detail = f"{len(paths)} recordings, {len(gaps)} gaps"
            raise SpeechDataError(where, "recordings and gaps differ in number", detail)
        counts = [_number(gap, "gaps", where) for gap in gaps]
        return tuple(
            Clip(path, pause=count / _rate(path, where) if count else 0.0)
            for path, count in zip((str(audio_dir / p) for p in paths), counts, strict=True)
        )
    if fields["audio"].startswith("[{"):
        return clips_from_text(fields["audio"])
    path, span = _split_span(fields["audio"])
    full = str(audio_dir / path)
    if span is not None:
        rate = _rate(full, where)
        return (Clip(full, span[0] / rate, span[1] / rate),)
    offset = _number(fields["offset"], "offset", where) if fields["offset"] else 0.0
    duration = _number(fields["duration"], "duration", where) if fields["duration"] else None
    return (Clip(full, offset, duration),)


def _split_span(audio: str) -> tuple[str, tuple[int, int] | None]:
    """`talk.wav:16000:8000` as path, first frame and frames; other paths as they are."""
    path, *span = audio.rsplit(":", 2)
    if len(span) == 2 and span[0].isdigit() and span[1].isdigit():
        return path, (int(span[0]), int(span[1]))
    return audio, None


def _rate(path: str, where: str) -> int:
    try:
        return probe(path).sample_rate
    except SpeechDataError as error:
        raise SpeechDataError(where, error.reason, error.where) from None


def _number(text: str, name: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e7:
        raise SpeechDataError(where, f"`{name}` is not a time or a count", repr(text[:40]))
    return value


def _table_of(path: Path, split: str) -> Path:
    if path.is_file():
        return path
    tables = (
        [file for file in sorted(path.glob("*")) if file.suffix in _TABLE_SUFFIXES] if path.is_dir() else []
    )
    named = [file for file in tables if file.stem in (split, "metadata")] or (
        tables if len(tables) == 1 else []
    )
    if not named:
        found = ", ".join(file.name for file in sorted(path.glob("*"))[:8]) if path.is_dir() else "nothing"
        raise SpeechDataError(
            str(path),
            f"no table of the split {split!r}, and no MuST-C folders",
            f"there is {found or 'nothing'}",
        )
    return named[0]


def _split_folder(path: Path, split: str) -> Path:
    """The folder with `wav/` and `txt/` of a split: `data/SPLIT`, `SPLIT`, or the folder itself."""
    candidates = (path / "data" / split, path / split, path)
    return next((folder for folder in candidates if (folder / "txt").is_dir()), path)


def _read_mustc(root: Path, split: str, source_language: str, target_language: str) -> Rows:
    table = root / "txt" / f"{split}.yaml"
    try:
        # A training split has a quarter of a million segments: the C parser is ten times as fast.
        segments = yaml.load(_read_text(table), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise SpeechDataError(str(table), "not readable YAML", str(error).replace("\n", " ")) from None
    if not isinstance(segments, list):
        raise SpeechDataError(str(table), "not a list of segments")
    texts = _parallel_texts(root, split, (source_language, target_language), len(segments), table)
    rows: list[tuple[_Segment, str, str]] = []
    for number, (values, source, target) in enumerate(zip(segments, *texts, strict=True), start=1):
        try:
            rows.append((_segment(values, f"{table}: segment {number}"), source, target))
        except SpeechDataError as error:
            yield error
    for wav, group in groupby(rows, key=lambda row: row[0].wav):
        ordered = sorted(group, key=lambda row: row[0].offset)
        for index, (segment, source, target) in enumerate(ordered):
            yield Utterance(
                id=f"{split}_{Path(wav).stem}_{index}",
                clips=(Clip(str(root / "wav" / wav), segment.offset, segment.duration),),
                source=source,
                target=target,
                speaker=segment.speaker,
                where=segment.where,
            )


@dataclass(frozen=True)
class _Segment:
    wav: str
    offset: float
    duration: float
    speaker: str
    where: str


def _segment(values: Any, where: str) -> _Segment:
    if not isinstance(values, dict) or not isinstance(values.get("wav"), str):
        raise SpeechDataError(where, "the segment needs `wav`, `offset` and `duration`")
    offset, duration = (_number(str(values.get(name)), name, where) for name in ("offset", "duration"))
    return _Segment(values["wav"], offset, duration, str(values.get("speaker_id", "")), where)


def _read_easy(root: Path, split: str, source_language: str, target_language: str) -> Rows:
    table = root / "txt" / f"{split}.audio"
    stems = _lines(table)
    texts = _parallel_texts(root, split, (source_language, target_language), len(stems), table)
    for number, (stem, source, target) in enumerate(zip(stems, *texts, strict=True), start=1):
        where = f"{table}:{number}"
        files = [root / "wav" / f"{stem.strip()}{suffix}" for suffix in ("", *AUDIO_SUFFIXES)]
        found = next((file for file in files if file.is_file()), files[1])
        yield Utterance(f"{split}_{stem.strip()}", (Clip(str(found)),), source, target, where=where)


def _parallel_texts(
    root: Path, split: str, languages: tuple[str, str], count: int, table: Path
) -> tuple[list[str], list[str]]:
    """Transcripts (empty ones where there is no file) and translations, one line a segment."""
    texts = []
    for language in languages:
        file = root / "txt" / f"{split}.{language}"
        if not file.is_file():
            there = sorted(
                f.suffix[1:] for f in file.parent.glob(f"{split}.*") if f.suffix not in (".yaml", ".audio")
            )
            detail = f"there is {', '.join(there) or 'none'}; set `source_language` and `target_language`"
            raise SpeechDataError(str(file), f"no text in the language {language!r}", detail)
        lines = _lines(file)
        if len(lines) != count:
            raise SpeechDataError(
                str(file),
                "the text has another number of lines than there are segments",
                f"{len(lines)}, {count} in {table}",
            )
        texts.append(lines)
    return texts[0], texts[1]


def _lines(path: Path) -> list[str]:
    # Not splitlines(): U+2028 and its like are characters of a text here, not ends of a segment.
    lines = _read_text(path).replace("\r\n", "\n").split("\n")
    return [line.strip() for line in (lines[:-1] if lines[-1] == "" else lines)]


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise SpeechDataError(str(path), "there is no such file")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + error.object[: error.start].count(b"\n")
        raise SpeechDataError(f"{path}:{line}", "not UTF-8 text", "convert the file to UTF-8") from None
