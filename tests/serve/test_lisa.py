"""A language model in OpenAI's shapes on a tiny model: texts equal greedy decoding, streams, refusals. Then once over HTTP with the `openai` client."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from builders import CHAT_TEMPLATE, tiny_model, tiny_tokenizer
from fastapi.testclient import TestClient

from eagleray.jobs.serve import serving
from eagleray.models.backbone.decoding import Continuation
from eagleray.models.backbone.streaming import TextStream
from eagleray.models.lisa.convert import Start, convert
from eagleray.models.lisa.spec import LisaSpec
from eagleray.serve.batching import BatcherClosed, QueueFull
from eagleray.serve.decoding import DecodingLoop, Progress
from eagleray.serve.lisa import Args, LisaService, LoadedModel, Row, interleaved, lisa_app


@lru_cache
def loaded(*, chat: bool = True) -> LoadedModel:
    return LoadedModel(tiny_model(max_position_embeddings=128), tiny_tokenizer(chat=chat), "tiny", "r1")


def make_client(*, chat: bool = True, **limits: Any) -> TestClient:
    args = Args(model="unused", **{"max_new_tokens": 24, **limits})
    return TestClient(lisa_app(LisaService(loaded(chat=chat), args), args))


@pytest.fixture
def client() -> Iterator[TestClient]:
    with make_client() as client:
        yield client


def greedy(text: str, tokens: int) -> str:
    """The continuation that the model's own `generate` writes."""
    model, tokenizer = loaded().model, loaded().tokenizer
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    out = model.generate(
        ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=tokenizer.eos_token_id
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def complete(client: TestClient, **values: Any) -> Any:
    return client.post("/v1/completions", json={"model": "tiny", "temperature": 0, **values})


def test_a_completion_is_what_generate_writes(client: TestClient) -> None:
    body = complete(client, prompt=["numbers 0 1 2", "A short"], max_tokens=10).json()
    assert [choice["text"] for choice in body["choices"]] == [
        greedy("numbers 0 1 2", 10),
        greedy("A short", 10),
    ]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["length", "length"]
    assert body["object"] == "text_completion" and body["system_fingerprint"] == "r1"
    usage = body["usage"]
    assert usage["completion_tokens"] == 20 and usage["total_tokens"] == usage["prompt_tokens"] + 20


def test_requests_that_come_together_get_what_they_get_alone(client: TestClient) -> None:
    prompts = [
        "numbers",
        "user assistant Name a river in Peru.",
        "words in sentences, with commas",
        "flows",
    ] * 3
    with ThreadPoolExecutor(6) as pool:
        answers = list(
            pool.map(lambda prompt: complete(client, prompt=prompt, max_tokens=12).json(), prompts)
        )
    assert [answer["choices"][0]["text"] for answer in answers] == [greedy(prompt, 12) for prompt in prompts]


def test_a_chat_uses_the_template_and_streams_the_same_text(client: TestClient) -> None:
    messages = [
        {"role": "developer", "content": "You compare."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Name a "}, {"type": "text", "text": "river."}],
        },
    ]
    request = {"model": "tiny", "messages": messages, "temperature": 0, "max_completion_tokens": 9, "n": 2}
    prompt = (
        "<|bos|><|im_start|>system\nYou compare.<|im_end|>\n<|im_start|>user\nName a river.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert "add_generation_prompt" in CHAT_TEMPLATE
    whole = client.post("/v1/chat/completions", json=request).json()
    assert [c["message"]["content"] for c in whole["choices"]] == [greedy(prompt, 9)] * 2
    streaming = {**request, "stream": True, "stream_options": {"include_usage": True}}
    answer = client.post("/v1/chat/completions", json=streaming)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(answer.text)
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    for index in range(2):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["delta"]["content"] for choice in own) == greedy(prompt, 9)
        assert own[0]["delta"]["role"] == "assistant" and own[1]["delta"]["role"] is None
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["length"]


def test_stop_texts_end_the_text_in_both_ways(client: TestClient) -> None:
    whole = greedy("numbers 0 1 2", 20)
    stop = whole[6:9]
    body = complete(client, prompt="numbers 0 1 2", max_tokens=20, stop=stop).json()
    [choice] = body["choices"]
    assert choice == {"index": 0, "text": whole.split(stop)[0], "finish_reason": "stop", "logprobs": None}
    streamed = complete(client, prompt="numbers 0 1 2", max_tokens=20, stop=[stop], stream=True)
    assert "".join(e["choices"][0]["text"] for e in events(streamed.text)) == whole.split(stop)[0]


def test_a_seed_repeats_a_draw(client: TestClient) -> None:
    def draw(seed: int | None) -> list[str]:
        body = complete(client, prompt="numbers", temperature=1.5, seed=seed, n=3, max_tokens=12).json()
        return [choice["text"] for choice in body["choices"]]

    assert draw(5) == draw(5) and len(set(draw(5))) == 3
    assert draw(None) != draw(None)


@pytest.mark.parametrize(
    ("path", "values", "status", "message"),
    [
        (
            "completions",
            {"prompt": "a", "model": "other"},
            404,
            "no such model here; /v1/models lists for this endpoint: tiny",
        ),
        ("completions", {"prompt": "a", "max_tokens": 25}, 422, "`max_tokens` is 25; this server allows 24"),
        ("completions", {"prompt": "7 " * 120, "max_tokens": 9}, 422, "the model takes 128 in all"),
        ("completions", {"prompt": "a", "temperature": 3}, 422, "`temperature`"),
        ("completions", {"prompt": "a", "logit_bias": {}}, 422, "`logit_bias` is not a known field"),
        ("completions", {"prompt": "a", "presence_penalty": 0.5}, 422, "`presence_penalty` is a number"),
        ("completions", {"prompt": "a", "stop": ["x"] * 5}, 422, "`stop"),
        ("chat/completions", {"messages": []}, 422, "`messages` has 0 item"),
        ("chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, 422, "'robot'; it must be"),
        ("completions", {"prompt": "x" * 2**20}, 413, "larger than 1048576 bytes"),
    ],
)
def test_refusals(client: TestClient, path: str, values: dict[str, Any], status: int, message: str) -> None:
    answer = client.post(f"/v1/{path}", json={"model": "tiny", **values})
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_a_model_without_a_chat_template_says_so() -> None:
    with make_client(chat=False) as client:
        request = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
        assert "has no chat template" in client.post("/v1/chat/completions", json=request).text
        assert client.get("/healthz").json()["pending_continuations"] == 0


class SlowDecoder:
    """Counts instead of computing; waits at a gate before each step; fails at a prompt [13]."""

    def __init__(self, gate: threading.Semaphore, most: list[int]) -> None:
        self.gate, self.most = gate, most
        self.active: list[Continuation] = []
        self.columns = 0

    def add(self, new: list[Continuation]) -> None:
        if any(list(one.prompt) == [13] for one in new):
            raise ArithmeticError("thirteen")
        self.active += new
        self.most.append(len(self.active))
        self._write()

    def step(self) -> None:
        assert self.gate.acquire(timeout=10)
        self._write()

    def drop(self, given_up: list[Continuation]) -> None:
        self.active = [one for one in self.active if one not in given_up]

    def _write(self) -> None:
        for one in self.active:
            one.tokens.append(len(one.tokens))
            if len(one.tokens) == one.max_tokens:
                one.finished = "length"
        self.active = [one for one in self.active if one.finished is None]


def test_rows_and_cache_are_bounded_and_who_leaves_makes_room() -> None:
    gate, most = threading.Semaphore(0), [0]

    async def main() -> None:
        loop = DecodingLoop(lambda: SlowDecoder(gate, most), max_rows=3, max_batch_tokens=40, max_pending=6)

        async def decode(prompt: int, tokens: int) -> list[int]:
            async with loop.decoding([Continuation([1] * prompt, max_tokens=tokens)]) as [progress]:
                async for _ in progress.changes():
                    pass
                return progress.continuation.tokens

        async with loop:
            abandoned = asyncio.create_task(decode(2, 1000))  # longer than the budget: runs alone
            while loop.pending == 0 or most[-1] == 0:
                await asyncio.sleep(0.01)
            tasks = [asyncio.create_task(decode(2, 6)) for _ in range(5)]
            while loop.pending < 6:
                await asyncio.sleep(0.01)
            with pytest.raises(QueueFull, match="1 needed, 6 of 6 pending"):
                await decode(1, 1)
            assert most[-1] == 1
            abandoned.cancel()
            await asyncio.wait([abandoned])  # or the thread spends the steps below on it
            for _ in range(100):
                gate.release()
            assert await asyncio.wait_for(asyncio.gather(*tasks), 10) == [list(range(6))] * 5
            assert max(most) == 3 and loop.pending == 0
        with pytest.raises(BatcherClosed):
            await decode(1, 1)

    asyncio.run(asyncio.wait_for(main(), 20))


def test_a_row_no_longer_counts_when_its_client_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has an answer may ask again at once and is not refused because of it."""
    notify, pending = Progress.notify, []

    async def main() -> None:
        async with DecodingLoop(
            lambda: SlowDecoder(threading.Semaphore(1000), []), max_rows=3, max_batch_tokens=40, max_pending=1
        ) as loop:

            def noted(progress: Progress) -> None:
                if progress.continuation.finished is not None:
                    pending.append(loop.pending)
                notify(progress)

            monkeypatch.setattr(Progress, "notify", noted)
            async with loop.decoding([Continuation([1, 1], max_tokens=3)]) as [progress]:
                async for _ in progress.changes():
                    pass

    asyncio.run(asyncio.wait_for(main(), 20))
    assert pending == [0]


def test_only_the_last_piece_has_a_finish_reason_however_late_it_is_read() -> None:
    """A row may have ended long before the client reads its first piece."""
    gate = threading.Semaphore(0)

    async def pace() -> None:
        while True:
            gate.release()
            await asyncio.sleep(0.01)

    async def main() -> None:
        reasons: dict[int, list[str | None]] = {0: [], 1: []}
        async with (
            DecodingLoop(
                lambda: SlowDecoder(gate, []), max_rows=3, max_batch_tokens=100, max_pending=6
            ) as loop,
            loop.decoding([Continuation([1], max_tokens=most) for most in (20, 30)]) as handed_in,
        ):
            rows = [Row(index, one, TextStream(loaded().tokenizer)) for index, one in enumerate(handed_in)]
            steps = asyncio.create_task(pace())
            async for row, piece in interleaved(rows):
                while loop.pending:
                    await asyncio.sleep(0.01)
                reasons[row.index].append(piece.finish_reason)
            steps.cancel()
        for own in reasons.values():
            assert len(own) > 1 and own == [None] * (len(own) - 1) + ["length"]

    asyncio.run(asyncio.wait_for(main(), 20))


def test_a_continuation_that_ends_during_a_turn_has_ended_in_the_next() -> None:
    class Ends(Continuation):
        """The thread writes its end just after the first look at it."""

        looks = 0

        @property
        def finished(self) -> str | None:  # type: ignore[override]
            self.looks += 1
            return "length" if self.looks > 1 else None

        @finished.setter
        def finished(self, _: str | None) -> None: ...

    async def main() -> list[str | None]:
        progress = Progress(Ends([1], max_tokens=3), asyncio.get_running_loop())
        progress.continuation.tokens += [5, 6, 7]
        reasons = []
        progress.notify()
        async for piece in Row(0, progress, TextStream(loaded().tokenizer)).pieces():
            reasons.append(piece.finish_reason)
            progress.notify()
        return reasons

    assert asyncio.run(asyncio.wait_for(main(), 20)) == [None, "length"]


def test_a_failure_reaches_those_it_concerns_and_the_loop_goes_on() -> None:
    gate = threading.Semaphore(1000)

    async def main() -> None:
        async with DecodingLoop(
            lambda: SlowDecoder(gate, []), max_rows=3, max_batch_tokens=40, max_pending=6
        ) as loop:

            async def decode(prompt: list[int]) -> int:
                async with loop.decoding([Continuation(prompt, max_tokens=3)]) as [progress]:
                    async for _ in progress.changes():
                        pass
                    return len(progress.continuation.tokens)

            with pytest.raises(ArithmeticError):
                await decode([13])
            assert await decode([1]) == 3 and loop.alive

    asyncio.run(asyncio.wait_for(main(), 20))


def test_a_stream_that_takes_too_long_says_so_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded().model
    forward = type(model).forward

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.2)
        return forward(*args, **kwargs)

    monkeypatch.setattr(type(model), "forward", slow)
    with make_client(timeout_s=1.0) as client:
        text = complete(client, prompt="numbers", max_tokens=20, stream=True).text
        assert "[DONE]" not in text and "was not complete within 1 s" in text
        assert complete(client, prompt="numbers", max_tokens=20).status_code == 504


@pytest.mark.ray
def test_the_openai_client_talks_to_a_converted_model(ray_cluster: None, tmp_path: Path) -> None:
    spec = LisaSpec(shared_layers=(2, 3), rank=4)
    model = convert(tiny_model(num_hidden_layers=4), spec, start=Start(align="identity")).eval()
    tokenizer = tiny_tokenizer()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "shared")
    prompt = "<|bos|><|im_start|>user\nName a river in Peru.<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    question = [{"role": "user", "content": "Name a river in Peru."}]
    with serving(tmp_path / "shared", kind="lisa", cpus=1) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        [card] = client.models.list().data
        settings = {"model": card.id, "messages": question, "temperature": 0, "max_completion_tokens": 8}
        answer = client.chat.completions.create(**settings)
        assert answer.choices[0].message.content == expected and answer.usage.completion_tokens == 8
        pieces = [
            chunk.choices[0].delta.content or ""
            for chunk in client.chat.completions.create(**settings, stream=True)
        ]
        assert "".join(pieces) == expected and len(pieces) > 1
        with pytest.raises(openai.NotFoundError, match="no such model here"):
            client.completions.create(model="other", prompt="Hi")
