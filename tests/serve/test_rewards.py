"""Requests of other programs, replayed: vLLM's, Jina's, Cohere's and OpenRLHF's reward shapes, and OpenAI's client."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import openai
import pytest
import soundfile
from fastapi.testclient import TestClient
from serving_cases import judge, language_model, listening, translator

from eagleray.models.gram.judge import Comparison, Pair, read_out
from eagleray.models.gram.prompts import JudgeTemplate
from eagleray.serve.fleet import LocalFleet
from eagleray.serve.gateway import gateway_app
from eagleray.serve.protocol import Piece
from eagleray.serve.subtitles import srt, vtt

TEMPLATE = JudgeTemplate.load("eagleray")


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def biased(pairs: Sequence[Pair]) -> list[Comparison]:
    """Prefers the longer answer, and slot A by one."""
    return [read_out(len(a) - len(b) + 1.0, len(b) - len(a) + 1.0) for _, a, b in pairs]


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(gateway_app(LocalFleet([judge(max_responses=4)]))) as client:
        yield client


class LengthScorer:
    """A reward for each answer by itself: its length."""

    encoder = SimpleNamespace(encode=lambda prompt, answer: [0] * 3)

    def score(self, conversations: Sequence[tuple[str, str]]) -> list[float]:
        return [float(len(answer)) for _, answer in conversations]


@pytest.fixture(scope="module")
def scorer() -> Iterator[TestClient]:
    with TestClient(gateway_app(LocalFleet([judge("rm", scorer=LengthScorer())]))) as client:
        yield client


# ---------------------------------------------------------------- rewards


@pytest.mark.parametrize(
    ("first", "second"), [("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2")]
)
def test_vllms_score(client: TestClient, first: str, second: str) -> None:
    """Means over the other answers: lengths 1, 2 and 4."""
    body = client.post("/v1/score", json={"model": "gram", first: "x", second: ["a", "aa", "aaaa"]}).json()
    assert (body["object"], body["model"], body["usage"]["total_tokens"]) == ("list", "gram", 21)
    expected = [
        (sigmoid(-1) + sigmoid(-3)) / 2,
        (sigmoid(1) + sigmoid(-2)) / 2,
        (sigmoid(3) + sigmoid(2)) / 2,
    ]
    assert [row["score"] for row in body["data"]] == pytest.approx(expected)
    assert [(row["index"], row["object"]) for row in body["data"]] == [(i, "score") for i in range(3)]


def test_a_prompt_for_each_answer_and_a_reference(client: TestClient) -> None:
    request = {"text_1": ["x", "y", "x"], "text_2": ["aaa", "a", "a"], "reference": "bb"}
    scores = [row["score"] for row in client.post("/v1/score", json=request).json()["data"]]
    assert scores == pytest.approx([sigmoid(1), sigmoid(-1), sigmoid(-1)])
    alone = client.post("/v1/score", json={"text_1": "x", "text_2": "a"})
    assert alone.status_code == 422 and "give it a reference or several answers" in alone.text
    uneven = client.post("/v1/score", json={"text_1": ["x", "y"], "text_2": ["a", "b", "c"]})
    assert uneven.status_code == 422 and "`text_1` has 2 items; 1 or 3, as `text_2`" in uneven.text
    many = client.post("/v1/score", json={"text_1": "x", "text_2": list("abcde")})
    assert many.status_code == 422 and "more than 4 answers" in many.text


def test_a_model_with_rewards_of_its_own_gives_them(scorer: TestClient) -> None:
    one = scorer.post("/v1/score", json={"text_1": "x", "text_2": "aaa"}).json()
    assert [row["score"] for row in one["data"]] == [3.0] and one["usage"]["prompt_tokens"] == 3
    body = scorer.post("/get_reward", json={"query": ["xaa", "yb"], "prompts": ["x", "y"]}).json()
    assert body["rewards"] == [2.0, 1.0]
    assert body["scores"] == pytest.approx([sigmoid(2), sigmoid(1)]) and body["extra_logs"] == {}
    assert scorer.post("/classify", json={"input": "x"}).status_code == 404
    pair = {"prompt": "x", "a": "aaaa", "b": "bb"}
    assert scorer.post("/compare", json=pair).json()["p_a"] == pytest.approx(sigmoid(2))


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v2/rerank"])
def test_jinas_and_coheres_rerank(client: TestClient, path: str) -> None:
    jina = {"model": "gram", "query": "x", "documents": ["a", {"text": "aaaa"}, "aa"], "top_n": 2}
    body = client.post(path, json=jina).json()
    assert [row["index"] for row in body["results"]] == [1, 2]
    assert body["results"][0]["relevance_score"] > body["results"][1]["relevance_score"]
    texts = [row.get("document") for row in body["results"]]
    assert texts == ([None, None] if path == "/v2/rerank" else [{"text": "aaaa"}, {"text": "aa"}])
    assert body["usage"]["total_tokens"] == 21 and body["meta"]["billed_units"] == {"search_units": 1}
    cohere = {"model": "gram", "query": "x", "documents": ["a", "bb"], "max_tokens_per_doc": 4096}
    assert "document" not in client.post(path, json=cohere | {"return_documents": False}).text


def test_openrlhfs_remote_reward(client: TestClient) -> None:
    request = {
        "query": ["Qaaa", "Qa", "Rbb"],
        "prompts": ["Q", "Q", "R"],
        "labels": ["aa", "aa", "b"],
    }
    body = client.post("/get_reward?model=gram", json=request).json()
    assert body["rewards"] == pytest.approx([sigmoid(1), sigmoid(-1), sigmoid(1)])
    assert body["scores"] == body["rewards"]
    # Without labels the answers to one prompt are measured against each other, as GRPO samples them.
    group = {"query": ["Qaaa", "Qa"], "prompts": ["Q", "Q"], "labels": ["", ""]}
    assert client.post("/get_reward", json=group).json()["rewards"] == pytest.approx(
        [sigmoid(2), sigmoid(-2)]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ["Q"]}, "`prompts` has 1 items; 2, as `query`"),
        ({"labels": ["a"]}, "`labels` has 1 items; 2"),
        ({"prompts": ["Q", "R"]}, "`query.1` does not begin with its prompt"),
        ({"query": ["Q a", "Q"]}, "`query.1` has an empty prompt or answer"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(
    client: TestClient, change: dict[str, Any], message: str
) -> None:
    request = {"query": ["Qa", "Qb"], "prompts": ["Q", "Q"], "labels": []}
    answer = client.post("/get_reward", json=request | change)
    assert answer.status_code == 422 and message in answer.json()["error"]["message"]


# ---------------------------------------------------------------- OpenAI's client


@pytest.fixture(scope="module")
def openai_client() -> Iterator[openai.OpenAI]:
    served = [judge(compare=biased), language_model(), translator(piece_seconds=1)]
    with listening(gateway_app(LocalFleet(served))) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_the_judge_answers_with_a_label_and_log_probabilities(openai_client: openai.OpenAI) -> None:
    """Slot A is longer by 2 and liked by 1: the label margin is 3."""
    prompt = TEMPLATE.render("Which?", "aaaa", "bb")
    answer = openai_client.chat.completions.create(
        model="gram",
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        max_tokens=1,
    )
    [choice] = answer.choices
    assert choice.message.content == "A" and choice.finish_reason == "stop"
    assert choice.logprobs is not None and choice.logprobs.content is not None
    [token] = choice.logprobs.content
    found = {top.token: math.exp(top.logprob) for top in token.top_logprobs}
    assert found == pytest.approx({"A": sigmoid(3), "B": sigmoid(-3)})
    drawn = openai_client.completions.create(model="gram", prompt=[prompt], n=16, temperature=2, seed=3)
    assert {choice.text for choice in drawn.choices} == {"A", "B"}  # B has probability 0.18
    legacy = openai_client.completions.create(model="gram", prompt=prompt, logprobs=1, temperature=0)
    logprobs = legacy.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens == ["A"] and len((logprobs.top_logprobs or [{}])[0]) == 1
    with pytest.raises(openai.UnprocessableEntityError, match="is not a prompt of this judge"):
        openai_client.completions.create(model="gram", prompt="Hello.")


def test_verdicts_as_classes(client: TestClient) -> None:
    texts = [TEMPLATE.render("Which?", "aaaa", "bb"), TEMPLATE.render("Which?", "a", "bb")]
    body = client.post("/classify", json={"model": "gram", "input": texts}).json()
    assert [row["label"] for row in body["data"]] == ["A", "B"]
    assert body["data"][0]["probs"] == pytest.approx([sigmoid(2), sigmoid(-2)])
    assert body["data"][0]["num_classes"] == 2


def test_the_client_lists_models_and_chats_with_the_one_it_names(openai_client: openai.OpenAI) -> None:
    assert [card.id for card in openai_client.models.list().data] == ["gram", "lisa", "nast"]
    settings: dict[str, Any] = {
        "model": "lisa",
        "messages": [{"role": "user", "content": "Name a river in Peru."}],
        "temperature": 0,
        "max_completion_tokens": 8,
    }
    whole = openai_client.chat.completions.create(**settings).choices[0].message.content
    pieces = list(openai_client.chat.completions.create(**settings, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_client_translates_speech_in_every_format(openai_client: openai.OpenAI) -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, 24_000)
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format="WAV")
    settings: dict[str, Any] = {"model": "nast", "file": ("a.wav", file.getvalue())}
    create: Any = openai_client.audio.translations.create
    text = create(**settings).text
    assert text.startswith("T") and len(text.split()) == 2
    assert str(create(**settings, response_format="text")).strip() == text
    verbose = create(**settings, response_format="verbose_json")
    assert verbose.duration == pytest.approx(1.5) and verbose.segments is not None
    assert [segment.text for segment in verbose.segments] == text.split()
    assert verbose.segments[0].start == 0 and verbose.segments[-1].end == pytest.approx(1.5)
    for shape, start in [("srt", "1\n00:00:00,000 --> 00:00:0"), ("vtt", "WEBVTT\n\n00:00:00.000 --> ")]:
        assert str(create(**settings, response_format=shape)).startswith(start)
    with pytest.raises(openai.UnprocessableEntityError, match="`response_format` must be one of json, text"):
        create(**settings, response_format="doc")
    with pytest.raises(openai.UnprocessableEntityError, match="`prompt` is not supported"):
        create(**settings, prompt="Hi")
    with pytest.raises(openai.UnprocessableEntityError, match="`file` cannot be used: not a readable audio"):
        create(model="nast", file=("a.wav", b"text"))


def test_subtitles_by_hand() -> None:
    pieces = [
        Piece(start=0, end=1.5, text="One.", transcript=""),
        Piece(start=1.5, end=2, text="", transcript=""),
        Piece(start=3599.9996, end=3661.25, text="Two.", transcript=""),
    ]
    assert srt(pieces) == (
        "1\n00:00:00,000 --> 00:00:01,500\nOne.\n\n2\n01:00:00,000 --> 01:01:01,250\nTwo.\n\n"
    )
    assert vtt(pieces) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\nOne.\n\n01:00:00.000 --> 01:01:01.250\nTwo.\n\n"
    )
