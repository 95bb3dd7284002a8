"""Reward functions that ask a gateway: order, batches, retries; then one step of trl's GRPO on a tiny model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from builders import tiny_model, tiny_tokenizer
from datasets import Dataset
from serving_cases import judge, listening

from eagleray.serve.fleet import LocalFleet
from eagleray.serve.gateway import gateway_app
from eagleray.serve.reward_client import RewardClient, RewardError, trl_reward, verl_reward


class Server:
    """Rewards an answer by its length and notes the requests; what `refuse` gives for the nth comes instead."""

    def __init__(self, refuse: Callable[[int], httpx.Response | None] = lambda _: None) -> None:
        self.refuse = refuse
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if (refusal := self.refuse(len(self.requests))) is not None:
            return refusal
        body = json.loads(request.content)
        rewards = [len(q) - len(p) for q, p in zip(body["query"], body["prompts"], strict=True)]
        return httpx.Response(200, json={"rewards": rewards})

    def client(self, **options: Any) -> RewardClient:
        return RewardClient("http://test", transport=httpx.MockTransport(self), **options)


def test_answers_to_a_prompt_stay_together_and_rewards_keep_their_order() -> None:
    server = Server()
    prompts = ["p", "q", "p", "r", "q", "p"]
    answers = ["a", "bb", "ccc", "dddd", "eeeee", "  "]
    rewards = server.client(batch_size=3, concurrency=1, model="gram", key="secret").rewards(prompts, answers)
    assert rewards == [1, 2, 3, 4, 5, 1]  # no text: the lowest
    assert [json.loads(r.content)["prompts"] for r in server.requests] == [["p", "p"], ["q", "q", "r"]]
    assert {str(r.url) for r in server.requests} == {"http://test/get_reward?model=gram"}
    assert {r.headers["authorization"] for r in server.requests} == {"Bearer secret"}
    assert server.client().rewards(["p"], [""]) == [0.0]


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again(status: int) -> None:
    server = Server(lambda n: httpx.Response(status, headers={"retry-after": "0"}) if n < 4 else None)
    assert server.client().rewards(["p"], ["aa"]) == [2]
    assert len(server.requests) == 4


def test_a_refusal_for_good_and_lost_patience_are_errors() -> None:
    bad = Server(lambda _: httpx.Response(422, json={"error": {"message": "no"}}))
    with pytest.raises(RewardError, match=r"refused the request: 422 .*no"):
        bad.client().rewards(["p"], ["a"])
    assert len(bad.requests) == 1

    def gone(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("nobody there")

    client = RewardClient("http://test", transport=httpx.MockTransport(gone), patience_s=0.01)
    with pytest.raises(
        RewardError, match=r"no reward in 0.01 s and 1 attempts: ConnectError. Is the server up"
    ):
        client.rewards(["p"], ["a"])


def test_verls_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    options: dict[str, Any] = {"url": "http://test", "transport": httpx.MockTransport(server)}
    messages = [{"role": "user", "content": "Hi"}]
    rows: dict[str, Any] = {
        "data_sources": ["d", "d"],
        "solution_strs": ["aa", "b"],
        "ground_truths": ["x", 7],
        "extra_infos": [{"question": "p"}, {"question": messages}],
    }
    assert verl_reward(**rows, **options, use_ground_truth=True) == [2, 1]
    body = json.loads(server.requests[0].content)
    assert body == {"query": ["paa", "Hib"], "prompts": ["p", "Hi"], "labels": ["x", "7"]}
    with pytest.raises(RewardError, match=r"`extra_info` has no 'prompt'.*reward_kwargs\.prompt_key"):
        verl_reward(**rows, **options, prompt_key="prompt")


@pytest.mark.filterwarnings("ignore")
def test_a_step_of_grpo_takes_its_reward_from_the_gateway(tmp_path: Path) -> None:
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = tiny_tokenizer(chat=True)
    config = GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        seed=0,
    )
    questions = [[{"role": "user", "content": text}] for text in ("Name a river.", "numbers 0 1 2")]
    with listening(gateway_app(LocalFleet([judge()]))) as url:
        reward = trl_reward(url, model="gram")
        seen: list[tuple[list[str], list[float]]] = []

        def noted(**columns: Any) -> list[float]:
            rewards = reward(**columns)
            seen.append(([c[0]["content"] for c in columns["completions"]], rewards))
            return rewards

        trainer = GRPOTrainer(
            tiny_model(max_position_embeddings=128),
            reward_funcs=noted,  # type: ignore[arg-type]
            args=config,
            train_dataset=Dataset.from_dict({"prompt": questions}),
            processing_class=tokenizer,
        )
        trainer.train()
    [(answers, rewards)] = seen
    assert len(rewards) == 4 and sum(rewards) == pytest.approx(2, abs=0.5)  # wins within a group
    for i, a in enumerate(answers):
        wins = [1 / (1 + math.exp(len(b) - len(a))) for j, b in enumerate(answers) if j != i]
        if all(answer.strip() for answer in answers):
            assert rewards[i] == pytest.approx(sum(wins) / 3)
    logged = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert logged == [pytest.approx(sum(rewards) / 4)]
