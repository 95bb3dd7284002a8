"""The translator on random models: any audio, any batch mates, both models, and folders that are none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from eagleray.models.nast.autoregressive import AutoregressiveModel
from eagleray.models.nast.config import AutoregressiveConfig, NastConfig
from eagleray.models.nast.frontend import Frontend
from eagleray.models.nast.model import NastModel
from eagleray.models.nast.translator import Translator, model_class
from eagleray.models.nast.vocabulary import Vocabulary, save_vocabularies

SIZES = {
    "width": 16,
    "heads": 2,
    "inner_width": 32,
    "subsampler_width": 16,
    "acoustic_layers": 2,
    "textual_layers": 2,
}
SIZES |= {"inner_source_layers": [1], "inner_target_layers": [1], "cross_layer_source": 1}


@pytest.fixture(params=["nast", "autoregressive"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    vocabulary = Vocabulary.train(["eins zwei drei vier fünf sechs"], size=12, kind="word")
    torch.manual_seed(0)
    if request.param == "nast":
        model = NastModel(NastConfig(vocab_size=len(vocabulary), **SIZES))
    else:
        model = AutoregressiveModel(
            AutoregressiveConfig(vocab_size=len(vocabulary), decoder_layers=1, **SIZES)
        )
    model.save_pretrained(tmp_path)
    save_vocabularies(tmp_path, vocabulary, vocabulary)
    Frontend(dither=1e-3).save(tmp_path)
    return tmp_path


def _waveforms() -> list[np.ndarray]:
    """Noise, silence, clipping, one frame, less than one frame, nothing."""
    generator = np.random.default_rng(0)
    noise = [generator.normal(0, 0.1, size) for size in (9000, 16000)]
    odd = [np.zeros(4000), np.sign(generator.normal(0, 1, 8000)), np.ones(400), np.ones(399), np.zeros(0)]
    return [wave.astype(np.float32) for wave in [*noise, *odd]]


@pytest.mark.parametrize("beam", [1, 3])
def test_a_result_does_not_depend_on_batch_mates(folder: Path, beam: int) -> None:
    translator = Translator.from_pretrained(folder, device="cpu", beam=beam)
    features = [translator.features(wave) for wave in _waveforms()]
    together = translator.translate(features)
    assert [row.frames for row in together] == [54, 98, 23, 48, 1, 0, 0]
    assert [(row.text, row.score) for row in together[-2:]] == [("", 0.0)] * 2
    translator.max_batch_frames = 1
    for row, feature in zip(together, features, strict=True):
        [alone] = translator.translate([feature])
        assert (alone.text, alone.transcript) == (row.text, row.transcript)
        assert alone.score == pytest.approx(row.score, abs=1e-3) and np.isfinite(row.score)
    assert translator.translate([]) == []


def test_a_config_is_read_as_that_of_its_model(folder: Path) -> None:
    found = model_class(folder)
    assert found.config_class.model_type == json.loads((folder / "config.json").read_text())["model_type"]
    assert found.config_class.from_pretrained(folder).all_strides == NastConfig(vocab_size=8).all_strides


def test_folders_that_are_no_model(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json; give the `model` folder"):
        Translator.from_pretrained(tmp_path_factory.mktemp("empty"))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(
        ValueError, match="the model is a 'llama'; it must be one of nast, nast-autoregressive"
    ):
        Translator.from_pretrained(folder)
