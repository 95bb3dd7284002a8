"""The reward model: parity with transformers, pooling (check 18), freezing (check 17), and what is not cut."""

from __future__ import annotations

import copy

import pytest
import torch
from rovrm_cases import BLUE, FAMILIES, RED, tiny_llava
from torch import Tensor

from eagleray.models.gram.batching import pad_right
from eagleray.models.rovrm.images import decode_image
from eagleray.models.rovrm.losses import plackett_luce_loss
from eagleray.models.rovrm.model import Phase, VisualRewardModel
from eagleray.models.rovrm.scoring import Prepared, TooLongError, VisualScorer, collate

PROMPT, ANSWERS = "Is there a circle?", ["Yes, a red one.", "No.", "There are three of them, all blue."]


@pytest.fixture(params=FAMILIES)
def scorer(request: pytest.FixtureRequest) -> VisualScorer:
    return VisualScorer(*FAMILIES[request.param]())


def test_the_forward_pass_is_that_of_transformers(scorer: VisualScorer) -> None:
    """Rewards of a batch = head on the last hidden state that transformers' own processing of one row gives."""
    items = scorer.prepare(PROMPT, ANSWERS, RED)
    rewards = scorer.model(*collate(items))
    for item, reward in zip(items, rewards, strict=True):
        ids_1T = torch.tensor([item.ids])
        own = dict(item.pixels or {})
        if scorer.model.config.model_type == "qwen2_vl":
            own["mm_token_type_ids"] = (ids_1T == scorer.model.config.image_token_id).int()
        hidden = scorer.model.model(
            input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), **own
        ).last_hidden_state
        expected = hidden[0, -1] @ scorer.model.v_head.weight[0]
        assert reward.item() == pytest.approx(expected.item(), abs=1e-5)
    assert len({round(reward, 3) for reward in rewards.tolist()}) == 3


def test_image_tokens_are_as_many_as_features(scorer: VisualScorer) -> None:
    pixels = scorer.encoder.pixels(decode_image(RED))
    features = scorer.model.model.get_image_features(**pixels, return_dict=True).pooler_output
    assert scorer.encoder.family.image_tokens(pixels) == len(features[0])


def test_check_18_padding_side_and_batch_size_do_not_matter(scorer: VisualScorer) -> None:
    items = scorer.prepare(PROMPT, ANSWERS, RED) + scorer.prepare("What?", ["Nothing to see."])
    together = scorer.model(*collate(items))
    alone = torch.cat([scorer.model(*collate([item])) for item in items])
    left = scorer.model(*_pad_left(items))
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(left, alone, atol=1e-5, rtol=0)
    assert scorer.rewards(items) == pytest.approx(alone.tolist(), abs=1e-5)


def test_check_18_the_pad_id_does_not_matter(scorer: VisualScorer) -> None:
    """Not even if it is that of a token of the answer: the reward is read by position."""
    items = scorer.prepare(PROMPT, ANSWERS, RED)
    expected = scorer.model(*collate(items))
    for pad_id in (items[0].ids[-1], items[0].ids[0]):
        torch.testing.assert_close(scorer.model(*collate(items, pad_id=pad_id)), expected, atol=1e-5, rtol=0)


def test_check_18_text_and_image_rows_share_a_batch(scorer: VisualScorer) -> None:
    texts, pictures = scorer.prepare(PROMPT, ANSWERS), scorer.prepare(PROMPT, ANSWERS, RED)
    others = scorer.prepare(PROMPT, ANSWERS, BLUE)
    mixed = [texts[0], others[0], pictures[0], texts[1], pictures[1]]
    expected = torch.cat([scorer.model(*collate([item])) for item in mixed])
    torch.testing.assert_close(scorer.model(*collate(mixed)), expected, atol=1e-5, rtol=0)


def test_check_18_the_picture_counts_and_texts_ignore_it(scorer: VisualScorer) -> None:
    one, other = (scorer.score(PROMPT, ANSWERS, image) for image in (RED, BLUE))
    assert all(abs(a - b) > 1e-3 for a, b in zip(one, other, strict=True))
    [text] = scorer.prepare(PROMPT, ANSWERS[:1])
    pixels = scorer.encoder.pixels(decode_image(RED))
    ids_BT, mask_BT, _, _ = collate([text])
    with_tensor = scorer.model(ids_BT, mask_BT, torch.tensor([-1]), pixels)
    assert with_tensor.item() == scorer.model(ids_BT, mask_BT).item()


def test_a_picture_is_seen_once_for_all_its_answers(scorer: VisualScorer) -> None:
    *_, index_B, pixels = collate(scorer.prepare(PROMPT, ANSWERS, RED))
    assert index_B is not None and index_B.tolist() == [0, 0, 0]
    assert pixels is not None and len(scorer.model.model.get_image_features(**pixels).pooler_output) == 1


def test_image_tokens_are_never_cut() -> None:
    model, encoder = tiny_llava(max_length=60)
    scorer = VisualScorer(model, encoder)
    with pytest.raises(TooLongError, match=r"take \d+ tokens, 4 of them of the picture; the model takes 60"):
        scorer.score(PROMPT, ["word " * 60], RED)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("phase", "tower", "changed"),
    [
        (1, False, {"language_model", "v_head"}),
        (2, False, {"language_model", "v_head"}),
        (3, False, {"language_model", "v_head", "projector"}),
        (3, True, {"language_model", "v_head", "projector", "vision_tower"}),
    ],
)
def test_check_17_each_phase_changes_its_parts_and_no_others(
    family: str, phase: Phase, tower: bool, changed: set[str]
) -> None:
    model, encoder = FAMILIES[family]()
    before = copy.deepcopy(model.state_dict())
    names = model.train_parts(phase, train_vision_tower=tower)
    items = VisualScorer(model, encoder).prepare(PROMPT, ANSWERS, RED if phase == 3 else None)
    _step(model, items)
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {model.part_of(name) for name in moved} == changed
    assert moved <= set(names)
    frozen = {name for name in before if model.part_of(name) not in changed}
    assert not frozen & moved


def test_the_tower_is_trained_with_pictures_only() -> None:
    with pytest.raises(ValueError, match="`train_vision_tower` goes with phase 3; phase 1 has no pictures"):
        tiny_llava()[0].train_parts(1, train_vision_tower=True)


def test_unused_pictures_keep_the_graph_and_change_nothing() -> None:
    """A batch of texts gives the projector a gradient of zero rather than none, as other workers expect."""
    model, encoder = tiny_llava()
    model.train_parts(3)
    scorer = VisualScorer(model, encoder)
    ids_BT, mask_BT, _, _ = collate(scorer.prepare(PROMPT, ANSWERS))
    pixels = encoder.pixels(decode_image(RED))
    rewards = model(ids_BT, mask_BT, torch.full((3,), -1), pixels)
    plackett_luce_loss(rewards[None]).backward()
    gradient = model.model.multi_modal_projector.linear_1.weight.grad
    assert gradient is not None and not gradient.any()


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model, encoder = tiny_llava()
    items = VisualScorer(model, encoder).prepare(PROMPT, ANSWERS, RED)
    gradients = []
    for checkpointed in (False, True):
        model.zero_grad()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        plackett_luce_loss(model(*collate(items))[None]).backward()
        gradients.append(model.model.multi_modal_projector.linear_1.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1])


def _step(model: VisualRewardModel, items: list[Prepared]) -> None:
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1
    )
    plackett_luce_loss(model(*collate(items))[None]).backward()
    optimizer.step()


def _pad_left(items: list[Prepared]) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor] | None]:
    _, _, index_B, pixels = collate(items)
    ids_BT, mask_BT = pad_right([item.ids[::-1] for item in items], pad_id=3)
    return ids_BT.flip(1), mask_BT.flip(1), index_B, pixels
