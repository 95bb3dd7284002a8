"""A GRAM judge (or a discriminative reward model) behind HTTP: `/compare`, `/rank`, `/reward`, and what others call it.

Every comparison of every request goes through one `Batcher`; a ranking takes part in it round by round, so rounds of
different requests share batches. The scores are those of `Judge.compare`, called here with larger batches and nothing
else. The shapes of other programs are in `rewards.py` and, for a judge, `judging.py`.

`eagleray serve gram=MODEL` starts it.
"""

# No postponed annotations here: Ray Serve looks at the annotation of `build_app` itself to learn the type of its
# arguments, and passes the YAML on unchecked when it finds a string.

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from fastapi import FastAPI
from pydantic import Field, model_validator
from ray.serve import Application

from eagleray.models.gram.alignment import transform_reward
from eagleray.models.gram.batching import common_prefix
from eagleray.models.gram.discriminative import SETTINGS_FILE as REWARD_SETTINGS
from eagleray.models.gram.discriminative import DiscriminativeScorer
from eagleray.models.gram.judge import Comparison, Judge, Pair
from eagleray.models.gram.prompts import JudgeEncoder
from eagleray.models.gram.ranking import Compare, Ranking, rank
from eagleray.platform.serving import ServedModel, model_folder, model_revision
from eagleray.serve.batching import Batcher, BatcherClosed
from eagleray.serve.http_app import ERROR_RESPONSES, check_model, invalid, new_app
from eagleray.serve.judging import add_judge_routes
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
from eagleray.serve.replica import Served, model_application
from eagleray.serve.rewards import Group, Scores, add_reward_routes

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


Item = Pair | tuple[str, str]
"""What shares a batch: pairs to compare, and conversations to reward."""


@dataclass(frozen=True)
class LoadedModel:
    """What is served: a `Judge`, or anything else that compares pairs of answers."""

    compare: Callable[[Sequence[Pair]], Sequence[Comparison]]
    costs: Callable[[Sequence[Pair]], list[int | None]]
    """Tokens that each pair adds to a round; None for a pair that is too long to be judged."""
    name: str
    revision: str
    encoder: JudgeEncoder | None = None
    """Of a judge that writes a label; None for a discriminative model."""
    scorer: DiscriminativeScorer | None = None
    """A model with a reward for each answer by itself."""

    def compute(self, items: Sequence[Item]) -> list[Comparison | float]:
        """Comparisons of pairs and rewards of conversations, in order."""
        pairs = [item for item in items if len(item) == 3]
        alone = [item for item in items if len(item) == 2]
        compared = iter(self.compare(pairs) if pairs else [])
        scored = iter(self.scorer.score(alone) if self.scorer is not None and alone else [])
        return [next(compared) if len(item) == 3 else next(scored) for item in items]


class GramService:
    """The work behind the endpoints, without HTTP: checks that need settings, batching, ranking in rounds."""

    def __init__(self, model: LoadedModel, args: Args):
        self.model = model
        self._max_responses = args.max_responses
        self.batcher = Batcher[Item, Comparison | float](
            model.compute,
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
        check_model(request.model, self.model.name)
        result = await self._judge_one((prompt_text(request.prompt), request.a, request.b))
        return CompareResponse(
            p_a=result.p_a,
            p_b=result.p_b,
            p_order1=result.p_order1,
            p_order2=result.p_order2,
            consistent=result.consistent,
            model=self.model.name,
            revision=self.model.revision,
        )

    async def reward(self, request: RewardRequest) -> RewardResponse:
        """Judge a response against its reference."""
        check_model(request.model, self.model.name)
        result = await self._judge_one((prompt_text(request.prompt), request.response, request.reference))
        probability = torch.tensor(result.p_a, dtype=torch.float64)
        return RewardResponse(
            probability=result.p_a,
            centred=transform_reward(probability, "centred").item(),
            logit=transform_reward(probability, "logit").item(),
            consistent=result.consistent,
            model=self.model.name,
            revision=self.model.revision,
        )

    async def rank(self, request: RankRequest) -> RankResponse:
        """Rank several responses."""
        check_model(request.model, self.model.name)
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
            model=self.model.name,
            revision=self.model.revision,
        )

    async def score(self, groups: Sequence[Group]) -> Scores:
        """Answers scored by themselves, if the model can; else against a reference or the other answers."""
        if max(len(group.answers) for group in groups) > self._max_responses and self.model.scorer is None:
            raise invalid(
                "body", f"has more than {self._max_responses} answers to one prompt, the most allowed"
            )
        if self.model.scorer is not None:
            return await self._score_alone(groups)
        if any(group.reference is None and len(group.answers) == 1 for group in groups):
            raise invalid(
                "body",
                "has a single answer to a prompt and no reference; this judge compares, so give it a reference or "
                "several answers",
            )
        plans = [_pairs_of(group) for group in groups]
        pairs = [
            (group.prompt, a, b) for group, plan in zip(groups, plans, strict=True) for _, _, a, b in plan
        ]
        with self.batcher.admit(len(pairs)):
            results, tokens = await self._judge(pairs)
        wins = iter(result.p_a for result in results)
        return Scores(
            [_mean_wins(group, plan, wins) for group, plan in zip(groups, plans, strict=True)], tokens
        )

    async def judge(self, pairs: Sequence[Pair]) -> tuple[list[Comparison], int]:
        """Comparisons of pairs, and the tokens computed."""
        with self.batcher.admit(len(pairs)):
            return await self._judge(pairs)

    def health(self) -> HealthResponse:
        """That requests are answered; BatcherClosed if they are not."""
        if not self.batcher.alive:
            raise BatcherClosed("the batcher is not running")
        return HealthResponse(
            pending_comparisons=self.batcher.pending, model=self.model.name, revision=self.model.revision
        )

    async def _score_alone(self, groups: Sequence[Group]) -> Scores:
        scorer = self.model.scorer
        assert scorer is not None
        items: list[Item] = [(group.prompt, answer) for group in groups for answer in group.answers]
        with self.batcher.admit(len(items)):
            costs = await asyncio.to_thread(lambda: [len(scorer.encoder.encode(*item)) for item in items])
            values = iter(await self.batcher.run(items, costs=costs))
        return Scores([[_number(next(values)) for _ in group.answers] for group in groups], sum(costs))

    async def _judge_one(self, pair: Pair) -> Comparison:
        with self.batcher.admit(1):
            [result], _ = await self._judge([pair])
        return result

    async def _judge(self, pairs: Sequence[Pair]) -> tuple[list[Comparison], int]:
        # In a thread: a text of a megabyte takes a while to tokenise.
        costs = await asyncio.to_thread(self.model.costs, pairs)
        known = [cost for cost in costs if cost is not None]
        if len(known) < len(pairs):
            raise invalid(
                "body", "holds a prompt with two answers that are too long for the model; shorten them"
            )
        results = await self.batcher.run(pairs, costs=known)
        return [result for result in results if isinstance(result, Comparison)], sum(known)

    async def _run_in_rounds(self, work: Callable[[Compare], Ranking]) -> Ranking:
        """Run `rank`, which calls for one round after the other, in a thread whose rounds join the shared batches."""
        loop = asyncio.get_running_loop()
        abandoned = threading.Event()
        rounds: list[Future[tuple[list[Comparison], int]]] = []

        def compare(pairs: Sequence[Pair]) -> list[Comparison]:
            rounds.append(asyncio.run_coroutine_threadsafe(self._judge(pairs), loop))
            if abandoned.is_set():
                rounds[-1].cancel()
            return rounds[-1].result()[0]

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


def _pairs_of(group: Group) -> list[tuple[int, int | None, str, str]]:
    """Which comparisons a group needs: positions of both answers (None: the reference), and their texts."""
    answers = group.answers
    if group.reference is not None:
        return [(i, None, answer, group.reference) for i, answer in enumerate(answers)]
    return [(i, j, answers[i], answers[j]) for i in range(len(answers)) for j in range(i + 1, len(answers))]


def _mean_wins(
    group: Group, plan: Sequence[tuple[int, int | None, str, str]], wins: Iterator[float]
) -> list[float]:
    """The mean probability with which each answer of a group wins its comparisons."""
    found: list[list[float]] = [[] for _ in group.answers]
    for i, j, _, _ in plan:
        p_a = next(wins)
        found[i].append(p_a)
        if j is not None:
            found[j].append(1 - p_a)
    return [sum(values) / len(values) for values in found]


def _number(value: Comparison | float) -> float:
    assert not isinstance(value, Comparison)
    return value


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

    add_reward_routes(app, service.score, name=service.model.name)
    if (encoder := service.model.encoder) is not None:
        add_judge_routes(
            app,
            service.judge,
            template=encoder.template,
            labels=encoder.label_strings,
            name=service.model.name,
            revision=service.model.revision,
        )

    @app.get("/healthz", responses={503: ERROR_RESPONSES[503]}, summary="Whether the model takes requests")
    async def healthz() -> HealthResponse:
        return service.health()

    return app


def start(args: Args, /, *, device: str) -> Served:
    """Load the model and put its endpoints around it."""
    model = load_model(args, device=device)
    service = GramService(model, args)
    return Served(
        kind="gram",
        name=model.name,
        revision=model.revision,
        settings=args,
        max_body_bytes=args.max_body_bytes,
        app=gram_app(service, args),
        health=service.health,
    )


def build_app(args: Args) -> Application:
    """The Serve application; `eagleray.serve.gram:build_app` is the import path for `serve deploy`."""
    return model_application(start, args, kind="gram", max_ongoing_requests=MAX_ONGOING_REQUESTS)


def load_model(args: Args, *, device: str) -> LoadedModel:
    """Load what `args` name: a discriminative reward model if the folder has the settings of one, else a judge."""
    folder = model_folder(args.model)
    name, revision = args.name or folder.name, model_revision(folder, args.dtype)
    if (folder / REWARD_SETTINGS).is_file():
        if args.dtype != "saved":
            raise ValueError(f"`dtype` is {args.dtype!r}; a discriminative reward model takes 'saved' only.")
        scorer = DiscriminativeScorer.from_pretrained(folder, max_batch_tokens=args.max_batch_tokens)
        costs = partial(_scorer_costs, scorer)
        return LoadedModel(scorer.compare, costs, name, revision, scorer=scorer)
    judge = Judge.from_pretrained(
        folder, device=device, dtype=_DTYPES.get(args.dtype), max_batch_tokens=args.max_batch_tokens
    )
    return LoadedModel(judge.compare, partial(_judge_costs, judge), name, revision, encoder=judge.encoder)


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
