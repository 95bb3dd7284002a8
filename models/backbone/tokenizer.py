"""A byte-level BPE tokenizer with a ChatML template, trained from text; the same text gives the same tokenizer.

Any text can be encoded and comes back unchanged, since all 256 bytes are tokens. That also makes every
letter, so the labels "A" and "B", a single token. Padding, beginning, end and the ends of chat turns are
tokens of their own: a model whose padding is its end token learns never to stop. Encoding adds none of
them; the chat template or the caller does, once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD = "<|pad|>"
BOS = "<|bos|>"
EOS = "<|eos|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, IM_START, IM_END)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int = 8192, max_length: int = 2048
) -> PreTrainedTokenizerFast:
    """Train a tokenizer; `len(tokenizer)` may stay below `vocab_size` where the text has too few word parts.

    Args:
        texts: Training texts; read once.
        vocab_size: Largest number of tokens: 5 special ones, 256 bytes and the merges.
        max_length: Length in tokens that the model is made for.

    Raises:
        ValueError: `vocab_size` is too small for the bytes, or there is no text.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(SPECIAL_TOKENS) + len(alphabet)
    if vocab_size < smallest:
        raise ValueError(
            f"`vocab_size` is {vocab_size}; it must be at least {smallest}: "
            f"{len(SPECIAL_TOKENS)} special tokens and {len(alphabet)} bytes."
        )
    iterator = iter(texts)
    first = next((text for text in iterator if text), None)
    if first is None:
        raise ValueError("There is no text to train a tokenizer on.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.chain([first], iterator), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[IM_START, IM_END],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
