"""Requests and responses of the serving endpoints; one place for their names, limits and examples.

A request carries texts and choices, never a path or an address: nothing on the server's side is named by a client.
Field docstrings are the descriptions in the OpenAPI document.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag

from eagleray.platform.data.layouts import readable


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _example(request: dict[str, Any]) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [request]})


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty or only white space; write some text")
    return text


def _prompt_kind(value: Any) -> str:
    return "(messages)" if isinstance(value, list) else "(text)"


Text = Annotated[str, Field(json_schema_extra={"minLength": 1, "pattern": r"\S"}), AfterValidator(_not_blank)]


class Message(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    """Who speaks."""
    content: Text
    """What is said."""


Prompt = Annotated[
    Annotated[Text, Tag("(text)")] | Annotated[list[Message], Field(min_length=1), Tag("(messages)")],
    Discriminator(_prompt_kind),
]


def prompt_text(prompt: str | list[Message]) -> str:
    """A prompt as one text, as the data readers make it, so that it counts online as it does offline."""
    if isinstance(prompt, str):
        return prompt
    return readable([{"role": message.role, "content": message.content} for message in prompt])


RankMethod = Literal["reference", "linear", "bracket", "round_robin"]


class _ForModel(_Strict):
    model: str | None = None
    """Which model is asked; needed only if several serve this endpoint (`/v1/models` lists them)."""


class CompareRequest(_ForModel):
    """Two answers to one prompt."""

    model_config = _example(
        {"prompt": "Name a river in Peru.", "a": "The Ucayali.", "b": "Probably the Nile."}
    )

    prompt: Prompt
    """What was asked: a text, or the messages of a conversation."""
    a: Text
    """The first answer."""
    b: Text
    """The second answer."""


class RankRequest(_ForModel):
    """Several answers to one prompt."""

    model_config = _example(
        {"prompt": "Name a river in Peru.", "responses": ["Probably the Nile.", "The Ucayali.", "Lima."]}
    )

    prompt: Prompt
    """What was asked: a text, or the messages of a conversation."""
    responses: list[Text] = Field(min_length=2)
    """The answers to put in order."""
    method: RankMethod = "round_robin"
    """Which pairs are compared. `round_robin`: every pair, n(n-1)/2 comparisons. `bracket` and `linear`: n-1 comparisons
    that settle the first place only. `reference`: each answer against `reference`."""
    reference: Text | None = None
    """The answer to measure against; goes with method `reference` only."""


class RewardRequest(_ForModel):
    """One answer, measured against another."""

    model_config = _example(
        {"prompt": "Name a river in Peru.", "response": "The Ucayali.", "reference": "Probably the Nile."}
    )

    prompt: Prompt
    """What was asked: a text, or the messages of a conversation."""
    response: Text
    """The answer that is rewarded."""
    reference: Text
    """The answer it is measured against, e.g. the policy's greedy one."""


class _FromModel(_Strict):
    model: str
    """Name of the model that answered."""
    revision: str
    """Changes with the weights and the judging settings: equal revisions give equal scores."""


class CompareResponse(_FromModel):
    """Which of two answers is better, read in both orders."""

    p_a: float = Field(ge=0, le=1)
    """Probability that `a` is better, both orders taken together."""
    p_b: float = Field(ge=0, le=1)
    """Probability that `b` is better: 1 - p_a."""
    p_order1: float = Field(ge=0, le=1)
    """Probability that `a` is better, read with `a` shown first."""
    p_order2: float = Field(ge=0, le=1)
    """Probability that `a` is better, read with `b` shown first."""
    consistent: bool
    """Whether both orders prefer the same answer."""


class RankResponse(_FromModel):
    """An order of the answers; numbers are positions in `responses`, from 0."""

    order: list[int]
    """Positions from the best answer to the worst; beyond the first place a guess for `bracket` and `linear`."""
    best: int
    """Position of the best answer."""
    scores: list[float] | None
    """Of each answer, in the order of `responses`: the probability to beat the reference, or the mean probability to beat
    another answer (`round_robin`). Null for `bracket` and `linear`."""
    comparisons: int
    """How many pairs were compared."""
    intransitive: bool | None
    """Whether the comparisons run in a circle (a beats b, b beats c, c beats a); null if too few were made to tell."""


class RewardResponse(_FromModel):
    """The reward of one answer against another, in three scales."""

    probability: float = Field(ge=0, le=1)
    """Probability r that the response is better than the reference; 0.5 is parity."""
    centred: float = Field(ge=-1, le=1)
    """2r - 1."""
    logit: float
    """log(r / (1 - r)), cut to [-5, 5]."""
    consistent: bool
    """Whether both orders prefer the same answer."""


class ScoreRequest(_ForModel):
    """Answers to one prompt, about a picture or without one."""

    model_config = _example(
        {
            "prompt": "How many cups are there?",
            "responses": ["Two.", "Five."],
            "image": "data:image/png;base64,...",
        }
    )

    prompt: Text
    """What was asked, without an image marker."""
    responses: list[Text] = Field(min_length=1)
    """The answers to score."""
    image: str | None = None
    """The picture's file in base64, plain or as a data URL. Files and addresses are not read from here; send the file
    itself as `multipart/form-data` if base64 is in the way."""


class ScoreResponse(_FromModel):
    """Rewards of the answers; only differences between answers to one prompt mean something."""

    scores: list[float]
    """Of each answer, in the order of `responses`."""
    best: int
    """Position of the highest; the first of several."""
    image_size: list[int] | None
    """Width and height of the picture that was scored; null without one."""


class ScoreHealthResponse(_FromModel):
    """The model is loaded and takes requests."""

    status: Literal["ready"] = "ready"
    pending_answers: int = Field(ge=0)
    """Answers admitted by this replica and not finished."""


class Piece(_Strict):
    """A stretch of the recording that was translated by itself."""

    start: float
    """Its start in seconds."""
    end: float
    """Its end in seconds."""
    text: str
    """Its translation."""
    transcript: str
    """What was heard, in the source language."""


class TranslateResponse(_FromModel):
    """The translation of a recording."""

    text: str
    """The translation; empty if nothing was heard."""
    transcript: str
    """What was heard, in the source language; empty if the model writes none."""
    seconds: float
    """Length of the recording."""
    pieces: list[Piece]
    """The stretches that a long recording was cut into, at its silences; their texts, joined, are `text`."""


class SpeechHealthResponse(_FromModel):
    """The model is loaded and takes requests."""

    status: Literal["ready"] = "ready"
    pending_pieces: int = Field(ge=0)
    """Pieces of recordings admitted by this replica and not finished."""


class TextHealthResponse(_FromModel):
    """The model is loaded and takes requests."""

    status: Literal["ready"] = "ready"
    pending_continuations: int = Field(ge=0)
    """Continuations admitted by this replica and not finished."""


class HealthResponse(_FromModel):
    """The model is loaded and takes requests."""

    status: Literal["ready"] = "ready"
    pending_comparisons: int = Field(ge=0)
    """Comparisons admitted by this replica and not finished."""


RepresentOrder = Literal["canonical", "both", "diff"]

_PAIR_EXAMPLE = {
    "prompt": "Name a river in Peru.",
    "chosen": "The Ucayali.",
    "rejected": "Probably the Nile.",
}


class MarginRequest(_ForModel):
    """A preference pair."""

    model_config = _example(_PAIR_EXAMPLE)

    prompt: Prompt
    """What was asked: a text, or the messages of a conversation."""
    chosen: Text
    """The better answer."""
    rejected: Text
    """The worse answer."""


class RepresentRequest(MarginRequest):
    """A preference pair, and how it is to be read."""

    model_config = _example(_PAIR_EXAMPLE | {"order": "canonical"})

    order: RepresentOrder = "canonical"
    """`canonical`: the chosen answer first; `both`: the mean over the two orders; `diff`: their difference."""


class RepresentResponse(_FromModel):
    """The representation of a pair."""

    h: list[float]
    """The hidden state at the pair's special token, not normalised."""
    u: float
    """Logit that the chosen answer is better; antisymmetric over both orders for `both` and `diff`."""
    p: float = Field(ge=0, le=1)
    """Probability that the chosen answer is better."""
    truncated: bool
    """Whether the texts were too long and have been cut."""


class MarginResponse(_FromModel):
    """How much better the chosen answer is."""

    margin: float = Field(ge=0, le=1)
    """Predicted margin as a share of the largest there can be."""
    truncated: bool
    """Whether the texts were too long and have been cut."""


class PairHealthResponse(_FromModel):
    """The model is loaded and takes requests."""

    status: Literal["ready"] = "ready"
    pending_pairs: int = Field(ge=0)
    """Pairs admitted by this replica and not finished."""
    margins: bool
    """Whether `/margin` is served."""


class ModelHealth(BaseModel):
    """One model of the gateway: its name, kind and revision, and how many of its items are pending."""

    model_config = ConfigDict(extra="allow")

    model: str
    kind: str
    revision: str
    status: Literal["ready"]


class GatewayHealthResponse(_Strict):
    """Every model is loaded and takes requests."""

    status: Literal["ready"] = "ready"
    models: list[ModelHealth]


class Problem(_Strict):
    """One thing that is wrong with a request."""

    field: str
    """Where: a dotted path in the body, e.g. `responses.2`."""
    problem: str
    """What is wrong and what is allowed."""


class Error(_Strict):
    """What went wrong, for a program (`code`) and for a person (`message`)."""

    code: str
    message: str
    problems: list[Problem] = []


class ErrorResponse(_Strict):
    """The body of every answer that is not a success."""

    error: Error
