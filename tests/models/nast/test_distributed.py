"""Several workers: A16 (two ranks, one gradient) with BatchNorm, two forwards a step and tied heads, under ZeRO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from nast_cases import batch_of, tiny_model
from torch import Tensor, nn
from toy_task import run_workers, toy_config

from eagleray.models.nast.curriculum import Mixing
from eagleray.models.nast.losses import nast_loss
from eagleray.platform.engine import build_engine

pytestmark = pytest.mark.ray  # several processes

STEPS = 3


def _loss(model: Any, batch: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    # Ratio 1: all mistakes are told, so nothing is drawn and any number of workers sees the same.
    return nast_loss(model, *batch, mixing=Mixing(ratio=1.0))


def _trajectory(stage: int, **changes: Any) -> list[float]:
    """Losses of a few steps on one global batch of four clips, and the norm of BatchNorm's statistics at the end."""
    torch.manual_seed(0)
    cfg = toy_config(f"deepspeed.zero_stage={stage}", "train.micro_batch_size=1", "optim.lr=0.003")
    model = tiny_model(**{"dropout": 0.0, "drop_net": 0.0, **changes})
    engine = build_engine(model, cfg, total_steps=STEPS)
    engine.train()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    batch = batch_of(4)
    share = tuple(t[rank::world_size] for t in batch)
    weight = float((batch[5] + 1).sum())
    losses = []
    for _ in range(STEPS):
        loss, _ = engine(_loss, share)
        engine.backward(loss * (world_size / weight), scale_wrt_gas=False)
        engine.step()
        total = loss.detach().double()
        dist.all_reduce(total)
        losses.append(total.item() / weight)
    statistics = [b for name, b in nn.Module.named_buffers(model) if name.endswith("running_mean")]
    return [*losses, sum(b.double().norm().item() for b in statistics)]


def _write(rank: int, path: str, stages: list[int]) -> None:
    found = {str(stage): _trajectory(stage) for stage in stages}
    if dist.get_world_size() > 1:
        # Workers draw drop-net apart; under ZeRO-3 they would wait for each other if a branch were skipped.
        torch.manual_seed(rank)
        found["drop-net"] = _trajectory(3, drop_net=0.5)
    Path(f"{path}.{rank}").write_text(json.dumps(found))


def test_a16_workers_and_zero_stages_give_one_trajectory(tmp_path: Path) -> None:
    """Losses of three steps and running statistics: 1 process, 2 processes, ZeRO 0, 2 and 3, agree."""
    run_workers(_write, 1, str(tmp_path / "one"), [0])
    run_workers(_write, 2, str(tmp_path / "two"), [0, 2, 3])
    expected = json.loads((tmp_path / "one.0").read_text())["0"]
    assert expected[0] > expected[2]
    for rank in range(2):
        found = json.loads((tmp_path / f"two.{rank}").read_text())
        for stage in ("0", "2", "3"):
            assert found[stage] == pytest.approx(expected, abs=2e-3), stage
        assert len(found["drop-net"]) == STEPS + 1
