"""A GRAM judge (or a discriminative reward model) behind HTTP: `/compare`, `/rank`, `/reward`, `/healthz`.

One Ray Serve deployment holds the model and the endpoints: the texts would otherwise travel once more between two
processes, and there is nothing else to scale on its own. Every comparison of every request goes through one
`Batcher`; a ranking takes part in it round by round, so rounds of different requests share batches. The scores are
those of `Judge.compare`, called here with larger batches and nothing else.

`serve deploy serve/gram.yaml` or `eagleray serve gram=MODEL` start it.
"""

# No postponed annotations here: Ray Serve looks at the annotation of `build_app` itself to learn the type of its
# arguments, and passes the YAML on unchecked when it finds a string.

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import ray
import torch
from fastapi import FastAPI
from pydantic import Field, model_validator
from ray import serve
from ray.serve import Application

from eagleray.models.gram.alignment import transform_reward
from eagleray.models.gram.batching import common_prefix
from eagleray.models.gram.discriminative import SETTINGS_FILE as REWARD_SETTINGS
from eagleray.models.gram.discriminative import DiscriminativeScorer
from eagleray.models.gram.judge import Comparison, Judge, Pair
from eagleray.models.gram.ranking import Compare, Ranking, rank
from eagleray.platform.serving import ServedModel, model_folder, model_revision
from eagleray.serve.batching import Batcher, BatcherClosed
from eagleray.serve.http_app import ERROR_RESPONSES, invalid, new_app
from eagleray.serve.protocol import (
    CompareRequest,
    CompareResponse,
    HealthResponse,
    RankMethod,
    RankRequest,
    RankResponse,
    RewardRequest,
    RewardResponse,
    prompt_text,
)

MAX_ONGOING_REQUESTS = 256
"""Requests that one replica works on at a time. The bound that clients meet first is the one on comparisons."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Args(ServedModel):
    """Argument of `build_app`: the model, its share of the machine, and the limits on requests."""

    dtype: Literal["saved", "fp32", "bf16", "fp16"] = "saved"
    """Arithmetic of the model; `saved` keeps that of the weights."""
    max_batch_tokens: int = Field(default=16384, ge=1)
    """Most tokens of one batch, both orders counted; also the judge's limit for one forward pass."""
    max_wait_s: float = Field(default=0.004, ge=0)
    """How long a comparison waits for others to share its batch."""
    max_pending: int = Field(default=1024, ge=1)
    """Comparisons a replica has admitted and not finished; what comes on top gets 429."""
    max_responses: int = Field(default=32, ge=2)
    """Most answers in one `/rank` request."""
    max_body_bytes: int = Field(default=4 * 2**20, ge=1)
    """Largest request body; larger ones get 413."""

    @model_validator(mode="after")
    def _largest_ranking_fits(self) -> "Args":
        most = comparisons_needed("round_robin", self.max_responses)
        if most > self.max_pending:
            raise ValueError(
                f"`max_pending` is {self.max_pending}, but a ranking of `max_responses` = {self.max_responses} answers "
                f"may need {most} comparisons and could never be admitted. Raise the one or lower the other."
            )
        return self


@dataclass(frozen=True)
class LoadedModel:
    """What is served: a `Judge`, or anything else that compares pairs of answers."""

    compare: Callable[[Sequence[Pair]], Sequence[Comparison]]
    costs: Callable[[Sequence[Pair]], list[int | None]]
    """Tokens that each pair adds to a round; None for a pair that is too long to be judged."""
    name: str
    revision: str


class GramService:
    """The work behind the endpoints, without HTTP: checks that need settings, batching, ranking in rounds."""

    def __init__(self, model: LoadedModel, args: Args):
        self._model = model
        self._max_responses = args.max_responses
        self.batcher = Batcher[Pair, Comparison](
            model.compare,
            max_batch_cost=args.max_batch_tokens,
            max_wait_s=args.max_wait_s,
            max_pending=args.max_pending,
        )
        self._rankers = ThreadPoolExecutor(max_workers=MAX_ONGOING_REQUESTS, thread_name_prefix="rank")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Requests are answered inside the block."""
        async with self.batcher:
            yield
        self._rankers.shutdown(wait=False, cancel_futures=True)

    async def compare(self, request: CompareRequest) -> CompareResponse:
        """Judge one pair."""
        result = await self._judge_one((prompt_text(request.prompt), request.a, request.b))
        return CompareResponse(
            p_a=result.p_a,
            p_b=result.p_b,
            p_order1=result.p_order1,
            p_order2=result.p_order2,
            consistent=result.consistent,
            model=self._model.name,
            revision=self._model.revision,
        )

    async def reward(self, request: RewardRequest) -> RewardResponse:
        """Judge a response against its reference."""
        result = await self._judge_one((prompt_text(request.prompt), request.response, request.reference))
        probability = torch.tensor(result.p_a, dtype=torch.float64)
        return RewardResponse(
            probability=result.p_a,
            centred=transform_reward(probability, "centred").item(),
            logit=transform_reward(probability, "logit").item(),
            consistent=result.consistent,
            model=self._model.name,
            revision=self._model.revision,
        )

    async def rank(self, request: RankRequest) -> RankResponse:
        """Rank several responses."""
        responses, method, reference = request.responses, request.method, request.reference
        if len(responses) > self._max_responses:
            raise invalid(
                "responses", f"has {len(responses)} items; at most {self._max_responses} are allowed"
            )
        if (method == "reference") != (reference is not None):
            given = (
                "is missing; method 'reference' needs it"
                if reference is None
                else "goes with method 'reference' only"
            )
            raise invalid("reference", given)

        def work(compare: Compare) -> Ranking:
            return rank(compare, prompt_text(request.prompt), responses, method=method, reference=reference)

        with self.batcher.admit(comparisons_needed(method, len(responses))):
            ranking = await self._run_in_rounds(work)
        return RankResponse(
            order=list(ranking.order),
            best=ranking.best,
            scores=None if ranking.scores is None else list(ranking.scores),
            comparisons=ranking.comparisons,
            intransitive=ranking.intransitive,
            model=self._model.name,
            revision=self._model.revision,
        )

    def health(self) -> HealthResponse:
        """That requests are answered; BatcherClosed if they are not."""
        if not self.batcher.alive:
            raise BatcherClosed("the batcher is not running")
        return HealthResponse(
            pending_comparisons=self.batcher.pending, model=self._model.name, revision=self._model.revision
        )

    async def _judge_one(self, pair: Pair) -> Comparison:
        with self.batcher.admit(1):
            [result] = await self._judge([pair])
        return result

    async def _judge(self, pairs: Sequence[Pair]) -> list[Comparison]:
        # In a thread: a text of a megabyte takes a while to tokenise.
        costs = await asyncio.to_thread(self._model.costs, pairs)
        known = [cost for cost in costs if cost is not None]
        if len(known) < len(pairs):
            raise invalid(
                "body", "holds a prompt with two answers that are too long for the model; shorten them"
            )
        return await self.batcher.run(pairs, costs=known)

    async def _run_in_rounds(self, work: Callable[[Compare], Ranking]) -> Ranking:
        """Run `rank`, which calls for one round after the other, in a thread whose rounds join the shared batches."""
        loop = asyncio.get_running_loop()
        abandoned = threading.Event()
        rounds: list[Future[list[Comparison]]] = []

        def compare(pairs: Sequence[Pair]) -> list[Comparison]:
            rounds.append(asyncio.run_coroutine_threadsafe(self._judge(pairs), loop))
            if abandoned.is_set():
                rounds[-1].cancel()
            return rounds[-1].result()

        try:
            return await loop.run_in_executor(self._rankers, work, compare)
        finally:
            # If the request was cancelled, the thread is still waiting for a round, or about to ask for one.
            abandoned.set()
            for judged in rounds[-1:]:
                judged.cancel()


def comparisons_needed(method: RankMethod, responses: int) -> int:
    """How many pairs a ranking compares."""
    counts: dict[RankMethod, int] = {
        "reference": responses,
        "linear": responses - 1,
        "bracket": responses - 1,
        "round_robin": responses * (responses - 1) // 2,
    }
    return counts[method]


def gram_app(service: GramService, args: Args) -> FastAPI:
    """The HTTP application around a service."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = new_app(
        title="Eagleray GRAM",
        description=f"Compares, ranks and rewards answers. Bodies up to {args.max_body_bytes} bytes, rankings of up to "
        f"{args.max_responses} answers, at most {args.timeout_s:g} s a request.",
        max_body_bytes=args.max_body_bytes,
        timeout_s=args.timeout_s,
        lifespan=lifespan,
    )

    @app.post("/compare", responses=ERROR_RESPONSES, summary="Which of two answers is better")
    async def compare(request: CompareRequest) -> CompareResponse:
        return await service.compare(request)

    @app.post("/rank", responses=ERROR_RESPONSES, summary="Put several answers in order")
    async def rank_responses(request: RankRequest) -> RankResponse:
        return await service.rank(request)

    @app.post("/reward", responses=ERROR_RESPONSES, summary="Reward one answer against a reference")
    async def reward(request: RewardRequest) -> RewardResponse:
        return await service.reward(request)

    @app.get("/healthz", responses={503: ERROR_RESPONSES[503]}, summary="Whether the model takes requests")
    async def healthz() -> HealthResponse:
        return service.health()

    return app


@serve.deployment(
    name="gram",
    max_ongoing_requests=MAX_ONGOING_REQUESTS,
    max_queued_requests=MAX_ONGOING_REQUESTS,
    backpressure_config={"status_code": 429, "retry_after_s": 1},
    max_constructor_retry_count=2,
)
@serve.ingress()
class GramDeployment:
    """One replica: a model, its batcher and the endpoints."""

    def __init__(self, args: Args):
        on_gpu = bool(ray.get_runtime_context().get_accelerator_ids().get("GPU"))
        if not on_gpu:
            torch.set_num_threads(max(1, int(args.cpus)))
        self._args = args
        self._service = GramService(load_model(args, device="cuda" if on_gpu else "cpu"), args)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return gram_app(self._service, self._args)

    def check_health(self) -> None:
        """Called by Serve; a replica that fails is replaced."""
        self._service.health()


def build_app(args: Args) -> Application:
    """The Serve application; `eagleray.serve.gram:build_app` is the import path for `serve deploy`."""
    return GramDeployment.options(
        ray_actor_options=args.actor_options(),
        graceful_shutdown_timeout_s=args.timeout_s + 10,
    ).bind(args)


def load_model(args: Args, *, device: str) -> LoadedModel:
    """Load what `args` name: a discriminative reward model if the folder has the settings of one, else a judge."""
    folder = model_folder(args.model)
    if (folder / REWARD_SETTINGS).is_file():
        if args.dtype != "saved":
            raise ValueError(f"`dtype` is {args.dtype!r}; a discriminative reward model takes 'saved' only.")
        scorer = DiscriminativeScorer.from_pretrained(folder, max_batch_tokens=args.max_batch_tokens)
        compare, costs = scorer.compare, partial(_scorer_costs, scorer)
    else:
        judge = Judge.from_pretrained(
            folder, device=device, dtype=_DTYPES.get(args.dtype), max_batch_tokens=args.max_batch_tokens
        )
        compare, costs = judge.compare, partial(_judge_costs, judge)
    return LoadedModel(compare, costs, args.name or folder.name, model_revision(folder, args.dtype))


def _judge_costs(judge: Judge, pairs: Sequence[Pair]) -> list[int | None]:
    """Tokens of both orders, without what a pair shares with the one before it: the judge computes that once."""
    costs: list[int | None] = []
    before: list[int] = []
    for pair in pairs:
        ids = judge.encoder.encode(*pair)
        shared = common_prefix(before, ids, len(ids)) if ids and judge.share_prefix else 0
        costs.append(None if ids is None else 2 * max(1, len(ids) - shared))
        before = ids or before
    return costs


def _scorer_costs(scorer: DiscriminativeScorer, pairs: Sequence[Pair]) -> list[int | None]:
    """Tokens of both conversations, without those of an earlier pair: the model scores each once."""
    seen: set[tuple[str, str]] = set()
    costs: list[int | None] = []
    for prompt, *answers in pairs:
        new = {(prompt, answer) for answer in answers} - seen
        costs.append(max(1, sum(len(scorer.encoder.encode(*conversation)) for conversation in new)))
        seen |= new
    return costs
