"""The job `features` as shipped: resumable stores of one model, what is refused, and a selection by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from rovrm_cases import tiny_llava

from eagleray.jobs import encoding, features, select
from eagleray.models.rovrm.checkpoint import save_reward_model
from eagleray.models.rovrm.features import Featuriser
from eagleray.models.selection.store import StoreError, VectorStore
from eagleray.platform.config import ConfigError, load_config, validate_config
from eagleray.platform.data.vectors import read_vectors

CONFIG = Path(__file__).parents[3] / "configs" / "select" / "features_tiny.yaml"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_reward_model(*tiny_llava(), folder)
    return folder


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers' code without Ray."""

    def stream(build: Any, arguments: Any, rows: Any, section: Any, *, batch_size: int) -> Any:
        score = build(**arguments)
        for start in range(0, len(rows), 8):
            yield from enumerate(score(rows[start : start + 8]), start)

    monkeypatch.setattr(encoding, "stream_with_model", stream)


def _run(model: Path, folder: Path, name: str, *overrides: str) -> dict[str, Any]:
    values = [f"model.path={model}", f"store={folder / 'store'}", f"run.dir={folder / name}", *overrides]
    return features.main(load_config(features.Config, CONFIG, values))


@pytest.mark.usefixtures("in_process")
def test_features_stop_go_on_and_select(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append, written = VectorStore.append, []

    def failing(store: VectorStore, rows: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(len(rows))
        append(store, rows)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(VectorStore, "append", failing)
        _run(model, tmp_path, "cut", "shard_rows=16")
    assert written == [16, 16]
    report = _run(model, tmp_path, "rest")
    assert {name: s["computed"] for name, s in report["sets"].items()} == {"pictures": 0, "captions": 64}
    again = _run(model, tmp_path, "again")
    assert [s["computed"] for s in again["sets"].values()] == [0, 0]

    table = read_vectors(str(tmp_path / "store" / "captions"))
    assert table.ids == sorted(table.ids) and table.model_hash == report["model_hash"]
    np.testing.assert_allclose(np.linalg.norm(table.vectors_ND, axis=1), 1, rtol=1e-5)
    cfg = load_config(features.Config, CONFIG, [f"model.path={model}"])
    [made] = cfg.sets["captions"].synthetic
    sample = features.generated(made, made.samples, "train")[5]
    featuriser = Featuriser.from_pretrained(model, cfg.features.settings())
    rows = featuriser.prepare(sample.record.prompt, sample.record.responses, None)
    np.testing.assert_allclose(
        table.vectors_ND[table.ids.index(sample.record.id)], featuriser.features([rows])[0], atol=1e-5
    )
    _check_selection(tmp_path, table.ids)
    for changed in ("features.rank=2", "features.kind=hidden"):
        with pytest.raises(StoreError, match="vectors of two models cannot be compared"):
            _run(model, tmp_path, changed.replace("=", ""), changed)


def _check_selection(folder: Path, ids: list[str]) -> None:
    for method in ("cosine", "transport", "random"):
        values = {
            "target": {"vectors": str(folder / "store" / "pictures")},
            "pools": {"captions": {"vectors": str(folder / "store" / "captions"), "count": 20}},
            "method": method,
            "features": {"name": "stored"},
            "run": {"dir": str(folder / method)},
        }
        report = select.main(validate_config(select.Config, values, "test"))["captions"]
        assert (report["pool"], report["targets"], report["selected"]) == (64, 32, 20)
        chosen = _chosen(folder / method / "scores" / "captions.parquet")
        assert set(chosen) <= set(ids) and len(chosen) == 20


def _chosen(path: Path) -> list[str]:
    import pyarrow.parquet as pq

    rows = pq.read_table(path, columns=["id", "selected"]).to_pylist()
    return [row["id"] for row in rows if row["selected"]]


@pytest.mark.usefixtures("in_process")
def test_what_does_not_fit_is_left_out_with_its_id(tmp_path: Path) -> None:
    reward_model, encoder = tiny_llava(max_length=1000)
    [made] = load_config(features.Config, CONFIG).sets["captions"].synthetic
    lengths = {
        sample.record.id: max(
            len(encoder.encode(sample.record.prompt, answer)) for answer in sample.record.responses
        )
        for sample in features.generated(made, made.samples, "train")
    }
    encoder.max_length = max(lengths.values()) - 1
    save_reward_model(reward_model, encoder, tmp_path / "model")
    report = _run(tmp_path / "model", tmp_path, "short", "features.kind=hidden")["sets"]["captions"]
    assert report["left_out"] == sorted(name for name in lengths if lengths[name] > encoder.max_length)
    held = read_vectors(str(tmp_path / "store" / "captions")).ids
    assert held == sorted(lengths.keys() - set(report["left_out"]))


def test_batches_in_which_nothing_fits_can_be_joined_with_others(model: Path) -> None:
    settings = features.FeatureSection(kind="hidden").model_dump()
    score = features.build_featuriser(str(model), settings, features.ImageSection().model_dump())
    fits, too_long = (
        score([{"prompt": text, "answers": '["a", "b"]', "image": b""}])
        for text in ("Name one.", "word " * 4000)
    )
    assert (fits[0]["fits"], too_long[0]["fits"]) == (True, False)
    blocks = [pa.Table.from_pylist([{"h": row[0]["h"]}]) for row in (fits, too_long)]
    assert blocks[0].schema == blocks[1].schema


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sets={a/b: {synthetic: [{}]}}", "`a/b` cannot name a set; take letters, digits, _ and -"),
        ("sets={a: {}}", "give `sources`, `synthetic` or both"),
        ("features.width=12", "multiple of 8"),
    ],
)
def test_contradictions_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(features.Config, CONFIG, [override])


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_features_on_ray(tmp_path: Path, model: Path) -> None:
    report = _run(model, tmp_path, "run", "sets={pictures: {synthetic: [{kind: visual, samples: 12}]}}")
    assert report["sets"]["pictures"]["computed"] == 12
