"""Answers of a language model by transformers' generation: greedy ones, or several drawn ones."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from eagleray.platform.config import Config as Section

PromptFormat = Literal["chat", "plain"]


class GenerationSection(Section):
    """How answers are sampled."""

    answers: int = Field(default=8, ge=2)
    """Answers to each prompt."""
    max_tokens: int = Field(default=256, ge=1)
    """Longest answer."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the samples."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the likeliest tokens that together have this probability."""


def formatted(prompt: str, prompt_format: PromptFormat) -> Any:
    """A prompt as trl takes it: messages, or text."""
    return f"{prompt}\n" if prompt_format == "plain" else [{"role": "user", "content": prompt}]


def model_text(prompt: str, prompt_format: PromptFormat, tokenizer: Any) -> str:
    """A prompt as the model reads it.

    Raises:
        ValueError: The tokenizer has no chat template.
    """
    given = formatted(prompt, prompt_format)
    if isinstance(given, str):
        return given
    if tokenizer.chat_template is None:
        raise ValueError(
            "The model's tokenizer has no chat template, which `prompt_format: chat` needs; `plain` gives the prompt and a "
            "newline."
        )
    return tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True)


def prepare_tokenizer(tokenizer: Any) -> Any:
    """The same tokenizer, with a padding token and padding where generation wants it: on the left."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def greedy_answers(
    model: Any, tokenizer: Any, texts: Sequence[str], *, max_tokens: int, batch_size: int
) -> list[str]:
    """The likeliest continuation of each text, in batches of like length; the model keeps its training mode."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = [""] * len(texts)
    was_training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        options = {"max_new_tokens": max_tokens, "do_sample": False}
        answers = _continued(model, tokenizer, [texts[i] for i in members], **options)
        for i, answer in zip(members, answers, strict=True):
            found[i] = answer
    model.train(was_training)
    return found


def sampled_answers(
    model: Any, tokenizer: Any, text: str, section: GenerationSection, *, seed: int
) -> list[str]:
    """Continuations of a text that depend on model, text, section and `seed` alone.

    Not on what else is sampled, by whom and in which order: the random state is set from seed and text, and the answers to
    one text are one batch.
    """
    digest = hashlib.sha256(f"{seed} {text}".encode()).digest()
    with torch.random.fork_rng():
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return _continued(
            model,
            tokenizer,
            [text],
            max_new_tokens=section.max_tokens,
            do_sample=True,
            num_return_sequences=section.answers,
            temperature=section.temperature,
            top_p=section.top_p,
            top_k=0,
        )


def _continued(model: Any, tokenizer: Any, texts: list[str], **options: Any) -> list[str]:
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    batch.pop("token_type_ids", None)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
    with torch.no_grad():
        tokens_BT = model.generate(
            **batch.to(model.device),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=sorted(ends - {None}) or None,
            **options,
        )
    new_BT = tokens_BT[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new_BT, skip_special_tokens=True)]
