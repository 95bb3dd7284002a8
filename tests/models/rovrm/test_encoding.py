"""Texts reach the model unchanged (check 19), and no text can pass for a picture or end a turn."""

from __future__ import annotations

import pytest
from rovrm_cases import FAMILIES, tiny_llava, tokenizer

from eagleray.models.rovrm.encoding import VisualEncoder
from eagleray.models.rovrm.templates import VisualTemplate


def _text(encoder: VisualEncoder, ids: list[int]) -> str:
    """What the ids say; the byte-level tokenizer gives every text back."""
    return encoder.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "prompt", ["Is there a cat?", "The sign says what?", "Are they USERS", " padded ", "a{b}{question}"]
)
def test_check_19_the_prompt_survives(family: str, prompt: str) -> None:
    _, encoder = FAMILIES[family]()
    for tokens in (None, 4):
        shown = _text(encoder, encoder.encode(prompt, "Yes: {answer}", image_tokens=tokens))
        assert shown.count(prompt) == 1 and shown.count("Yes: {answer}") == 1


def test_the_llava_layout() -> None:
    _, encoder = tiny_llava()
    system = encoder.template.system
    with_image = _text(encoder, encoder.encode("Q?", "A.", image_tokens=3))
    assert with_image == f"<|bos|>{system} USER: <image><image><image>\nQ? ASSISTANT: A.<|eos|>"
    assert _text(encoder, encoder.encode("Q?", "A.")) == f"<|bos|>{system} USER: Q? ASSISTANT: A.<|eos|>"


def test_the_chatml_layout() -> None:
    _, encoder = FAMILIES["qwen2_vl"]()
    shown = _text(encoder, encoder.encode("Q?", "A.", image_tokens=2))
    image = "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"
    assert f"<|im_start|>user\n{image}Q?<|im_end|>\n<|im_start|>assistant\nA.<|im_end|>" in shown


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_in_a_text_are_text(family: str) -> None:
    _, encoder = FAMILIES[family]()
    typed = "<image> <|image_pad|> <|eos|> <|im_end|> \ud83d"
    plain = encoder.encode("x", "y")
    ids = encoder.encode(f"x{typed}", f"y{typed}")
    controls = set(encoder.tokenizer.all_special_ids) | {encoder.family.image_token_id}
    assert [i for i in ids if i in controls] == [i for i in plain if i in controls]


def test_a_tokenizer_without_the_templates_tokens_is_refused() -> None:
    _, encoder = tiny_llava()
    qwen = VisualTemplate("other", "<|start|>{question}", after_image="")
    with pytest.raises(ValueError, match=r"no token '<\|start\|>', which template 'other' needs"):
        VisualEncoder(tokenizer(), encoder.image_processor, encoder.family, qwen)
    bare = tokenizer()
    bare.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        VisualEncoder(bare, encoder.image_processor, encoder.family, encoder.template)
    with pytest.raises(ValueError, match="no template 'vicuna'; the templates are llava, chatml"):
        VisualTemplate.named("vicuna")
