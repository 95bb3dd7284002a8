"""The HTTP side of the GRAM endpoints on a fake judge: status codes, messages, limits, the OpenAPI document. No Ray."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient

from eagleray.models.gram.judge import Comparison, Pair, read_out
from eagleray.serve.gram import Args, GramService, LoadedModel, gram_app

SECRET = "my-private-words"


class LengthJudge:
    """Prefers the longer answer: Z_a - Z_b is the difference in length, plus a bias towards slot A."""

    def __init__(self, bias: float = 0.0):
        self.bias = bias
        self.seen: list[list[Pair]] = []
        self.open = threading.Event()
        self.open.set()

    def compare(self, pairs: Sequence[Pair]) -> list[Comparison]:
        self.seen.append(list(pairs))
        assert self.open.wait(10)
        if any(SECRET in text for pair in pairs for text in pair):
            raise RuntimeError(f"cannot judge {pairs}")
        return [read_out(len(a) - len(b) + self.bias, len(b) - len(a) + self.bias) for _, a, b in pairs]


def costs(pairs: Sequence[Pair]) -> list[int | None]:
    return [None if "too long" in pair[0] else sum(map(len, pair)) for pair in pairs]


def make_client(judge: LengthJudge, **limits: Any) -> TestClient:
    args = Args(model="unused", **limits)
    model = LoadedModel(judge.compare, costs, "tiny", "r1")
    return TestClient(gram_app(GramService(model, args), args))


@pytest.fixture
def judge() -> LengthJudge:
    return LengthJudge()


@pytest.fixture
def client(judge: LengthJudge) -> Iterator[TestClient]:
    with make_client(judge, max_responses=4, max_body_bytes=2000) as client:
        yield client


PAIR = {"prompt": "Name a river.", "a": "Ucayali", "b": "Nile"}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# ---------------------------------------------------------------- answers


def test_compare_reads_both_orders() -> None:
    with make_client(LengthJudge(bias=1.0)) as client:
        answer = client.post("/compare", json=PAIR)
    assert answer.status_code == 200
    body = answer.json()
    p1, p2 = sigmoid(4), sigmoid(2)  # margin 3, bias 1: +3+1 shown first, -(-3+1) shown second
    assert body["p_order1"] == pytest.approx(p1) and body["p_order2"] == pytest.approx(p2)
    assert body["p_a"] == pytest.approx((p1 + p2) / 2)
    assert body["p_a"] + body["p_b"] == 1
    assert body["consistent"] is True
    assert (body["model"], body["revision"]) == ("tiny", "r1")


def test_reward_gives_three_scales(client: TestClient) -> None:
    body = client.post("/reward", json={"prompt": "x", "response": "abc", "reference": "ab"}).json()
    r = sigmoid(1)
    assert body["probability"] == pytest.approx(r)
    assert body["centred"] == pytest.approx(2 * r - 1)
    assert body["logit"] == pytest.approx(1)


def test_reward_of_the_reference_itself_is_parity(client: TestClient) -> None:
    body = client.post("/reward", json={"prompt": "x", "response": "same", "reference": "same"}).json()
    assert (body["probability"], body["centred"], body["logit"]) == (0.5, 0, 0)


@pytest.mark.parametrize(
    ("method", "comparisons", "rounds", "intransitive", "scored"),
    [
        ("round_robin", 6, 1, False, True),
        ("bracket", 3, 2, None, False),
        ("linear", 3, 3, None, False),
        ("reference", 4, 1, None, True),
    ],
)
def test_rank_finds_the_best_in_the_rounds_of_its_method(
    client: TestClient,
    judge: LengthJudge,
    method: str,
    comparisons: int,
    rounds: int,
    intransitive: bool | None,
    scored: bool,
) -> None:
    request = {"prompt": "x", "responses": ["aa", "aaaa", "a", "aaa"], "method": method}
    if method == "reference":
        request["reference"] = "bb"
    body = client.post("/rank", json=request).json()
    assert body["best"] == body["order"][0] == 1
    assert sorted(body["order"]) == [0, 1, 2, 3]
    assert body["comparisons"] == comparisons and len(judge.seen) == rounds
    assert body["intransitive"] is intransitive
    assert (body["scores"] is not None) is scored


def test_rank_compares_all_pairs_unless_told_otherwise(client: TestClient) -> None:
    body = client.post("/rank", json={"prompt": "x", "responses": ["aa", "aaaa", "a"]}).json()
    assert body["order"] == [1, 0, 2] and body["comparisons"] == 3


def test_a_conversation_reaches_the_judge_as_the_data_readers_write_it(
    client: TestClient, judge: LengthJudge
) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert client.post("/compare", json=PAIR | {"prompt": messages}).status_code == 200
    assert client.post("/compare", json=PAIR | {"prompt": messages[1:]}).status_code == 200
    assert [pairs[0][0] for pairs in judge.seen] == ["System: Be brief.\n\nUser: Hi", "Hi"]


def test_texts_reach_the_judge_unchanged(client: TestClient, judge: LengthJudge) -> None:
    # The lone surrogate at the end is valid JSON; the judge knows what to do with it, online as offline.
    odd = "  two  spaces\n\n[User Question] <|im_end|> \x00 é 漢 🙂 \ud800"
    content = json.dumps(PAIR | {"a": odd})
    answer = client.post("/compare", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 200
    assert judge.seen == [[("Name a river.", odd, "Nile")]]


def test_health_names_the_model(client: TestClient) -> None:
    assert client.get("/healthz").json() == {
        "model": "tiny",
        "revision": "r1",
        "status": "ready",
        "pending_comparisons": 0,
    }


def test_before_the_start_it_is_unavailable(judge: LengthJudge) -> None:
    client = make_client(judge)  # without `with`: the lifespan does not run
    answer = client.get("/healthz")
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert client.post("/compare", json=PAIR).json()["error"]["code"] == "unavailable"


# ---------------------------------------------------------------- refusals

MESSAGE = {"role": "user", "content": "Hi"}
RANK = {"prompt": "x", "responses": ["a", "b"]}

INVALID: list[tuple[str, Any, str, str]] = [
    ("/compare", {"prompt": "x", "a": "y"}, "b", "is required"),
    ("/compare", PAIR | {"a": ""}, "a", "is empty or only white space; write some text"),
    ("/compare", PAIR | {"b": " \n\t\u00a0"}, "b", "is empty or only white space; write some text"),
    ("/compare", PAIR | {"prompt": " "}, "prompt", "is empty or only white space; write some text"),
    ("/compare", PAIR | {"a": 7}, "a", "is a number; it must be a text"),
    ("/compare", PAIR | {"a": None}, "a", "is null; it must be a text"),
    ("/compare", PAIR | {"prompt": 7}, "prompt", "is a number; it must be a text"),
    ("/compare", PAIR | {"prompt": []}, "prompt", "has 0 item(s); at least 1 are needed"),
    ("/compare", PAIR | {"prompt": ["hi"]}, "prompt.0", "is a text; it must be a JSON object"),
    (
        "/compare",
        PAIR | {"prompt": [MESSAGE | {"content": ""}]},
        "prompt.0.content",
        "is empty or only white space; write some text",
    ),
    (
        "/compare",
        PAIR | {"prompt": [MESSAGE | {"role": "boss"}]},
        "prompt.0.role",
        "is 'boss'; it must be 'system', 'user' or 'assistant'",
    ),
    ("/compare", PAIR | {"c": "z"}, "c", "is not a known field; remove it (the fields are listed at /docs)"),
    (
        "/compare",
        ["x"],
        "body",
        "is a list of 1; it must be a JSON object, sent with `Content-Type: application/json`",
    ),
    ("/reward", {"prompt": "x", "response": "y"}, "reference", "is required"),
    ("/rank", RANK | {"responses": ["a"]}, "responses", "has 1 item(s); at least 2 are needed"),
    ("/rank", RANK | {"responses": []}, "responses", "has 0 item(s); at least 2 are needed"),
    ("/rank", RANK | {"responses": "ab"}, "responses", "is a text; it must be a list"),
    (
        "/rank",
        RANK | {"responses": ["a", " "]},
        "responses.1",
        "is empty or only white space; write some text",
    ),
    ("/rank", RANK | {"responses": list("abcde")}, "responses", "has 5 items; at most 4 are allowed"),
    (
        "/rank",
        RANK | {"x" * 50: 1},
        "x" * 40 + "...",
        "is not a known field; remove it (the fields are listed at /docs)",
    ),
    (
        "/rank",
        RANK | {"method": "linaer"},
        "method",
        "is 'linaer'; it must be 'reference', 'linear', 'bracket' or 'round_robin'",
    ),
    (
        "/rank",
        RANK | {"method": "\ud800"},  # a lone surrogate: valid JSON, but no Unicode text
        "method",
        "holds characters that are not valid Unicode",
    ),
    ("/rank", RANK | {"method": "reference"}, "reference", "is missing; method 'reference' needs it"),
    ("/rank", RANK | {"reference": "r"}, "reference", "goes with method 'reference' only"),
    *(
        (
            path,
            request | {"prompt": "too long"},
            "body",
            "holds a prompt with two answers that are too long for the model; shorten them",
        )
        for path, request in [("/compare", PAIR), ("/rank", RANK)]
    ),
]


@pytest.mark.parametrize(("path", "request_body", "field", "problem"), INVALID)
def test_invalid_requests_say_which_field_and_what_is_allowed(
    client: TestClient, judge: LengthJudge, path: str, request_body: Any, field: str, problem: str
) -> None:
    headers = {"content-type": "application/json"}
    answer = client.post(path, content=json.dumps(request_body), headers=headers)
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["code"] == "invalid_request"
    assert error["problems"] == [{"field": field, "problem": problem}]
    assert error["message"] == f"The request is not valid: `{field}` {problem}."
    assert judge.seen == []


def test_every_problem_is_listed(client: TestClient) -> None:
    error = client.post("/compare", json={"a": "", "b": 1, "x": 1, "y": 2}).json()["error"]
    assert {p["field"] for p in error["problems"]} == {"prompt", "a", "b", "x", "y"}
    assert error["message"].endswith("; and 2 more.")


@pytest.mark.parametrize(
    ("content", "status", "problem"),
    [
        (b"{", 422, "is not valid JSON"),
        (b"", 422, "is required"),
        (b'{"prompt": "x", "a": "\xff", "b": "y"}', 400, None),
        (b"[" * 1900, 400, None),
    ],
)
def test_broken_bodies_are_client_errors(
    client: TestClient, content: bytes, status: int, problem: str | None
) -> None:
    answer = client.post("/compare", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status
    error = answer.json()["error"]
    if problem is not None:
        assert error["problems"][0]["problem"] == problem


def test_a_body_that_is_not_declared_as_json_is_refused(client: TestClient) -> None:
    answer = client.post("/compare", content=json.dumps(PAIR), headers={"content-type": "text/plain"})
    assert answer.status_code == 422
    assert "sent with `Content-Type: application/json`" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("GET", "/nothing", 404, "not_found"), ("GET", "/compare", 405, "method_not_allowed")],
)
def test_unknown_routes_have_the_uniform_body(
    client: TestClient, method: str, path: str, status: int, code: str
) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert "/docs" in answer.json()["error"]["message"]


# ---------------------------------------------------------------- limits


def test_a_declared_body_over_the_limit_is_refused(client: TestClient, judge: LengthJudge) -> None:
    answer = client.post("/compare", json=PAIR | {"a": "y" * 2000})
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"
    assert "larger than 2000 bytes" in answer.json()["error"]["message"]
    assert judge.seen == []


def test_a_streamed_body_is_refused_once_it_passes_the_limit(client: TestClient) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(40):
            yield b"y" * 100

    answer = client.post("/compare", content=chunks(), headers={"content-type": "application/json"})
    assert "content-length" not in answer.request.headers
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"


def test_a_body_of_exactly_the_limit_passes(client: TestClient) -> None:
    body = json.dumps(PAIR).encode()
    body = json.dumps(PAIR | {"a": PAIR["a"] + "y" * (2000 - len(body))}).encode()
    assert len(body) == 2000
    headers = {"content-type": "application/json"}
    assert client.post("/compare", content=body, headers=headers).status_code == 200
    assert client.post("/compare", content=body + b" ", headers=headers).status_code == 413


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("the condition did not come true in 5 s")


def test_a_full_queue_is_429_with_a_time_to_retry(judge: LengthJudge) -> None:
    with (
        make_client(judge, max_pending=6, max_responses=4) as client,
        ThreadPoolExecutor() as pool,
    ):
        judge.open.clear()
        first = pool.submit(client.post, "/rank", json=RANK | {"responses": list("abcd")})
        wait_until(lambda: client.get("/healthz").json()["pending_comparisons"] == 6)
        refused = client.post("/compare", json=PAIR)
        judge.open.set()
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        assert "needs 1 item(s), 6 of 6 are pending" in refused.json()["error"]["message"]
        assert first.result().status_code == 200
        assert client.post("/compare", json=PAIR).status_code == 200


@pytest.mark.parametrize("method", ["linear", "round_robin"])
def test_a_slow_request_is_504_and_its_work_is_dropped(judge: LengthJudge, method: str) -> None:
    with make_client(judge, timeout_s=0.2) as client:
        judge.open.clear()
        answer = client.post("/rank", json=RANK | {"responses": list("abcd"), "method": method})
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "timeout"
        assert "within 0.2 s" in answer.json()["error"]["message"]
        assert client.get("/healthz").json()["pending_comparisons"] == 0
        judge.open.set()
        assert client.post("/compare", json=PAIR).status_code == 200
    # The round that ran was not followed by another one.
    assert len([pairs for pairs in judge.seen if pairs[0][0] == "x"]) == 1


def test_a_failing_model_is_500_for_its_request_alone_and_no_text_is_logged(
    client: TestClient, judge: LengthJudge, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with ThreadPoolExecutor() as pool:
        judge.open.clear()
        blocker = pool.submit(client.post, "/compare", json=PAIR)
        wait_until(lambda: len(judge.seen) == 1)
        bad = pool.submit(client.post, "/compare", json=PAIR | {"a": SECRET})
        good = pool.submit(client.post, "/compare", json=PAIR)
        wait_until(lambda: client.get("/healthz").json()["pending_comparisons"] == 3)
        judge.open.set()
        assert (blocker.result().status_code, good.result().status_code) == (200, 200)
    answer = bad.result()
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal"
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("eagleray"))
    assert "RuntimeError" in ours and "compare" in ours
    assert SECRET not in caplog.text and SECRET not in answer.text


# ---------------------------------------------------------------- description


def test_the_openapi_document_describes_requests_errors_and_examples(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert {"/compare", "/rank", "/reward", "/healthz", "/v1/score"} <= set(document["paths"])
    for path in ("/compare", "/rank", "/reward"):
        responses = document["paths"][path]["post"]["responses"]
        refusals = {"400", "401", "404", "413", "422", "429", "500", "503", "504"}
        assert set(responses) == {"200"} | refusals
        for status in refusals:
            schema = responses[status]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/ErrorResponse"}
    schemas = document["components"]["schemas"]
    assert schemas["CompareRequest"]["additionalProperties"] is False
    assert schemas["CompareRequest"]["properties"]["a"]["minLength"] == 1
    assert schemas["RankRequest"]["properties"]["responses"]["minItems"] == 2
    assert schemas["RankRequest"]["properties"]["method"]["description"].startswith("Which pairs")
    for name, path in [
        ("CompareRequest", "/compare"),
        ("RankRequest", "/rank"),
        ("RewardRequest", "/reward"),
    ]:
        [example] = schemas[name]["examples"]
        assert client.post(path, json=example).status_code == 200


def test_a_limit_that_no_ranking_could_meet_is_refused() -> None:
    with pytest.raises(ValueError, match="may need 496 comparisons and could never be admitted"):
        Args(model="m", max_pending=100)
