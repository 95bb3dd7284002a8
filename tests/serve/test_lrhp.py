"""A pair encoder behind real Ray Serve over HTTP: equal to offline encoding; and what is refused early."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from builders import tiny_model, tiny_tokenizer

from eagleray.jobs.serve import serving
from eagleray.models.lrhp.checkpoint import PairSettings, save_tokenizer_and_settings
from eagleray.models.lrhp.margins import MarginPredictor, fit_ridge
from eagleray.models.lrhp.model import PairModel
from eagleray.models.lrhp.prompts import PREFERENCE_TOKEN, add_preference_token
from eagleray.models.lrhp.representer import Representer
from eagleray.models.selection.store import model_hash
from eagleray.serve.lrhp import Args, load_model

PAIRS = [
    ("Name a river in Peru.", "The Ucayali flows through the forest.", "Lima."),
    ("numbers", f"0 1 2 3 {PREFERENCE_TOKEN}", "A short answer is better than a long one. " * 5),
    ("Compare two words", "and", "sentences, with commas, and full stops."),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random pair encoder, as a training run leaves it."""
    folder = tmp_path_factory.mktemp("served") / "tiny-pairs"
    tokenizer = tiny_tokenizer()
    backbone = tiny_model().model  # type: ignore[operator]
    model = PairModel(backbone, token_id=add_preference_token(tokenizer))
    torch.manual_seed(0)
    torch.nn.init.normal_(model.head.weight, std=0.2)
    model.start_row(len(tokenizer) - 1)
    model.save_pretrained(folder)
    save_tokenizer_and_settings(tokenizer, PairSettings(model.token_id, max_length=256), folder)
    return folder


@pytest.fixture(scope="module")
def predictor(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ridge on differences, fitted on random labels."""
    path = tmp_path_factory.mktemp("predictor")
    x_ND = np.random.default_rng(0).normal(size=(20, 32)) * 5
    about = {"model_hash": model_hash(folder, "saved", "False"), "order": "diff"}
    fit_ridge(x_ND, np.linspace(0.3, 0.7, 20), about=about).save(path)
    return path


def test_a_batch_may_mix_orders_and_costs_count_them(folder: Path) -> None:
    model = load_model(Args(model=str(folder)), device="cpu")
    items = [(PAIRS[0], "canonical"), (PAIRS[1], "diff"), (PAIRS[2], "canonical"), (PAIRS[0], "both")]
    found = model.compute(items)  # type: ignore[arg-type]
    for (pair, order), result in zip(items, found, strict=True):
        [alone] = model.representer.represent([pair], order=order)  # type: ignore[arg-type]
        np.testing.assert_allclose(result.h_D, alone.h_D, atol=2e-5)
    assert model.cost((PAIRS[0], "both")) == 2 * model.cost((PAIRS[0], "canonical"))


def test_a_predictor_of_another_model_is_refused(folder: Path, predictor: Path, tmp_path: Path) -> None:
    assert load_model(Args(model=str(folder), predictor=str(predictor)), device="cpu").predictor is not None
    with pytest.raises(
        ValueError, match=r"was fitted on representations of model .* and run `lrhp.margin` again"
    ):
        load_model(Args(model=str(folder), predictor=str(predictor), dtype="bf16"), device="cpu")
    with pytest.raises(ValueError, match=r"no margin\.json"):
        load_model(Args(model=str(folder), predictor=str(tmp_path)), device="cpu")


@pytest.fixture(scope="module")
def server(ray_cluster: None, folder: Path, predictor: Path) -> Iterator[httpx.Client]:
    options = {"predictor": str(predictor), "max_wait_s": 0.1, "max_body_bytes": 20_000}
    with (
        serving(folder, kind="lrhp", **options) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


@pytest.mark.ray
def test_served_representations_and_margins_equal_offline_ones(
    server: httpx.Client, folder: Path, predictor: Path
) -> None:
    representer = Representer.from_pretrained(folder, device="cpu")
    margins = MarginPredictor.load(predictor)
    [health] = server.get("/healthz").json()["models"]
    assert health["status"] == "ready" and health["margins"] and health["model"] == "lrhp"

    def ask(pair: tuple[str, str, str], path: str, **more: str) -> dict[str, object]:
        body = dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) | more
        answer = server.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    for order in ("canonical", "both", "diff"):
        offline = representer.represent(PAIRS, order=order)  # type: ignore[arg-type]
        with ThreadPoolExecutor(len(PAIRS)) as pool:
            served = list(pool.map(lambda pair, o=order: ask(pair, "/represent", order=o), PAIRS))
        for one, other in zip(served, offline, strict=True):
            scale = np.abs(other.h_D).max()
            np.testing.assert_allclose(np.array(one["h"]) / scale, other.h_D / scale, atol=1e-6)
            assert one["u"] == pytest.approx(other.u, abs=1e-5)
            assert one["p"] == pytest.approx(1 / (1 + np.exp(-other.u)), abs=1e-5)
            assert one["revision"] == health["revision"] and one["truncated"] == other.truncated
    differences = np.stack([r.h_D for r in representer.represent(PAIRS, order="diff")])
    expected = margins.predict(differences).clip(0, 1)
    assert [ask(pair, "/margin")["margin"] for pair in PAIRS] == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.ray
def test_refusals_over_http(server: httpx.Client) -> None:
    missing = server.post("/represent", json={"prompt": "x", "chosen": "a"})
    assert missing.status_code == 422 and missing.json()["error"]["problems"][0]["field"] == "rejected"
    order = {"prompt": "x", "chosen": "a", "rejected": "b", "order": "best"}
    assert server.post("/represent", json=order).status_code == 422
    large = server.post("/margin", json={"prompt": "x", "chosen": "a" * 30_000, "rejected": "b"})
    assert large.status_code == 413 and large.json()["error"]["code"] == "body_too_large"
