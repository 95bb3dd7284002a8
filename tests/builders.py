"""Tiny tokenizers and random models for tests: no downloads, milliseconds to build.

from builders import tiny_model, tiny_tokenizer
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

Architecture = Literal["llama", "qwen2", "qwen3", "mistral"]
ARCHITECTURES: tuple[Architecture, ...] = ("llama", "qwen3", "mistral")

BOS, EOS, PAD, TURN = "<|bos|>", "<|im_end|>", "<|pad|>", "<|im_start|>"
THINK, END_THINK = "<think>", "</think>"

# ChatML with the switches of the templates in use: a begin-of-text token, and an empty think block on
# request.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}"
    "{%- endif %}"
    "{%- endif %}"
)

_CORPUS = (
    "You compare two candidate answers to one request and decide which serves the request better.",
    "[The Start of Assistant A's Answer] [The End of Assistant B's Answer] [User Question] #Preferred:",
    "user assistant Name a river in Peru. The Ucayali flows through the forest.",
    "A short and useful answer is better than a long one.",
    "numbers 0 1 2 3 4 5 6 7 8 9 and words in sentences, with commas, and full stops.",
)


@lru_cache
def _trained_backend() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=448,
        special_tokens=[PAD, BOS, TURN, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    return backend.to_str()


def tiny_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of some 450 tokens, with a ChatML template or none; pad is not eos."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_backend()),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[TURN],
        chat_template=CHAT_TEMPLATE if chat else None,
    )
    # Control tokens that are not special, as in Qwen3.
    tokenizer.add_tokens([AddedToken(THINK, special=False), AddedToken(END_THINK, special=False)])
    return tokenizer


def tiny_model(
    architecture: Architecture = "llama",
    *,
    vocab_size: int = 512,
    seed: int = 0,
    tie_word_embeddings: bool = False,
    **config: Any,
) -> PreTrainedModel:
    """A random causal language model of 2 layers and width 32, in evaluation mode.

    Weights are large for their size, so that different inputs give clearly different logits.
    """
    shape: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 4096,
        "initializer_range": 0.3,
        "tie_word_embeddings": tie_word_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **config,
    }
    classes = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
    }
    config_class, model_class = classes[architecture]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_class(config_class(**shape)).eval()
