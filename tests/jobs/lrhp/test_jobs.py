"""The jobs of LRHP run as shipped: train, encode, stop and go on, evaluate, margins, a reward model's data; with and without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import tiny_model, tiny_tokenizer

from eagleray.jobs import encoding
from eagleray.jobs.gram import discriminative
from eagleray.jobs.lrhp import encode, evaluate, margin, train
from eagleray.models.lrhp.checkpoint import PairSettings, save_tokenizer_and_settings
from eagleray.models.lrhp.margins import MarginPredictor
from eagleray.models.lrhp.model import PairModel
from eagleray.models.lrhp.prompts import add_preference_token
from eagleray.models.lrhp.representer import Representer
from eagleray.models.lrhp.store import RepresentationStore
from eagleray.models.lrhp.synthetic import make_typed_pairs
from eagleray.models.selection.store import StoreError, model_hash
from eagleray.platform.config import load_config
from eagleray.platform.runs import RunFolder

CONFIGS = Path(__file__).parents[3] / "configs" / "lrhp"


def _run(module: Any, name: str, *overrides: str) -> Any:
    return module.main(load_config(module.Config, CONFIGS / f"{name}_tiny.yaml", overrides))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair encoder with a random head, as a training run leaves it."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    pair_model = PairModel(tiny_model().model, token_id=add_preference_token(tokenizer))  # type: ignore[operator]
    torch.manual_seed(0)
    torch.nn.init.normal_(pair_model.head.weight, std=0.2)
    pair_model.start_row(len(tokenizer) - 1)
    pair_model.save_pretrained(folder)
    save_tokenizer_and_settings(tokenizer, PairSettings(pair_model.token_id, max_length=256), folder)
    return folder


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch inference without Ray: the same workers' code, called here."""

    def stream(build: Any, arguments: Any, rows: Any, section: Any, *, batch_size: int = 7) -> Any:
        return enumerate(build(**arguments)(rows))

    def whole(build: Any, arguments: Any, rows: Any, section: Any) -> Any:
        return build(**arguments)(rows)

    monkeypatch.setattr(encoding, "stream_with_model", stream)
    monkeypatch.setattr(evaluate, "map_with_model", whole)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_train_and_encode_on_ray(tmp_path: Path) -> None:
    """The tiny configs as shipped: LoRA through Ray Train, then its representations through Ray Data."""
    quick = ["train.max_steps=4", "train.eval_every=2", "data.train.synthetic.pairs=40"]
    trained = _run(train, "train", *quick, "lora={rank: 2}", f"run.dir={tmp_path / 'train'}")
    assert {"accuracy", "consistency", "ece", "accuracy_chosen_first"} <= trained.summary.keys()
    model = trained.path / "model"
    assert (model / "adapter_model.safetensors").is_file() and (model / "lrhp.json").is_file()
    to_store = [f"model.path={model}", f"store={tmp_path / 'store'}", "data.made.synthetic.pairs=50"]
    report = _run(encode, "encode", *to_store, f"run.dir={tmp_path / 'e'}")
    assert (report["pairs"], report["encoded"]) == (50, 50)
    _check_store(tmp_path / "store", model)


@pytest.mark.usefixtures("in_process")
def test_encoding_stops_goes_on_and_is_idempotent(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_store = [f"model.path={model}", f"store={tmp_path / 'store'}", "data.made.synthetic.pairs=50"]
    _stopped_after_two_shards(monkeypatch, [*to_store, f"run.dir={tmp_path / 'e1'}"])
    report = _run(encode, "encode", *to_store, "shard_rows=16", f"run.dir={tmp_path / 'e2'}")
    assert (report["pairs"], report["encoded"], report["shards"]) == (50, 18, 4)
    _check_store(tmp_path / "store", model)
    again = _run(encode, "encode", *to_store, f"run.dir={tmp_path / 'e3'}")
    assert (again["encoded"], again["shards"]) == (0, 4)
    _check_store(tmp_path / "store", model)
    with pytest.raises(StoreError, match="vectors of two models cannot be compared"):
        _run(encode, "encode", *to_store, "model.dtype=bf16", f"run.dir={tmp_path / 'e4'}")
    monkeypatch.setattr("eagleray.jobs.lrhp.data.make_typed_pairs", _with_other_texts)
    with pytest.raises(StoreError, match="50 pairs have another text than the pair of their id"):
        _run(encode, "encode", *to_store, f"run.dir={tmp_path / 'e5'}")


@pytest.mark.usefixtures("in_process")
def test_evaluation_and_margins(tmp_path: Path, model: Path) -> None:
    made = ["data.made.synthetic.pairs=30", "bootstrap=100"]
    found = _run(evaluate, "evaluate", f"model.path={model}", *made, f"run.dir={tmp_path / 'ev'}")
    figures = found["sets"]["made"]
    assert figures["pairs"] == 30 and 0 <= figures["orders"]["consistency"] <= 1
    assert figures["scorers"]["longer answer"]["accuracy"]["value"] > 0.5
    assert found["vectors"]["tag"]["probe"]["majority"] == 0.5
    plots = {path.name for path in (tmp_path / "ev" / "plots").iterdir()}
    assert {"map_source.png", "map_tag.png", "made_reliability.png"} <= plots
    stores = {}
    for name, more in {"store": [], "untrained": ["model.untrained=true"]}.items():
        stores[name] = tmp_path / name
        to_store = [f"model.path={model}", f"store={stores[name]}", "data.made.synthetic.pairs=50"]
        _run(encode, "encode", *to_store, *more, f"run.dir={tmp_path / f'{name}_run'}")
    _check_margins(tmp_path, stores["store"], stores["untrained"])


def _stopped_after_two_shards(monkeypatch: pytest.MonkeyPatch, overrides: list[str]) -> None:
    append, calls = RepresentationStore.append, []

    def failing(store: RepresentationStore, rows: Any) -> None:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(rows))
        append(store, rows)

    monkeypatch.setattr(RepresentationStore, "append", failing)
    with pytest.raises(KeyboardInterrupt):
        _run(encode, "encode", *overrides, "shard_rows=16")
    monkeypatch.setattr(RepresentationStore, "append", append)
    assert calls == [16, 16]


def _check_store(folder: Path, model: Path) -> list[str]:
    """Sorted by id, of this model, and equal to what the library computes."""
    store = RepresentationStore(folder)
    found = store.read()
    assert found.ids == sorted(found.ids) and len(set(found.ids)) == 50
    assert found.model_hash == model_hash(model, "saved", "False")
    assert set(found.sources) == {"made"} and {tag for tags in found.tags for tag in tags} == {
        "length",
        "banned",
    }
    pairs = {p.id: p for p in encode.PairSet.model_validate(_MADE).load().pairs}
    triples = [(pairs[i].prompt_text, pairs[i].chosen, pairs[i].rejected) for i in found.ids]
    offline = Representer.from_pretrained(model, device="cpu").represent(triples)
    np.testing.assert_allclose(found.h_ND, [r.h_D for r in offline], atol=1e-5)
    np.testing.assert_allclose(found.u_N, [r.u for r in offline], atol=1e-5)
    return found.ids


_MADE = {"synthetic": {"pairs": 50, "split": "rated"}}


def _with_other_texts(pairs: int, seed: int, *, split: str) -> list[dict[str, Any]]:
    return [row | {"chosen": "another text"} for row in make_typed_pairs(pairs, seed, split=split)]


def _check_margins(tmp_path: Path, store_dir: Path, untrained: Path) -> None:
    rated = ["data.synthetic.pairs=50", "test_fraction=0.3", "budgets=[20]", "bootstrap=100"]
    rated += [f"stores={{untrained: {{path: {untrained}}}}}", "mlp.epochs=5"]
    report = _run(margin, "margin", f"store={store_dir}", *rated, f"run.dir={tmp_path / 'm'}")
    assert list(report["predictors"]) == [
        "ridge",
        "mlp",
        "constant",
        "length difference",
        "tf-idf",
        "untrained",
    ]
    for figures in report["predictors"].values():
        for figure in figures.values():
            assert figure["low"] <= figure["value"] <= figure["high"]
    assert report["predictors"]["constant"]["spearman"]["value"] == 0
    assert report["budgets"][20].keys() == {"ridge", "mlp"}
    assert json.loads((tmp_path / "m" / "report.json").read_text())["alpha"] == report["alpha"]
    rows = [json.loads(line) for line in (tmp_path / "m" / "margins.jsonl").read_text().splitlines()]
    assert len(rows) == 50 and all(0 <= row["margin"] <= 1 for row in rows)
    store = RepresentationStore(store_dir).read()
    predictor = MarginPredictor.load(tmp_path / "m" / "predictor")
    expected = predictor.predict(store.h_ND[store.rows_of([row["id"] for row in rows])]).clip(0, 1)
    np.testing.assert_allclose([row["margin"] for row in rows], expected, atol=1e-9)
    assert predictor.about["model_hash"] == store.model_hash
    _check_reward_model(tmp_path, rows)


def _check_reward_model(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    """`gram.discriminative` gets the margins, by id from the file, in both forms of the loss."""
    data = {"sources": [{"path": str(tmp_path / "m" / "margins.jsonl")}], "drop_ties": False}
    configs = CONFIGS.parent / "gram" / "discriminative_tiny.yaml"
    overrides = [
        "data.synthetic=null",
        f"data.train={json.dumps(data)}",
        f"margins={json.dumps(data['sources'][0])}",  # type: ignore[index]
        "loss.use_margin=true",
        f"run.dir={tmp_path / 'rm'}",
    ]
    cfg = load_config(discriminative.Config, configs, overrides)
    with RunFolder.create(discriminative.JOB, cfg).recording() as run:
        discriminative._prepare(cfg, run)
    task = discriminative.DiscriminativeTask(cfg, tmp_path / "rm" / "data")
    margins = {row["id"]: row["margin"] for row in rows}
    batch = task.train_batch(range(8), step=0)
    assert batch.tensors["margin"].tolist() == pytest.approx([margins[name] for name in batch.ids], abs=1e-6)
    assert batch.tensors["margin"].max() > 0
    model = task.build_model()
    losses = {}
    for form in ("subtract", "scale", "none"):
        section = cfg.loss.model_copy(update={"margin_form": form, "use_margin": form != "none"})
        task.cfg = cfg.model_copy(update={"loss": section})
        losses[form] = task.loss(model, batch.tensors)[0].item()
    assert losses["subtract"] > losses["none"] and losses["scale"] != losses["none"]
