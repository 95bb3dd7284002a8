"""The chat frame on tokenizers with other habits than byte-level BPE, and the shares of over-long texts."""

from __future__ import annotations

import logging
import pickle
from itertools import product

import pytest
from builders import tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from eagleray.models.gram.tokenization import ChatFrame, PlainTokenizer, share_room, valid_unicode

TEXT = "Judge this.\n\n- one [INST]\n- two </s> <|user|>"


def sentencepiece_like(chat_template: str, *added: AddedToken) -> PreTrainedTokenizerFast:
    """Characters as tokens, spaces as `▁`, a space put before the very first word (Llama 2, Mistral 7B)."""
    alphabet = "▁ \n-.,<>[]|/abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ?"
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *dict.fromkeys(alphabet)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=chat_template,
    )
    tokenizer.add_tokens(list(added))
    return tokenizer


MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
CONTROL = {
    MISTRAL: [AddedToken("[INST]", special=True), AddedToken("[/INST]", special=True)],
    PHI: [AddedToken(t, special=True, rstrip=True) for t in ("<|user|>", "<|assistant|>", "<|end|>")],
}


@pytest.mark.parametrize("template", CONTROL, ids=["mistral", "phi"])
def test_frame_matches_the_tokenizer_on_the_rendered_chat(
    template: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = sentencepiece_like(template, *CONTROL[template])
    with caplog.at_level(logging.WARNING):
        frame = ChatFrame(tokenizer)
    assert not caplog.records
    text = "Judge this.\n\nIt is short."
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    assert frame.user_turn(text) == tokenizer.encode(rendered, add_special_tokens=False)


@pytest.mark.parametrize("template", CONTROL, ids=["mistral", "phi"])
def test_control_tokens_come_from_the_frame_only(template: str) -> None:
    tokenizer = sentencepiece_like(template, *CONTROL[template])
    frame, control = ChatFrame(tokenizer), set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}
    assert [i for i in frame.user_turn(TEXT) if i in control] == [
        i for i in frame.user_turn("x") if i in control
    ]


def test_other_added_tokens_stay_tokens_with_their_ids() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<|fim|>", special=False), AddedToken("    ", special=False)])
    ids = ChatFrame(tokenizer).user_turn("x <|fim|>    y")
    assert tokenizer.convert_tokens_to_ids("<|fim|>") in ids
    assert tokenizer.convert_tokens_to_ids("    ") in ids


def test_control_tokens_stay_text_in_another_process() -> None:
    frame = ChatFrame(tiny_tokenizer())
    assert pickle.loads(pickle.dumps(frame)).user_turn("a <|im_end|>") == frame.user_turn("a <|im_end|>")


def test_a_tokenizer_that_splits_otherwise_inside_the_frame_is_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A normalizer puts a mark before each piece of text; a control token in the middle makes two pieces."""
    tokenizer = sentencepiece_like(MISTRAL, *CONTROL[MISTRAL])
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("x")
    tokenizer.add_tokens([AddedToken("better", special=True)])
    with caplog.at_level(logging.WARNING):
        ChatFrame(tokenizer)
    assert "splits a text differently inside its chat template" in caplog.text


def test_template_must_write_the_text_once() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(ValueError, match="does not write each message exactly once and unchanged"):
        ChatFrame(tokenizer)


def test_slow_tokenizers_are_refused() -> None:
    class Slow(PreTrainedTokenizerBase):
        pass

    with pytest.raises(ValueError, match="a Slow, which gives no character offsets; a fast tokenizer"):
        PlainTokenizer(Slow(), set(), inside_text=True)


def test_cuts_at_token_borders() -> None:
    plain = ChatFrame(tiny_tokenizer()).plain
    text = "numbers 12 and words - in sentences, " * 400
    ids = plain.encode(text)
    head, tail = plain.head(text, 50), plain.tail(text, 50)
    assert (len(head.spans), head.complete, len(tail.spans), tail.complete) == (50, False, 50, False)
    assert plain.encode(head.first(50)) == ids[:50]
    assert plain.encode(tail.last(50)) == ids[-50:]
    assert (head.first(0), tail.last(0)) == ("", "")
    whole = plain.head(text, len(ids))
    assert whole.complete and whole.first(len(ids)) == text
    assert not plain.head(text, len(ids) - 1).complete


def test_a_character_of_several_tokens_is_not_cut() -> None:
    plain = ChatFrame(tiny_tokenizer()).plain
    assert len(plain.encode("🙂")) > 2
    assert plain.head("🙂🙂", 2).first(2) == "🙂"
    assert plain.tail("🙂🙂", 2).last(2) == "🙂"


def test_room_is_shared_fully_and_fairly() -> None:
    sizes = (0, 1, 7, 40, 49, 50, 51, 100, 1000)
    for prompt, a, b, room in product(sizes, sizes, sizes, (0, 1, 10, 100, 101)):
        prompt_cap, answer_cap = share_room(room, prompt, a, b)
        kept = [min(prompt, prompt_cap), min(a, answer_cap), min(b, answer_cap)]
        total = prompt + a + b
        assert min(prompt_cap, answer_cap) >= 0
        assert sum(kept) <= room
        assert sum(kept) >= min(total, room - 1)  # one token may be left over: two answers, one limit
        if total <= room:
            assert kept == [prompt, a, b]
        if kept[0] < prompt:
            assert kept[1] + kept[2] <= max(room // 2, 0)
        assert share_room(room, prompt, b, a) == (prompt_cap, answer_cap)


def test_valid_unicode() -> None:
    assert valid_unicode("a\ud83d\ude42b\udc00") == "a🙂b\ufffd"
    assert valid_unicode("naïve 🙂") == "naïve 🙂"
