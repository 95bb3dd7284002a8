"""A real judge behind real Ray Serve over HTTP: every endpoint, equal to the offline scores; and what is refused early."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from builders import tiny_model, tiny_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification

from eagleray.jobs.serve import serving
from eagleray.models.gram.discriminative import DiscriminativeScorer, RewardSettings
from eagleray.models.gram.judge import Judge
from eagleray.models.gram.prompts import JudgeEncoder, JudgeTemplate
from eagleray.models.gram.ranking import rank
from eagleray.platform.serving import ServingError
from eagleray.serve.gram import Args, load_model

PROMPT = "Name a river in Peru."
ANSWERS = [
    "The Ucayali flows through the forest.",
    "Lima.",
    "numbers 0 1 2 3 4 5 6 7 8 9",
    "A short and useful answer is better than a long one. " * 4,
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with the settings of a judge, as a training run leaves it."""
    folder = tmp_path_factory.mktemp("served") / "tiny-judge"
    tokenizer = tiny_tokenizer()
    model = tiny_model()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    encoder = JudgeEncoder(tokenizer, JudgeTemplate.load("eagleray"), max_length=512)
    Judge(model, encoder).save_settings(folder)
    return folder


@pytest.fixture(scope="module")
def judge(model_folder: Path) -> Judge:
    return Judge.from_pretrained(model_folder, device="cpu")


# ---------------------------------------------------------------- without Ray


def test_a_pair_costs_what_the_judge_computes(model_folder: Path, judge: Judge) -> None:
    model = load_model(Args(model=str(model_folder)), device="cpu")
    pairs = [(PROMPT, ANSWERS[0], ANSWERS[1]), (PROMPT, ANSWERS[0], ANSWERS[2]), ("Other.", "yes", "no")]
    ids = [judge.encoder.encode(*pair) or [] for pair in pairs]
    shared = [next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y) for a, b in pairwise(ids)]
    assert shared[0] > shared[1] > 50  # instruction, prompt and first answer; the instruction
    assert model.costs(pairs) == [
        2 * len(ids[0]),
        2 * (len(ids[1]) - shared[0]),
        2 * (len(ids[2]) - shared[1]),
    ]
    assert model.name == "tiny-judge"


def test_a_pair_that_the_judge_would_drop_is_found_before(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dropping"
    shutil.copytree(model_folder, folder)
    settings = json.loads((folder / "gram.json").read_text())
    (folder / "gram.json").write_text(json.dumps(settings | {"overlong": "drop"}))
    model = load_model(Args(model=str(folder)), device="cpu")
    short, long = (PROMPT, "yes", "no"), (PROMPT, "yes " * 400, "no")
    costs = model.costs([short, long, short])
    assert costs[0] is not None and costs[1] is None and costs[2] == 2


def test_a_discriminative_reward_model_is_recognised_and_served(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        **tiny_model().config.to_dict() | {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id}
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    RewardSettings(max_length=256).save(tmp_path)
    args = Args(model=str(tmp_path))
    model = load_model(args, device="cpu")
    pairs = [(PROMPT, ANSWERS[0], ANSWERS[1]), (PROMPT, ANSWERS[1], ANSWERS[2])]
    assert model.compare(pairs) == DiscriminativeScorer.from_pretrained(tmp_path).compare(pairs)
    first, second = model.costs(pairs)
    assert first is not None and second is not None and 1 < second < first
    with pytest.raises(
        ValueError, match="`dtype` is 'bf16'; a discriminative reward model takes 'saved' only"
    ):
        load_model(Args(model=str(tmp_path), dtype="bf16"), device="cpu")


# ---------------------------------------------------------------- with Ray Serve

LIMITS = {"max_responses": 8, "max_pending": 28, "max_body_bytes": 20_000, "cpus": 1}


@pytest.fixture(scope="module")
def server(ray_cluster: None, model_folder: Path) -> Iterator[httpx.Client]:
    with (
        serving(model_folder, max_wait_s=0.3, **LIMITS) as url,
        httpx.Client(base_url=url, timeout=60, limits=httpx.Limits(max_connections=64)) as client,
    ):
        yield client


def health(server: httpx.Client) -> dict[str, Any]:
    """What the one model says of itself."""
    [model] = server.get("/healthz").json()["models"]
    return model


@pytest.mark.ray
def test_served_scores_equal_offline_scores(server: httpx.Client, judge: Judge) -> None:
    a, b = ANSWERS[0], ANSWERS[1]
    [offline] = judge.compare([(PROMPT, a, b)])
    body = server.post("/compare", json={"prompt": PROMPT, "a": a, "b": b}).json()
    for key in ("p_a", "p_b", "p_order1", "p_order2"):
        assert body[key] == pytest.approx(getattr(offline, key), abs=1e-6)
    assert body["consistent"] == offline.consistent
    assert body["model"] == "gram" and body["revision"] == health(server)["revision"]

    body = server.post("/reward", json={"prompt": PROMPT, "response": a, "reference": b}).json()
    assert body["probability"] == pytest.approx(offline.p_a, abs=1e-6)
    assert body["centred"] == pytest.approx(2 * offline.p_a - 1, abs=1e-6)


@pytest.mark.ray
@pytest.mark.parametrize("method", ["round_robin", "bracket", "linear", "reference"])
def test_served_rankings_equal_offline_rankings(server: httpx.Client, judge: Judge, method: Any) -> None:
    reference = "Peru." if method == "reference" else None
    offline = rank(judge.compare, PROMPT, ANSWERS, method=method, reference=reference)
    request = {"prompt": PROMPT, "responses": ANSWERS, "method": method, "reference": reference}
    body = server.post("/rank", json=request).json()
    assert body["order"] == list(offline.order) and body["best"] == offline.best
    assert body["comparisons"] == offline.comparisons and body["intransitive"] == offline.intransitive
    if offline.scores is None:
        assert body["scores"] is None
    else:
        assert body["scores"] == pytest.approx(offline.scores, abs=1e-6)


@pytest.mark.ray
def test_concurrent_requests_do_not_change_each_other(server: httpx.Client, judge: Judge) -> None:
    pairs = [
        (f"Question {i}: {PROMPT}", ANSWERS[i % 4], ANSWERS[(i + 1 + i // 4) % 4] + f" {i}")
        for i in range(16)
    ]
    offline = judge.compare(pairs)

    def ask(pair: tuple[str, str, str]) -> float:
        answer = server.post("/compare", json=dict(zip(("prompt", "a", "b"), pair, strict=True)))
        assert answer.status_code == 200, answer.text
        return answer.json()["p_a"]

    with ThreadPoolExecutor(len(pairs)) as pool:
        served = list(pool.map(ask, pairs))
    assert served == pytest.approx([result.p_a for result in offline], abs=1e-6)


@pytest.mark.ray
def test_refusals_over_http(server: httpx.Client) -> None:
    invalid = server.post("/rank", json={"prompt": PROMPT, "responses": ANSWERS, "method": "best"})
    assert invalid.status_code == 422
    assert invalid.json()["error"]["problems"][0]["field"] == "method"
    many = server.post("/rank", json={"prompt": PROMPT, "responses": ANSWERS * 3})
    assert many.status_code == 422 and "at most 8" in many.json()["error"]["message"]

    large = {"prompt": PROMPT, "a": "y" * 30_000, "b": "n"}
    declared = server.post("/compare", json=large)
    streamed = server.post(
        "/compare", content=iter([json.dumps(large).encode()]), headers={"content-type": "application/json"}
    )
    for answer in (declared, streamed):
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"


@pytest.mark.ray
def test_overload_is_429_and_what_was_admitted_is_answered(server: httpx.Client) -> None:
    responses = [f"{answer} {i}" for i in range(2) for answer in ANSWERS]

    def ask(number: int) -> httpx.Response:
        return server.post("/rank", json={"prompt": f"{number} {PROMPT}", "responses": responses})

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(16)))
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "queue_full"
        else:
            assert answer.json()["comparisons"] == 28
    assert health(server)["pending_comparisons"] == 0


@pytest.mark.ray
def test_work_of_a_client_that_went_away_is_dropped(server: httpx.Client) -> None:
    """A linear scan of 8 takes 7 rounds of at least 0.3 s; the client leaves in the second one."""
    request = {
        "prompt": PROMPT,
        "responses": [f"{a} {i}" for i in range(2) for a in ANSWERS],
        "method": "linear",
    }
    started = time.monotonic()
    with pytest.raises(httpx.ReadTimeout):
        server.post("/rank", json=request, timeout=0.4)
    assert health(server)["pending_comparisons"] in (0, 7)
    while health(server)["pending_comparisons"]:
        assert time.monotonic() - started < 7 * 0.3, "the ranking went on"
        time.sleep(0.02)


@pytest.mark.ray
def test_a_second_server_on_the_same_ray_is_refused(server: httpx.Client, model_folder: Path) -> None:
    with pytest.raises(ServingError, match="Ray Serve runs already"), serving(model_folder, cpus=1):
        pass
    assert server.get("/healthz").status_code == 200
