"""The jobs of NAST as shipped, with real Ray: prepare, train on two workers, the sibling, translate, evaluate, distill, serve."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from eagleray.jobs.nast import distill, evaluate, prepare, train, translate
from eagleray.jobs.serve import serving
from eagleray.models.nast.audio import read_audio, write_wav
from eagleray.models.nast.layouts import read_table
from eagleray.models.nast.manifest import Utterance
from eagleray.models.nast.synthetic import write_corpus
from eagleray.models.nast.translator import Translator
from eagleray.platform.config import load_config, validate_config
from eagleray.platform.launch import TrainedRun

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

CONFIGS = Path(__file__).parents[3] / "configs" / "nast"
QUICK = ["train.max_steps=4", "train.eval_every=2", "train.log_every=1", "tracking.tensorboard=false"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Iterator[TrainedRun]:
    """Data prepared once, then two workers with passes cut by frames and the mean of two models."""
    folder = tmp_path_factory.mktemp("nast")
    summary = prepare.main(
        load_config(
            prepare.Config,
            CONFIGS / "prepare_tiny.yaml",
            ["data.synthetic.utterances=24", "frontend.dither=1.0e-4", f"run.dir={folder / 'prepared'}"],
        )
    )
    assert summary["train"]["utterances"] == 24 and summary["train"]["infeasible_targets"] == 0
    start = ["data.synthetic=null", f"data.prepared={folder / 'prepared'}", f"run.dir={folder / 'run'}"]
    options = [*QUICK, *start, "ray.num_workers=2", "train.batch_size=8", "train.micro_batch_length=150"]
    yield train.main(load_config(train.Config, CONFIGS / "train_tiny.yaml", options))


def test_training_leaves_the_mean_of_the_best_models(trained: TrainedRun) -> None:
    assert {"bleu", "exact_match", "target_wer", "source_wer"} <= trained.summary.keys()
    assert len(list((trained.path / "best").iterdir())) == 2
    assert (trained.path / "model" / "model.safetensors").is_file()
    lines = [json.loads(line) for line in (trained.path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_translate_evaluate_and_distill(trained: TrainedRun, tmp_path: Path) -> None:
    """Files of which one is broken, a set with report and plots, and targets that the teacher wrote."""
    table = write_corpus(tmp_path / "audio", utterances=6, seed=5, split="test")
    (tmp_path / "audio" / "wav" / "broken.wav").write_text("text")
    model = {"path": str(trained.path / "model")}
    values: dict[str, Any] = {"model": model, "files": [str(tmp_path / "audio" / "wav")]}
    values |= {"data": {"on_error": "skip"}, "run": {"dir": str(tmp_path / "translated")}}
    rows = translate.main(validate_config(translate.Config, values, "test"))
    assert len(rows) == 6 and not any(row["error"] for row in rows)
    report = json.loads((tmp_path / "translated" / "report.json").read_text())
    assert report["skipped"] == {"not a readable audio file": 1}
    assert len((tmp_path / "translated" / "translations.txt").read_text().splitlines()) == 6
    translator = Translator.from_pretrained(trained.path / "model")
    for row in rows:
        [alone] = translator.translate([translator.features(read_audio(row["id"]))])
        assert (alone.text, alone.transcript) == (row["text"], row["transcript"])
        assert alone.score == pytest.approx(row["score"], abs=1e-3)

    few = write_corpus(tmp_path / "few", utterances=2, seed=7, split="test")
    values = {"models": {"a": model, "b": {**model, "beam": 3}}, "latency_utterances": 4, "bootstrap": 100}
    values |= {
        "sets": {name: {"sources": [{"path": str(path)}]} for name, path in (("few", few), ("test", table))}
    }
    values |= {"run": {"dir": str(tmp_path / "eval")}}
    figures = evaluate.main(validate_config(evaluate.Config, values, "test"))["sets"]["test"]["models"]
    for name, found in figures.items():
        assert found["bleu"]["low"] <= found["bleu"]["value"] <= found["bleu"]["high"], name
        assert "tok:13a" in found["bleu"]["signature"] and found["infeasible_share"] == 0
        assert sum(row["count"] for row in found["by_length"]) == 6
        assert found["latency"]["mean_ms"] > 0 and found["latency"]["real_time_factor"] > 0
    assert figures["a"]["latency"]["speed_up"] == 1
    assert len(list((tmp_path / "eval" / "plots").glob("*.png"))) == 6
    results, others = (_results(tmp_path / "eval" / "results" / f"{name}.jsonl") for name in ("test", "few"))
    assert [row["a"]["text"] for row in results] == [row["text"] for row in rows]
    translators = {"a": translator, "b": Translator.from_pretrained(trained.path / "model", beam=3)}
    utterances = [row for row in read_table(few) if isinstance(row, Utterance)]
    for row, utterance in zip(others, utterances, strict=True):
        for name, alone in translators.items():
            [found] = alone.translate([alone.features(read_audio(utterance.audio))])
            assert (row["id"], row[name]["text"]) == (utterance.id, found.text)
            assert row[name]["score"] == pytest.approx(found.score, abs=1e-3)
    assert others[0]["a"]["score"] != others[0]["b"]["score"]

    values = {"model": model, "sources": [{"path": str(table)}], "keep_original": True}
    values |= {"run": {"dir": str(tmp_path / "kd")}}
    report = distill.main(validate_config(distill.Config, values, "test"))
    assert report["rows"] == 12 - report["empty"]
    taught = {row.id: row for row in read_table(tmp_path / "kd" / "train.tsv") if isinstance(row, Utterance)}
    for row in results:
        assert taught[row["id"]].target == row["target"]
        if row["a"]["text"]:
            assert taught[f"{row['id']}_kd"].target == row["a"]["text"]


def _results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_autoregressive_sibling_trains_and_translates(tmp_path: Path) -> None:
    options = [*QUICK, "data.synthetic.utterances=16", f"run.dir={tmp_path / 'run'}", "train.max_steps=2"]
    run = train.main(load_config(train.Config, CONFIGS / "autoregressive_tiny.yaml", options))
    assert "cross_entropy" in (run.path / "metrics.jsonl").read_text() and "source_wer" not in run.summary
    translator = Translator.from_pretrained(run.path / "model", beam=2)
    [first, empty] = translator.translate(
        [translator.features(np.zeros(8000)), translator.features(np.zeros(100))]
    )
    assert first.frames == 48 and np.isfinite(first.score)
    assert (empty.text, empty.frames) == ("", 0)


def test_a_served_text_is_the_offline_text(trained: TrainedRun, tmp_path: Path) -> None:
    table = write_corpus(tmp_path, utterances=3, seed=6, split="test")
    recordings = [read_audio(row.audio) for row in read_table(table) if isinstance(row, Utterance)]
    write_wav(tmp_path / "long.wav", np.concatenate([np.pad(wave, 4000) for wave in recordings]))
    translator = Translator.from_pretrained(trained.path / "model")
    with (
        serving(trained.path / "model", kind="nast", piece_seconds=1, max_seconds=60) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        for row, wave in zip(read_table(table), recordings, strict=True):
            assert isinstance(row, Utterance)
            answer = client.post("/translate", content=Path(row.audio).read_bytes()).json()
            [offline] = translator.translate([translator.features(wave)])
            assert (answer["text"], answer["transcript"]) == (offline.text, offline.transcript)
        long = client.post("/translate", content=(tmp_path / "long.wav").read_bytes()).json()
        assert len(long["pieces"]) >= 3
        assert client.post("/translate", content=b"no audio").status_code == 422
        assert client.get("/healthz").json()["models"][0]["pending_pieces"] == 0
