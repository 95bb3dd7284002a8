"""A language model, with or without shared attention scores, in the shapes of OpenAI's API.

`/v1/completions`, `/v1/chat/completions` (both streaming on request) and `/healthz`, for the `openai`
client and whatever else speaks to it. Requests are decoded together with continuous batching (`DecodingLoop`): they join
between two steps and leave when they end, and none changes the text of another.

`eagleray serve lisa=MODEL` starts it.
"""

# No postponed annotations here: Ray Serve looks at the annotation of `build_app` itself to learn the type of its
# arguments, and passes the YAML on unchecked when it finds a string.

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from jinja2 import TemplateError
from pydantic import BaseModel, Field
from ray.serve import Application
from starlette.responses import Response
from transformers import AutoModelForCausalLM, AutoTokenizer

import eagleray.models.lisa.model  # noqa: F401 - registers the architectures
from eagleray.models.backbone.decoding import Continuation, ContinuousDecoder, FinishReason
from eagleray.models.backbone.streaming import TextStream
from eagleray.platform.serving import ServedModel, model_folder, model_revision
from eagleray.serve.batching import BatcherClosed
from eagleray.serve.decoding import DecodingLoop, Progress
from eagleray.serve.http_app import ERROR_RESPONSES, check_model, error_response, invalid, new_app
from eagleray.serve.metrics import tokens_generated
from eagleray.serve.openai import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatRequest,
    ChunkChoice,
    Completion,
    CompletionChoice,
    CompletionRequest,
    Delta,
    Usage,
)
from eagleray.serve.protocol import TextHealthResponse
from eagleray.serve.replica import STREAMED, Served, model_application

MAX_ONGOING_REQUESTS = 256
"""Requests that one replica works on at a time. The bound that clients meet first is `max_pending`."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Args(ServedModel):
    """Argument of `build_app`: the model, its share of the machine, and the limits on requests."""

    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the model; `auto`: as saved."""
    max_rows: int = Field(default=16, ge=1)
    """Continuations that are decoded at a time."""
    max_batch_tokens: int = Field(default=65_536, ge=1)
    """Bound on rows times the longest row, which is what the cache may grow to."""
    max_pending: int = Field(default=128, ge=1)
    """Continuations a replica has admitted and not finished; what comes on top gets 429."""
    max_new_tokens: int = Field(default=1024, ge=1)
    """Most new tokens of a continuation, and how many it may have if the request does not say."""
    max_body_bytes: int = Field(default=2**20, ge=1)
    """Largest request body; larger ones get 413."""


@dataclass(frozen=True)
class LoadedModel:
    """A model, its tokenizer, and what clients are told about it."""

    model: Any
    tokenizer: Any
    name: str
    revision: str

    @property
    def max_length(self) -> int:
        """Longest text in tokens, prompt and continuation."""
        return self.model.config.max_position_embeddings

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end a text."""
        given = self.model.generation_config.eos_token_id
        return [*(given if isinstance(given, list) else [given]), self.tokenizer.eos_token_id]


class Piece(NamedTuple):
    """A part of a text."""

    text: str
    finish_reason: FinishReason | None
    """Why the text ends here; `None` if it goes on."""


@dataclass
class Row:
    """A continuation on its way to a client."""

    index: int
    progress: Progress
    stream: TextStream

    async def pieces(self) -> AsyncIterator[Piece]:
        """New text, as it becomes certain; the last piece alone has a finish reason."""
        async for ended in self.progress.changes():
            tokens = list(self.progress.continuation.tokens)
            text = self.stream.feed(tokens) + (self.stream.close(tokens) if ended else "")
            self.progress.given_up = self.stream.stopped  # its row is free for others
            yield Piece(text, "stop" if self.stream.stopped else ended)
            if self.stream.stopped:
                return


class LisaService:
    """The work behind the endpoints, without HTTP."""

    def __init__(self, model: LoadedModel, args: Args):
        self.model, self._args = model, args
        self.loop = DecodingLoop(
            partial(ContinuousDecoder, model.model, end_ids=[i for i in model.end_ids if i is not None]),
            max_rows=args.max_rows,
            max_batch_tokens=args.max_batch_tokens,
            max_pending=args.max_pending,
        )

    def health(self) -> TextHealthResponse:
        """That requests are answered; BatcherClosed if they are not."""
        if not self.loop.alive:
            raise BatcherClosed("the decoding loop is not running")
        return TextHealthResponse(
            pending_continuations=self.loop.pending, model=self.model.name, revision=self.model.revision
        )

    def text_prompts(self, request: CompletionRequest) -> list[list[int]]:
        """Token ids of the texts to continue."""
        check_model(request.model, self.model.name)
        texts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        prompts = [self.model.tokenizer(text)["input_ids"] for text in texts]
        beginning = self.model.tokenizer.bos_token_id
        return [prompt or ([] if beginning is None else [beginning]) for prompt in prompts]

    def chat_prompt(self, request: ChatRequest) -> list[list[int]]:
        """Token ids of a conversation, up to where the answer begins."""
        check_model(request.model, self.model.name)
        tokenizer = self.model.tokenizer
        if tokenizer.chat_template is None:
            raise invalid("messages", "can't be used: this model has no chat template; use /v1/completions")
        try:
            text = tokenizer.apply_chat_template(
                [message.plain() for message in request.messages], tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise invalid("messages", f"do not fit the model's chat template: {error}") from None
        return [tokenizer(text, add_special_tokens=False)["input_ids"]]

    @asynccontextmanager
    async def continued(
        self, request: CompletionRequest | ChatRequest, prompts: Sequence[list[int]]
    ) -> AsyncIterator[list[Row]]:
        """Decode `n` continuations of each prompt for the length of the block."""
        seed = secrets.randbits(62) if request.seed is None else request.seed
        asked = request.max_tokens
        if isinstance(request, ChatRequest):
            asked = request.max_completion_tokens or asked
        continuations = [
            Continuation(
                prompt,
                max_tokens=self._new_tokens(len(prompt), asked),
                temperature=request.temperature,
                top_p=request.top_p,
                seed=(seed + index) % 2**62,
            )
            for prompt in prompts
            for index in range(request.n)
        ]
        async with self.loop.decoding(continuations) as handed_in:
            try:
                yield [
                    Row(index, progress, TextStream(self.model.tokenizer, stop=request.stops))
                    for index, progress in enumerate(handed_in)
                ]
            finally:
                tokens_generated(sum(len(one.tokens) for one in continuations))

    def _new_tokens(self, prompt: int, asked: int | None) -> int:
        if prompt == 0:
            raise invalid("prompt", "is empty, and the model has no token for the beginning of a text")
        most = self._args.max_new_tokens
        if asked is not None and asked > most:
            raise invalid("max_tokens", f"is {asked}; this server allows {most}")
        room = self.model.max_length - prompt
        if room < (asked or 1):
            wanted = "" if asked is None else f" and {asked} new ones"
            raise invalid(
                "prompt", f"has {prompt} tokens{wanted}; the model takes {self.model.max_length} in all"
            )
        return asked or min(most, room)


def usage_of(rows: Sequence[Row], prompts: Sequence[list[int]]) -> Usage:
    """Token counts of a request."""
    read = sum(map(len, prompts))
    written = sum(len(row.progress.continuation.tokens) for row in rows)
    return Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


async def whole_text(row: Row) -> Piece:
    """The text of a continuation when it has ended."""
    pieces = [piece async for piece in row.pieces()]
    return Piece("".join(piece.text for piece in pieces), pieces[-1].finish_reason)


async def interleaved(rows: Sequence[Row]) -> AsyncIterator[tuple[Row, Piece]]:
    """Pieces of all rows as they come, empty ones left out unless they are the last of their row."""
    arrived: asyncio.Queue[tuple[Row, Piece | Exception | None]] = asyncio.Queue()

    async def follow(row: Row) -> None:
        try:
            async for piece in row.pieces():
                if any(piece):
                    arrived.put_nowait((row, piece))
        except Exception as error:  # noqa: BLE001 - handed to the one who reads
            arrived.put_nowait((row, error))
        else:
            arrived.put_nowait((row, None))

    tasks = [asyncio.create_task(follow(row)) for row in rows]
    left = len(rows)
    try:
        while left:
            row, piece = await arrived.get()
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                left -= 1
            else:
                yield row, piece
    finally:
        for task in tasks:
            task.cancel()


def lisa_app(service: LisaService, args: Args) -> FastAPI:
    """The HTTP application around a service."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.loop:
            yield

    app = new_app(
        title="Eagleray language model",
        description=f"Completions and chat completions in OpenAI's shapes; at most {args.max_new_tokens} new tokens and "
        f"{args.timeout_s:g} s a request.",
        max_body_bytes=args.max_body_bytes,
        timeout_s=args.timeout_s,
        lifespan=lifespan,
    )

    @app.post(
        "/v1/completions",
        response_model=Completion,
        responses=ERROR_RESPONSES,
        openapi_extra=STREAMED,
        summary="Continue a text",
    )
    async def completions(request: CompletionRequest) -> Any:
        prompts = service.text_prompts(request)
        head = _head("cmpl", service.model)
        if request.stream:

            def chunk(row: Row, piece: Piece, first: bool) -> BaseModel:
                choice = CompletionChoice(index=row.index, text=piece.text, finish_reason=piece.finish_reason)
                return Completion(**head, choices=[choice])

            last = partial(Completion, **head, choices=[])
            return await _streamed(service, request, prompts, chunk, last, args.timeout_s)
        async with service.continued(request, prompts) as rows:
            texts = await asyncio.gather(*map(whole_text, rows))
            choices = [
                CompletionChoice(index=row.index, text=text, finish_reason=finish_reason)
                for row, (text, finish_reason) in zip(rows, texts, strict=True)
            ]
            return Completion(**head, choices=choices, usage=usage_of(rows, prompts))

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses=ERROR_RESPONSES,
        openapi_extra=STREAMED,
        summary="Answer a conversation",
    )
    async def chat_completions(request: ChatRequest) -> Any:
        prompts = service.chat_prompt(request)
        head = _head("chatcmpl", service.model)
        if request.stream:

            def chunk(row: Row, piece: Piece, first: bool) -> BaseModel:
                delta = Delta(role="assistant" if first else None, content=piece.text)
                choice = ChunkChoice(index=row.index, delta=delta, finish_reason=piece.finish_reason)
                return ChatCompletionChunk(**head, choices=[choice])

            last = partial(ChatCompletionChunk, **head, choices=[])
            return await _streamed(service, request, prompts, chunk, last, args.timeout_s)
        async with service.continued(request, prompts) as rows:
            texts = await asyncio.gather(*map(whole_text, rows))
            choices = [
                ChatChoice(
                    index=row.index, message=AssistantMessage(content=text), finish_reason=finish_reason
                )
                for row, (text, finish_reason) in zip(rows, texts, strict=True)
            ]
            return ChatCompletion(**head, choices=choices, usage=usage_of(rows, prompts))

    @app.get("/healthz", responses={503: ERROR_RESPONSES[503]}, summary="Whether the model takes requests")
    async def healthz() -> TextHealthResponse:
        return service.health()

    return app


def _head(kind: str, model: LoadedModel) -> dict[str, Any]:
    return {
        "id": f"{kind}-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": model.name,
        "system_fingerprint": model.revision,
    }


async def _streamed(
    service: LisaService,
    request: CompletionRequest | ChatRequest,
    prompts: Sequence[list[int]],
    chunk: Callable[[Row, Piece, bool], BaseModel],
    last: Callable[..., BaseModel],
    timeout_s: float,
) -> Response:
    """Server-sent events. The request is admitted before the first byte, so that a refusal is still a status."""
    context = service.continued(request, prompts)
    rows = await context.__aenter__()

    async def events() -> AsyncIterator[str]:
        begun: set[int] = set()
        try:
            # A little earlier than the limit on the whole request, which would cut the connection without a word.
            async with asyncio.timeout(0.95 * timeout_s):
                async for row, piece in interleaved(rows):
                    yield _event(chunk(row, piece, row.index not in begun))
                    begun.add(row.index)
            if request.stream_options and request.stream_options.include_usage:
                yield _event(last(usage=usage_of(rows, prompts)))
            yield "data: [DONE]\n\n"
        except TimeoutError:
            text = f"The answer was not complete within {timeout_s:g} s; ask for fewer tokens."
            yield f"data: {bytes(error_response(504, 'timeout', text).body).decode()}\n\n"
        finally:
            await context.__aexit__(None, None, None)

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def _event(value: BaseModel) -> str:
    return f"data: {value.model_dump_json()}\n\n"


def start(args: Args, /, *, device: str) -> Served:
    """Load the model and put its endpoints around it."""
    model = load_model(args, device=device)
    service = LisaService(model, args)
    return Served(
        kind="lisa",
        name=model.name,
        revision=model.revision,
        settings=args,
        max_body_bytes=args.max_body_bytes,
        app=lisa_app(service, args),
        health=service.health,
    )


def build_app(args: Args) -> Application:
    """The Serve application; `eagleray.serve.lisa:build_app` is the import path for `serve deploy`."""
    return model_application(start, args, kind="lisa", max_ongoing_requests=MAX_ONGOING_REQUESTS)


def load_model(args: Args, *, device: str) -> LoadedModel:
    """Load the model folder that `args` name."""
    folder = model_folder(args.model)
    dtype: Any = "auto" if args.dtype == "auto" else _DTYPES[args.dtype]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return LoadedModel(model.to(device).eval(), tokenizer, args.name or folder.name, model_revision(folder))
