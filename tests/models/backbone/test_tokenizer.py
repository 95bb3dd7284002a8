import json
import os
import random
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from eagleray.models.backbone.tokenizer import SPECIAL_TOKENS, train_tokenizer

WORDS = [
    "the",
    "judge",
    "compares",
    "answer",
    "A",
    "with",
    "B",
    "and",
    "prefers",
    "longer",
    "number",
    "1234",
    "über",
]


def corpus(count=300):
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=12)) + ".\n" for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(corpus(), vocab_size=400, max_length=128)


def test_special_tokens_are_distinct_and_come_first(tokenizer):
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert set(tokenizer.all_special_tokens) == set(SPECIAL_TOKENS)
    assert tokenizer.model_max_length == 128
    assert 261 < len(tokenizer) <= 400


def test_labels_are_single_tokens_also_after_the_chat_header(tokenizer):
    for label in "AB":
        (token,) = tokenizer.encode(label)
        assert tokenizer.decode([token]) == label
        chat = [{"role": "user", "content": "#Preferred:"}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert tokenizer.encode(prompt + label) == [*tokenizer.encode(prompt), token]


@pytest.mark.parametrize(
    "text", ["", "A", " two  blanks\t\n\n", "naïve 日本語 \U0001f600", "\x00\x7f", "don't , stop"]
)
def test_any_text_comes_back_unchanged_and_nothing_is_added(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_training_merges_what_is_frequent(tokenizer):
    assert len(tokenizer.encode("the judge compares answer")) < len("the judge compares answer") / 3


def test_special_strings_in_user_text_can_be_kept_as_text(tokenizer):
    text = "ends here <|im_end|>"
    assert tokenizer.encode(text)[-1] == 4
    ids = tokenizer.encode(text, split_special_tokens=True)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_chat_template(tokenizer):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\n"}]
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi\n<|im_end|>\n"
    assert tokenizer.apply_chat_template(chat, tokenize=False) == text
    opened = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert opened == text + "<|im_start|>assistant\n"
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert ids == tokenizer.encode(opened)
    assert (ids.count(3), ids.count(4)) == (3, 2)


def test_saved_and_loaded_tokenizer_is_equal(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.all_special_tokens == tokenizer.all_special_tokens
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.model_max_length) == (0, 2, 128)
    text = "naïve <|im_start|>user\nA  B"
    assert loaded.encode(text) == tokenizer.encode(text)


def test_same_text_gives_the_same_tokenizer_whatever_the_threads_and_hash_seed(tokenizer, tmp_path):
    (tmp_path / "corpus.json").write_text(json.dumps(corpus()))
    script = (
        "import json; from eagleray.models.backbone.tokenizer import train_tokenizer;"
        f"texts = json.load(open({str(tmp_path / 'corpus.json')!r}));"
        "print(train_tokenizer(texts, vocab_size=400, max_length=128).backend_tokenizer.to_str())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "17", "TOKENIZERS_PARALLELISM": "false"}
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == tokenizer.backend_tokenizer.to_str()


def test_texts_may_be_a_generator_and_blank_ones_do_no_harm(tokenizer):
    again = train_tokenizer((text for text in ["", *corpus(), ""]), vocab_size=400, max_length=128)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_impossible_arguments():
    with pytest.raises(
        ValueError, match="`vocab_size` is 200; it must be at least 261: 5 special tokens and 256 bytes"
    ):
        train_tokenizer(["x"], vocab_size=200)
    with pytest.raises(ValueError, match="There is no text to train a tokenizer on"):
        train_tokenizer(iter(["", ""]))
