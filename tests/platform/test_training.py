"""The loop's invariances, in plain processes without Ray: splits, ZeRO stages, resuming, faults."""

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
from eagleray.platform.remote import SharedFolder
from eagleray.platform.stopping import withdraw_stop
from eagleray.platform.training import NonFiniteLossError, run_training, seed_step, total_steps

pytestmark = pytest.mark.ray  # several processes
CLOCK = ("time", "tokens_per_s", "step_s")


def _train(run_dir: Path, *overrides: str) -> dict[str, float] | None:
    if dist.get_rank() == 0 and not (run_dir / "data").exists():
        write_toy_data(run_dir / "data")
    dist.barrier()
    cfg = toy_config(*overrides)
    return run_training(ToyTask(cfg, run_dir / "data"), cfg, run_dir)


def _records(run_dir: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def _weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "model" / "model.safetensors")


def _each(rank: int, runs: dict[str, list[str]]) -> None:
    for folder, overrides in runs.items():
        _train(Path(folder), *overrides)


def _assert_same_run(one: Path, other: Path, *, atol: float) -> None:
    for a, b in zip(_records(one), _records(other), strict=True):
        assert a["step"] == b["step"] and a["kind"] == b["kind"]
        assert a["loss"] == pytest.approx(b["loss"], abs=atol)
        if a["kind"] == "train":
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], abs=10 * atol)
    weights, others = _weights(one), _weights(other)
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], atol=10 * atol, rtol=0)


def test_result_does_not_depend_on_the_split(tmp_path: Path) -> None:
    """1 x 8, 1 x 2 accumulated four times, 2 x 4, 2 x 2 accumulated twice, passes cut by length, and every ZeRO stage: one trajectory.

    The weights (target tokens) of the shares differ, so a mean of means would fail here.
    """
    sgd_like = (
        "optim.eps=0.001"  # Adam with a tiny eps turns rounding noise of near-zero gradients into steps
    )
    keep_last = "train.keep_model=last"
    one = {
        "1x8": [],
        "1x2x4": ["train.micro_batch_size=2"],
        **{f"1x8-zero{stage}": [f"deepspeed.zero_stage={stage}"] for stage in (1, 2, 3)},
    }
    two = {
        "2x4": ["train.micro_batch_size=4"],
        "2x2x2": ["train.micro_batch_size=2"],
        "2xlength": ["train.micro_batch_length=24"],
        **{f"2x2x2-zero{s}": ["train.micro_batch_size=2", f"deepspeed.zero_stage={s}"] for s in (1, 2, 3)},
    }
    for workers, runs in ((1, one), (2, two)):
        common = [sgd_like, keep_last, f"ray.num_workers={workers}"]
        run_workers(_each, workers, {str(tmp_path / name): [*runs[name], *common] for name in runs})
    for name in [*one, *two][1:]:
        _assert_same_run(tmp_path / "1x8", tmp_path / name, atol=1e-5)


def _crash_and_resume(rank: int, root: str, overrides: list[str]) -> None:
    _train(Path(root, "whole"), *overrides)
    ToyTask.crash_at_call = 10
    with pytest.raises(ConnectionError, match="injected"):
        _train(Path(root, "broken"), *overrides)
    ToyTask.crash_at_call = None
    _train(Path(root, "broken"), *overrides)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resumed_run_is_bit_identical(tmp_path: Path, stage: int) -> None:
    """Dropout on, a crash between two checkpoints: same metrics and same weights as undisturbed, exactly."""
    overrides = [
        "dropout=0.2",
        "ray.num_workers=2",
        "train.micro_batch_size=4",
        f"deepspeed.zero_stage={stage}",
    ]
    run_workers(_crash_and_resume, 2, str(tmp_path), overrides)
    assert _records(tmp_path / "whole") == _records(tmp_path / "broken")
    for name, weight in _weights(tmp_path / "whole").items():
        assert torch.equal(weight, _weights(tmp_path / "broken")[name]), name


def _stop_after(rank: int, runs: dict[str, list[str]], calls: int | None) -> None:
    """Train until the loss was computed `calls` times; `None`: to the end."""
    for folder, overrides in runs.items():
        withdraw_stop(SharedFolder(Path(folder)))
        dist.barrier()
        ToyTask.stop_at_call = calls
        finished = _train(Path(folder), *overrides)
        assert (finished is None) == (calls is not None)


def test_another_number_of_workers_goes_on(tmp_path: Path) -> None:
    """2 workers, then 1, then 2, under every ZeRO stage: the loss is that of one run to 1e-4.

    Weight decay tells whether biases still have none, and seven steps after a change whether Adam's step counter
    is right: with the counters of two parameter groups shared the loss was off by more within five steps.
    """
    common = ["optim.eps=0.001", "optim.weight_decay=0.3", "train.keep_model=last"]
    two = [*common, "ray.num_workers=2", "train.micro_batch_size=4"]
    stages = [f"deepspeed.zero_stage={stage}" for stage in range(4)]
    for workers, calls, split in ((2, 3, two), (1, 4, [*common, "ray.num_workers=1"]), (2, None, two)):
        runs = {str(tmp_path / stage): [stage, *split] for stage in stages}
        run_workers(_stop_after, workers, runs, calls)
    run_workers(_each, 2, {str(tmp_path / "whole"): two})
    for stage in stages:
        _assert_same_run(tmp_path / "whole", tmp_path / stage, atol=1e-4)
    assert not list(tmp_path.rglob("*universal*")), "converted copies are gone"


def _faults(rank: int, root: str) -> None:
    run, every = Path(root, "run"), "train.eval_every=3"
    ToyTask.nan_at_call = 7
    with pytest.raises(NonFiniteLossError, match=r"loss of step 7 is nan.*train-\d+"):
        _train(run, every)
    ToyTask.nan_at_call = None
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]
    with pytest.raises(CheckpointError, match="another config"):
        _train(run, every, "optim.lr=0.5")

    # A half-written checkpoint is never used; a damaged one is passed over for the one before.
    (run / "checkpoints" / "step-00000009.partial").mkdir()
    _shard(run, 6).write_bytes(_shard(run, 6).read_bytes()[:-100])
    _train(run, every)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000009", "step-00000012"]
    flipped = bytearray(_shard(run, 9).read_bytes())
    flipped[len(flipped) // 2] ^= 1
    _shard(run, 9).write_bytes(flipped)
    _shard(run, 12).unlink()
    with pytest.raises(
        CheckpointError, match=r"step-00000012: .*states.pt is missing; step-00000009: .*states.pt is damaged"
    ):
        _train(run, every)


def _shard(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}" / "state" / "mp_rank_00_model_states.pt"


def test_faults_lose_nothing(tmp_path: Path) -> None:
    run_workers(_faults, 1, str(tmp_path))
    run_workers(_each, 1, {str(tmp_path / "whole"): ["train.eval_every=3"]})
    _assert_same_run(tmp_path / "run", tmp_path / "whole", atol=0.0)


def _full_disk(rank: int, root: str) -> None:
    run, sync = Path(root, "run"), os.fsync

    def no_space(descriptor: int) -> None:
        if _shard(run, 4).exists():
            raise OSError(28, "No space left on device")
        sync(descriptor)

    os.fsync = no_space
    with pytest.raises(CheckpointError, match=r"step 8 could not be written.*No space left.*make room"):
        _train(run)
    os.fsync = sync
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000004"]
    _train(run)
    _train(Path(root, "whole"))


def test_full_disk_while_saving(tmp_path: Path) -> None:
    """The writing thread's error ends the run; the checkpoint before is whole, and the run goes on from it."""
    run_workers(_full_disk, 1, str(tmp_path))
    _assert_same_run(tmp_path / "run", tmp_path / "whole", atol=0.0)


def _variants(rank: int, root: str) -> None:
    early = _train(Path(root, "early"), "train.patience=1", "optim.lr=0.000000001", "train.eval_every=2")
    assert early and early["steps"] < 12
    lora = _train(Path(root, "lora"), "lora={rank: 4}", "train.max_steps=4")
    assert lora and lora["steps"] == 4
    _train(Path(root, "bf16"), "train.precision=bf16", "deepspeed.zero_stage=2", "train.max_steps=4")
    _train(Path(root, "gc"), "train.gradient_checkpointing=true")
    with pytest.raises(ValueError, match=r"`train.metric` is 'bleu'; this job evaluates: loss"):
        _train(Path(root, "metric"), "train.metric=bleu")
    _train(Path(root, "plain"))


def _fp16(rank: int, root: str) -> None:
    with pytest.raises(ValueError, match="needs a GPU"):
        _train(Path(root), "train.precision=fp16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only where there is no GPU")
def test_fp16_needs_a_gpu(tmp_path: Path) -> None:
    run_workers(_fp16, 1, str(tmp_path))


def test_variants(tmp_path: Path) -> None:
    """Early stopping, LoRA export, bf16, gradient checkpointing, refusals."""
    run_workers(_variants, 1, str(tmp_path))
    adapter = {p.name for p in (tmp_path / "lora" / "model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "extra.txt"} <= adapter
    assert (
        next(iter(load_file(tmp_path / "bf16" / "model" / "model.safetensors").values())).dtype
        == torch.bfloat16
    )
    _assert_same_run(tmp_path / "gc", tmp_path / "plain", atol=1e-6)


@pytest.mark.soak  # DeepSpeed compiles its Adam, minutes the first time
def test_offload_changes_nothing(tmp_path: Path) -> None:
    """Optimiser and parameters in host memory, under ZeRO 2 and 3; DeepSpeed's own CPU Adam takes the steps."""
    common = ["optim.eps=0.001", "train.keep_model=last", "train.max_steps=6"]
    runs = {
        "plain": [],
        "zero2": ["deepspeed={zero_stage: 2, offload_optimizer: true}"],
        "zero3": ["deepspeed={zero_stage: 3, offload_optimizer: true, offload_params: true}"],
    }
    run_workers(_each, 1, {str(tmp_path / name): [*further, *common] for name, further in runs.items()})
    for name in ("zero2", "zero3"):
        _assert_same_run(tmp_path / "plain", tmp_path / name, atol=1e-5)


def _from_pretrained(rank: int, root: str) -> None:
    start = Path(root, "start")
    ToyTask.start = None
    _train(start, "train.max_steps=1")
    ToyTask.start = str(start / "model")
    for stage in (0, 3):
        _train(
            Path(root, f"zero{stage}"),
            f"deepspeed.zero_stage={stage}",
            "train.keep_model=last",
            "optim.eps=0.001",
        )


def test_zero_3_partitions_a_pretrained_model_as_it_loads(tmp_path: Path) -> None:
    run_workers(_from_pretrained, 1, str(tmp_path))
    _assert_same_run(tmp_path / "zero0", tmp_path / "zero3", atol=1e-5)
    started, fresh = (_records(tmp_path / name)[0]["loss"] for name in ("zero3", "start"))
    assert started != fresh


def test_total_steps() -> None:
    train = toy_config().train
    assert total_steps(train, 40) == 12
    assert total_steps(train.model_copy(update={"max_steps": None, "epochs": 2.0}), 41) == 11  # ceil(82 / 8)


def test_seed_is_a_function_of_step_and_rank() -> None:
    draws = set()
    for step in range(3):
        for rank in range(2):
            seed_step(1, step=step, rank=rank)
            first = torch.rand(1).item()
            seed_step(1, step=step, rank=rank)
            assert torch.rand(1).item() == first
            draws.add(first)
    assert len(draws) == 6
