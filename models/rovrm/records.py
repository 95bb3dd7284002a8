"""Rows of visual preference data, in the layouts that people have, as one kind of record.

A record is a prompt with its answers, the best first, and perhaps the name of a picture or its caption. The layouts
are told apart by their columns:

| layout | columns |
| --- | --- |
| `ranked` | ours: `prompt`, `responses` (best first), `image`, `caption`, `origin` |
| `official` | the released code's: `conversations` of one human turn and the ranked answers, `image` |
| `pairs` | `prompt`, `chosen`, `rejected`, `image`, `caption` (NLVR facts and statements, RLAIF-V files) |
| `choices` | `question`, `choices`, `answer`, `image` (ScienceQA): the right choice against each wrong one |
| `vl_reward_bench` | `query`, `response` (two), `human_ranking` (0 is the better one), `image` (VL-RewardBench) |
| `verdicts` | the same with `model_answers`: the right answer of a model against the wrong one of another |

Texts are kept as they are. Only the image marker is taken off, as a whole and from the ends of a prompt: where it goes
is the template's business.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

IMAGE_MARKER = "<image>"
Form = Literal["image", "caption", "question"]


class RecordError(ValueError):
    """A row that does not fit; `reason` is the same for every row with the same fault, the rest is in `detail`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return self.reason + (f": {self.detail}" if self.detail else "")


@dataclass(frozen=True, slots=True)
class VisualPreference:
    """A prompt with its answers, best first."""

    id: str
    prompt: str
    responses: tuple[str, ...]
    image: str | None = None
    """Name of the picture in its folder or archive."""
    caption: str | None = None
    """What the picture shows, in words."""
    origin: str | None = None
    """Name or id of the visual sample that a caption sample was made from."""
    group: str = ""
    """Kind of the sample, where the data says one; figures are also given by group."""


def read_row(values: Mapping[str, Any], layout: str = "auto") -> list[VisualPreference]:
    """The records of one row; a row of a multiple-choice question gives one for each wrong choice.

    Raises:
        RecordError: The row does not fit its layout, or contradicts itself.
        ValueError: There is no such layout.
    """
    if layout == "auto":
        layout = _layout_of(values)
    if layout not in LAYOUTS:
        raise ValueError(f"`layout` is {layout!r}; it must be auto or one of {', '.join(LAYOUTS)}.")
    return [_checked(record) for record in LAYOUTS[layout](values)]


def in_form(record: VisualPreference, form: Form) -> VisualPreference:
    """The record as a phase or a baseline shows it.

    `image` leaves it as it is; `caption` puts the caption, as text, in the place of the picture (phase 2);
    `question` leaves the picture out, which makes a picture-blind baseline.

    Raises:
        RecordError: There is no caption to show.
    """
    if form == "image":
        return record
    prompt, origin = record.prompt, record.origin or record.image
    if form == "caption":
        if not record.caption:
            raise RecordError("`caption` is missing", "a caption takes the place of the picture")
        prompt = caption_prompt(record.caption, record.prompt)
    # Another form is another sample: a mixture may hold both.
    name = f"{record.id}#{form}" if record.image else record.id
    return VisualPreference(name, prompt, record.responses, None, record.caption, origin, record.group)


def caption_prompt(caption: str, prompt: str) -> str:
    """A question about a picture that a caption stands for."""
    return f"Image description: {caption}\nQuestion: {prompt}"


def without_marker(prompt: str, *, has_image: bool) -> str:
    """A prompt without its image marker, which may stand at one of its ends, on a line of its own or not.

    Raises:
        RecordError: There are several markers, or one without a picture, or one inside the text.
    """
    count = prompt.count(IMAGE_MARKER)
    if count > 1:
        raise RecordError("more than one image", f"the prompt holds {IMAGE_MARKER} {count} times")
    if count and not has_image:
        raise RecordError("an image marker without an image", f"the prompt holds {IMAGE_MARKER}")
    for start, end in (
        (f"{IMAGE_MARKER}\n", ""),
        (IMAGE_MARKER, ""),
        ("", f"\n{IMAGE_MARKER}"),
        ("", IMAGE_MARKER),
    ):
        if count and prompt.startswith(start) and prompt.endswith(end):
            return prompt.removeprefix(start).removesuffix(end)
    if count:
        raise RecordError(
            "the image marker stands inside the prompt", "put it at the start, or leave it away"
        )
    return prompt


def _ranked(values: Mapping[str, Any]) -> list[VisualPreference]:
    responses = values.get("responses")
    if not isinstance(responses, list):
        raise RecordError("`responses` is missing or not a list", f"the row has {', '.join(values)}")
    image = _image(values)
    prompt = without_marker(_text(values, "prompt"), has_image=image is not None)
    answers = tuple(_as_text(answer, f"responses.{i}") for i, answer in enumerate(responses))
    return [VisualPreference(_id(values), prompt, answers, image, *_extras(values))]


def _official(values: Mapping[str, Any]) -> list[VisualPreference]:
    turns = values.get("conversations")
    if not isinstance(turns, list) or [_field(turn, "from") for turn in turns] != ["human", "gpt"]:
        raise RecordError("`conversations` must be one turn of `human` and one of `gpt`")
    answers = _field(turns[1], "value")
    if not isinstance(answers, list):
        raise RecordError(
            "the value of `gpt` is not a list of answers, best first",
            "a single answer is data for a policy, not for a reward model",
        )
    image = _image(values)
    prompt = without_marker(
        _as_text(_field(turns[0], "value"), "conversations.0.value"), has_image=image is not None
    )
    texts = tuple(_as_text(answer, f"conversations.1.value.{i}") for i, answer in enumerate(answers))
    return [VisualPreference(_id(values), prompt, texts, image, *_extras(values))]


def _pairs(values: Mapping[str, Any]) -> list[VisualPreference]:
    image = _image(values)
    prompt = without_marker(_text(values, "prompt"), has_image=image is not None)
    answers = (_text(values, "chosen"), _text(values, "rejected"))
    return [VisualPreference(_id(values), prompt, answers, image, *_extras(values))]


def _choices(values: Mapping[str, Any]) -> list[VisualPreference]:
    choices, answer = values.get("choices"), values.get("answer")
    if not isinstance(choices, list) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise RecordError("`answer` must be a position in `choices`", f"it is {answer!r}")
    texts = [_as_text(choice, f"choices.{i}") for i, choice in enumerate(choices)]
    return [
        VisualPreference(
            f"{_id(values)}-c{i}", _question(values), (texts[answer], text), _image(values), *_extras(values)
        )
        for i, text in enumerate(texts)
        if i != answer
    ]


def _verdicts(values: Mapping[str, Any]) -> list[VisualPreference]:
    answers = values.get("model_answers")
    if not isinstance(answers, list):
        raise RecordError("`model_answers` is missing or not a list", f"the row has {', '.join(values)}")
    by_verdict: dict[bool, list[str]] = {True: [], False: []}
    for i, answer in enumerate(answers):
        text = _as_text(_field(answer, "text"), f"model_answers.{i}.text")
        by_verdict[bool(_field(answer, "correct"))].append(text)
    lettered = "\n".join(
        f"({letter}) {choice}"
        for letter, choice in zip(string.ascii_uppercase, values["choices"], strict=False)
    )
    prompt = f"{_question(values)}\n{lettered}"
    pairs = [(right, wrong) for right in by_verdict[True] for wrong in by_verdict[False]]
    return [
        VisualPreference(f"{_id(values)}-m{i}", prompt, pair, _image(values), *_extras(values))
        for i, pair in enumerate(pairs)
    ]


def _vl_reward_bench(values: Mapping[str, Any]) -> list[VisualPreference]:
    responses, ranking = values.get("response"), values.get("human_ranking")
    if not isinstance(responses, list) or not isinstance(ranking, list) or len(responses) != len(ranking):
        raise RecordError(
            "`response` and `human_ranking` must be lists of one length", f"the row has {', '.join(values)}"
        )
    if sorted(ranking) != list(range(len(ranking))):
        raise RecordError("`human_ranking` is no ranking", f"it is {ranking}")
    image = _image(values)
    prompt = without_marker(_text(values, "query"), has_image=image is not None)
    answers = [_as_text(answer, f"response.{i}") for i, answer in enumerate(responses)]
    ranked = tuple(answer for _, answer in sorted(zip(ranking, answers, strict=True)))
    caption, origin, group = _extras(values)
    return [VisualPreference(_id(values), prompt, ranked, image, caption, origin, group or _vl_group(values))]


def _vl_group(values: Mapping[str, Any]) -> str:
    """Part of VL-RewardBench that a row belongs to, by the start of its id."""
    start = _id(values).replace("-", "_").partition("_")[0].lower()
    parts = {"rlaif": "hallucination", "rlhf": "hallucination", "povid": "hallucination"}
    return parts.get(start, "reasoning" if start in ("mathverse", "mmmu") else "general")


LAYOUTS: dict[str, Callable[[Mapping[str, Any]], list[VisualPreference]]] = {
    "ranked": _ranked,
    "official": _official,
    "pairs": _pairs,
    "choices": _choices,
    "vl_reward_bench": _vl_reward_bench,
    "verdicts": _verdicts,
}
"""Name of a layout -> how a row is read."""


def _layout_of(values: Mapping[str, Any]) -> str:
    for column, layout in (
        ("conversations", "official"),
        ("responses", "ranked"),
        ("chosen", "pairs"),
        ("choices", "choices"),
        ("human_ranking", "vl_reward_bench"),
    ):
        if values.get(column) is not None:
            return layout
    raise RecordError(
        "the row has no answers",
        f"its columns are {', '.join(values) or 'none'}; see the layouts in docs/rovrm.md",
    )


def _checked(record: VisualPreference) -> VisualPreference:
    if len(record.responses) < 2:
        raise RecordError("fewer than two answers", f"it has {len(record.responses)}; a ranking needs two")
    for name, text in (("prompt", record.prompt), *(("answer", text) for text in record.responses)):
        if not text.strip():
            raise RecordError(f"an empty {name}")
        if IMAGE_MARKER in text and name == "answer":
            raise RecordError("an image marker in an answer")
    if len({text.strip() for text in record.responses}) < len(record.responses):
        raise RecordError("two of the answers are equal")
    return record


def _question(values: Mapping[str, Any]) -> str:
    hint = values.get("hint")
    question = without_marker(_text(values, "question"), has_image=_image(values) is not None)
    return f"{question}\n{hint}" if isinstance(hint, str) and hint.strip() else question


def _image(values: Mapping[str, Any]) -> str | None:
    image = values.get("image")
    if isinstance(image, list):
        if len(image) > 1:
            raise RecordError("more than one image", f"`image` lists {len(image)}")
        image = image[0] if image else None
    if image is None or image == "":
        return None
    if not isinstance(image, str):
        raise RecordError("`image` is not the name of a file", f"it is a {type(image).__name__}")
    path = PurePosixPath(image.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        raise RecordError("`image` leads out of the folder of images", repr(image))
    return str(path)


def _extras(values: Mapping[str, Any]) -> tuple[str | None, str | None, str]:
    """Caption, origin and group."""
    caption, origin = values.get("caption"), values.get("origin")
    group = values.get("kind") or values.get("group") or ""
    return (None if caption is None else str(caption), None if origin is None else str(origin), str(group))


def _id(values: Mapping[str, Any]) -> str:
    if values.get("id") is None or not str(values["id"]).strip():
        raise RecordError("`id` is missing", "rows are named by it in every message and table")
    return str(values["id"])


def _text(values: Mapping[str, Any], name: str) -> str:
    return _as_text(values.get(name), name)


def _as_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        given = "missing" if value is None else f"a {type(value).__name__}"
        raise RecordError(f"`{name.rpartition('.')[0] or name}` is not text", f"`{name}` is {given}")
    return value


def _field(turn: Any, name: str) -> Any:
    return turn.get(name) if isinstance(turn, dict) else None
