"""The jobs of LiSA, one after the other on a tiny model; training in a real Ray worker."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from eagleray.jobs.lisa import analyze, convert, evaluate, measure
from eagleray.jobs.lisa import train as lisa_train
from eagleray.jobs.lisa.sections import ShareSection, as_texts
from eagleray.jobs.sweep import load_space, sweep_config
from eagleray.jobs.sweep import main as sweep
from eagleray.models.lisa.baselines import direct_sharing
from eagleray.models.lisa.delta import load_delta
from eagleray.models.lisa.distill import is_lisa_parameter
from eagleray.models.lisa.probe import token_loss
from eagleray.models.lisa.spec import LisaSpec
from eagleray.platform.config import ConfigError, load_config
from eagleray.platform.pretrained import load_pretrained, load_tokenizer
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import LoraSection, ModelSection
from eagleray.platform.space import limit_space

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
    common = [f"run.dir={tmp_path / job}"]
    if cls is not measure.Config:
        common += [f"data.paths=[{teacher / 'text.txt'}]", "data.block_length=32"]
    if "model" in cls.model_fields:
        common.append(f"model.path={teacher}")
    return load_config(cls, CONFIGS / f"{job.partition('.')[2]}_tiny.yaml", [*common, *overrides])


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
    models = [f"models.full.path={teacher}", f"models.shared.path={run.model}"]
    again = f"models.again.path={run.model}"
    found = evaluate.main(load(evaluate.Config, teacher, tmp_path, *models, again))
    assert found["full"]["loss"] == pytest.approx(converted["loss_full"], abs=1e-5)
    assert found["shared"]["loss"] == pytest.approx(converted["loss"], abs=1e-5)
    assert list(found) == [
        "full",
        "shared",
        "shared: direct sharing",
        "shared: direct sharing, heads permuted",
        "again",
    ]
    _with_intervals(found)
    plain = found["shared: direct sharing"]
    cfg = load(convert.Config, teacher, tmp_path)
    held_out = as_texts(cfg.data.blocks(load_tokenizer(cfg.model), "dev"))
    unfitted = direct_sharing(AutoModelForCausalLM.from_pretrained(teacher), converted["shared_layers"])
    assert plain["loss"] == pytest.approx(token_loss(unfitted, held_out), abs=1e-5)
    assert plain["shared_layers"] == converted["shared_layers"] and plain["added_parameters"] == 0
    assert found["shared"]["added_parameters"] == converted["added_parameters"]
    assert json.loads((tmp_path / "lisa.evaluate" / "report.json").read_text()) == found
    _measured(load(measure.Config, teacher, tmp_path, *models), converted)


def _with_intervals(found: dict[str, Any]) -> None:
    """Perplexity is exp(loss) with blocks to either side; a ratio to itself is 1 whatever blocks are drawn."""
    for result in found.values():
        perplexity = result["perplexity"]
        assert perplexity["value"] == pytest.approx(np.exp(result["loss"]))
        assert perplexity["low"] < perplexity["value"] < perplexity["high"]
    assert found["full"]["perplexity_over_reference"] == {"value": 1, "low": 1, "high": 1}
    assert found["again"] == found["shared"]


def _measured(cfg: measure.Config, converted: dict[str, Any]) -> None:
    """Measured bytes of the caches are those of the formula; a cell for each model, batch size and prompt."""
    cells = measure.main(cfg)["cells"]
    keys = ("batch", "context", "model")
    assert [tuple(cell[k] for k in keys) for cell in cells] == [
        (batch, context, model) for batch in (1, 2) for context in (32, 64) for model in ("full", "shared")
    ]
    for cell in cells:
        assert cell["measured_cache_bytes"] == cell["cache_bytes"]
        assert cell["measured_tokens_per_second"] > 0 and cell["measured_peak_bytes"] >= 0
    full, shared = cells[:2]
    assert shared["added"] == converted["added_parameters"] and full["added"] == 0
    assert full["parameters"] - shared["parameters"] == (
        converted["removed_parameters"] - converted["added_parameters"]
    )
    run = RunFolder(Path(cfg.run.dir or ""))
    assert (run.plots / "throughput.png").is_file() and "measured_step_seconds" in (
        run.path / "table.md"
    ).read_text()


def test_a_shape_is_measured_by_arithmetic(teacher: Path, tmp_path: Path) -> None:
    """LLaMA3-8B at 8,192 tokens, 27 of 32 layers, rank 20: the specification's 659.5 MiB of 1,024, and 6.4 times less Q/K.

    Traffic of one layer and sequence: 16.78 MB of keys and of values in full; 2.62 MB of low-rank keys, 16.78 MB of
    values and 2.10 MB of scores shared.
    """
    options = ["models={}", "shape=llama3-8b", "timed=false", "precision=bf16", "share.fraction=0.84"]
    sizes = ["share.rank=20", "batch_sizes=[1]", "contexts=[8184]", "share.align={kind: ffn, width: 32}"]
    full, shared = measure.main(load(measure.Config, teacher, tmp_path, *options, *sizes))["cells"]
    assert full["parameters"] == 8_030_261_248 and shared["added"] == 88_530_624
    assert full["cache_bytes"] == 1024 * 2**20 and shared["cache_bytes"] == 659.5 * 2**20
    weights = 2 * (full["parameters"] - shared["parameters"])
    layer = 2 * 8192 * 8 * (128 - 20) - 2 * 4 * 32 * 8192
    assert full["bytes"] - shared["bytes"] == weights + 27 * layer


def test_a_batch_that_does_not_fit_costs_no_figure(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first model fits with up to two prompts, the second with four; the best of each are compared."""
    models: list[Any] = []
    tried: list[tuple[str, int]] = []

    def time_decoding(model: Any, ids: torch.Tensor, **_: Any) -> dict[str, float]:
        if model not in models:
            models.append(model)
        name, most, each = [("full", 2, 10.0), ("shared", 4, 9.0)][models.index(model)]
        tried.append((name, len(ids)))
        if len(ids) > most:
            raise torch.OutOfMemoryError
        return {"tokens_per_second": each * len(ids)}

    monkeypatch.setattr(measure, "time_decoding", time_decoding)
    sizes = ["batch_sizes=[1,2,3,4,8]", "contexts=[32]", "rounds=1"]
    paths = [f"models.{name}.path={teacher}" for name in ("full", "shared")]
    cfg = load(measure.Config, teacher, tmp_path, *sizes, *paths)
    report = measure.main(cfg)
    assert [(c["model"], c["batch"]) for c in report["cells"] if c["measured_tokens_per_second"] is None] == [
        ("full", 3),
        ("full", 4),
        ("full", 8),
        ("shared", 8),
    ]
    assert ("full", 3) in tried and ("full", 4) not in tried and ("shared", 4) in tried
    full, shared = report["throughput"]
    assert (full["batch"], full["tokens_per_second"], full["gain"]) == (2, 20.0, 0.0)
    assert (shared["batch"], shared["tokens_per_second"], shared["gain"]) == (4, 36.0, pytest.approx(0.8))
    assert "| gain" in (Path(cfg.run.dir or "") / "table.md").read_text()


def test_nothing_fits(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def time_decoding(*_: Any, **__: Any) -> dict[str, float]:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(measure, "time_decoding", time_decoding)
    paths = [f"models.{name}.path={teacher}" for name in ("full", "shared")]
    cfg = load(measure.Config, teacher, tmp_path, *paths)
    with pytest.raises(ConfigError, match="no model fits"):
        measure.main(cfg)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["shape=llama3-8b"], "give either `models`"),
        (["models={}"], "give either `models`"),
        (["contexts=[0]"], "must be at least 1"),
    ],
)
def test_measuring_needs_subjects(teacher: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(measure.Config, teacher, tmp_path, *overrides)


def test_tasks_need_the_harness(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything runs."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    cfg = load(evaluate.Config, teacher, tmp_path, "tasks={names: [piqa]}")
    with pytest.raises(ConfigError, match=r"pip install 'eagleray\[lm-eval\]'"):
        evaluate.main(cfg)
    assert not (tmp_path / "lisa.evaluate").exists()


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


def test_blocks_are_taken_from_everywhere(teacher: Path, tmp_path: Path) -> None:
    """Three of ten are the first, a middle one and the last; the development part may have a number of its own."""
    texts = as_texts(np.arange(20).reshape(10, 2), count=3, batch=2)
    assert [text[:, 0].tolist() for text in texts] == [[0, 8], [18]]
    limits = ["data.max_blocks=3", "data.max_dev_blocks=2"]
    cfg = load(convert.Config, teacher, tmp_path, *limits)
    tokenizer = load_tokenizer(cfg.model)
    assert [len(cfg.data.blocks(tokenizer, part)) for part in ("train", "dev")] == [3, 2]


def test_direct_sharing_can_be_trained_by_an_adapter(teacher: Path, tmp_path: Path) -> None:
    """It adds no weights of its own; the loss reaches every adapter, and what was saved is what was trained."""
    share = ["share.layers=[2,3]", "share.rank=0", "share.align={kind: identity, width: null}"]
    cfg = load(lisa_train.Config, teacher, tmp_path, *share, "phase=end_to_end", "lora={rank: 2}")
    with RunFolder.create(lisa_train.JOB, cfg).recording() as run:
        lisa_train._prepare(cfg, run)
    task = lisa_train.LisaTask(cfg, run.data)
    model: Any = task.build_model()
    batch = task.train_batch([0, 1], step=0).tensors
    task.loss(model, batch)[0].backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert all(p.grad is not None for p in trained.values())
    for p in trained.values():
        torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    again = load_pretrained(AutoModelForCausalLM, ModelSection(path=str(tmp_path / "adapter"))).eval()
    ids = batch["input_ids"]
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)
    assert tuple(again.config.lisa_attention["shared_layers"]) == (2, 3)


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
    assert set(parts) == {"language_model", "distillation", "attention"} and batch.weight == 64
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
    found = task.summarise(records)
    assert found["distance"] == pytest.approx(found["layer_2"] + found["layer_4"])
    texts = [batch.tensors["input_ids"] for batch in (task.eval_batch([0]), task.eval_batch([1]))]
    assert found["language_model"] == pytest.approx(token_loss(model, texts), rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["deepspeed.zero_stage=3"], "the teacher runs beside the engine"),
        (["trained=full"], "trains the added weights only"),
        (["lora={rank: 2}", "phase=end_to_end", "trained=full"], "leave one out"),
        (["loss.kl=0", "loss.mse_out=0"], "phase `local` has no loss"),
        (["share.rank=5"], "must be even"),
        (["share.stage=weights"], "can't be added to attention weights"),
        (["share.scale=0"], "share.scale"),
        (["share.align={kind: identity, width: 2}"], "only kinds with a hidden layer"),
        (["share.rank=16"], r"takes 1\.\d+ times the arithmetic of full scores at head size 16"),
    ],
)
def test_contradictions_are_refused(
    teacher: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(lisa_train.Config, teacher, tmp_path, *overrides)


def test_benchmark_tasks_run(teacher: Path, tmp_path: Path) -> None:
    """A task of one's own, two choices a question: accuracy of both models from lm-evaluation-harness itself."""
    pytest.importorskip(
        "lm_eval", reason="lm-evaluation-harness is optional: pip install 'eagleray[lm-eval]'"
    )
    rows = [{"question": f"word {i}", "choices": ["river", "forest"], "label": i % 2} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task.yaml").write_text(
        "task: rivers\ndataset_path: json\noutput_type: multiple_choice\ntest_split: train\n"
        f"dataset_kwargs: {{data_files: {tmp_path / 'rows.jsonl'}}}\n"
        "doc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: label\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    tasks = f"tasks={{names: [rivers], folder: {tmp_path}, batch_size: 2}}"
    models = [f"models.full.path={teacher}", f"models.shared.path={teacher}"]
    found = evaluate.main(load(evaluate.Config, teacher, tmp_path, *models, tasks))
    assert set(found["full"]["tasks"]) == {"rivers"}
    assert 0 <= found["full"]["tasks"]["rivers"]["acc"] <= 1
    assert found["full"]["tasks"] == found["shared"]["tasks"]


@pytest.mark.parametrize("search", ["grid", "random"])
def test_the_sweep_leaves_out_ranks_past_break_even(teacher: Path, tmp_path: Path, search: Any) -> None:
    """Before any trial runs: heads of 16 bear ranks 0 to 4 beside the alignments of the space, not 8 and more."""
    cfg = load(lisa_train.Config, teacher, tmp_path)
    space = load_space("lisa_rank", search, lisa_train)
    limited = limit_space(space, "share.rank", lisa_train.Config, cfg.model_dump(mode="json"))
    ranks = limited.domains["share.rank"]
    assert (ranks["grid_search"] if search == "grid" else ranks.categories) == [0, 2, 4]
    with pytest.raises(ConfigError, match="times the arithmetic of full scores"):
        costly = cfg.model_dump(mode="json") | {"share": {"align": {"kind": "ffn", "width": 64}}}
        limit_space(load_space("lisa_rank", "grid", lisa_train), "share.rank", lisa_train.Config, costly)


@pytest.mark.ray
@pytest.mark.soak
def test_trials_share_one_recording(teacher: Path, tmp_path: Path, ray_cluster: None) -> None:
    """The teacher runs once for all ranks, nobody records again, and the points have a Pareto front."""
    overrides = [f"model.path={teacher}", f"data.paths=[{teacher / 'text.txt'}]", "data.block_length=32"]
    quick = ["train.max_steps=2", "train.eval_every=2", "share.align.kind=linear+ffn", "share.align.width=3"]
    cfg = sweep_config(
        "lisa_rank", CONFIGS / "train_tiny.yaml", [*overrides, *quick, f"run.dir={tmp_path / 'sweep'}"]
    )
    swept = sweep(cfg)
    report = json.loads((swept.path / "report.json").read_text())
    assert sorted(row["share.rank"] for row in report["table"]) == [0, 2, 4]
    assert report["count"] == {"finished": 3, "stopped": 0, "failed": 0}
    assert [path.parent.parent.name for path in swept.path.rglob("train.npy")] == [swept.path.name]
    assert report["pareto"] and (swept.path / "plots" / "pareto.png").is_file()
    by_rank = {row["share.rank"]: row["cache_values_per_token"] for row in report["table"]}
    assert by_rank[4] - by_rank[0] == 2 * 2 * 4  # two shared layers, two low-rank key heads


def test_a_recording_of_something_else_is_refused(teacher: Path, tmp_path: Path) -> None:
    """Other text, layers that are missing, one that was cut off; what fits is read without the teacher."""
    cfg = load(lisa_train.Config, teacher, tmp_path, "share.layers=[2,3]")
    found = lisa_train.prepare_sweep(cfg, tmp_path)
    assert found == {"recorded": str(tmp_path / "recorded")}  # layers are given: nothing to probe
    again = [f"recorded={tmp_path / 'recorded'}", "share.layers=[2,3]"]
    with RunFolder.create(
        lisa_train.JOB, load(lisa_train.Config, teacher, tmp_path, *again)
    ).recording() as run:
        lisa_train._prepare(load(lisa_train.Config, teacher, tmp_path, *again), run)
    assert not (run.data / "recorded").exists()
    about = json.loads((tmp_path / "recorded" / "recording.json").read_text())
    for change, message in (
        ({"model": "other"}, "recorded from another model than this run has"),
        ({"text": {}}, "recorded from another text than this run has"),
        ({"layers": [0, 1, 2]}, r"without the inputs of layers \[3\]"),
    ):
        (tmp_path / "recorded" / "recording.json").write_text(json.dumps(about | change))
        with pytest.raises(ConfigError, match=message):
            lisa_train._prepare(load(lisa_train.Config, teacher, tmp_path, *again), run)
    (tmp_path / "recorded" / "recording.json").unlink()
    with pytest.raises(ConfigError, match="holds no finished recording"):
        lisa_train._prepare(load(lisa_train.Config, teacher, tmp_path, *again), run)


def test_every_choice_of_a_shared_layer_is_a_config_field(teacher: Path, tmp_path: Path) -> None:
    """What the paper leaves open can be set without a change of code, and arrives in the converted model."""
    open_to_choice = {f.name for f in fields(LisaSpec)} - {
        "shared_layers",  # `layers`, or chosen as `select` says
        "rope_pairs",  # found by the start
        "score_budget",  # memory, not the function
        "base_checksum",
    }
    assert open_to_choice <= set(ShareSection.model_fields)
    chosen = ["share.row_center=max", "share.scale=0.25", "share.score_dtype=float32", "share.rope=none"]
    cfg = load(convert.Config, teacher, tmp_path, "share.layers=[3]", *chosen)
    convert.main(cfg)
    found = AutoModelForCausalLM.from_pretrained(Path(cfg.run.dir) / "model").config.lisa_attention
    assert {name: found[name] for name in ("row_center", "scale", "score_dtype", "rope")} == {
        "row_center": "max",
        "scale": 0.25,
        "score_dtype": "float32",
        "rope": "none",
    }


def test_an_analysis_of_another_model_is_refused(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"layers": 7, "rise": {}}))
    with pytest.raises(ConfigError, match="of a model of 7 layers; this one has 5"):
        convert.main(load(convert.Config, teacher, tmp_path, f"share.analysis={tmp_path / 'report.json'}"))
    with pytest.raises(ConfigError, match="layers 0 to 4"):
        convert.main(
            load(convert.Config, teacher, tmp_path, "share.layers=[9]", f"run.dir={tmp_path / 'other'}")
        )
