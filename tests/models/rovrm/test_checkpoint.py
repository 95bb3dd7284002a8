"""A model folder: strict loading, lineage, hashes, and the hand-over between phases (check 17)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rovrm_cases import FAMILIES, RED, tiny_llava
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from eagleray.models.rovrm.checkpoint import (
    CheckpointMismatch,
    PhaseRecord,
    VisualSettings,
    load_encoder,
    load_reward_model,
    save_reward_model,
    weights_sha256,
)
from eagleray.models.rovrm.scoring import VisualScorer
from eagleray.models.rovrm.templates import VisualTemplate

RECORD = PhaseRecord(1, "0" * 64, {"a.jsonl": "1" * 64}, ["v_head.weight"], 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_check_17_what_was_saved_is_loaded_bit_for_bit(family: str, tmp_path: Path) -> None:
    model, encoder = FAMILIES[family]()
    save_reward_model(model, encoder, tmp_path, lineage=[RECORD])
    loaded = load_reward_model(tmp_path, expected_sha256=weights_sha256(tmp_path))
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert VisualSettings.load(tmp_path).lineage == (RECORD,)
    scorer, again = VisualScorer(model, encoder), VisualScorer.from_pretrained(tmp_path, device="cpu")
    assert again.score("What?", ["A", "B"], RED) == scorer.score("What?", ["A", "B"], RED)
    assert again.score("What?", ["A"]) == scorer.score("What?", ["A"])


def test_transformers_reads_the_body_of_the_folder(tmp_path: Path) -> None:
    model, encoder = tiny_llava()
    save_reward_model(model, encoder, tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    expected = model.model.state_dict()
    assert type(body) is type(model.model)
    assert all(torch.equal(expected[name], value) for name, value in body.state_dict().items())


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    model, encoder = tiny_llava()
    save_reward_model(model, encoder, tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    state["model.extra.weight"] = torch.zeros(2)
    state["v_head.weight"] = torch.zeros(1, 7)
    del state["model.multi_modal_projector.linear_1.bias"]
    save_file(state, file)
    VisualSettings(encoder.template, 64).save(tmp_path)
    message = (
        r"1 missing: model\.multi_modal_projector\.linear_1\.bias; 1 unexpected: model\.extra\.weight; "
        r"1 of another shape: v_head\.weight \[1, 7\] for \[1, 32\]"
    )
    with pytest.raises(CheckpointMismatch, match=message):
        load_reward_model(tmp_path)


def test_exchanged_weights_are_found(tmp_path: Path) -> None:
    model, encoder = tiny_llava()
    save_reward_model(model, encoder, tmp_path)
    with pytest.raises(CheckpointMismatch, match="the run expects 000000000000"):
        load_reward_model(tmp_path, expected_sha256="0" * 64)
    state = {name: value + 1 for name, value in load_file(tmp_path / "model.safetensors").items()}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointMismatch, match=r"rovrm\.json expects .*Copy the folder again"):
        load_reward_model(tmp_path)


def test_settings_are_the_folders_unless_others_are_given(tmp_path: Path) -> None:
    model, encoder = tiny_llava(max_length=99)
    save_reward_model(model, encoder, tmp_path)
    loaded = load_encoder(tmp_path)
    assert (loaded.max_length, loaded.template) == (99, encoder.template)
    other = VisualTemplate.named("llava", system="Be brief.")
    assert load_encoder(tmp_path, template=other, max_length=50).template.system == "Be brief."
    (tmp_path / "rovrm.json").write_text(json.dumps({"max_length": 3}))
    with pytest.raises(ValueError, match="not the settings of a visual reward model"):
        load_encoder(tmp_path)
    (tmp_path / "rovrm.json").unlink()
    with pytest.raises(ValueError, match="give `template` and `max_length`"):
        load_encoder(tmp_path)
    with pytest.raises(ValueError, match=r"holds no rovrm\.json; it is not a visual reward model"):
        load_reward_model(tmp_path)
