"""Captions from random weights: what is a target, parity with transformers, and the job as shipped with what follows it."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2VLConfig

from eagleray.jobs.rovrm import pretrain, train
from eagleray.models.rovrm.scenes import make_scenes
from eagleray.models.rovrm.synthetic import make_visual, write_visual
from eagleray.platform.config import ConfigError, load_config
from eagleray.platform.data.sources import DataError
from eagleray.platform.runs import RunFolder

CONFIGS = Path(__file__).parents[3] / "configs" / "rovrm"
CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the picture."}]}]


def _config(tmp_path: Path, *overrides: str) -> pretrain.Config:
    small = ["data.synthetic=[{kind: visual, samples: 24}]", f"run.dir={tmp_path / 'run'}"]
    return load_config(pretrain.Config, CONFIGS / "pretrain_tiny.yaml", [*small, *overrides])


def _prepared(tmp_path: Path, *overrides: str) -> tuple[RunFolder, pretrain.CaptionTask]:
    cfg = _config(tmp_path, *overrides)
    run = RunFolder.create(pretrain.JOB, cfg)
    pretrain._prepare(cfg, run)
    return run, pretrain.CaptionTask(cfg, run.data)


def test_the_caption_and_its_end_are_the_targets(tmp_path: Path) -> None:
    _, task = _prepared(tmp_path)
    captions = [row["caption"] for row in make_visual(24, 0)[0]]
    batch = task.train_batch([0, 1, 2], step=0)
    targets = [
        task.encoder.tokenizer.decode(ids[mask])
        for ids, mask in zip(batch.tensors["input_ids"], batch.tensors["target_mask"], strict=True)
    ]
    assert targets == [f" {caption}<|eos|>" for caption in captions[:3]]
    assert batch.tensors["pixel_values"].shape == (3, 3, 32, 128)
    assert batch.weight == batch.tensors["target_mask"].sum()


def test_losses_are_those_of_transformers_on_what_its_processor_makes(tmp_path: Path) -> None:
    """One row alone through `AutoProcessor`, chat template and `labels`, against a batch of three of ours."""
    _, task = _prepared(tmp_path)
    model = task.build_model().eval()
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    task.save_extras(tmp_path / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    ours = task.evaluate_batch(model, task.train_batch([0, 1, 2], step=0).tensors)
    rows, files = make_visual(24, 0)
    for row, (total, count) in zip(rows, ours, strict=False):
        asked = processor.apply_chat_template(CHAT, add_generation_prompt=True)
        inputs = processor(
            images=Image.open(BytesIO(files[row["image"]])),
            text=f"{asked} {row['caption']}{processor.tokenizer.eos_token}",
            return_tensors="pt",
        )
        labels = inputs["input_ids"].clone()
        labels[:, :-count] = -100
        with torch.no_grad():
            expected = again(**inputs, labels=labels).loss.item()
        assert total / count == pytest.approx(expected, abs=1e-5)


def test_the_picture_is_looked_at(tmp_path: Path) -> None:
    _, task = _prepared(tmp_path)
    model, tensors = task.build_model().eval(), task.train_batch([0, 1], step=0).tensors
    swapped = tensors | {"pixel_values": tensors["pixel_values"].flip(0)}
    losses = [np.array(task.evaluate_batch(model, t))[:, 0] for t in (tensors, swapped)]
    assert np.abs(losses[0] - losses[1]).min() > 1e-6


def test_each_picture_is_described_once_and_texts_are_read_for_the_vocabulary(tmp_path: Path) -> None:
    rows = write_visual(tmp_path / "data", 12, 3)
    lines = rows.read_text().splitlines()
    doubled = [json.dumps({**json.loads(line), "id": f"again-{i}"}) for i, line in enumerate(lines)]
    rows.write_text("\n".join([*lines, *doubled]))
    texts = tmp_path / "texts.jsonl"
    words = "zymurgy zymurgy zymurgy"
    texts.write_text(
        "\n".join(
            json.dumps({"id": f"t{i}", "prompt": f"{words} {i}?", "chosen": f"{words} {i}", "rejected": "no"})
            for i in range(30)
        )
    )
    sources = f"[{{path: {rows}, images: {tmp_path / 'data/images'}}}, {{path: {texts}, layout: text}}]"
    run, task = _prepared(tmp_path, "data.synthetic=[]", f"data.train={sources}", "data.eval_fraction=0.2")
    assert len(task.train) + len(task.eval) == 12
    assert len(task.encoder.tokenizer.tokenize(" zymurgy")) == 1
    assert run.read_manifest()["data"]["too_long"] == []


def test_scenes_in_words_are_described_and_counted_without_pictures(tmp_path: Path) -> None:
    run, task = _prepared(
        tmp_path, "scenes=60", "data.synthetic=[{kind: text, samples: 24}]", "max_length=500"
    )
    assert (len(task.train), len(task.eval)) == (120, 32)
    assert run.read_manifest()["data"]["too_long"] == []
    batch = task.train_batch(list(range(120)), step=0)
    assert set(batch.tensors) == {"input_ids", "target_mask"}
    expected = {}
    for scene in make_scenes(60, 0):
        expected[f"{scene.id}-caption"] = (scene.told, "Describe the picture.", scene.caption)
        expected[f"{scene.id}-numbers"] = (scene.told, "Count what is in the picture.", scene.numbers)
    assert set(batch.ids) == set(expected)
    decode = task.encoder.tokenizer.decode
    ids, masks = batch.tensors["input_ids"], batch.tensors["target_mask"]
    for name, row, mask in zip(batch.ids, ids, masks, strict=True):
        told, prompt, answer = expected[name]
        assert decode(row[mask]) == f" {answer}<|eos|>"
        assert decode(row).startswith(
            f"<|bos|>{task.encoder.template.system} USER: Image description: {told}\n"
            f"Question: {prompt} ASSISTANT:"
        )


def test_scenes_tell_the_captions_of_the_data_too(tmp_path: Path) -> None:
    known = "one box has 1 big blue circle; one box has 2 small black squares; one box has 1 small yellow triangle"
    row = {"id": "c", "prompt": "What?", "chosen": "A circle.", "rejected": "A cube.", "caption": known}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    sources = f"[{{path: {tmp_path / 'rows.jsonl'}, form: caption}}]"
    data = ["data.synthetic=[{kind: text, samples: 24}]", f"data.train={sources}"]
    _, task = _prepared(tmp_path, "scenes=20", "max_length=500", *data)
    batch = task.train_batch(list(range(40)), step=0)
    retold = {
        name
        for name, ids, mask in zip(
            batch.ids, batch.tensors["input_ids"], batch.tensors["target_mask"], strict=True
        )
        if task.encoder.tokenizer.decode(ids[mask]) == f" {known}<|eos|>"
    }
    assert retold == {f"s-train-0-{i}-caption" for i in range(1, 20, 2)}


def test_captions_that_scenes_cannot_retell_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"can't retell a caption.*Leave such rows out"):
        _prepared(tmp_path, "scenes=20")


@pytest.mark.parametrize(
    ("parts", "prefixes"),
    [
        ("[projector]", {"model.multi_modal_projector."}),
        ("[vision_tower, projector]", {"model.vision_tower.", "model.multi_modal_projector."}),
        ("[language_model]", {"model.language_model."}),
    ],
)
def test_only_the_named_parts_are_trained(tmp_path: Path, parts: str, prefixes: set[str]) -> None:
    _, task = _prepared(tmp_path, f"parts={parts}")
    parameters = dict(task.build_model().named_parameters())
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert trained == {name for name in parameters if name.startswith(tuple(prefixes))}
    assert trained


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["scratch=null"], "give either `model.path`"),
        (["model.path=folder"], "give either `model.path`"),
        (["lora={rank: 4}"], "`parts` says what is trained"),
        (["scenes=60", "parts=[projector]"], "put it into `parts`"),
        (["parts=[]"], "parts"),
    ],
)
def test_configs_that_do_not_fit_are_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _config(tmp_path, *overrides)


def test_a_model_of_another_family_is_refused(tmp_path: Path) -> None:
    """Its weights are not looked at: the configuration says what it is."""
    folder = tmp_path / "other"
    _, task = _prepared(tmp_path)
    task.save_extras(folder)
    Qwen2VLConfig().save_pretrained(folder)
    with pytest.raises(ValueError, match="holds a 'qwen2_vl'; this job trains a LLaVA"):
        _prepared(tmp_path, "scratch=null", f"model.path={folder}", f"run.dir={tmp_path / 'second'}")


def test_data_without_captions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row has a picture and a caption"):
        _prepared(tmp_path, "data.synthetic=[{kind: text, samples: 24}]")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_it_learns_writes_and_is_what_a_phase_starts_from(tmp_path: Path) -> None:
    """Two workers; the model answers through transformers alone, and `rovrm.train` starts from its body."""
    options = ["ray.num_workers=2", "tracking.tensorboard=false", "train.max_steps=30"]
    done = pretrain.main(_config(tmp_path, "data.synthetic=[{kind: visual, samples: 200}]", *options))
    lines = [json.loads(line) for line in (done.path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "eval"]
    assert losses[-1] < 4.5 < np.log(512)
    folder = done.path / "model"
    processor, model = (
        AutoProcessor.from_pretrained(folder),
        AutoModelForImageTextToText.from_pretrained(folder),
    )
    rows, files = make_visual(2, 5)
    inputs = processor(
        images=Image.open(BytesIO(files[rows[0]["image"]])),
        text=processor.apply_chat_template(CHAT, add_generation_prompt=True),
        return_tensors="pt",
    )
    assert (
        model.generate(**inputs, max_new_tokens=4, do_sample=False).shape[1]
        <= inputs["input_ids"].shape[1] + 4
    )

    overrides = ["scratch=null", f"model.path={folder}", f"run.dir={tmp_path / 'phase'}"]
    cfg = load_config(train.Config, CONFIGS / "train_tiny.yaml", overrides)
    run = RunFolder.create(train.JOB, cfg)
    train._prepare(cfg, run)
    started = train.VisualTask(cfg, run.data).build_model()
    for name, weight in model.model.state_dict().items():
        assert torch.equal(started.state_dict()[f"model.{name}"], weight), name


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_tower_is_aligned_with_a_language_model_that_reads(tmp_path: Path) -> None:
    """Two runs, two workers each: the second moves tower and projector only, and ends as a LLaVA folder too."""
    options = ["ray.num_workers=2", "tracking.tensorboard=false", "train.max_steps=6", "train.eval_every=6"]
    words = ["data.synthetic=[{kind: text, samples: 24}]", "scenes=50", "parts=[language_model]"]
    read = pretrain.main(_config(tmp_path, *words, f"run.dir={tmp_path / 'read'}", *options))
    start = [
        "scratch=null",
        f"model.path={read.path / 'model'}",
        "parts=[vision_tower, projector]",
        "train.keep_model=last",
    ]
    see = pretrain.main(_config(tmp_path, f"run.dir={tmp_path / 'see'}", *start, *options))
    before, after = (
        AutoModelForImageTextToText.from_pretrained(done.path / "model").state_dict() for done in (read, see)
    )
    moved = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert moved == {name for name in before if "vision_tower" in name or "multi_modal_projector" in name}
    AutoProcessor.from_pretrained(see.path / "model")
