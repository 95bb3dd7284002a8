"""A judge as a language model for clients that know nothing else: one label token and its log probabilities.

The text to send is the judge's own prompt (`JudgeTemplate.render`): instruction, request, and both answers between their
markers. It is read back into the pair and judged as any other, so the probabilities are those of `/compare`, of the one
order that the prompt shows: `p_order1`. Log probabilities are over the two label tokens, which add up to one.
"""

from __future__ import annotations

import math
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, field_validator

from eagleray.models.gram.judge import Comparison, Pair
from eagleray.models.gram.prompts import JudgeTemplate
from eagleray.serve.http_app import ERROR_RESPONSES, check_model, invalid
from eagleray.serve.openai import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    Completion,
    CompletionChoice,
    Generation,
    TextLogprobs,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from eagleray.serve.protocol import Text
from eagleray.serve.rewards import Tokens

Judging = Callable[[Sequence[Pair]], Awaitable[tuple[list[Comparison], int]]]
"""Pairs in; their comparisons and the tokens computed."""


class _Verdict(Generation):
    """One token is written, whatever the client allows."""

    stream: bool = False
    """Only false: an answer is one token."""
    max_tokens: int | None = Field(default=None, ge=1)
    """At least 1."""

    @field_validator("stream")
    @classmethod
    def _whole(cls, stream: bool) -> bool:
        if stream:
            raise ValueError("must be false for a judge, whose answer is one token")
        return stream


class JudgeChatRequest(_Verdict):
    """A judge's prompt as the last message."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=1)
    """One message of the user: the judge's prompt."""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """At least 1."""
    logprobs: bool | None = None
    """Give log probabilities."""
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    """Of how many tokens; there are two labels."""


class JudgeCompletionRequest(_Verdict):
    """Judge's prompts to continue by a label."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=16)]
    """A judge's prompt, or several."""
    logprobs: int | None = Field(default=None, ge=0, le=20)
    """Of how many tokens; there are two labels."""


class ClassifyRequest(BaseModel):
    """vLLM's classification: texts to give a class each."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: str | None = None
    """Name of the model."""
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=256)]
    """A judge's prompt, or several."""
    user: str | None = None
    """Taken and not used."""


class ClassifyData(BaseModel):
    """One text's class."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyResponse(BaseModel):
    """Classes in the order of `input`."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[ClassifyData]
    usage: Tokens


def add_judge_routes(
    app: FastAPI,
    judge: Judging,
    *,
    template: JudgeTemplate,
    labels: tuple[str, str],
    name: str,
    revision: str,
) -> None:
    """Give a judge's application these endpoints.

    Args:
        app: The application.
        judge: Compares pairs.
        template: How its prompts are written.
        labels: What it writes if the first, or the second, answer is better.
        name: Name of the model.
        revision: Its revision.
    """

    def pair(text: str, field: str) -> Pair:
        try:
            return template.parse(text)
        except ValueError as error:
            # The template's own text names markers and counts, and nothing of the user.
            raise invalid(field, f"is not a prompt of this judge: {error}") from None

    def head(kind: str) -> dict[str, Any]:
        now = int(time.time())
        return {
            "id": f"{kind}-{secrets.token_hex(12)}",
            "created": now,
            "model": name,
            "system_fingerprint": revision,
        }

    @app.post("/v1/chat/completions", responses=ERROR_RESPONSES, summary="A verdict as one label token")
    async def chat(request: JudgeChatRequest) -> ChatCompletion:
        check_model(request.model, name)
        [result], tokens = await judge([pair(request.messages[0].plain()["content"], "messages.0.content")])
        shown = _logprobs(result, labels)
        choices = [
            ChatChoice(
                index=i,
                message=AssistantMessage(content=label),
                finish_reason="stop",
                logprobs=_chat_logprobs(label, shown, request.top_logprobs or 0)
                if request.logprobs
                else None,
            )
            for i, label in enumerate(_drawn(shown, request, 0))
        ]
        return ChatCompletion(**head("chatcmpl"), choices=choices, usage=_usage(tokens, len(choices)))

    @app.post("/v1/completions", responses=ERROR_RESPONSES, summary="Verdicts as one label token each")
    async def complete(request: JudgeCompletionRequest) -> Completion:
        check_model(request.model, name)
        texts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        results, tokens = await judge([pair(text, "prompt") for text in texts])
        choices: list[CompletionChoice] = []
        for number, (text, result) in enumerate(zip(texts, results, strict=True)):
            shown = _logprobs(result, labels)
            for label in _drawn(shown, request, number):
                logprobs = (
                    None
                    if request.logprobs is None
                    else _text_logprobs(label, shown, request.logprobs, len(text))
                )
                choices.append(
                    CompletionChoice(index=len(choices), text=label, finish_reason="stop", logprobs=logprobs)
                )
        return Completion(**head("cmpl"), choices=choices, usage=_usage(tokens, len(choices)))

    @app.post("/classify", responses=ERROR_RESPONSES, summary="Verdicts as classes, in vLLM's shape")
    async def classify(request: ClassifyRequest) -> ClassifyResponse:
        check_model(request.model, name)
        texts = [request.input] if isinstance(request.input, str) else request.input
        results, tokens = await judge([pair(text, "input") for text in texts])
        data = [
            ClassifyData(
                index=i,
                label=labels[result.p_order1 < 0.5],
                probs=[result.p_order1, 1 - result.p_order1],
                num_classes=2,
            )
            for i, result in enumerate(results)
        ]
        usage = Tokens(prompt_tokens=tokens, total_tokens=tokens)
        return ClassifyResponse(
            id=f"classify-{secrets.token_hex(12)}",
            created=int(time.time()),
            model=name,
            data=data,
            usage=usage,
        )


def _logprobs(result: Comparison, labels: tuple[str, str]) -> dict[str, float]:
    """Log probability of each label, the likelier one first; from the margin, which does not round to 0 or 1."""
    values = {labels[0]: -_softplus(-result.delta1), labels[1]: -_softplus(result.delta1)}
    return dict(sorted(values.items(), key=lambda item: -item[1]))


def _drawn(logprobs: dict[str, float], request: Generation, number: int) -> list[str]:
    """`n` labels: the likelier one at temperature 0, else drawn."""
    (best, first), (other, second) = logprobs.items()
    if request.temperature == 0:
        return [best] * request.n
    chance = 1 / (1 + math.exp(max(-700.0, (second - first) / request.temperature)))
    if chance >= request.top_p:
        return [best] * request.n
    seed = secrets.randbits(62) if request.seed is None else request.seed
    draw = random.Random(f"{seed}:{number}")
    return [best if draw.random() < chance else other for _ in range(request.n)]


def _chat_logprobs(label: str, logprobs: dict[str, float], top: int) -> ChatLogprobs:
    alternatives = [
        TopLogprob(token=token, logprob=value, bytes=list(token.encode()))
        for token, value in list(logprobs.items())[:top]
    ]
    return ChatLogprobs(
        content=[
            TokenLogprob(
                token=label,
                logprob=logprobs[label],
                bytes=list(label.encode()),
                top_logprobs=alternatives,
            )
        ]
    )


def _text_logprobs(label: str, logprobs: dict[str, float], top: int, offset: int) -> TextLogprobs:
    return TextLogprobs(
        tokens=[label],
        token_logprobs=[logprobs[label]],
        top_logprobs=[dict(list(logprobs.items())[:top])],
        text_offset=[offset],
    )


def _usage(read: int, written: int) -> Usage:
    return Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


def _softplus(value: float) -> float:
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))
