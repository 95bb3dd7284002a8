"""Means of models, by hand, and what the training loop averages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_task import ToyTask, run_workers, toy_config, write_toy_data

from eagleray.platform.averaging import average_models
from eagleray.platform.training import run_training


def _model(folder: Path, **weights: torch.Tensor) -> Path:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(folder.name)
    return folder


def test_mean_in_fp32_by_hand(tmp_path: Path) -> None:
    """In bf16, 256 + 1 is 256: a sum in the type of the weights would lose the second model."""
    counts = [torch.tensor(5), torch.tensor(8)]
    first = _model(tmp_path / "a", w=torch.tensor([256.0, 1.0], dtype=torch.bfloat16), count=counts[0])
    second = _model(tmp_path / "b", w=torch.tensor([260.0, 2.0], dtype=torch.bfloat16), count=counts[1])
    average_models([first, second], tmp_path / "mean")
    average_models([first, second], tmp_path / "mean")  # replaces the first
    weights = load_file(tmp_path / "mean" / "model.safetensors")
    assert weights["w"].tolist() == [258.0, 1.5] and weights["w"].dtype == torch.bfloat16
    assert weights["count"].item() == 6
    assert (tmp_path / "mean" / "config.json").read_text() == "a"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "mean"]


def test_models_that_differ_are_refused(tmp_path: Path) -> None:
    one, other = _model(tmp_path / "a", w=torch.ones(2)), _model(tmp_path / "b", w=torch.ones(3))
    with pytest.raises(ValueError, match="`w` has another shape"):
        average_models([one, other], tmp_path / "mean")
    with pytest.raises(ValueError, match="has other weights"):
        average_models([one, _model(tmp_path / "c", v=torch.ones(2))], tmp_path / "mean")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no weights"):
        average_models([one, tmp_path / "empty"], tmp_path / "mean")
    with pytest.raises(ValueError, match="no model to average"):
        average_models([], tmp_path / "mean")


def _train(rank: int, run_dir: str, *overrides: str) -> None:
    cfg = toy_config("train.average_best=2", "ray.num_workers=2", "train.micro_batch_size=4", *overrides)
    run_training(ToyTask(cfg, Path(run_dir, "data")), cfg, Path(run_dir))


@pytest.mark.ray
def test_the_loop_averages_the_best(tmp_path: Path) -> None:
    write_toy_data(tmp_path / "data")
    run_workers(_train, 2, str(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if line["kind"] == "eval"}
    best = sorted(sorted(losses, key=lambda step: losses[step])[:2])
    kept = sorted((tmp_path / "best").iterdir())
    assert [path.name for path in kept] == [f"step-{step:08d}" for step in best]
    parts = [load_file(path / "model.safetensors") for path in kept]
    for name, mean in load_file(tmp_path / "model" / "model.safetensors").items():
        torch.testing.assert_close(mean, (parts[0][name] + parts[1][name]) / 2)
