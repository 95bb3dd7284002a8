"""Features of samples: gradients against a loop of backward passes, heads and states, models of pictures and of texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from builders import tiny_model, tiny_tokenizer
from rovrm_cases import BLUE, RED, tiny_llava
from transformers import LlamaForSequenceClassification

from eagleray.models.gram.discriminative import DiscriminativeScorer, RewardEncoder
from eagleray.models.rovrm.features import FeatureSettings, Featuriser, TextBody, VisualBody
from eagleray.models.rovrm.losses import plackett_luce_loss
from eagleray.models.rovrm.scoring import VisualScorer
from eagleray.models.selection.projection import RandomProjection

SAMPLES: list[tuple[str, list[str], bytes | None]] = [
    ("What is there?", ["A red circle.", "A green one, I think, or two."], RED),
    ("And here?", ["Blue.", "Red.", "Nothing at all."], BLUE),
    ("Name a river.", ["The Ucayali.", "Lima."], None),
    ("What is there?", ["A circle.", "A red circle and nothing else."], BLUE),
]


def _visual(kind: Any = "lora_grad", **options: Any) -> Featuriser:
    settings = FeatureSettings(kind, rank=2, width=4096, **options)
    return Featuriser(VisualBody(VisualScorer(*tiny_llava())), settings)


def _text(kind: Any = "lora_grad") -> Featuriser:
    tokenizer = tiny_tokenizer()
    config = tiny_model().config
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight)
    return Featuriser(
        TextBody(DiscriminativeScorer(model, RewardEncoder(tokenizer))), FeatureSettings(kind, 2)
    )


@pytest.mark.parametrize("build", [_visual, _text])
def test_gradients_equal_a_loop_of_backward_passes(build: Any) -> None:
    featuriser = build()
    samples = [featuriser.prepare(*s) for s in SAMPLES if build is _visual or s[2] is None]
    found_NK = featuriser.features(samples)
    weights = [p for p in featuriser.body.model.parameters() if p.requires_grad]
    project = RandomProjection(featuriser.width)
    expected = []
    for sample in samples:
        loss = plackett_luce_loss(featuriser.body.rewards(sample).view(1, -1), reduction="sum")
        total = torch.zeros(1, featuriser.width)
        block = 0
        for gradient in torch.autograd.grad(loss, weights):
            total += project(gradient.reshape(1, -1), first_block=block)
            block += project.blocks(gradient.numel())
        expected.append((total[0] / total.norm()).numpy())
    np.testing.assert_allclose(found_NK, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found_NK, axis=1), 1, rtol=1e-5)


def test_rewards_stay_and_neighbours_do_not_matter() -> None:
    featuriser = _visual()
    model, encoder = tiny_llava()
    plain = VisualScorer(model, encoder)
    samples = [featuriser.prepare(*sample) for sample in SAMPLES]
    for rows in samples:
        np.testing.assert_allclose(
            featuriser.body.rewards(rows).detach().numpy(), plain.rewards(rows), atol=1e-5
        )
    whole = featuriser.features(samples)
    for i, sample in enumerate(samples):
        np.testing.assert_allclose(featuriser.features([sample])[0], whole[i], atol=1e-5)
    assert abs(float(whole[0] @ whole[3])) < 0.999  # the picture counts


@pytest.mark.parametrize("build", [_visual, _text])
def test_heads_and_states_are_those_of_the_best_and_the_worst_answer(build: Any) -> None:
    """Their difference along the head is the difference of rewards."""
    direction, states = build("head_grad"), build("hidden")
    sample = SAMPLES[1] if build is _visual else SAMPLES[2]
    rows = direction.prepare(*sample)
    rewards = direction.body.rewards(rows).detach()
    [gradient] = direction.features([rows])
    head = direction.body.head.weight.detach().numpy()[0]
    width = len(head)
    [both] = states.features([states.prepare(*sample)])
    best, worst = both[:width], both[width:]
    np.testing.assert_allclose(gradient, (worst - best) / np.linalg.norm(worst - best), atol=1e-5)
    assert np.sign(gradient @ head) == np.sign(float(rewards[-1] - rewards[0]))


def test_a_model_of_texts_refuses_pictures() -> None:
    with pytest.raises(ValueError, match=r"reads texts only, .* Give `form: caption`"):
        _text("hidden").prepare(*SAMPLES[0])
