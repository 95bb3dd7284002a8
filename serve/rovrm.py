"""A visual reward model behind HTTP: `POST /score` with a prompt, answers and perhaps a picture, and `/healthz`.

The picture comes in the request: as a file of a form, or in JSON as base64 or a data URL. Nothing on the server's side is
named by a client, and no address is fetched. Limits are checked against the picture's header before anything is decoded.
The scores are those of `VisualScorer`, which the offline jobs use too; answers of all requests share batches.

`eagleray serve rovrm=MODEL` starts it.
"""

# No postponed annotations here: Ray Serve looks at the annotation of `build_app` itself to learn the type of its
# arguments, and passes the YAML on unchecked when it finds a string.

import asyncio
import base64
import binascii
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import Field, ValidationError
from ray.serve import Application

from eagleray.models.rovrm.best_of_n import best_of
from eagleray.models.rovrm.images import ImageError, ImageLimits, decode_image
from eagleray.models.rovrm.scoring import Prepared, TooLongError, VisualScorer
from eagleray.platform.serving import ServedModel, model_folder, model_revision
from eagleray.serve.batching import Batcher, BatcherClosed
from eagleray.serve.http_app import ERROR_RESPONSES, check_model, invalid, new_app
from eagleray.serve.multipart import MultipartError, parse_multipart
from eagleray.serve.protocol import ScoreHealthResponse, ScoreRequest, ScoreResponse
from eagleray.serve.replica import Served, model_application
from eagleray.serve.rewards import Group, Scores, add_reward_routes

MAX_ONGOING_REQUESTS = 64
"""Requests that one replica works on at a time; each may hold a decoded picture."""

_DATA_URL = re.compile(r"data:(image/[\w.+-]+)?(;[\w=.+-]+)*;base64,", re.ASCII)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_FORM: dict[str, Any] = {
    "type": "object",
    "required": ["prompt", "responses"],
    "properties": {
        "model": {"type": "string"},
        "prompt": {"type": "string"},
        "responses": {"type": "array", "items": {"type": "string"}},
        "image": {"type": "string", "format": "binary"},
    },
}
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": ScoreRequest.model_json_schema()},
            "multipart/form-data": {"schema": _FORM},
        },
    }
}


class Args(ServedModel):
    """Argument of `build_app`: the model, its share of the machine, and the limits on requests."""

    max_batch_tokens: int = Field(default=16384, ge=1)
    """Most tokens of one batch, those of the pictures counted."""
    max_wait_s: float = Field(default=0.005, ge=0)
    """How long an answer waits for others to share its batch."""
    max_pending: int = Field(default=512, ge=1)
    """Answers a replica has admitted and not finished; what comes on top gets 429."""
    max_responses: int = Field(default=64, ge=1)
    """Most answers in one request; more get 422."""
    max_image_pixels: int = Field(default=2**24, ge=1)
    """Most pixels of a picture; larger ones get 422 before they are decoded."""
    max_body_bytes: int = Field(default=16 * 2**20, ge=1)
    """Largest request body; larger ones get 413."""


@dataclass(frozen=True)
class LoadedModel:
    """A model and what clients are told about it."""

    scorer: VisualScorer
    name: str
    revision: str


class RovrmService:
    """The work behind the endpoints, without HTTP: checks, decoding, batching."""

    def __init__(self, model: LoadedModel, args: Args):
        self.model, self._args = model, args
        self.batcher = Batcher[Prepared, float](
            model.scorer.rewards,
            max_batch_cost=args.max_batch_tokens,
            max_wait_s=args.max_wait_s,
            max_pending=args.max_pending,
        )

    async def score(self, request: ScoreRequest, image: bytes | None) -> ScoreResponse:
        """Score the answers of one request; `image` is the content of a picture's file."""
        check_model(request.model, self.model.name)
        most = min(self._args.max_responses, self._args.max_pending)
        if len(request.responses) > most:
            raise invalid("responses", f"has {len(request.responses)} items; at most {most} are allowed")
        with self.batcher.admit(len(request.responses)):
            # In a thread: decoding and resizing a large picture takes a while.
            size, items = await asyncio.to_thread(self._prepare, request, image)
            scores = await self.batcher.run(items, costs=[len(item.ids) for item in items])
        return ScoreResponse(
            scores=scores,
            best=best_of(scores),
            image_size=size,
            model=self.model.name,
            revision=self.model.revision,
        )

    async def score_groups(self, groups: Sequence[Group]) -> Scores:
        """Answers without a picture, for the shapes of other programs."""
        if any(group.reference is not None for group in groups):
            raise invalid(
                "body", "has a reference; this model rewards each answer by itself, so leave it away"
            )
        count = sum(len(group.answers) for group in groups)
        most = min(self._args.max_responses, self._args.max_pending)
        if count > most:
            raise invalid("body", f"has {count} answers; at most {most} are allowed")
        with self.batcher.admit(count):
            prepared = await asyncio.to_thread(self._prepare_groups, groups)
            items = [item for group in prepared for item in group]
            costs = [len(item.ids) for item in items]
            values = iter(await self.batcher.run(items, costs=costs))
        return Scores([[next(values) for _ in group] for group in prepared], sum(costs))

    def health(self) -> ScoreHealthResponse:
        """That requests are answered; BatcherClosed if they are not."""
        if not self.batcher.alive:
            raise BatcherClosed("the batcher is not running")
        return ScoreHealthResponse(
            pending_answers=self.batcher.pending, model=self.model.name, revision=self.model.revision
        )

    def _prepare(self, request: ScoreRequest, image: bytes | None) -> tuple[list[int] | None, list[Prepared]]:
        try:
            decoded = None if image is None else decode_image(image, self.model.scorer.limits)
            items = self.model.scorer.prepare(request.prompt, request.responses, decoded)
        except ImageError as error:
            raise invalid("image", f"cannot be used: {error}") from None
        except TooLongError as error:
            raise invalid("responses", f"do not fit: {error}; shorten the prompt or the answer") from None
        return None if decoded is None else [*decoded.size], items

    def _prepare_groups(self, groups: Sequence[Group]) -> list[list[Prepared]]:
        try:
            return [self.model.scorer.prepare(group.prompt, list(group.answers), None) for group in groups]
        except TooLongError as error:
            raise invalid("body", f"does not fit: {error}; shorten the prompt or the answer") from None


def rovrm_app(service: RovrmService, args: Args) -> FastAPI:
    """The HTTP application around a service."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.batcher:
            yield

    app = new_app(
        title="Eagleray RoVRM",
        description=f"Scores answers about pictures. Bodies up to {args.max_body_bytes} bytes, pictures up to "
        f"{args.max_image_pixels} pixels, at most {args.max_responses} answers and {args.timeout_s:g} s a request.",
        max_body_bytes=args.max_body_bytes,
        timeout_s=args.timeout_s,
        lifespan=lifespan,
    )

    @app.post(
        "/score",
        responses=ERROR_RESPONSES,
        openapi_extra=_BODY,
        summary="Reward of each answer (JSON with base64, or a form with the picture as a file)",
    )
    async def score(request: Request) -> ScoreResponse:
        return await service.score(
            *read_request(request.headers.get("content-type", ""), await request.body())
        )

    add_reward_routes(app, service.score_groups, name=service.model.name)

    @app.get("/healthz", responses={503: ERROR_RESPONSES[503]}, summary="Whether the model takes requests")
    async def healthz() -> ScoreHealthResponse:
        return service.health()

    return app


def read_request(content_type: str, body: bytes) -> tuple[ScoreRequest, bytes | None]:
    """The request and the picture's file, from JSON or a form.

    Raises:
        RequestError: The body is neither, or `image` is not a picture's file.
        RequestValidationError: A field is missing or wrong.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return _from_form(content_type, body)
    if kind not in ("application/json", ""):
        raise invalid("body", "must be sent as application/json or multipart/form-data")
    request = _validated(body)
    return request, None if request.image is None else _from_text(request.image)


def _from_form(content_type: str, body: bytes) -> tuple[ScoreRequest, bytes | None]:
    try:
        parts = parse_multipart(content_type, body)
    except MultipartError as error:
        raise invalid("body", f"is not a form: {error}") from None
    values: dict[str, Any] = {"responses": []}
    images: list[bytes] = []
    for part in parts:
        if part.name == "image":
            images.append(part.content)
            continue
        try:
            text = part.content.decode("utf-8")
        except UnicodeDecodeError:
            raise invalid(part.name[:40], "is not UTF-8 text") from None
        if part.name == "responses":
            values["responses"].append(text)
        elif part.name in values:
            raise invalid(part.name, "is given more than once")
        else:
            values[part.name] = text
    if len(images) > 1:
        raise invalid("image", f"is given {len(images)} times; one picture is taken")
    return _validated(values), images[0] if images else None


def _validated(values: dict[str, Any] | bytes) -> ScoreRequest:
    try:
        if isinstance(values, bytes):
            return ScoreRequest.model_validate_json(values)
        return ScoreRequest.model_validate(values)
    except ValidationError as error:
        # As FastAPI reports them for a body it has read itself.
        raise RequestValidationError([{**e, "loc": ("body", *e["loc"])} for e in error.errors()]) from None


def _from_text(image: str) -> bytes:
    """The picture's file in a text: a data URL, or plain base64."""
    if match := _DATA_URL.match(image):
        image = image[match.end() :]
    elif _ADDRESS.match(image[:40]):
        raise invalid(
            "image", "is an address; nothing is fetched. Send the picture itself, in base64 or as a file"
        )
    try:
        return base64.b64decode("".join(image.split()), validate=True)
    except (binascii.Error, ValueError):
        raise invalid(
            "image", "is not base64; send the content of the picture's file, not its name or address"
        ) from None


def start(args: Args, /, *, device: str) -> Served:
    """Load the model and put its endpoints around it."""
    model = load_model(args, device=device)
    service = RovrmService(model, args)
    return Served(
        kind="rovrm",
        name=model.name,
        revision=model.revision,
        settings=args,
        max_body_bytes=args.max_body_bytes,
        app=rovrm_app(service, args),
        health=service.health,
    )


def build_app(args: Args) -> Application:
    """The Serve application; `eagleray.serve.rovrm:build_app` is the import path for `serve deploy`."""
    return model_application(start, args, kind="rovrm", max_ongoing_requests=MAX_ONGOING_REQUESTS)


def load_model(args: Args, *, device: str) -> LoadedModel:
    """Load the model folder that `args` name."""
    folder = model_folder(args.model)
    limits = ImageLimits(max_bytes=args.max_body_bytes, max_pixels=args.max_image_pixels)
    scorer = VisualScorer.from_pretrained(
        folder, device=device, limits=limits, max_batch_tokens=args.max_batch_tokens
    )
    return LoadedModel(scorer, args.name or folder.name, model_revision(folder))
