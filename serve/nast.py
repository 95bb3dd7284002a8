"""A CTC-NAST model behind HTTP: `POST /translate` with an audio file as the body, and `/healthz`.

The body is the file itself (wav, flac, ogg or mp3; any rate, any number of channels), so `curl --data-binary @a.wav` is a
client. Limits are checked against the header before anything is decoded. A long recording is cut at its silences,
and the pieces of all requests share batches by their frames. The texts are those of `Translator.translate`, which the
offline jobs call too.

`serve deploy serve/nast.yaml` or `eagleray serve nast=MODEL` start it.
"""

# No postponed annotations here: Ray Serve looks at the annotation of `build_app` itself to learn the type of its
# arguments, and passes the YAML on unchecked when it finds a string.

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import ray
import torch
from fastapi import FastAPI, Request
from pydantic import Field
from ray import serve
from ray.serve import Application
from torch import Tensor

from eagleray.models.nast.audio import SAMPLE_RATE, probe, read_audio
from eagleray.models.nast.errors import SpeechDataError
from eagleray.models.nast.segmentation import split_at_silence
from eagleray.models.nast.translator import Translation, Translator
from eagleray.platform.serving import ServedModel, model_folder, model_revision
from eagleray.serve.batching import Batcher, BatcherClosed
from eagleray.serve.http_app import ERROR_RESPONSES, invalid, new_app
from eagleray.serve.protocol import Piece, SpeechHealthResponse, TranslateResponse

MAX_ONGOING_REQUESTS = 64
"""Requests that one replica works on at a time; each may hold a decoded recording."""

_AUDIO_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"audio/*": {"schema": {"type": "string", "format": "binary"}}},
    }
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
        self._model, self._args = model, args
        self.batcher = Batcher[Tensor, Translation](
            model.speech.translate,
            max_batch_cost=args.max_batch_frames,
            max_wait_s=args.max_wait_s,
            max_pending=args.max_pending,
        )

    async def translate(self, body: bytes) -> TranslateResponse:
        """Translate the content of an audio file."""
        # In a thread: decoding, resampling and features of ten minutes take seconds.
        try:
            spans, features = await asyncio.to_thread(self._pieces, body)
        except SpeechDataError as error:
            raise invalid("body", _problem(error)) from None
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
            model=self._model.name,
            revision=self._model.revision,
        )

    def health(self) -> SpeechHealthResponse:
        """That requests are answered; BatcherClosed if they are not."""
        if not self.batcher.alive:
            raise BatcherClosed("the batcher is not running")
        return SpeechHealthResponse(
            pending_pieces=self.batcher.pending, model=self._model.name, revision=self._model.revision
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
        return spans, [self._model.speech.features(waveform_N[start:end]) for start, end in spans]


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

    @app.get("/healthz", responses={503: ERROR_RESPONSES[503]}, summary="Whether the model takes requests")
    async def healthz() -> SpeechHealthResponse:
        return service.health()

    return app


@serve.deployment(
    name="nast",
    max_ongoing_requests=MAX_ONGOING_REQUESTS,
    max_queued_requests=MAX_ONGOING_REQUESTS,
    backpressure_config={"status_code": 429, "retry_after_s": 1},
    max_constructor_retry_count=2,
)
@serve.ingress()
class NastDeployment:
    """One replica: a model, its batcher and the endpoints."""

    def __init__(self, args: Args):
        on_gpu = bool(ray.get_runtime_context().get_accelerator_ids().get("GPU"))
        if not on_gpu:
            torch.set_num_threads(max(1, int(args.cpus)))
        self._args = args
        self._service = NastService(load_model(args, device="cuda" if on_gpu else "cpu"), args)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return nast_app(self._service, self._args)

    def check_health(self) -> None:
        """Called by Serve; a replica that fails is replaced."""
        self._service.health()


def build_app(args: Args) -> Application:
    """The Serve application; `eagleray.serve.nast:build_app` is the import path for `serve deploy`."""
    return NastDeployment.options(
        ray_actor_options=args.actor_options(),
        graceful_shutdown_timeout_s=args.timeout_s + 10,
    ).bind(args)


def load_model(args: Args, *, device: str) -> LoadedModel:
    """Load the model folder that `args` name."""
    folder = model_folder(args.model)
    translator = Translator.from_pretrained(folder, device=device, max_batch_frames=args.max_batch_frames)
    return LoadedModel(translator, args.name or folder.name, model_revision(folder))


def _problem(error: SpeechDataError) -> str:
    return f"cannot be used: {error.reason}" + (f" ({error.detail})" if error.detail else "")
