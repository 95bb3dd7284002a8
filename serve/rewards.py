"""The shapes in which other programs ask for rewards: vLLM's score, Jina's and Cohere's rerank, OpenRLHF's remote reward.

One function of the model stands behind all of them: `Scorer`, answers to a prompt in, one number each out. A pairwise
judge gives the probability to beat `reference`, or without one the mean probability to beat the other answers to the
same prompt; a model with a reward of its own for each answer gives that reward.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

from fastapi import FastAPI
from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from eagleray.serve.http_app import ERROR_RESPONSES, check_model, invalid
from eagleray.serve.protocol import Text

Texts = Annotated[list[Text], Field(min_length=1)]


@dataclass(frozen=True)
class Group:
    """Answers to one prompt, and what they are measured against."""

    prompt: str
    answers: Sequence[str]
    reference: str | None = None


@dataclass(frozen=True)
class Scores:
    """A number for each answer of each group, and the tokens that were computed for them."""

    values: list[list[float]]
    tokens: int


class Scorer(Protocol):
    """What a model does."""

    async def __call__(self, groups: Sequence[Group], /) -> Scores: ...


class _Request(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, populate_by_name=True
    )

    model: str | None = None
    """Name of the model, as `/v1/models` gives it."""
    user: str | None = None
    """Taken and not used."""


class ScoreTextsRequest(_Request):
    """vLLM's score: prompts and answers. One prompt goes with all answers, else there is one for each."""

    text_1: Text | Texts = Field(validation_alias=AliasChoices("text_1", "queries", "data_1"))
    """The prompt, or one for each answer; also `queries` or `data_1`."""
    text_2: Text | Texts = Field(validation_alias=AliasChoices("text_2", "documents", "items", "data_2"))
    """The answers; also `documents`, `items` or `data_2`."""
    reference: Text | None = None
    """The answer to measure against, for a pairwise judge (not part of vLLM's request)."""


class RerankDocument(BaseModel):
    """An answer as an object."""

    text: Text


class RerankRequest(_Request):
    """Jina's and Cohere's rerank: a prompt and the answers to put in order."""

    query: Text
    """The prompt."""
    documents: Annotated[list[Text | RerankDocument], Field(min_length=1)]
    """The answers."""
    top_n: int | None = Field(default=None, ge=1)
    """How many to give back; default: all."""
    return_documents: bool | None = None
    """Whether the texts come back; default: yes, except at `/v2/rerank`."""
    max_tokens_per_doc: int | None = None
    """Taken and not used: the model's own settings say how long a text may be."""


class RewardsRequest(BaseModel):
    """OpenRLHF's remote reward."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: str | None = None
    """Name of the model; OpenRLHF sends none, so put it into the address: `/get_reward?model=NAME`."""
    query: Texts
    """Prompts with their answers behind them."""
    prompts: list[str] = []
    """The prompts alone."""
    labels: list[str | None] = []
    """Reference answers for a pairwise judge; empty ones mean none."""


class Tokens(BaseModel):
    """Tokens that were computed; a prompt that several answers share may count once."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int


class ScoreData(BaseModel):
    """One answer's score."""

    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreTextsResponse(BaseModel):
    """Scores in the order of the answers."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[ScoreData]
    usage: Tokens


class RerankResult(BaseModel):
    """One answer in its place."""

    index: int
    relevance_score: float
    document: RerankDocument | None = None


class RerankResponse(BaseModel):
    """The answers from the best to the worst."""

    id: str
    model: str
    results: list[RerankResult]
    usage: Tokens
    meta: dict[str, dict[str, str | int]]


class RewardsResponse(BaseModel):
    """In the order of `query`."""

    rewards: list[float]
    """Of each answer, for training."""
    scores: list[float]
    """The same between 0 and 1, for filtering."""
    extra_logs: dict[str, list[float]]
    """Empty."""


def add_reward_routes(app: FastAPI, score: Scorer, *, name: str) -> None:
    """Give a model's application these endpoints.

    Args:
        app: The application.
        score: The model.
        name: Its name.
    """

    @app.post("/v1/score", responses=ERROR_RESPONSES, summary="Scores of answers, in vLLM's shape")
    async def score_texts(request: ScoreTextsRequest) -> ScoreTextsResponse:
        check_model(request.model, name)
        answers = _listed(request.text_2)
        prompts = _listed(request.text_1)
        if len(prompts) not in (1, len(answers)):
            raise invalid(
                "text_1", f"has {len(prompts)} items; 1 or {len(answers)}, as `text_2`, are allowed"
            )
        prompts = prompts * len(answers) if len(prompts) == 1 else prompts
        found = await _by_prompt(score, prompts, answers, [request.reference] * len(answers))
        return ScoreTextsResponse(
            id=f"score-{secrets.token_hex(12)}",
            created=int(time.time()),
            model=name,
            data=[ScoreData(index=i, score=value) for i, value in enumerate(found.values[0])],
            usage=_tokens(found),
        )

    async def reranked(request: RerankRequest, *, texts: bool) -> RerankResponse:
        check_model(request.model, name)
        answers = [d if isinstance(d, str) else d.text for d in request.documents]
        found = await score([Group(request.query, answers)])
        [values] = found.values
        order = sorted(range(len(answers)), key=lambda i: -values[i])[: request.top_n]
        texts = texts if request.return_documents is None else request.return_documents
        return RerankResponse(
            id=f"rerank-{secrets.token_hex(12)}",
            model=name,
            results=[
                RerankResult(
                    index=i,
                    relevance_score=values[i],
                    document=RerankDocument(text=answers[i]) if texts else None,
                )
                for i in order
            ],
            usage=_tokens(found),
            meta={"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
        )

    shape: dict = {"responses": ERROR_RESPONSES, "response_model_exclude_none": True}

    @app.post("/rerank", summary="Answers in order, in Jina's shape", **shape)
    @app.post("/v1/rerank", summary="Answers in order, in Jina's and Cohere's shape", **shape)
    async def rerank(request: RerankRequest) -> RerankResponse:
        return await reranked(request, texts=True)

    @app.post("/v2/rerank", summary="Answers in order, in Cohere's shape", **shape)
    async def rerank_v2(request: RerankRequest) -> RerankResponse:
        return await reranked(request, texts=False)

    @app.post("/get_reward", responses=ERROR_RESPONSES, summary="Rewards, as OpenRLHF asks for them")
    async def get_reward(request: RewardsRequest) -> RewardsResponse:
        check_model(request.model, name)
        answers = _answers(request)
        labels = [label or None for label in request.labels] or [None] * len(answers)
        rewards = (await _by_prompt(score, request.prompts, answers, labels)).values[0]
        bounded = all(0 <= reward <= 1 for reward in rewards)
        return RewardsResponse(
            rewards=rewards,
            scores=rewards if bounded else [1 / (1 + math.exp(-max(r, -700))) for r in rewards],
            extra_logs={},
        )


def _answers(request: RewardsRequest) -> list[str]:
    """What stands behind the prompt in each query."""
    for field, values in (("prompts", request.prompts), ("labels", request.labels or request.query)):
        if len(values) != len(request.query):
            raise invalid(field, f"has {len(values)} items; {len(request.query)}, as `query`, are needed")
    answers: list[str] = []
    for i, (query, prompt) in enumerate(zip(request.query, request.prompts, strict=True)):
        if not query.startswith(prompt):
            raise invalid(f"query.{i}", "does not begin with its prompt, so the answer cannot be told")
        answers.append(query[len(prompt) :])
        if not answers[-1].strip() or not prompt.strip():
            raise invalid(f"query.{i}", "has an empty prompt or answer; write some text")
    return answers


async def _by_prompt(
    score: Scorer, prompts: Sequence[str], answers: Sequence[str], references: Sequence[str | None]
) -> Scores:
    """Scores as one list in the order of `answers`; those with one prompt and reference are scored together."""
    rows: dict[tuple[str, str | None], list[int]] = {}
    for i, key in enumerate(zip(prompts, references, strict=True)):
        rows.setdefault(key, []).append(i)
    groups = [
        Group(prompt, [answers[i] for i in members], reference)
        for (prompt, reference), members in rows.items()
    ]
    found = await score(groups)
    values = [0.0] * len(answers)
    for members, scores in zip(rows.values(), found.values, strict=True):
        for i, value in zip(members, scores, strict=True):
            values[i] = value
    return Scores([values], found.tokens)


def _listed(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


def _tokens(found: Scores) -> Tokens:
    return Tokens(prompt_tokens=found.tokens, total_tokens=found.tokens)
