"""The task of a phase without Ray: examples, batches, loss, hand-over (check 17); and the jobs as shipped, with Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from eagleray.jobs.rovrm import evaluate, progressive, train
from eagleray.jobs.serve import serving
from eagleray.models.rovrm.checkpoint import (
    CheckpointMismatch,
    VisualSettings,
    load_reward_model,
    weights_sha256,
)
from eagleray.models.rovrm.scoring import VisualScorer
from eagleray.models.rovrm.synthetic import make_visual, write_visual
from eagleray.platform.config import ConfigError, load_config, validate_config
from eagleray.platform.runs import RunFolder
from eagleray.platform.task import Batch

CONFIGS = Path(__file__).parents[3] / "configs" / "rovrm"
MIXTURE = "data.synthetic=[{kind: visual, samples: 24}, {kind: text, samples: 12}]"


def _prepared(
    tmp_path: Path, *overrides: str, name: str = "run"
) -> tuple[train.Config, RunFolder, train.VisualTask]:
    cfg = load_config(
        train.Config, CONFIGS / "train_tiny.yaml", [MIXTURE, f"run.dir={tmp_path / name}", *overrides]
    )
    run = RunFolder.create(train.JOB, cfg)
    train._prepare(cfg, run)
    return cfg, run, train.VisualTask(cfg, run.data)


def _steps(task: train.VisualTask, model: torch.nn.Module, count: int = 3) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(count):
        batch = task.train_batch(list(range(8 * step, 8 * step + 8)), step=step)
        loss, _ = task.loss(model, batch.tensors)
        optimizer.zero_grad()
        (loss / batch.weight).backward()
        optimizer.step()


def test_texts_and_pictures_share_a_batch(tmp_path: Path) -> None:
    _, run, task = _prepared(tmp_path)
    assert len(task.train) == 36 and task.images is not None and len(task.images) <= 30
    model = task.build_model().eval()
    batch = task.train_batch([0, 1, 30, 31], step=0)
    assert batch.weight == 4 and batch.tensors["counts"].tolist() == [2, 2, 2, 2]
    assert (batch.tensors["image_index"] >= 0).tolist() == [True] * 4 + [False] * 4
    together = task.evaluate_batch(model, batch.tensors)
    alone = [task.evaluate_batch(model, task.train_batch([i], step=0).tensors)[0] for i in (0, 1, 30, 31)]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    metrics = task.summarise(together)
    assert metrics.keys() >= {"accuracy", "nll", "ece", "margin"}
    assert run.read_manifest()["phase"] == 3 and run.read_manifest()["data"]["too_long"] == []


def test_a_batch_of_texts_runs_the_tower_too(tmp_path: Path) -> None:
    """Else workers whose share of a batch has no picture would wait for gradients that never come."""
    _, _, task = _prepared(tmp_path)
    model = task.build_model()
    texts: Batch = task.train_batch([30, 31], step=0)
    assert texts.tensors["image_index"].tolist() == [-1] * 4 and "image.pixel_values" in texts.tensors
    loss, _ = task.loss(model, texts.tensors)
    loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "multi_modal_projector" in name]
    assert all(g is not None and not g.any() for g in gradients)


def test_what_does_not_fit_is_left_out_with_its_id(tmp_path: Path) -> None:
    _, _, whole = _prepared(tmp_path, name="whole")
    limit = int(max(whole.train_lengths)) - 1
    _, run, task = _prepared(tmp_path, f"max_length={limit}")
    manifest = run.read_manifest()["data"]
    kept = {task.train[i]["id"] for i in range(len(task.train))}
    assert manifest["too_long"] and not set(manifest["too_long"]) & kept
    assert max(task.train_lengths) <= limit
    image_id = task.encoder.family.image_token_id
    pictures = [task.train[i] for i in range(len(task.train)) if task.train[i]["image"] >= 0]
    assert pictures and all((row["ids"] == image_id).sum() == 2 * 16 for row in pictures)


def test_check_17_phases_hand_over_all_weights_and_their_history(tmp_path: Path) -> None:
    """Phase 1, then 3: bitwise the same weights, and a lineage whose hashes meet."""
    text = "data.synthetic=[{kind: text, samples: 40}]"
    _, _, first = _prepared(tmp_path, text, "phase=1", "train_vision_tower=false", name="one")
    model = first.build_model()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    _steps(first, model)
    seeing = ("model.vision_tower", "model.multi_modal_projector")
    for name, value in model.state_dict().items():
        if name.startswith(seeing):
            assert torch.equal(value, start[name]), name
    handed = tmp_path / "model-1"
    model.save_pretrained(handed)
    first.save_extras(handed)

    over = ["scratch=null", f"model={{path: {handed}}}", "max_length=null"]
    sha256 = weights_sha256(handed)
    _, run, second = _prepared(tmp_path, *over, f"input_sha256={sha256}", name="two")
    assert run.read_manifest()["input_sha256"] == sha256
    taken = second.build_model()
    assert all(torch.equal(value, taken.state_dict()[name]) for name, value in model.state_dict().items())
    assert second.encoder.max_length == first.encoder.max_length
    _steps(second, taken)
    after = taken.state_dict()
    assert any(
        not torch.equal(after[name], value)
        for name, value in model.state_dict().items()
        if name.startswith(seeing)
    )
    taken.save_pretrained(tmp_path / "model-2")
    second.save_extras(tmp_path / "model-2")
    zero, one, two = VisualSettings.load(tmp_path / "model-2").lineage
    assert (zero.phase, one.phase, two.phase) == (0, 1, 3)
    assert two.input_sha256 == sha256 == VisualSettings.load(handed).weights_sha256
    assert one.trained_count < two.trained_count == sum(p.numel() for p in taken.parameters())
    load_reward_model(tmp_path / "model-2")

    with pytest.raises(CheckpointMismatch, match=r"`input_sha256` is ffffffffffff\.\.\., but .* holds"):
        _prepared(tmp_path, *over, f"input_sha256={'f' * 64}", name="three")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["scratch=null"], r"give either `model.path` .* or `scratch`"),
        (["phase=2"], "`train_vision_tower` goes with `phase: 3`"),
        (["lora={rank: 4}"], "`lora` is not available here: a phase hands its whole weights"),
        (["train.average_best=2"], "`train.average_best` is not available here"),
        (["data.synthetic=[]"], "give `data.train`, `data.synthetic` or both"),
        (["phase=4"], "`phase`: Input should be 1, 2 or 3"),
    ],
)
def test_contradictions_are_refused_before_anything_runs(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(train.Config, CONFIGS / "train_tiny.yaml", overrides)


def test_phases_run_forward() -> None:
    text = "{phase: 1, data: {synthetic: [{kind: text}]}}"
    picture = "{phase: 3, data: {synthetic: [{kind: visual}]}}"
    for phases in (f"[{picture}]", f"[{text}, {picture}]", f"[{text}, {text}]"):
        load_config(progressive.Config, CONFIGS / "progressive_tiny.yaml", [f"phases={phases}"])
    with pytest.raises(ConfigError, match="phase 1 stands behind phase 3"):
        load_config(progressive.Config, CONFIGS / "progressive_tiny.yaml", [f"phases=[{picture}, {text}]"])
    broken = "[{phase: 3, data: {synthetic: [{kind: visual}]}, train: {epoks: 2}}]"
    with pytest.raises(ConfigError, match=r"unknown key `train\.epoks`; did you mean `train\.epochs`"):
        load_config(progressive.Config, CONFIGS / "progressive_tiny.yaml", [f"phases={broken}"])


def _chain(tmp_path: Path) -> progressive.Config:
    """Texts, then pictures, and an evaluation on the other half of the facts."""
    rows = write_visual(tmp_path / "data", 24, 7, split="test")
    values: dict[str, Any] = {
        "sets": {"facts": {"sources": [{"path": str(rows), "images": str(tmp_path / "data" / "images")}]}},
        "bootstrap": 100,
        "run": {"dir": str(tmp_path / "chain")},
        "tracking": {"tensorboard": False},
    }
    base = load_config(progressive.Config, CONFIGS / "progressive_tiny.yaml").model_dump()
    base["phases"] = [base["phases"][0], base["phases"][2]]
    base["train"] |= {"max_steps": 3, "eval_every": 3}
    return validate_config(progressive.Config, base | values, "test")


def _cut_short(chain: Path) -> None:
    path = chain / "manifest.json"
    path.write_text(path.read_text().replace('"status": "finished"', '"status": "interrupted"', 1))


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.usefixtures("ray_cluster")
def test_a_phase_trains_on_what_is_selected_for_the_next(tmp_path: Path) -> None:
    """Inside the chain: warm-up, features, selection; a chain that is asked again computes none of them twice."""
    base = _chain(tmp_path).model_dump()
    base["phases"][0]["select"] = {"count": 60}
    warm_up = {"samples": 16, "train": {"max_steps": 1, "eval_every": 1}}
    base["selection"] |= {"warm_up": warm_up, "features": {"rank": 2, "width": 64}}
    cfg = validate_config(progressive.Config, base, "test")
    report = progressive.main(cfg)
    assert report["selection"]["1-phase-1"]["selected"] == 60
    assert [phase["phase"] for phase in report["phases"]] == [1, 3]
    manifests = {path: path.stat().st_mtime_ns for path in (tmp_path / "chain").glob("*/**/manifest.json")}
    _cut_short(tmp_path / "chain")
    again = progressive.main(cfg)
    assert (again["selection"], again["phases"]) == (report["selection"], report["phases"])
    assert len(manifests) > 3 and all(path.stat().st_mtime_ns == time for path, time in manifests.items())


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_phases_then_evaluation_then_a_picture_over_http(tmp_path: Path) -> None:
    """Texts, then pictures; one report; a chain that is asked again trains nothing; and the model answers over HTTP."""
    cfg = _chain(tmp_path)
    report = progressive.main(cfg)
    first, second = report["phases"]
    assert second["input_sha256"] == first["output_sha256"] == weights_sha256(f"{first['run']}/model")
    assert first["trained_count"] < second["trained_count"]
    manifest = RunFolder(second["run"]).read_manifest()
    assert manifest["input_sha256"] == first["output_sha256"]
    assert manifest["output_sha256"] == second["output_sha256"]
    assert len(manifest["trained_parameters"]) > 10
    scorers = report["evaluation"]["sets"]["facts"]["scorers"]
    assert list(scorers) == ["2 phase 3", "1 phase 1", "2 phase 3, picture-blind", "longer answer"]
    assert (
        scorers["2 phase 3, picture-blind"]["accuracy"]["value"] == 0.5
    )  # right and wrong facts mirror each other
    assert json.loads((tmp_path / "chain" / "report.json").read_text())["phases"][1]["phase"] == 3

    # Cut short after its phases: what is finished stays as it is.
    before = (tmp_path / "chain" / "2-phase-3" / "manifest.json").stat().st_mtime_ns
    _cut_short(tmp_path / "chain")
    assert progressive.main(cfg)["phases"] == report["phases"]
    assert (tmp_path / "chain" / "2-phase-3" / "manifest.json").stat().st_mtime_ns == before

    model = f"{second['run']}/model"
    [row, *_], files = make_visual(4, 9)
    answers, picture = [row["chosen"], row["rejected"]], files[row["image"]]
    offline = VisualScorer.from_pretrained(model, device="cpu").score(row["prompt"], answers, picture)
    with serving(model, kind="rovrm", cpus=1) as url:
        reply = httpx.post(
            f"{url}/score",
            data={"prompt": row["prompt"], "responses": answers},
            files={"image": ("a.png", picture, "image/png")},
            timeout=60,
        )
    assert reply.status_code == 200, reply.text
    assert reply.json()["scores"] == pytest.approx(offline, abs=1e-6)
    results = [
        json.loads(line)
        for line in (tmp_path / "chain/evaluation/results/facts.jsonl").read_text().splitlines()
    ]
    again = VisualScorer.from_pretrained(model, device="cpu")
    image = (tmp_path / "data" / "images" / results[0]["image"]).read_bytes()
    expected = again.score(results[0]["prompt"], results[0]["responses"], image)
    assert results[0]["rewards"]["2 phase 3"] == pytest.approx(expected, abs=1e-5)


def test_evaluation_scorers_need_what_they_need() -> None:
    for scorer in ({"kind": "model"}, {"kind": "longer_answer", "path": "x"}):
        with pytest.raises(ConfigError, match="a scorer of kind `model` needs `path`"):
            validate_config(evaluate.Config, {"scorers": {"a": scorer}, "sets": {}}, "test")
