"""Reward functions for reinforcement learning that ask a gateway: for trl's GRPOTrainer and RLOOTrainer, and for verl.

    from eagleray.serve.reward_client import trl_reward
    trainer = GRPOTrainer(model, reward_funcs=trl_reward("http://127.0.0.1:8000", model="gram"), ...)

    # verl: its batch manager, so that all answers to a prompt come together
    reward_model.reward_manager=batch
    custom_reward_function.path=.../eagleray/serve/reward_client.py
    custom_reward_function.name=verl_reward
    +custom_reward_function.reward_kwargs.url=http://127.0.0.1:8000

Only httpx is needed. Answers to one prompt stay in one request, because a pairwise judge without a reference measures
them against each other; otherwise requests are filled up to `batch_size` answers and several are under way at a time.
What the server refuses for the moment (429, 503, or no connection) is asked again after the time it names.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from eagleray.platform.data.layouts import readable

_LATER = (429, 503)
_LONGEST_WAIT_S = 30.0


class RewardError(RuntimeError):
    """The server refused a request for good, or for longer than the client was to wait."""


@dataclass(frozen=True)
class RewardClient:
    """Asks `/get_reward` of a gateway.

    Args:
        url: Base address of the gateway.
        model: Name of the model; needed if several give rewards.
        key: API key.
        batch_size: Answers of one request, unless one prompt has more.
        concurrency: Requests under way at a time.
        patience_s: How long to ask again before giving up on a request.
        timeout_s: Longest time for one answer of the server.
        transport: Another transport of httpx, for tests.
    """

    url: str
    model: str | None = None
    key: str | None = None
    batch_size: int = 64
    concurrency: int = 4
    patience_s: float = 300
    timeout_s: float = 120
    transport: httpx.BaseTransport | None = None

    def rewards(
        self, prompts: Sequence[str], answers: Sequence[str], references: Sequence[str | None] | None = None
    ) -> list[float]:
        """A reward for each answer, in order.

        An answer without text cannot be judged; it gets the lowest reward among the others, or 0.

        Args:
            prompts: The prompt of each answer.
            answers: The answers.
            references: What a pairwise judge measures each answer against; None: the other answers to its prompt.

        Raises:
            RewardError: See the class.
        """
        rows = [i for i, answer in enumerate(answers) if answer.strip()]
        references = references or [None] * len(answers)
        found: dict[int, float] = {}
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        options: dict[str, Any] = {"headers": headers, "timeout": self.timeout_s, "transport": self.transport}
        with (
            httpx.Client(base_url=self.url, **options) as client,
            ThreadPoolExecutor(self.concurrency) as pool,
        ):
            batches = list(_batches([prompts[i] for i in rows], self.batch_size))
            bodies = [
                {
                    "query": [prompts[rows[i]] + answers[rows[i]] for i in batch],
                    "prompts": [prompts[rows[i]] for i in batch],
                    "labels": [references[rows[i]] for i in batch],
                }
                for batch in batches
            ]
            for batch, rewards in zip(
                batches, pool.map(lambda body: self._ask(client, body), bodies), strict=True
            ):
                found |= {rows[i]: reward for i, reward in zip(batch, rewards, strict=True)}
        lowest = min(found.values(), default=0.0)
        return [found.get(i, lowest) for i in range(len(answers))]

    def _ask(self, client: httpx.Client, body: dict[str, Any]) -> list[float]:
        until = time.monotonic() + self.patience_s
        wait, attempt = 0.5, 0
        while True:
            try:
                params = {} if self.model is None else {"model": self.model}
                answer = client.post("/get_reward", json=body, params=params)
            except httpx.TransportError as error:
                answer, problem = None, type(error).__name__
            else:
                if answer.is_success:
                    return answer.json()["rewards"]
                problem = f"{answer.status_code} {answer.text[:500]}"
                if answer.status_code not in _LATER:
                    raise RewardError(f"{self.url}/get_reward refused the request: {problem}")
            attempt += 1
            if answer is not None and answer.headers.get("retry-after", "").isdigit():
                pause = float(answer.headers["retry-after"])
            else:
                pause, wait = wait * (0.5 + random.random()), min(2 * wait, _LONGEST_WAIT_S)
            if time.monotonic() + pause > until:
                raise RewardError(
                    f"{self.url}/get_reward gave no reward in {self.patience_s:g} s and {attempt} attempts: {problem}. "
                    "Is the server up? Raise `patience_s`, or give the model more replicas."
                )
            time.sleep(pause)


def trl_reward(url: str, *, reference: str | None = None, **options: Any) -> Callable[..., list[float]]:
    """A reward function for the `reward_funcs` of trl's GRPOTrainer and RLOOTrainer.

    Args:
        url: Base address of the gateway.
        reference: Column of the data set with the answers to measure against. Default: a pairwise judge measures the
            answers to one prompt against each other.
        options: Further arguments of `RewardClient`.
    """
    client = RewardClient(url, **options)

    def eagleray_reward(*, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        references = None if reference is None else columns[reference]
        return client.rewards([_text(p) for p in prompts], [_text(c) for c in completions], references)

    return eagleray_reward


def verl_reward(
    data_sources: Sequence[str],
    solution_strs: Sequence[str],
    ground_truths: Sequence[Any],
    extra_infos: Sequence[dict[str, Any]],
    *,
    url: str,
    prompt_key: str = "question",
    use_ground_truth: bool = False,
    **options: Any,
) -> list[float]:
    """Rewards for verl's batch manager, which calls it by these names.

    Args:
        data_sources: Not used.
        solution_strs: The answers.
        ground_truths: Reference answers, used if `use_ground_truth` says so.
        extra_infos: Of each row; verl gives no prompt, so it must be in here.
        url: Base address of the gateway.
        prompt_key: Where in `extra_infos` the prompt is: a text or messages.
        use_ground_truth: Measure each answer against its ground truth instead of against the others.
        options: Further arguments of `RewardClient`.

    Raises:
        RewardError: A row has no prompt, or see `RewardClient`.
    """
    if any(not info or prompt_key not in info for info in extra_infos):
        raise RewardError(
            f"`extra_info` has no {prompt_key!r}, and verl gives a reward function no prompt. Write it there when the "
            "data are prepared, and name its key by `reward_kwargs.prompt_key`."
        )
    prompts = [_text(info[prompt_key]) for info in extra_infos]
    references = [str(truth) for truth in ground_truths] if use_ground_truth else None
    return RewardClient(url, **options).rewards(prompts, list(solution_strs), references)


def _text(value: Any) -> str:
    """A text as it is; messages as the data readers write them for training and evaluation."""
    if isinstance(value, str):
        return value
    if len(value) == 1:
        return value[0]["content"]
    return readable([{"role": message["role"], "content": message["content"]} for message in value])


def _batches(prompts: Sequence[str], size: int) -> Iterator[list[int]]:
    """Positions in batches of about `size`; those with one prompt stay together."""
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(i)
    batch: list[int] = []
    for group in groups.values():
        if batch and len(batch) + len(group) > size:
            yield batch
            batch = []
        batch = [*batch, *group]
    if batch:
        yield batch
