"""Going on from the checkpoint of another run: same weights, moments and step, but this run's own rates."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from toy_task import ToyTask, run_workers, toy_config, write_toy_data

from eagleray.platform.checkpoints import CheckpointError
from eagleray.platform.training import run_training

pytestmark = pytest.mark.ray  # several processes
CLOCK = ("time", "tokens_per_s", "step_s")
FACTOR = 8


def _train(root: str, name: str, *overrides: str) -> None:
    data = Path(root, "data")
    if dist.get_rank() == 0 and not data.exists():
        write_toy_data(data)
    dist.barrier()
    run_dir = Path(root, name)
    run_dir.mkdir(exist_ok=True)
    cfg = toy_config("dropout=0.2", "train.keep_model=last", *overrides)
    run_training(ToyTask(cfg, data), cfg, run_dir)


def _runs(rank: int, root: str, stage: int) -> None:
    zero = f"deepspeed.zero_stage={stage}"
    _train(root, "whole", zero)
    _train(root, "first", zero, "train.stop_at=4")
    scheme = "file://" if stage == 3 else ""
    os.environ["EAGLERAY_WORK_DIR"] = f"{root}/work"
    start = f"train.start_from={scheme}{root}/first/checkpoints/step-00000004"
    _train(root, "rest", zero, start)
    _train(root, "one", zero, start, "train.stop_at=5")
    faster = [zero, f"optim.lr={0.01 * FACTOR}", "optim.betas=[0.9, 0.999]"]
    _train(root, "faster", *faster, start, "train.stop_at=5")
    if stage == 0:
        with pytest.raises(CheckpointError, match=r"has done 4 steps and this run ends after 4"):
            _train(root, "nothing", zero, start, "train.stop_at=4")
        with pytest.raises(CheckpointError, match=r"train.start_from.*nowhere.*is missing or unreadable"):
            _train(root, "lost", zero, "train.start_from=/nowhere")
        with pytest.raises(CheckpointError, match="another config"):  # the guard of a resumed run stands
            _train(root, "first", zero, "train.stop_at=4", "optim.lr=0.5")
        shard = Path(root, "first/checkpoints/step-00000004/state/mp_rank_00_model_states.pt")
        shard.write_bytes(shard.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=r"cannot be used: .* is damaged"):
            _train(root, "damaged", zero, start)


def _records(run_dir: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_run_goes_on_from_the_checkpoint_of_another(tmp_path: Path, stage: int) -> None:
    """Two halves make the whole, exactly; a higher rate makes the next update larger by that factor.

    AdamW's update is the rate times a function of the moments and the gradient, which are the same.
    """
    run_workers(_runs, 1, str(tmp_path), stage)
    assert not list((tmp_path / "work").rglob("*states.pt"))  # copies from a URI are gone
    whole = _records(tmp_path / "whole")
    assert [r["step"] for r in _records(tmp_path / "first")] == [1, 2, 3, 4, 4]
    assert _records(tmp_path / "first") + _records(tmp_path / "rest") == whole

    fifth, faster = _records(tmp_path / "one")[0], _records(tmp_path / "faster")[0]
    assert (fifth["step"], fifth["loss"]) == (5, faster["loss"])
    assert faster["lr"] == pytest.approx(FACTOR * fifth["lr"])
    before, after, after_faster = (
        load_file(tmp_path / name / "model/model.safetensors") for name in ("first", "one", "faster")
    )
    for name, weight in before.items():
        update, larger = after[name] - weight, after_faster[name] - weight
        assert update.abs().max() > 0, name
        torch.testing.assert_close(larger, FACTOR * update, rtol=1e-3, atol=2e-6)
