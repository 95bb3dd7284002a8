"""The loop's invariances, in plain processes without Ray: splits, ZeRO stages, resuming, faults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from toy_task import ToyTask, run_workers, toy_config, write_toy_data

from eagleray.platform.checkpoints import CheckpointError
from eagleray.platform.training import NonFiniteLossError, run_training, seed_step, total_steps

pytestmark = pytest.mark.ray  # several processes
CLOCK = ("time", "tokens_per_s", "step_s")


def _train(run_dir: Path, *overrides: str) -> dict[str, float]:
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
    _truncate(run / "checkpoints" / "step-00000006")
    _train(run, every)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000009", "step-00000012"]
    for name in ("step-00000009", "step-00000012"):
        _truncate(run / "checkpoints" / name)
    with pytest.raises(CheckpointError, match=r"step-00000012: .*model_states.pt is damaged.*step-00000009"):
        _train(run, every)


def _truncate(checkpoint: Path) -> None:
    shard = checkpoint / "state" / "mp_rank_00_model_states.pt"
    shard.write_bytes(shard.read_bytes()[:-100])


def test_faults_lose_nothing(tmp_path: Path) -> None:
    run_workers(_faults, 1, str(tmp_path))
    run_workers(_each, 1, {str(tmp_path / "whole"): ["train.eval_every=3"]})
    _assert_same_run(tmp_path / "run", tmp_path / "whole", atol=0.0)


def _full_disk(rank: int, root: str) -> None:
    original = torch.save

    def no_space(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    torch.save = no_space
    with pytest.raises(CheckpointError, match=r"step 4 could not be written.*No space left.*make room"):
        _train(Path(root, "other"), "train.max_steps=4")
    torch.save = original
    assert not list(Path(root, "other", "checkpoints").iterdir())


def test_full_disk_while_saving(tmp_path: Path) -> None:
    run_workers(_full_disk, 1, str(tmp_path))


def _variants(rank: int, root: str) -> None:
    early = _train(Path(root, "early"), "train.patience=1", "optim.lr=0.000000001", "train.eval_every=2")
    assert early["steps"] < 12
    lora = _train(Path(root, "lora"), "lora={rank: 4}", "train.max_steps=4")
    assert lora["steps"] == 4
    _train(Path(root, "bf16"), "train.precision=bf16", "deepspeed.zero_stage=2", "train.max_steps=4")
    _train(Path(root, "gc"), "train.gradient_checkpointing=true")
    with pytest.raises(ValueError, match="needs a GPU"):
        _train(Path(root, "fp16"), "train.precision=fp16")
    with pytest.raises(ValueError, match=r"`train.metric` is 'bleu'; this job evaluates: loss"):
        _train(Path(root, "metric"), "train.metric=bleu")
    _train(Path(root, "plain"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks what happens without a GPU")
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
