"""The training task of LRHP without Ray: orders, the weight of a batch, and check 17, one loss however it is split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import tiny_model, tiny_tokenizer
from toy_task import run_workers

from eagleray.jobs.lrhp.train import Config, LrhpTask, _prepare
from eagleray.models.gram.prompts import shuffled_order
from eagleray.models.lrhp.losses import order_loss, symmetry_penalty
from eagleray.models.lrhp.representer import Representer
from eagleray.platform.config import ConfigError, load_config
from eagleray.platform.runs import RunFolder
from eagleray.platform.training import run_training

CONFIG = Path(__file__).parents[3] / "configs" / "lrhp" / "train_tiny.yaml"


def _config(*overrides: str) -> Config:
    return load_config(Config, CONFIG, ["tracking.tensorboard=false", *overrides])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with prepared examples and a tiny Llama to start from."""
    folder = tmp_path_factory.mktemp("lrhp")
    tokenizer = tiny_tokenizer()
    tiny_model(vocab_size=len(tokenizer), initializer_range=0.05).save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    cfg = _config(*_start(folder), f"run.dir={folder / 'run'}")
    with RunFolder.create("lrhp.train", cfg).recording() as run:
        _prepare(cfg, run)
    return folder


def _start(folder: Path) -> list[str]:
    pairs = ["data.train.synthetic.pairs=24", "data.eval.synthetic.pairs=10"]
    return ["scratch=null", f"model.path={folder / 'start'}", *pairs]


def _task(prepared: Path, *overrides: str) -> LrhpTask:
    return LrhpTask(_config(*_start(prepared), *overrides), prepared / "run" / "data")


def test_orders_of_the_rows(prepared: Path) -> None:
    both = _task(prepared).train_batch(range(6), step=0)
    assert both.tensors["label"].tolist() == [1, 0] * 6 and both.weight == 12
    fixed = _task(prepared, "loss.order=fixed").train_batch(range(6), step=0)
    assert fixed.tensors["label"].tolist() == [1] * 6 and fixed.weight == 6
    task = _task(prepared, "loss.order=random")
    random = task.train_batch(range(24), step=0)
    expected = [float(not shuffled_order(task.cfg.train.seed, name)) for name in random.ids]
    assert random.tensors["label"].tolist() == expected and 4 < sum(expected) < 20
    assert task.eval_batch(range(3)).weight == 6  # evaluation always reads both orders


def test_the_loss_is_the_sum_over_rows(prepared: Path) -> None:
    task = _task(prepared, "loss.symmetry=0.3", "loss.smoothing=0.1")
    model: Any = task.build_model()
    torch.nn.init.normal_(model.head.weight)
    batch = task.train_batch(range(5), step=0)
    total, further = task.loss(model, batch.tensors)
    _, u_R = model(batch.tensors["input_ids"], batch.tensors["attention_mask"])
    rows = order_loss(u_R, batch.tensors["label"], smoothing=0.1)
    pairs = symmetry_penalty(u_R[0::2], u_R[1::2]) / 5
    torch.testing.assert_close(total / batch.weight, rows + 0.3 * pairs)
    assert 0 <= further["accuracy"] <= 10


def test_an_lrhp_model_is_trained_further_from_its_row_and_head(prepared: Path, tmp_path: Path) -> None:
    task = _task(prepared)
    model: Any = task.build_model()
    assert not model.head.weight.any()
    torch.nn.init.normal_(model.head.weight)
    torch.nn.init.normal_(model.preference_row)
    model.save_pretrained(tmp_path)
    task.save_extras(tmp_path)
    again: Any = _task(prepared, f"model.path={tmp_path}").build_model()
    assert torch.equal(again.head.weight, model.head.weight)
    assert torch.equal(again.preference_row, model.preference_row)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.symmetry=0.1", "loss.order=random"], r"`loss.symmetry` needs `loss.order: both`"),
        (["pair.template=x"], r"it must hold \{prompt\}"),
        (["data.train.synthetic=null"], r"give either `pairs` or `synthetic`"),
        (["loss.smoothing=0.5"], r"less than 0.5"),
    ],
)
def test_contradictions_are_refused_before_anything_runs(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _config(*overrides)


RUNS = {
    1: {"1x8": [], "1x2x4": ["train.micro_batch_size=2"]},
    2: {
        "2x4": ["train.micro_batch_size=4"],
        "2x2x2-zero3": ["train.micro_batch_size=2", "deepspeed.zero_stage=3"],
    },
}


def _each(rank: int, prepared: str, runs: dict[str, list[str]], workers: int) -> None:
    base = ["train.batch_size=8", "train.micro_batch_size=8", "train.max_steps=3", "train.eval_every=3"]
    base += ["train.log_every=1", "optim.eps=0.001", "train.keep_model=last", f"ray.num_workers={workers}"]
    for name, overrides in runs.items():
        task = _task(Path(prepared), *base, *overrides)
        run_dir = Path(prepared) / name
        run_dir.mkdir(exist_ok=True)
        run_training(task, task.cfg, run_dir)


@pytest.mark.ray  # several processes
def test_check_17_loss_and_gradient_do_not_depend_on_the_split(prepared: Path) -> None:
    """1 worker x 8, 1 x 2 accumulated four times, 2 x 4, and 2 x 2 accumulated under ZeRO-3."""
    for workers, runs in RUNS.items():
        run_workers(_each, workers, str(prepared), runs, workers)
    trajectories = {}
    for name in [name for runs in RUNS.values() for name in runs]:
        lines = [json.loads(line) for line in (prepared / name / "metrics.jsonl").read_text().splitlines()]
        trajectories[name] = [x for r in lines if r["kind"] == "train" for x in (r["loss"], r["grad_norm"])]
        assert trajectories[name][0] == pytest.approx(0.693147, abs=1e-6)  # a head of zeros
    expected = trajectories.pop("1x8")
    assert len(expected) == 6
    for name, found in trajectories.items():
        assert found == pytest.approx(expected, abs=1e-5), name
    pairs = [("How?", "Like this.", "No."), ("Why?", "Because.", "So.")]
    one, sharded = (
        Representer.from_pretrained(prepared / name / "model", device="cpu").both_orders(pairs)
        for name in ("1x8", "2x2x2-zero3")
    )
    assert sharded[1].ravel().tolist() == pytest.approx(one[1].ravel().tolist(), abs=1e-3)
