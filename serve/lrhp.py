"""An LRHP pair encoder behind HTTP: `POST /represent`, `POST /margin`, and `/healthz`.

Pairs of all requests share batches by their tokens, and within a batch those of like length go together. The numbers
are those of `Representer.represent`, which the offline jobs call too. `/margin` needs a predictor that was fitted on
representations of the very model that is served.

`eagleray serve lrhp=MODEL lrhp.predictor=PREDICTOR` starts it.
"""

# No postponed annotations here: Ray Serve looks at the annotation of `build_app` itself to learn the type of its
# arguments, and passes the YAML on unchecked when it finds a string.

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from fastapi import FastAPI
from pydantic import Field, field_validator
from ray.serve import Application

from eagleray.models.gram.judge import Pair
from eagleray.models.lrhp.margins import MarginPredictor
from eagleray.models.lrhp.representer import Order, Representation, Representer
from eagleray.models.selection.store import model_hash
from eagleray.platform.serving import ServedModel, model_folder
from eagleray.serve.batching import Batcher, BatcherClosed
from eagleray.serve.http_app import ERROR_RESPONSES, RequestError, check_model, new_app
from eagleray.serve.protocol import (
    ErrorResponse,
    MarginRequest,
    MarginResponse,
    PairHealthResponse,
    RepresentRequest,
    RepresentResponse,
    prompt_text,
)
from eagleray.serve.replica import Served, model_application

MAX_ONGOING_REQUESTS = 256
"""Requests that one replica works on at a time."""

_DTYPES = {"saved": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NO_PREDICTOR = {
    404: {
        "model": ErrorResponse,
        "description": "There is no such model here, or it has no margin predictor.",
    }
}

Item = tuple[Pair, Order]


class Args(ServedModel):
    """Argument of `build_app`: the model, its share of the machine, and the limits on requests."""

    predictor: str | None = None
    """Folder `predictor` of a `lrhp.margin` run, fitted on representations of this model; without it there is no
    `/margin`."""
    dtype: Literal["saved", "fp32", "bf16", "fp16"] = "saved"
    """Arithmetic of the model; `saved` keeps that of the weights."""
    max_batch_tokens: int = Field(default=16384, ge=1)
    """Most tokens of one batch, and of one forward pass with padding."""
    max_wait_s: float = Field(default=0.004, ge=0)
    """How long a pair waits for others to share its batch."""
    max_pending: int = Field(default=1024, ge=1)
    """Pairs a replica has admitted and not finished; what comes on top gets 429."""
    max_body_bytes: int = Field(default=4 * 2**20, ge=1)
    """Largest request body; larger ones get 413."""

    @field_validator("predictor")
    @classmethod
    def _predictor_is_absolute(cls, path: str | None) -> str | None:
        # Replicas run in folders of their own.
        return None if path is None else str(Path(path).expanduser().absolute())


@dataclass(frozen=True)
class LoadedModel:
    """A model, its margin predictor if there is one, and what clients are told about it."""

    representer: Representer
    predictor: MarginPredictor | None
    name: str
    revision: str

    def compute(self, items: Sequence[Item]) -> list[Representation]:
        """Representations of pairs that may each want another order."""
        found: dict[int, Representation] = {}
        orders: set[Order] = {order for _, order in items}
        for order in orders:
            rows = [i for i, item in enumerate(items) if item[1] == order]
            results = self.representer.represent([items[i][0] for i in rows], order=order)
            found |= dict(zip(rows, results, strict=True))
        return [found[i] for i in range(len(items))]

    def cost(self, item: Item) -> int:
        """Tokens that a pair adds to a batch."""
        pair, order = item
        return len(self.representer.encoder.encode(*pair).ids) * (1 if order == "canonical" else 2)


class LrhpService:
    """The work behind the endpoints, without HTTP."""

    def __init__(self, model: LoadedModel, args: Args):
        self._model = model
        self.batcher = Batcher[Item, Representation](
            model.compute,
            max_batch_cost=args.max_batch_tokens,
            max_wait_s=args.max_wait_s,
            max_pending=args.max_pending,
        )

    async def represent(self, request: RepresentRequest) -> RepresentResponse:
        """Represent one pair."""
        check_model(request.model, self._model.name)
        found = await self._compute(request, request.order)
        return RepresentResponse(
            h=found.h_D.tolist(),
            u=found.u,
            p=_sigmoid(found.u),
            truncated=found.truncated,
            model=self._model.name,
            revision=self._model.revision,
        )

    async def margin(self, request: MarginRequest) -> MarginResponse:
        """Predict the margin of one pair."""
        check_model(request.model, self._model.name)
        predictor = self._model.predictor
        if predictor is None:
            message = (
                "This server has no margin predictor; it is started with one by `lrhp.predictor=FOLDER`."
            )
            raise RequestError(404, "no_predictor", message)
        found = await self._compute(request, predictor.about["order"])
        [margin] = predictor.predict(found.h_D[None]).clip(0, 1).tolist()
        return MarginResponse(
            margin=margin, truncated=found.truncated, model=self._model.name, revision=self._model.revision
        )

    def health(self) -> PairHealthResponse:
        """That requests are answered; BatcherClosed if they are not."""
        if not self.batcher.alive:
            raise BatcherClosed("the batcher is not running")
        return PairHealthResponse(
            pending_pairs=self.batcher.pending,
            margins=self._model.predictor is not None,
            model=self._model.name,
            revision=self._model.revision,
        )

    async def _compute(self, request: MarginRequest, order: Order) -> Representation:
        item = (prompt_text(request.prompt), request.chosen, request.rejected), order
        with self.batcher.admit(1):
            # In a thread: a text of a megabyte takes a while to tokenise.
            cost = await asyncio.to_thread(self._model.cost, item)
            [found] = await self.batcher.run([item], costs=[cost])
        return found


def lrhp_app(service: LrhpService, args: Args) -> FastAPI:
    """The HTTP application around a service."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.batcher:
            yield

    app = new_app(
        title="Eagleray LRHP",
        description=f"Represents preference pairs. Bodies up to {args.max_body_bytes} bytes, at most "
        f"{args.timeout_s:g} s a request.",
        max_body_bytes=args.max_body_bytes,
        timeout_s=args.timeout_s,
        lifespan=lifespan,
    )

    @app.post("/represent", responses=ERROR_RESPONSES, summary="The vector of a preference pair")
    async def represent(request: RepresentRequest) -> RepresentResponse:
        return await service.represent(request)

    @app.post(
        "/margin", responses=ERROR_RESPONSES | _NO_PREDICTOR, summary="How much better the chosen answer is"
    )
    async def margin(request: MarginRequest) -> MarginResponse:
        return await service.margin(request)

    @app.get("/healthz", responses={503: ERROR_RESPONSES[503]}, summary="Whether the model takes requests")
    async def healthz() -> PairHealthResponse:
        return service.health()

    return app


def start(args: Args, /, *, device: str) -> Served:
    """Load the model and put its endpoints around it."""
    model = load_model(args, device=device)
    service = LrhpService(model, args)
    return Served(
        kind="lrhp",
        name=model.name,
        revision=model.revision,
        settings=args,
        max_body_bytes=args.max_body_bytes,
        app=lrhp_app(service, args),
        health=service.health,
    )


def build_app(args: Args) -> Application:
    """The Serve application; `eagleray.serve.lrhp:build_app` is the import path for `serve deploy`."""
    return model_application(start, args, kind="lrhp", max_ongoing_requests=MAX_ONGOING_REQUESTS)


def load_model(args: Args, *, device: str) -> LoadedModel:
    """Load what `args` name.

    Raises:
        ValueError: The predictor was fitted on representations of another model, or of another arithmetic.
    """
    folder = model_folder(args.model)
    revision = model_hash(folder, args.dtype, str(False))
    predictor = None if args.predictor is None else MarginPredictor.load(args.predictor)
    if predictor is not None and predictor.about["model_hash"] != revision:
        raise ValueError(
            f"The predictor in {args.predictor} was fitted on representations of model "
            f"{predictor.about['model_hash']}, and {folder} with `dtype` {args.dtype!r} is {revision}. Encode with this "
            "model and run `lrhp.margin` again."
        )
    representer = Representer.from_pretrained(
        folder, device=device, dtype=_DTYPES[args.dtype], max_batch_tokens=args.max_batch_tokens
    )
    return LoadedModel(representer, predictor, args.name or folder.name, revision)


def _sigmoid(u: float) -> float:
    return 1 / (1 + math.exp(-u)) if u >= 0 else 1 - 1 / (1 + math.exp(u))
