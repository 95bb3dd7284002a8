"""A CTC-NAST model behind HTTP: `POST /translate` with an audio file as the body, and OpenAI's `/v1/audio/translations`.

The body is the file itself (wav, flac, ogg or mp3; any rate, any number of channels), so `curl --data-binary @a.wav` is a
client. Limits are checked against the header before anything is decoded. A long recording is cut at its silences,
and the pieces of all requests share batches by their frames. The texts are those of `Translator.translate`, which the
offline jobs call too.

`eagleray serve nast=MODEL` starts it.
"""

# No postponed annotations here: Ray Serve looks at the annotation of `build_app` itself to learn the type of its
# arguments, and passes the YAML on unchecked when it finds a string.

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse
from pydantic import Field
from ray.serve import Application
from torch import Tensor

from eagleray.models.nast.audio import SAMPLE_RATE, probe, read_audio
from eagleray.models.nast.errors import SpeechDataError
from eagleray.models.nast.segmentation import split_at_silence
from eagleray.models.nast.translator import Translation, Translator
from eagleray.platform.serving import ServedModel, model_folder, model_revision
from eagleray.serve.batching import Batcher, BatcherClosed
from eagleray.serve.http_app import ERROR_RESPONSES, check_model, invalid, new_app
from eagleray.serve.multipart import MultipartError, parse_multipart
from eagleray.serve.protocol import Piece, SpeechHealthResponse, TranslateResponse
from eagleray.serve.replica import Served, model_application
from eagleray.serve.subtitles import FORMATS, AudioTranslation, as_json, srt, vtt

MAX_ONGOING_REQUESTS = 64
"""Requests that one replica works on at a time; each may hold a decoded recording."""

_AUDIO_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"audio/*": {"schema": {"type": "string", "format": "binary"}}},
    }
}
_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "model": {"type": "string"},
                        "response_format": {"enum": list(FORMATS), "default": "json"},
                    },
                }
            }
        },
    }
}
_TEXT_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"content": {kind: {"schema": {"type": "string"}} for kind in ("text/plain", "text/vtt")}}
}


class Args(ServedModel):
    """Argument of `build_app`: the model, its share of the machine, and the limits on requests."""

    max_batch_frames: int = Field(default=20_000, ge=100)
    """Most frames (10 ms each) of one batch."""
    max_wait_s: float = Field(default=0.01, ge=0)
    """How long a piece waits for others to share its batch."""
    max_pending: int = Field(default=256, ge=1)
    """Pieces a replica has admitted and not finished; what comes on top gets 429."""
    max_seconds: float = Field(default=600, gt=0)
    """Longest recording; longer ones get 422."""
    piece_seconds: float = Field(default=20, ge=0.4)
    """Longest stretch that is translated as one; longer recordings are cut at silence."""
    max_body_bytes: int = Field(default=64 * 2**20, ge=1)
    """Largest request body; larger ones get 413."""


class Speech(Protocol):
    """What is served: a `Translator`, or anything that does the same."""

    def features(self, waveform_N: Any, /) -> Tensor: ...

    def translate(self, features: Sequence[Tensor], /) -> Sequence[Translation]: ...


@dataclass(frozen=True)
class LoadedModel:
    """A model and what clients are told about it."""

    speech: Speech
    name: str
    revision: str


class NastService:
    """The work behind the endpoints, without HTTP: decoding, cutting, batching, joining."""

    def __init__(self, model: LoadedModel, args: Args):
        self.model, self._args = model, args
        self.batcher = Batcher[Tensor, Translation](
            model.speech.translate,
            max_batch_cost=args.max_batch_frames,
            max_wait_s=args.max_wait_s,
            max_pending=args.max_pending,
        )

    async def translate(self, body: bytes, *, field: str = "body") -> TranslateResponse:
        """Translate the content of an audio file, which came in `field` of the request."""
        # In a thread: decoding, resampling and features of ten minutes take seconds.
        try:
            spans, features = await asyncio.to_thread(self._pieces, body)
        except SpeechDataError as error:
            raise invalid(field, _problem(error)) from None
        with self.batcher.admit(len(features)):
            results = await self.batcher.run(features, costs=[max(1, len(f)) for f in features])
        pieces = [
            Piece(start=start / SAMPLE_RATE, end=end / SAMPLE_RATE, text=r.text, transcript=r.transcript)
            for (start, end), r in zip(spans, results, strict=True)
        ]
        return TranslateResponse(
            text=" ".join(piece.text for piece in pieces if piece.text),
            transcript=" ".join(piece.transcript for piece in pieces if piece.transcript),
            seconds=spans[-1][1] / SAMPLE_RATE,
            pieces=pieces,
            model=self.model.name,
            revision=self.model.revision,
        )

    def health(self) -> SpeechHealthResponse:
        """That requests are answered; BatcherClosed if they are not."""
        if not self.batcher.alive:
            raise BatcherClosed("the batcher is not running")
        return SpeechHealthResponse(
            pending_pieces=self.batcher.pending, model=self.model.name, revision=self.model.revision
        )

    def _pieces(self, body: bytes) -> tuple[list[tuple[int, int]], list[Tensor]]:
        """Where the pieces of a recording begin and end (in samples), and their features."""
        limit = self._args.max_seconds
        if (seconds := probe(body).seconds) > limit:
            # Before decoding: a compressed file of the allowed size may hold hours.
            detail = f"{seconds:.1f} s, at most {limit:g} s are taken"
            raise SpeechDataError("audio", "the audio is too long", detail)
        waveform_N = read_audio(body, max_seconds=limit)
        spans = split_at_silence(waveform_N, sample_rate=SAMPLE_RATE, max_seconds=self._args.piece_seconds)
        return spans, [self.model.speech.features(waveform_N[start:end]) for start, end in spans]


def nast_app(service: NastService, args: Args) -> FastAPI:
    """The HTTP application around a service."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.batcher:
            yield

    app = new_app(
        title="Eagleray NAST",
        description=f"Translates speech. Recordings up to {args.max_seconds:g} s and {args.max_body_bytes} bytes, at "
        f"most {args.timeout_s:g} s a request.",
        max_body_bytes=args.max_body_bytes,
        timeout_s=args.timeout_s,
        lifespan=lifespan,
    )

    @app.post(
        "/translate",
        responses=ERROR_RESPONSES,
        openapi_extra=_AUDIO_BODY,
        summary="Translate the audio file in the body (wav, flac, ogg, mp3)",
    )
    async def translate(request: Request) -> TranslateResponse:
        return await service.translate(await request.body())

    @app.post(
        "/v1/audio/translations",
        responses=ERROR_RESPONSES | _TEXT_ANSWERS,
        response_model=AudioTranslation,
        response_model_exclude_none=True,
        openapi_extra=_FORM,
        summary="Translate the audio file of a form, in OpenAI's shape",
    )
    async def audio_translations(request: Request) -> Any:
        form = _read_form(request.headers.get("content-type", ""), await request.body())
        check_model(form.model, service.model.name)
        found = await service.translate(form.file, field="file")
        match form.response_format:
            case "text":
                return PlainTextResponse(found.text + "\n")
            case "srt":
                return PlainTextResponse(srt(found.pieces))
            case "vtt":
                return PlainTextResponse(vtt(found.pieces), media_type="text/vtt")
            case shape:
                return as_json(found, verbose=shape == "verbose_json")

    @app.get("/healthz", responses={503: ERROR_RESPONSES[503]}, summary="Whether the model takes requests")
    async def healthz() -> SpeechHealthResponse:
        return service.health()

    return app


def start(args: Args, /, *, device: str) -> Served:
    """Load the model and put its endpoints around it."""
    model = load_model(args, device=device)
    service = NastService(model, args)
    return Served(
        kind="nast",
        name=model.name,
        revision=model.revision,
        settings=args,
        max_body_bytes=args.max_body_bytes,
        app=nast_app(service, args),
        health=service.health,
    )


def build_app(args: Args) -> Application:
    """The Serve application; `eagleray.serve.nast:build_app` is the import path for `serve deploy`."""
    return model_application(start, args, kind="nast", max_ongoing_requests=MAX_ONGOING_REQUESTS)


def load_model(args: Args, *, device: str) -> LoadedModel:
    """Load the model folder that `args` name."""
    folder = model_folder(args.model)
    translator = Translator.from_pretrained(folder, device=device, max_batch_frames=args.max_batch_frames)
    return LoadedModel(translator, args.name or folder.name, model_revision(folder))


@dataclass(frozen=True)
class _Form:
    file: bytes
    model: str | None
    response_format: str


def _read_form(content_type: str, body: bytes) -> _Form:
    """The file and the settings of a form, or what is wrong with it."""
    try:
        parts = parse_multipart(content_type, body)
    except MultipartError as error:
        raise invalid("body", f"is not a form: {error}") from None
    values: dict[str, bytes] = {}
    for part in parts:
        if part.name not in ("file", "model", "response_format", "temperature", "prompt"):
            raise invalid(part.name[:40], "is not a known field; remove it (the fields are listed at /docs)")
        if part.name in values:
            raise invalid(part.name, "is given more than once")
        values[part.name] = part.content
    texts = {
        name: value.decode("utf-8", "replace").strip() for name, value in values.items() if name != "file"
    }
    if "file" not in values:
        raise invalid("file", "is required")
    if texts.get("prompt"):
        raise invalid("prompt", "is not supported; leave it away")
    if texts.get("temperature", "0") not in ("", "0", "0.0"):
        raise invalid("temperature", "must be 0; the likeliest translation is given")
    if (shape := texts.get("response_format", "json")) not in FORMATS:
        raise invalid("response_format", f"must be one of {', '.join(FORMATS)}")
    return _Form(values["file"], texts.get("model"), shape)


def _problem(error: SpeechDataError) -> str:
    return f"cannot be used: {error.reason}" + (f" ({error.detail})" if error.detail else "")
