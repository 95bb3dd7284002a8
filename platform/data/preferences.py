"""Preference data: prompts with two answers, labelled or not, from the formats that people have.

Read here are TRL's preference format (plain and conversational, explicit and implicit prompt), hh-rlhf
transcripts, and two responses with a label column. A format that belongs to one paper, such as the
official GRAM rows, is not known here: the job turns its rows into one of these by `rewrite`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

from pydantic import BeforeValidator, Field

from eagleray.platform.config import Config
from eagleray.platform.data.layouts import Message, ParsedPair, RowProblem, kind_of, parse_pair, readable
from eagleray.platform.data.sources import (
    DataError,
    Row,
    SourceConfig,
    file_hashes,
    read_rows,
    resolve_source,
)

Label = bool | int | str
Rewrite = Callable[[dict[str, Any]], dict[str, Any]]
_EXAMPLES = 5
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # JSON can spell it, UTF-8 cannot


class Columns(Config):
    """What the columns of the user's file are called."""

    prompt: str | list[str] = "prompt"
    """Prompt; several columns (`[instruction, input]`) are joined by a newline, blank ones left out."""
    chosen: str = "chosen"
    """Better answer."""
    rejected: str = "rejected"
    """Worse answer."""
    response_a: str = "response_a"
    """First answer of a pair whose label, if any, is in a column of its own."""
    response_b: str = "response_b"
    """Second answer of such a pair."""
    label: str = "label"
    """Which of `response_a` and `response_b` is better, in the values of `label_first` and `label_second`."""
    id: str = "id"
    """Name of the row; without it one is made from the row's text."""
    margin: str = "margin"
    """By how much the chosen answer is better."""
    score_chosen: str = "score_chosen"
    """Score of the chosen answer; without a margin, the margin is the difference of the scores."""
    score_rejected: str = "score_rejected"
    """Score of the rejected answer."""


class PreferenceData(Config):
    """Pairs of answers to read, and what to do with rows that do not fit."""

    sources: list[SourceConfig] = Field(min_length=1)
    """Where the rows come from, in this order."""
    layout: Literal["auto", "trl", "hh", "responses"] = "auto"
    """`trl`: chosen and rejected; `hh`: the same as hh-rlhf transcripts; `responses`: response_a, response_b and
    label. `auto` tells them row by row, by the columns and the marks `Human:` and `Assistant:`."""
    columns: Columns = Columns()
    """Names of the columns, where they differ from the usual ones."""
    label_first: Label = "A"
    """Value of the label column that says the first response is better; upper and lower case count the same."""
    label_second: Label = "B"
    """Value of the label column that says the second response is better."""
    label_ties: tuple[Label, ...] = ("tie",)
    """Values of the label column that say neither is better."""
    drop_ties: bool = True
    """Leave out (and count) pairs with margin 0 or a tie as label: they do not say which answer is better. If
    kept, a tie has margin 0 and its answers in the order of the row."""
    on_error: Literal["raise", "skip"] = "raise"
    """At a row that does not fit: stop, or leave it out and count it by reason."""
    max_chars: int = Field(default=200_000, ge=1)
    """Longest prompt and longest answer, in characters; what is longer counts as an error."""

    def resolved(self, base: str | Path) -> PreferenceData:
        """The same data with local paths made absolute as seen from `base`; they must exist."""
        return self.model_copy(update={"sources": [resolve_source(source, base) for source in self.sources]})


def _in_a_list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


PreferenceMixture = Annotated[
    list[PreferenceData],
    BeforeValidator(_in_a_list, json_schema_input_type=PreferenceData | list[PreferenceData]),
    Field(min_length=1),
]
"""One `PreferenceData`, or a list of several whose files name their columns differently."""


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt with a better and a worse answer; `extra` holds the row's other columns."""

    id: str
    prompt: list[Message]
    chosen: str
    rejected: str
    margin: float | None
    extra: dict[str, Any]

    @property
    def prompt_text(self) -> str:
        """The prompt as one text; see `layouts.readable`."""
        return readable(self.prompt)


@dataclass(frozen=True, slots=True)
class ResponsePair:
    """A prompt with two answers, not known which is better; `extra` holds the other columns but no label."""

    id: str
    prompt: list[Message]
    response_a: str
    response_b: str
    extra: dict[str, Any]

    @property
    def prompt_text(self) -> str:
        """The prompt as one text; see `layouts.readable`."""
        return readable(self.prompt)


@dataclass
class ReadReport:
    """What became of the rows that were read."""

    read: int = 0
    kept: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    """Rows left out, by reason."""
    examples: list[str] = field(default_factory=list)
    """The first few messages about rows left out."""
    hashes: dict[str, str] = field(default_factory=dict)
    """sha256 of every file read, by its path."""

    def summary(self) -> str:
        """One line for the log."""
        by_count = sorted(self.skipped.items(), key=lambda item: -item[1])
        reasons = ", ".join(f"{reason}: {count}" for reason, count in by_count)
        left_out = f", left out {sum(self.skipped.values())} ({reasons})" if reasons else ""
        return f"read {self.read} rows, kept {self.kept}{left_out}"

    def leave_out(self, reason: str, example: str = "") -> None:
        """Count a row that is not used; the first few examples are kept."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        if example and len(self.examples) < _EXAMPLES:
            self.examples.append(example)


def load_preferences(
    data: PreferenceData | Sequence[PreferenceData], *, rewrite: Rewrite | None = None
) -> tuple[list[Preference], ReadReport]:
    """Read labelled pairs.

    Args:
        data: Sources and rules; several are read one after the other.
        rewrite: Turns the values of a row in a format of its own into one of the formats read here; a
            `ValueError` it raises counts as a fault of the row, with its message as the reason.

    Raises:
        DataError: A source cannot be read, a row does not fit (unless `on_error` is `skip`), or none is left.
    """
    return _load(data, rewrite, _to_preference)


def load_response_pairs(
    data: PreferenceData | Sequence[PreferenceData], *, rewrite: Rewrite | None = None
) -> tuple[list[ResponsePair], ReadReport]:
    """Read pairs without labels: response_a and response_b, or any preference row with its label dropped.

    Chosen and rejected are put in an order given by a hash of the row, so that the order tells nothing.
    Arguments and errors are those of `load_preferences`.
    """
    return _load(data, rewrite, _to_response_pair)


def read_candidates(
    rows: Iterable[Row | DataError], data: PreferenceData, report: ReadReport
) -> Iterator[ResponsePair]:
    """Pairs to be judged, one at a time: `response_a` and `response_b`, or chosen and rejected in this order.

    Unlike `load_response_pairs` it keeps the order of the row, holds no more than one row and does not look for
    ids that occur twice, so it serves files of any length.

    Args:
        rows: Rows of a source.
        data: Rules; its sources are not looked at.
        report: Counts what is read and left out.

    Raises:
        DataError: A row does not fit (unless `on_error` is `skip`).
    """
    yield from _read(rows, data, None, _to_candidates, report)


class _Pair(Protocol):
    @property
    def prompt_text(self) -> str: ...


_P = TypeVar("_P", bound=_Pair)
_T = TypeVar("_T", Preference, ResponsePair)


def split_by_prompt(pairs: Sequence[_P], *, fraction: float, seed: int = 0) -> tuple[list[_P], list[_P]]:
    """Hold out about `fraction` of the prompts, with all of their pairs: (rest, held out).

    A prompt falls by a hash of its text (case and punctuation aside), so the same prompt falls on the same
    side in every data set that is split with this seed, and adding rows moves none.

    Raises:
        ValueError: `fraction` is not in (0, 1), or one of the sides would be empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"`fraction` is {fraction}; it must lie between 0 and 1.")
    rest: list[_P] = []
    held_out: list[_P] = []
    for pair in pairs:
        (held_out if _prompt_position(pair.prompt_text, seed) < fraction else rest).append(pair)
    if not rest or not held_out:
        prompts = len({pair.prompt_text for pair in pairs})
        raise ValueError(
            f"Splitting {prompts} prompt(s) by `fraction` {fraction} and `seed` {seed} leaves one side empty. "
            "Use more data, another fraction or another seed."
        )
    return rest, held_out


def _prompt_position(prompt: str, seed: int) -> float:
    words = re.sub(r"\W+", " ", prompt.lower()).strip()
    digest = hashlib.sha256(f"{seed}:{words}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _load(
    data: PreferenceData | Sequence[PreferenceData],
    rewrite: Rewrite | None,
    build: Callable[[dict[str, Any], PreferenceData], _T | None],
) -> tuple[list[_T], ReadReport]:
    report = ReadReport()
    pairs: list[_T] = []
    taken: set[str] = set()
    for part in [data] if isinstance(data, PreferenceData) else data:
        before = len(pairs)
        for pair in _read_part(part, rewrite, build, report):
            pairs.append(replace(pair, id=_unique(pair.id, taken)))
        if len(pairs) == before:
            where = ", ".join(source.path for source in part.sources)
            example = "; for example ".join([report.summary(), *report.examples[:1]])
            raise DataError(where, "no row is left", example)
    report.kept = len(pairs)
    return pairs, report


def _read_part(
    data: PreferenceData,
    rewrite: Rewrite | None,
    build: Callable[[dict[str, Any], PreferenceData], _T | None],
    report: ReadReport,
) -> Iterator[_T]:
    for source in data.sources:
        report.hashes.update(file_hashes(source))
        yield from _read(read_rows(source), data, rewrite, build, report)


def _read(
    rows: Iterable[Row | DataError],
    data: PreferenceData,
    rewrite: Rewrite | None,
    build: Callable[[dict[str, Any], PreferenceData], _T | None],
    report: ReadReport,
) -> Iterator[_T]:
    for row in rows:
        report.read += 1
        try:
            if isinstance(row, DataError):
                raise row
            pair = build(_rewritten(row.values, rewrite), data)
        except (RowProblem, DataError) as problem:
            error = DataError(row.where, problem.reason, problem.detail)
            if data.on_error == "raise":
                raise error from None
            report.leave_out(error.reason, str(error))
            continue
        if pair is None:
            report.leave_out("tie")
        else:
            yield pair


def _rewritten(values: dict[str, Any], rewrite: Rewrite | None) -> dict[str, Any]:
    if rewrite is None:
        return values
    try:
        return rewrite(values)
    except RowProblem:
        raise
    except ValueError as error:
        raise RowProblem(str(error)) from error


def _to_preference(values: dict[str, Any], data: PreferenceData) -> Preference | None:
    columns = data.columns
    if _has_responses(values, data):
        label = _label(values, data)
        first, second = columns.response_a, columns.response_b
        if label == "second":
            first, second = second, first
        margin = 0.0 if label == "tie" else _margin(values, columns)
        used = {columns.response_a, columns.response_b, columns.label}
    else:
        first, second = columns.chosen, columns.rejected
        margin = _margin(values, columns)
        used = {columns.chosen, columns.rejected}
    pair = _checked(values, first, second, data)
    if margin == 0 and data.drop_ties:
        return None
    used |= {columns.margin}
    return Preference(_id(values, pair, columns), *pair, margin, _rest(values, columns, used))


def _to_response_pair(values: dict[str, Any], data: PreferenceData) -> ResponsePair:
    pair = _to_candidates(values, data)
    if _has_responses(values, data):
        return pair
    parsed = ParsedPair(pair.prompt, pair.response_a, pair.response_b)
    if int(_digest(parsed)[-1], 16) % 2 == 1:
        return replace(pair, response_a=pair.response_b, response_b=pair.response_a)
    return pair


def _to_candidates(values: dict[str, Any], data: PreferenceData) -> ResponsePair:
    columns = data.columns
    labels = {columns.label, columns.margin, columns.score_chosen, columns.score_rejected}
    responses = (columns.response_a, columns.response_b)
    first, second = responses if _has_responses(values, data) else (columns.chosen, columns.rejected)
    pair = _checked(values, first, second, data)
    rest = _rest(values, columns, {first, second, *labels})
    return ResponsePair(_id(values, pair, columns), *pair, rest)


def _has_responses(values: Mapping[str, Any], data: PreferenceData) -> bool:
    if data.layout != "auto":
        return data.layout == "responses"
    columns = data.columns
    given = {name for name, value in values.items() if value is not None}
    return {columns.response_a, columns.response_b} <= given and not {
        columns.chosen,
        columns.rejected,
    } & given


def _checked(values: dict[str, Any], first: str, second: str, data: PreferenceData) -> ParsedPair:
    transcripts = {"trl": False, "hh": True}.get(data.layout)
    pair = parse_pair(values, prompt=data.columns.prompt, first=first, second=second, transcripts=transcripts)
    prompt = data.columns.prompt if isinstance(data.columns.prompt, str) else "+".join(data.columns.prompt)
    asked = "".join(message["content"] for message in pair.prompt)
    for name, text in ((first, pair.first), (second, pair.second), (prompt, asked)):
        if not text:
            raise RowProblem(f"`{name}` is empty")
        if not text.strip():
            raise RowProblem(f"`{name}` holds only whitespace")
        if len(text) > data.max_chars:
            raise RowProblem(
                f"`{name}` is too long", f"{len(text)} characters; `max_chars` is {data.max_chars}"
            )
        if _HALF_CHARACTER.search(text):
            raise RowProblem(f"`{name}` holds half a character", r"a cut-off \ud83d-style escape")
    if pair.first.strip() == pair.second.strip():
        raise RowProblem(f"`{first}` and `{second}` are equal")
    return pair


def _label(values: Mapping[str, Any], data: PreferenceData) -> Literal["first", "second", "tie"]:
    name = data.columns.label
    if values.get(name) is None:
        raise RowProblem(f"`{name}` is missing", f"the row has {', '.join(values)}")
    given = _label_text(values[name])
    known: dict[str, Literal["first", "second", "tie"]] = {_label_text(tie): "tie" for tie in data.label_ties}
    known |= {_label_text(data.label_first): "first", _label_text(data.label_second): "second"}
    if given not in known:
        detail = f"given {values[name]!r}; set `label_first`, `label_second` and `label_ties` (now {', '.join(known)})"
        raise RowProblem(f"`{name}` holds a value that is not a label", detail)
    return known[given]


def _label_text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():  # a column of numbers with gaps comes as floats
        value = int(value)
    return str(value).strip().casefold()


def _margin(values: Mapping[str, Any], columns: Columns) -> float | None:
    if values.get(columns.margin) is not None:
        return _number(values, columns.margin)
    scores = (columns.score_chosen, columns.score_rejected)
    if all(values.get(score) is not None for score in scores):
        return _number(values, scores[0]) - _number(values, scores[1])
    return None


def _number(values: Mapping[str, Any], name: str) -> float:
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowProblem(f"`{name}` is {kind_of(value)}, not a number")
    if not math.isfinite(value):
        raise RowProblem(f"`{name}` is not a finite number", str(value))
    return float(value)


def _id(values: Mapping[str, Any], pair: ParsedPair, columns: Columns) -> str:
    given = values.get(columns.id)
    if given is None or given == "":
        return _digest(pair)[:16]
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise RowProblem(f"`{columns.id}` is {kind_of(given)}, not text or a whole number")
    return str(given)


def _digest(pair: ParsedPair) -> str:
    return hashlib.sha256(json.dumps(pair).encode()).hexdigest()


def _unique(name: str, taken: set[str]) -> str:
    """The name itself, or with `#2`, `#3`, ... where rows share one."""
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}#{count}"
    taken.add(candidate)
    return candidate


def _rest(values: dict[str, Any], columns: Columns, used: set[str]) -> dict[str, Any]:
    prompt = {columns.prompt} if isinstance(columns.prompt, str) else set(columns.prompt)
    used = used | prompt | {columns.id}
    return {name: value for name, value in values.items() if name not in used}
