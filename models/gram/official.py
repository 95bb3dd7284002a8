"""Rows of the official GRAM data files, which keep whole prompts as text in `instruction`, `input`, `output`.

Stage 2 rows hold a rendered judge prompt and the letter of the better answer, stage 1 rows a question and both
answers. Both are taken apart by their markers, whatever the wording of the judge instruction. Known faults of
the files are handled: stray chat tokens inside answers are removed, nothing is dropped for braces in a text, and
line breaks around markers that the official converter wrote as a backslash and an n are read as line breaks.
"""

from __future__ import annotations

import re
from typing import Any

from eagleray.models.gram.prompts import ANSWER_BORDER, ANSWERS_END, ANSWERS_START, QUESTION

_CHAT_TOKEN = re.compile(r"<\|[\w.-]{1,40}\|>")
# Only next to a marker, where a sound file has a real line break: an answer may well speak of "\n".
_WRITTEN_BREAKS = re.compile(
    rf"(?:\\n)*(?:{re.escape(QUESTION)}|\[The (?:Start|End) of Assistant [AB]'s Answer\])(?:\\n)*"
)


def labelled_row(values: dict[str, Any]) -> dict[str, Any]:
    """`prompt`, `response_a`, `response_b` and `label` (A or B) of a stage 2 row; other columns stay.

    Raises:
        ValueError: A field is missing, the markers are not there exactly once, or the label is neither A nor B.
    """
    label = _field(values, "output").strip()
    if label not in ("A", "B"):
        raise ValueError(f"`output` is {label[:20]!r}; a stage 2 row has A or B there")
    _, found, rest = _prompt_text(values).partition(f"{QUESTION}\n")
    if not found:
        raise ValueError(f"`instruction` has no line {QUESTION!r}")
    prompt, answers = _cut_once(rest, ANSWERS_START, "`instruction`")
    return {**_others(values), "prompt": _clean(prompt), **_answers(answers, "`instruction`"), "label": label}


def unlabelled_row(values: dict[str, Any]) -> dict[str, Any]:
    """`prompt`, `response_a` and `response_b` of a stage 1 row; other columns stay.

    Raises:
        ValueError: A field is missing, or the markers are not there exactly once.
    """
    text = _prompt_text(values)
    prompt = text.partition(f"{QUESTION}\n")[2] if text.startswith(f"{QUESTION}\n") else text
    before, answers = _cut_once(f"\n\n{_field(values, 'output').lstrip()}", ANSWERS_START, "`output`")
    if before.strip():
        raise ValueError("`output` has text before the first answer")
    return {**_others(values), "prompt": _clean(prompt.strip()), **_answers(answers, "`output`")}


def _prompt_text(values: dict[str, Any]) -> str:
    instruction, more = _field(values, "instruction"), values.get("input") or ""
    return f"{instruction}\n{more}" if more else instruction


def _answers(text: str, where: str) -> dict[str, str]:
    answer_a, rest = _cut_once(text, ANSWER_BORDER, where)
    answer_b, found, _ = rest.rpartition(ANSWERS_END)
    if not found:
        raise ValueError(f"{where} has no end of the second answer")
    return {"response_a": _clean(answer_a), "response_b": _clean(answer_b)}


def _cut_once(text: str, border: str, where: str) -> tuple[str, str]:
    count = text.count(border)
    if count != 1:
        raise ValueError(f"{where} has {count} times {border.strip().splitlines()[-1]!r}, not once")
    before, _, after = text.partition(border)
    return before, after


def _field(values: dict[str, Any], name: str) -> str:
    value = values.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"`{name}` is missing or empty")
    return _with_line_breaks(value)


def _with_line_breaks(text: str) -> str:
    fixed = _WRITTEN_BREAKS.sub(lambda marker: marker.group().replace("\\n", "\n"), text)
    # A stage 1 question ends with such breaks and no marker after them.
    return fixed if fixed == text else re.sub(r"(?:\\n)+\Z", "\n\n", fixed)


def _others(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in ("instruction", "input", "output")}


def _clean(text: str) -> str:
    return _CHAT_TOKEN.sub("", text)
