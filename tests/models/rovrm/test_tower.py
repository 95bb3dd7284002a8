"""The convolutional tower: positions, wide pictures, and that a model with it is loaded as it was saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rovrm_cases import BLUE, RED, tokenizer

from eagleray.models.backbone.model import llama_config
from eagleray.models.rovrm.checkpoint import load_encoder, load_reward_model, save_reward_model
from eagleray.models.rovrm.encoding import VisualEncoder
from eagleray.models.rovrm.model import VisualRewardModel
from eagleray.models.rovrm.scoring import VisualScorer
from eagleray.models.rovrm.scratch import add_image_token, build_llava, image_processor, llava_config
from eagleray.models.rovrm.templates import VisualTemplate
from eagleray.models.rovrm.tower import ConvTower, ConvTowerConfig


def _model() -> tuple[VisualRewardModel, VisualEncoder]:
    made = tokenizer()
    image_id = add_image_token(made)
    text = llama_config(vocab_size=len(made), width=32, layers=2, heads=4, pad_id=made.pad_token_id)
    config = llava_config(
        text, image_token_id=image_id, tower="conv", image_size=16, image_width=64, patch_size=8, width=32
    )
    model = build_llava(config)
    return model.eval(), VisualEncoder(
        made, image_processor(16, 64), model.family, VisualTemplate.named("llava"), max_length=256
    )


def test_a_position_sees_its_part_of_the_picture_first() -> None:
    """Positions go by rows from the top, and a change on the right moves the last column most."""
    torch.manual_seed(0)
    tower = ConvTower(ConvTowerConfig(hidden_size=64, patch_size=16)).eval()
    picture = torch.zeros(1, 3, 64, 256)
    changed = picture.clone()
    changed[..., 48:, 240:] = 1.0
    with torch.inference_mode():
        states = [tower(pixel_values=p).last_hidden_state for p in (picture, changed)]
    assert states[0].shape == (1, 4 * 16, 64)
    moved = (states[1] - states[0]).norm(dim=-1).view(4, 16)
    assert moved.argmax() == 4 * 16 - 1


def test_a_model_with_it_scores_as_before_after_loading(tmp_path: Path) -> None:
    model, encoder = _model()
    scorer = VisualScorer(model, encoder)
    pixels = scorer.prepare("What?", ["This."], RED)[0].pixels
    assert pixels is not None and pixels["pixel_values"].shape == (1, 3, 16, 64)
    assert encoder.family.image_tokens(pixels) == 2 * 8
    before = [scorer.score("What?", ["A circle.", "None."], picture) for picture in (RED, BLUE)]
    assert before[0] != pytest.approx(before[1], abs=1e-6)
    save_reward_model(model, encoder, tmp_path)
    again = VisualScorer(load_reward_model(tmp_path).eval(), load_encoder(tmp_path))
    assert again.score("What?", ["A circle.", "None."], RED) == pytest.approx(before[0], abs=1e-6)


def test_phase_3_may_train_it(tmp_path: Path) -> None:
    model, _ = _model()
    assert not [name for name in model.train_parts(3) if "vision_tower" in name]
    assert [name for name in model.train_parts(3, train_vision_tower=True) if "vision_tower.stages" in name]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tower": "conv", "patch_size": 12, "image_size": 24, "width": 48}, "must be a power of two"),
        ({"tower": "conv", "width": 40}, "`width` is 40; it must be a multiple of 64"),
        (
            {"tower": "conv", "width": 64, "image_width": 40},
            "`image_width` is 40; it must be a multiple of 16",
        ),
        ({"tower": "clip", "image_width": 128}, "takes squares only"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, object], message: str) -> None:
    made = tokenizer()
    image_id = add_image_token(made)
    with pytest.raises(ValueError, match=message):
        llava_config(
            llama_config(vocab_size=len(made), width=32, layers=2, heads=4), image_token_id=image_id, **sizes
        )  # type: ignore[arg-type]
