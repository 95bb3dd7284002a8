"""The jobs of LiSA, one after the other on a tiny model; training in a real Ray worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from eagleray.jobs.lisa import analyze, convert, evaluate
from eagleray.jobs.lisa import train as lisa_train
from eagleray.jobs.sweep import load_space
from eagleray.models.lisa.delta import load_delta
from eagleray.models.lisa.distill import is_lisa_parameter
from eagleray.platform.config import ConfigError, load_config
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import LoraSection
from eagleray.platform.space import check_space

CONFIGS = Path(__file__).parents[3] / "configs" / "lisa"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 5 layers with heads of 16, and text beside it."""
    folder = tmp_path_factory.mktemp("teacher")
    model = tiny_model("llama", num_hidden_layers=5, head_dim=16, eos_token_id=3, initializer_range=0.15)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    words = ["river", "forest", "answer", "short", "useful", "numbers", "comma", "request", "better"]
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(words, 12)) + "." for _ in range(60)]
    (folder / "text.txt").write_text("\n\n".join(lines))
    return folder


def load(cls: type[Any], teacher: Path, tmp_path: Path, *overrides: str) -> Any:
    job = cls.model_fields["job"].default
    common = [f"data.paths=[{teacher / 'text.txt'}]", "data.block_length=32", f"run.dir={tmp_path / job}"]
    model = [] if cls is evaluate.Config else [f"model.path={teacher}"]
    return load_config(cls, CONFIGS / f"{job.partition('.')[2]}_tiny.yaml", [*common, *model, *overrides])


def test_analysis_feeds_conversion(teacher: Path, tmp_path: Path) -> None:
    """The layers that the report ranks first are those that share; the delta gives the same model."""
    report = analyze.main(load(analyze.Config, teacher, tmp_path))
    assert set(report["rise"]) == {1, 2, 3, 4}
    assert len(list((tmp_path / "lisa.analyze" / "plots").glob("*.png"))) == 3
    analysis = f"share.analysis={tmp_path / 'lisa.analyze' / 'report.json'}"
    converted = convert.main(load(convert.Config, teacher, tmp_path, analysis))
    ranked = sorted((2, 3, 4), key=lambda layer: report["rise"][layer])
    assert converted["shared_layers"] == sorted(ranked[:2])
    assert converted["cache_values_per_token"] < converted["cache_values_per_token_full"]
    run = RunFolder(tmp_path / "lisa.convert")
    base, whole = (AutoModelForCausalLM.from_pretrained(path) for path in (teacher, run.model))
    ids = torch.arange(10, 30)[None]
    assert torch.equal(load_delta(base, run.path / "delta")(ids).logits, whole(ids).logits)
    found = evaluate.main(
        load(
            evaluate.Config,
            teacher,
            tmp_path,
            f"models.full.path={teacher}",
            f"models.shared.path={run.model}",
        )
    )
    assert found["full"]["loss"] == pytest.approx(converted["loss_full"], abs=1e-5)
    assert found["shared"]["loss"] == pytest.approx(converted["loss"], abs=1e-5)
    ratio = converted["cache_values_per_token"] / converted["cache_values_per_token_full"]
    assert found["shared"]["cache_bytes"] / found["full"]["cache_bytes"] == pytest.approx(ratio)
    assert all(figures["tokens_per_second"] > 0 for figures in found.values())
    assert json.loads((tmp_path / "lisa.evaluate" / "report.json").read_text()) == found


@pytest.mark.ray
def test_both_phases_train(teacher: Path, tmp_path: Path, ray_cluster: None) -> None:
    """Phase A brings the layers closer to the teacher; phase B goes on from its model. Nothing else moves."""
    quick = ["share.layers=[2,3]", "train.max_steps=12", "train.eval_every=6"]
    local = load(lisa_train.Config, teacher, tmp_path, *quick, "optim.lr=0.01")
    first = lisa_train.main(local)
    lines = [json.loads(line) for line in (first.path / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line["distance"] for line in lines if line["kind"] == "eval"]
    assert evaluations[-1] < evaluations[0]
    phase_b = [f"run.dir={tmp_path / 'b'}", "phase=end_to_end", f"student.path={first.path / 'model'}"]
    second = lisa_train.main(load(lisa_train.Config, teacher, tmp_path, *quick, *phase_b, "optim.lr=1e-4"))
    start, end = (
        dict(AutoModelForCausalLM.from_pretrained(r.path / "model").named_parameters())
        for r in (first, second)
    )
    base = dict(AutoModelForCausalLM.from_pretrained(teacher).named_parameters())
    assert {name for name in start if not torch.equal(start[name], end[name])} <= set(
        filter(is_lisa_parameter, start)
    )
    assert any(not torch.equal(start[name], end[name]) for name in start)
    assert all(torch.equal(end[name], base[name]) for name in end if not is_lisa_parameter(name))
    assert second.summary["language_model"] > 0 and second.summary["distillation"] > 0


def test_an_adapter_holds_what_was_added(teacher: Path, tmp_path: Path) -> None:
    """LoRA beside the added weights: both are trained and both are in the saved adapter."""
    cfg = load(lisa_train.Config, teacher, tmp_path, "share.layers=[2,3]", "phase=end_to_end")
    cfg = cfg.model_copy(update={"lora": LoraSection(rank=2)})
    with RunFolder.create(lisa_train.JOB, cfg).recording() as run:
        lisa_train._prepare(cfg, run)
    task = lisa_train.LisaTask(cfg, run.data)
    model: Any = task.build_model()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {part for name in trained for part in ("lora_A", "align", "q_lr", "k_lr") if part in name} == {
        "lora_A",
        "align",
        "q_lr",
        "k_lr",
    }
    assert not any("lora" in name and "_lr." in name for name in trained)
    batch = task.train_batch([0, 1], step=0)
    total, parts = task.loss(model, batch.tensors)
    assert set(parts) == {"language_model", "distillation"} and batch.weight == 64
    total.backward()
    model.save_pretrained(tmp_path / "adapter")
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for part in ("align.m", "q_lr.weight", "k_lr.weight", "lora_A"):
        assert any(part in name for name in saved), part


def test_the_loss_does_not_depend_on_company(teacher: Path, tmp_path: Path) -> None:
    """Phase A: two examples together have the summed loss of each alone; records are one an example."""
    cfg = load(lisa_train.Config, teacher, tmp_path, "share.layers=[2,4]")
    with RunFolder.create(lisa_train.JOB, cfg).recording() as run:
        lisa_train._prepare(cfg, run)
    task = lisa_train.LisaTask(
        cfg.model_copy(update={"loss": cfg.loss.model_copy(update={"mse_out": 0.0})}), run.data
    )
    model = task.build_model()
    both = task.loss(model, task.train_batch([0, 1], step=0).tensors)[0]
    alone = [task.loss(model, task.train_batch([i], step=0).tensors)[0] for i in (0, 1)]
    torch.testing.assert_close(both, alone[0] + alone[1])
    records = task.evaluate_batch(model, task.eval_batch([0, 1]).tensors)
    assert len(records) == 2 and set(records[0][0]) == {"layer_2", "layer_4"}
    assert task.summarise(records)["distance"] > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["deepspeed.zero_stage=3"], "the teacher runs beside the engine"),
        (["trained=full"], "trains the added weights only"),
        (["lora={rank: 2}", "phase=end_to_end", "trained=full"], "leave one out"),
        (["loss.kl=0", "loss.mse_out=0"], "phase `local` has no loss"),
        (["share.rank=5"], "must be even"),
        (["share.rank=16"], r"takes 1\.\d+ times the arithmetic of full scores at head size 16"),
    ],
)
def test_contradictions_are_refused(
    teacher: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(lisa_train.Config, teacher, tmp_path, *overrides)


def test_the_sweep_refuses_ranks_past_break_even(teacher: Path, tmp_path: Path) -> None:
    """Before any trial runs: heads of 16 do not bear a rank of 12 beside this alignment."""
    cfg = load(lisa_train.Config, teacher, tmp_path)
    space = load_space("lisa_rank", "grid", lisa_train)
    with pytest.raises(ConfigError, match="times the arithmetic of full scores"):
        check_space(space, lisa_train.Config, cfg.model_dump(mode="json"), search="grid")


def test_an_analysis_of_another_model_is_refused(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"layers": 7, "rise": {}}))
    with pytest.raises(ConfigError, match="of a model of 7 layers; this one has 5"):
        convert.main(load(convert.Config, teacher, tmp_path, f"share.analysis={tmp_path / 'report.json'}"))
    with pytest.raises(ConfigError, match="layers 0 to 4"):
        convert.main(
            load(convert.Config, teacher, tmp_path, "share.layers=[9]", f"run.dir={tmp_path / 'other'}")
        )
