"""Requests and responses in the shapes of OpenAI's completions and chat completions, as far as they are served.

What a client may send but the model can't do is refused, so that no setting is silently without effect; fields that
change no token (`user`) are taken.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

# As in models/backbone/decoding.py, which imports torch; the gateway imports this module and needs none.
FinishReason = Literal["stop", "length"]
Stop = Annotated[str, Field(min_length=1, max_length=200)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class StreamOptions(_Request):
    """Goes with `stream`."""

    include_usage: bool = False
    """Send a last piece with the token counts."""


class Generation(_Request):
    """What requests for text have in common."""

    model: str
    """Name of the model, as `/v1/models` gives it."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """0 takes the likeliest token each time."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the likeliest tokens that together have this probability."""
    n: int = Field(default=1, ge=1, le=16)
    """How many continuations."""
    seed: int | None = Field(default=None, ge=0, lt=2**62)
    """The same seed and request give the same text."""
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    """Up to four texts that end a continuation; they are not part of it."""
    stream: bool = False
    """Send the text piece by piece as server-sent events."""
    stream_options: StreamOptions | None = None
    """Settings of the stream."""
    user: str | None = None
    """Taken and not used."""
    frequency_penalty: Literal[0] | None = None
    """Only 0: penalties are not supported."""
    presence_penalty: Literal[0] | None = None
    """Only 0: penalties are not supported."""

    @field_validator("frequency_penalty", "presence_penalty", mode="before")
    @classmethod
    def _zero_of_any_type(cls, value: Any) -> Any:
        return 0 if value == 0 and not isinstance(value, bool) else value

    @property
    def stops(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class CompletionRequest(Generation):
    """A text to continue."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "lisa", "prompt": "Once upon a time", "max_tokens": 32}]}
    )

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=16)]
    """A text, or several."""
    max_tokens: int | None = Field(default=None, ge=1)
    """New tokens at most; default: the most the server allows."""


class TextPart(_Request):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(_Request):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    """Who speaks; `developer` is another word for `system`."""
    content: str | list[TextPart]
    """What is said."""
    name: str | None = None
    """Taken and not used."""

    def plain(self) -> dict[str, str]:
        """For a chat template."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Generation):
    """A conversation to answer."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "lisa", "messages": [{"role": "user", "content": "Name a river in Peru."}]}
            ]
        }
    )

    messages: list[ChatMessage] = Field(min_length=1)
    """The conversation so far."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Older name of `max_completion_tokens`."""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """New tokens at most; default: the most the server allows."""


class _Answer(BaseModel):
    id: str
    """Of the request; the same in all pieces of a stream."""
    created: int
    """Unix time."""
    model: str
    """Name of the model that answered."""
    system_fingerprint: str
    """Changes with the weights."""


class Usage(BaseModel):
    """Tokens of a request; a prompt counts once, however many continuations it gets."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(BaseModel):
    """A token that could stand at a place."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The token that stands there, and the others."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log probabilities of an answer's tokens."""

    content: list[TokenLogprob]


class TextLogprobs(BaseModel):
    """Log probabilities of a continuation's tokens."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """A continuation, or a piece of one."""

    index: int
    text: str
    finish_reason: FinishReason | None
    logprobs: TextLogprobs | None = None


class Completion(_Answer):
    """Continuations of a text, or with `stream` a piece of them."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | None = None


class AssistantMessage(BaseModel):
    """An answer."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """An answer and why it ended."""

    index: int
    message: AssistantMessage
    finish_reason: FinishReason | None
    logprobs: ChatLogprobs | None = None


class ChatCompletion(_Answer):
    """Answers to a conversation."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """What is new in an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """A piece of an answer."""

    index: int
    delta: Delta
    finish_reason: FinishReason | None = None
    logprobs: None = None


class ChatCompletionChunk(_Answer):
    """A piece of the answers to a conversation."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChunkChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """A model that is served."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["eagleray"] = "eagleray"
    kind: str
    """Kind of model: gram, lisa, lrhp, nast or rovrm."""
    revision: str
    """Changes with the weights."""
    endpoints: list[str]
    """Paths that this model serves."""


class ModelList(BaseModel):
    """The models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
