"""The gateway on models of its own process: which model gets a request, limits, one document. Then over Ray Serve."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import pytest
import ray
import rpc_client
import yaml
from builders import tiny_model, tiny_tokenizer
from fastapi.testclient import TestClient
from ray.serve.schema import ServeDeploySchema
from serving_cases import judge, language_model

from eagleray.jobs.serve import gateway, parse_models
from eagleray.models.gram.judge import Comparison, Judge, Pair, read_out
from eagleray.models.gram.prompts import JudgeEncoder, JudgeTemplate
from eagleray.platform.keys import KeyChecker, add_key
from eagleray.platform.serving import ServingError, free_port, running, update
from eagleray.serve import gram, lisa
from eagleray.serve.fleet import LocalFleet
from eagleray.serve.gateway import gateway_app

PAIR = {"prompt": "Name a river.", "a": "Ucayali", "b": "Nile"}


def compare_brevity(pairs: Sequence[Pair]) -> list[Comparison]:
    """Prefers the shorter answer."""
    return [read_out(len(b) - len(a), len(a) - len(b)) for _, a, b in pairs]


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    served = [
        judge("long"),
        judge("short", compare_brevity, max_body_bytes=1000, timeout_s=3),
        language_model("talker"),
    ]
    with TestClient(gateway_app(LocalFleet(served))) as client:
        yield client


def test_the_models_field_decides_among_several_of_one_kind(client: TestClient) -> None:
    for name, better in [("long", "a"), ("short", "b")]:
        for answer in (
            client.post("/compare", json=PAIR | {"model": name}),
            client.post("/compare", json=PAIR, params={"model": name}),
        ):
            body = answer.json()
            assert body["model"] == name and (body["p_a"] > 0.5) == (better == "a")
    missing = client.post("/compare", json=PAIR)
    assert missing.status_code == 422
    assert "`model` is missing, and several models serve /compare: long, short" in missing.text
    unknown = client.post("/compare", json=PAIR | {"model": "other"})
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "model_not_found"


def test_one_model_of_a_kind_needs_no_name_but_another_is_refused(client: TestClient) -> None:
    request = {"prompt": "numbers", "max_tokens": 3}
    for model, status in [("talker", 200), ("other", 404)]:
        assert client.post("/v1/completions", json=request | {"model": model}).status_code == status


def test_a_stream_arrives_in_pieces(client: TestClient) -> None:
    request = {"model": "talker", "prompt": "numbers", "max_tokens": 8, "temperature": 0}
    whole = client.post("/v1/completions", json=request).json()["choices"][0]["text"]
    with client.stream("POST", "/v1/completions", json=request | {"stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]" and len(lines) > 2
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]) == whole


def test_the_limits_are_those_of_the_model(client: TestClient) -> None:
    long = PAIR | {"a": "x" * 2000}
    assert client.post("/compare", json=long | {"model": "long"}).status_code == 200
    refused = client.post("/compare", json=long | {"model": "short"})
    assert refused.status_code == 413 and "larger than 1000 bytes" in refused.text
    beyond = client.post("/compare", json=PAIR | {"a": "x" * 2**23, "model": "long"})
    assert beyond.status_code == 413 and "larger than 4194304 bytes" in beyond.text


def test_unknown_paths_and_methods_have_the_uniform_body(client: TestClient) -> None:
    for method, path, status in [("GET", "/nothing", 404), ("GET", "/compare", 405), ("POST", "/score", 404)]:
        answer = client.request(method, path)
        assert answer.status_code == status and "/docs" in answer.json()["error"]["message"]


def test_what_is_served_is_listed_and_described(client: TestClient) -> None:
    cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
    assert list(cards) == ["long", "short", "talker"]
    assert cards["short"]["kind"] == "gram" and cards["short"]["revision"] == "r-short"
    assert "/rank" in cards["long"]["endpoints"] and "/healthz" not in cards["long"]["endpoints"]
    document = client.get("/openapi.json").json()
    assert {"/compare", "/rank", "/v1/completions", "/v1/models", "/healthz"} <= set(document["paths"])
    assert {"CompareRequest", "CompletionRequest", "ErrorResponse"} <= set(document["components"]["schemas"])
    health = client.get("/healthz").json()
    assert health["status"] == "ready" and [model["model"] for model in health["models"]] == list(cards)


def test_without_models_it_is_not_ready() -> None:
    with TestClient(gateway_app(LocalFleet([]))) as client:
        answer = client.get("/healthz")
    assert answer.status_code == 503 and "No model is served yet" in answer.text


def test_what_a_model_that_is_not_running_may_serve_is_asked_for_again_later() -> None:
    fleet = LocalFleet([judge("here")])
    fleet.awaited = ["coming"]
    with TestClient(gateway_app(fleet)) as client:
        for path, body in [("/translate", {}), ("/compare", PAIR | {"model": "coming"})]:
            answer = client.post(path, json=body)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert "coming" in answer.json()["error"]["message"]
        assert client.post("/compare", json=PAIR).status_code == 200
        assert client.post("/compare", json=PAIR | {"model": "nobody"}).status_code == 404
        assert client.get("/compare").status_code == 405


def test_with_keys_a_request_needs_one_within_its_rate(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    secret = add_key(tmp_path / "keys.json", "trainer", per_minute=2)
    app = gateway_app(LocalFleet([judge()]), keys=KeyChecker(tmp_path / "keys.json"))
    with TestClient(app) as client:
        assert client.get("/healthz").status_code == 200
        for headers in ({}, {"Authorization": "Bearer er-wrong"}, {"Authorization": f"Basic {secret}"}):
            refused = client.post("/compare", json=PAIR, headers=headers)
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
            assert refused.json()["error"]["code"] == "unauthorized"
        assert client.get("/v1/models").status_code == 401 and client.get("/docs").status_code == 401
        for headers in ({"Authorization": f"Bearer {secret}"}, {"X-API-Key": secret}):
            assert client.post("/compare", json=PAIR, headers=headers).status_code == 200
        limited = client.post("/compare", json=PAIR, headers={"X-API-Key": secret})
    assert limited.status_code == 429 and limited.headers["retry-after"] == "30"
    assert limited.json()["error"]["code"] == "rate_limited"
    [line] = [r for r in caplog.records if getattr(r, "status", 0) == 200 and r.served_path == "/compare"][:1]
    assert (line.key, line.model, line.method) == ("trainer", "gram", "POST") and line.ms > 0
    assert secret not in caplog.text and PAIR["prompt"] not in caplog.text


def test_requests_are_counted_under_paths_that_exist(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str, int]] = []
    monkeypatch.setattr(
        "eagleray.serve.guard.request_answered",
        lambda *, model, path, status, seconds: seen.append((model, path, status)),
    )
    client.post("/compare", json=PAIR | {"model": "long"})
    client.post("/compare", json=PAIR)
    client.get("/made/up/by/a/client")
    client.get("/healthz")
    assert seen == [("long", "/compare", 200), ("", "other", 422), ("", "other", 404), ("", "/healthz", 200)]


def test_the_gateway_needs_no_torch() -> None:
    """A replica of the gateway starts in a second or two and stays small."""
    code = "import sys, eagleray.serve.gateway; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_shipped_yaml_is_valid_for_serve_deploy_and_stays_on_this_machine() -> None:
    values = yaml.safe_load((Path(__file__).parents[2] / "serve" / "gateway.yaml").read_text())
    assert ServeDeploySchema.model_validate(values).http_options.host == "127.0.0.1"
    door, *models = values["applications"]
    assert door["import_path"] == gateway().import_path and door["route_prefix"] == "/"
    for application, module in zip(models, (gram, lisa), strict=True):
        assert (
            application["import_path"] == f"{module.__name__}:build_app" and not application["route_prefix"]
        )
        module.Args.model_validate(application["args"])


# ---------------------------------------------------------------- with Ray Serve


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two judges with other weights, and a language model."""
    found: dict[str, Path] = {}
    for number, name in enumerate(("first", "second", "talker")):
        found[name] = tmp_path_factory.mktemp("fleet") / name
        model, tokenizer = tiny_model(seed=number), tiny_tokenizer(chat=name == "talker")
        model.save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
        if name != "talker":
            encoder = JudgeEncoder(tokenizer, JudgeTemplate.load("eagleray"), max_length=512)
            Judge(model, encoder).save_settings(found[name])
    return found


@pytest.mark.ray
def test_models_come_change_and_go_while_clients_keep_asking(
    ray_cluster: None, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Clients that ask twice a second see no failure while their model is replaced and another one comes and goes."""
    expected = [
        Judge.from_pretrained(folders[name], device="cpu").compare([tuple(PAIR.values())])[0].p_a  # type: ignore[list-item]
        for name in ("first", "second")
    ]
    assert abs(expected[0] - expected[1]) > 1e-4
    begin = parse_models([f"gram={folders['first']}"])
    grpc_port = free_port("127.0.0.1")
    with (
        running(gateway(), begin, grpc_port=grpc_port) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        by_grpc = rpc_client.Client(f"127.0.0.1:{grpc_port}", tmp_path)
        stop = threading.Event()
        seen: list[tuple[int, float]] = []

        def hammer() -> None:
            with httpx.Client(base_url=url, timeout=60) as own:
                while not stop.is_set():
                    answer = own.post("/compare", json=PAIR)
                    seen.append((answer.status_code, answer.json().get("p_a", -1)))
                    stop.wait(0.5)  # else the clients take the cores on which new replicas start

        with ThreadPoolExecutor(3) as pool:
            hammers = [pool.submit(hammer) for _ in range(2)]
            try:
                talker = f"lisa={folders['talker']}"
                done = update("gateway", parse_models([f"gram={folders['first']}", talker]), address="auto")
                assert (done.loaded, done.kept) == (["lisa"], ["gram"])
                wait_for_models(client, {"gram", "lisa"})
                # Tokens that are there when the client is served come as one piece: so many do not come all at once.
                request = {"model": "lisa", "prompt": "numbers", "max_tokens": 64, "temperature": 0}
                with client.stream("POST", "/v1/completions", json=request | {"stream": True}) as answer:
                    assert sum(line.startswith("data: ") for line in answer.iter_lines()) > 2
                streamed = json.dumps(request | {"stream": True}).encode()
                pieces = by_grpc.stream(path="/v1/completions", body=streamed)
                assert len(pieces) > 2 and pieces[-1].body.endswith(b"data: [DONE]\n\n")
                with pytest.raises(grpc.RpcError) as refused:
                    by_grpc.stream(path="/v1/completions", body=b"{}")
                assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
                assert "`model` is missing" in refused.value.details()  # type: ignore[attr-defined]
                wait_for_what_the_dashboard_shows()
                broken = tmp_path / "broken"
                shutil.copytree(folders["first"], broken)
                (broken / "model.safetensors").write_bytes(b"cut off")
                with pytest.raises(ServingError, match=r"broken.*safetensors in it is damaged"):
                    update(
                        "gateway",
                        parse_models([f"gram={folders['first']}", f"gram:other={broken}"]),
                        address="auto",
                    )
                done = update("gateway", parse_models([f"gram={folders['second']}"]), address="auto")
                assert (done.replaced, done.unloaded) == (["gram"], ["lisa"])
                wait_for_models(client, {"gram"})
            finally:
                stop.set()
            for one in hammers:
                one.result()
        assert {status for status, _ in seen} == {200} and len(seen) > 10
        assert client.post("/compare", json=PAIR).json()["p_a"] == pytest.approx(expected[1], abs=1e-6)
        answer = by_grpc.call(path="/compare", body=json.dumps(PAIR).encode())
        assert json.loads(answer.body)["p_a"] == pytest.approx(expected[1], abs=1e-6)
        values = [p_a for _, p_a in seen]
        assert all(min(abs(p - e) for e in expected) < 1e-6 for p in values)
        assert values[0] == pytest.approx(expected[0], abs=1e-6)


@pytest.mark.ray
@pytest.mark.soak  # Serve starts a replica three times before it gives up
def test_a_model_that_cannot_be_loaded_leaves_the_others(
    ray_cluster: None, folders: dict[str, Path], tmp_path: Path
) -> None:
    broken = shutil.copytree(folders["first"], tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 1}))
    begin = parse_models([f"gram={folders['first']}"])
    with running(gateway(), begin) as url:
        before = httpx.post(f"{url}/compare", json=PAIR, timeout=60).json()
        with pytest.raises(ServingError, match=r"broken could not be served: .*size"):
            update("gateway", [*begin, *parse_models([f"gram:other={broken}"])], address="auto")
        assert httpx.post(f"{url}/compare", json=PAIR, timeout=60).json() == before


def wait_for_what_the_dashboard_shows() -> None:
    """Ray offers, in Prometheus' format, every metric of the dashboard with every label by which it is summed."""
    dashboard = json.loads((Path(__file__).parents[2] / "serve" / "grafana.json").read_text())
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    wanted = {
        (name, label)
        for expression in shown
        for name in re.findall(r"ray_eagleray_\w+", expression)
        for label in re.search(r"by \((.+?)\)", expression)[1].split(", ")  # type: ignore[index]
    }
    assert len(wanted) == 10
    [node] = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    missing = wanted
    for _ in range(60):  # Ray collects every ten seconds
        lines = httpx.get(url, timeout=30).text.splitlines()
        samples = {name: [line for line in lines if line.startswith(f"{name}{{")] for name, _ in wanted}
        missing = {
            (name, label)
            for name, label in wanted
            if not any(f'{label}="' in line.replace(f'{label}=""', "") for line in samples[name])
        }
        if not missing:
            return
        threading.Event().wait(0.5)
    raise AssertionError(f"the dashboard shows what Ray does not offer: {sorted(missing)}")


def wait_for_models(client: httpx.Client, names: set[str]) -> None:
    for _ in range(300):
        if {card["id"] for card in client.get("/v1/models").json()["data"]} == names:
            return
        threading.Event().wait(0.1)
    raise AssertionError(f"the gateway did not come to serve {names}")
