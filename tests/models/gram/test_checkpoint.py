"""Judges from disk: settings, adapters, safetensors only."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model

from eagleray.models.gram.checkpoint import JudgeSettings, load_language_model
from eagleray.models.gram.judge import Judge
from eagleray.models.gram.prompts import JudgeEncoder, JudgeTemplate

TEMPLATE = JudgeTemplate("mine", "Which is {better}?\nÄ, B.", tail="#Preferred: ")
PAIRS = [("q", "one answer", "two"), ("q", "", "three, four")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def judge() -> Judge:
    encoder = JudgeEncoder(
        tiny_tokenizer(), TEMPLATE, label_strings=("1", "2"), max_length=300, overlong="drop"
    )
    return Judge(tiny_model(), encoder, swap_average="logit")


def test_a_saved_judge_judges_alike(folder: Path, judge: Judge) -> None:
    judge.save_settings(folder, label_smoothing=0.1, smoothing_convention="torch")
    loaded = Judge.from_pretrained(folder, device="cpu", max_batch_tokens=99, share_prefix=False)
    for ours, theirs in zip(loaded.compare(PAIRS), judge.compare(PAIRS), strict=True):
        assert (ours.delta1, ours.p_a) == pytest.approx((theirs.delta1, theirs.p_a), abs=1e-5)
    assert (loaded.max_batch_tokens, loaded.share_prefix, loaded.swap_average) == (99, False, "logit")
    settings = JudgeSettings.load(folder)
    assert settings == JudgeSettings(TEMPLATE, ("1", "2"), 300, "drop", "logit", 0.1, "torch")
    assert json.loads((folder / "gram.json").read_text())["template"]["sha256"] == TEMPLATE.sha256


def test_overrides(folder: Path, judge: Judge, tmp_path: Path) -> None:
    judge.save_settings(folder)
    loaded = Judge.from_pretrained(
        folder, device="cpu", swap_average="none", label_strings=["A", "B"], template="eagleray"
    )
    assert loaded.swap_average == "none"
    assert loaded.encoder.label_strings == ("A", "B")
    assert loaded.encoder.template == JudgeTemplate.load("eagleray")
    with pytest.raises(
        ValueError, match="Unknown judge setting 'labels'; the settings are: template, label_strings,"
    ):
        Judge.from_pretrained(folder, labels=("A", "B"))


def test_a_model_without_settings_gets_the_defaults_and_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        loaded = Judge.from_pretrained(folder, device="cpu")
    assert "has no gram.json: judging with template 'eagleray' and labels ('A', 'B')" in caplog.text
    assert loaded.encoder.template == JudgeTemplate.load("eagleray")
    caplog.clear()
    Judge.from_pretrained(folder, device="cpu", template=TEMPLATE)
    assert "gram.json" not in caplog.text


def test_dtype(folder: Path) -> None:
    assert Judge.from_pretrained(folder, device="cpu", dtype=torch.bfloat16).model.dtype == torch.bfloat16
    assert Judge.from_pretrained(folder, device="cpu").model.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda v: v["template"].update(instruction="Other words."),
            "does not match its sha256; the file was edited",
        ),
        (lambda v: v.pop("template"), "not the settings of a judge"),
        (lambda v: v.update(labels=1), "Unknown judge setting 'labels'"),
        (lambda v: v["template"].update(system="x"), "not the settings of a judge"),
    ],
)
def test_broken_settings(folder: Path, judge: Judge, change: Callable, message: str) -> None:
    judge.save_settings(folder)
    values = json.loads((folder / "gram.json").read_text())
    change(values)
    (folder / "gram.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        JudgeSettings.load(folder)


def test_settings_that_are_no_json(folder: Path) -> None:
    (folder / "gram.json").write_text("{")
    with pytest.raises(ValueError, match="not the settings of a judge"):
        JudgeSettings.load(folder)


@pytest.fixture
def adapter(folder: Path, tmp_path: Path) -> Path:
    model = get_peft_model(
        load_language_model(folder),
        LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False),
    )
    path = tmp_path / "adapter"
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_adapter_is_merged(adapter: Path, folder: Path, judge: Judge) -> None:
    judge.save_settings(adapter)
    base = Judge(tiny_model(), judge.encoder, swap_average="logit").compare(PAIRS)
    merged = Judge.from_pretrained(adapter, device="cpu")
    assert not any("lora" in name for name, _ in merged.model.named_parameters())
    model = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    model.load_adapter(str(adapter), "trained")
    model.set_adapter("trained")
    expected = Judge(model, judge.encoder, swap_average="logit").compare(PAIRS)
    for ours, theirs, without in zip(merged.compare(PAIRS), expected, base, strict=True):
        assert ours.delta1 == pytest.approx(theirs.delta1, abs=1e-4)
        assert abs(ours.delta1 - without.delta1) > 1e-2


def test_pickled_weights_are_refused(adapter: Path, folder: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors"):
        load_language_model(adapter)
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_language_model(folder)
