"""Tiny vision-language models for tests: a LLaVA and a Qwen2-VL with random weights, and pictures."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from transformers import (
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLModel,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from eagleray.models.backbone.model import llama_config
from eagleray.models.backbone.tokenizer import train_tokenizer
from eagleray.models.rovrm.encoding import VisualEncoder
from eagleray.models.rovrm.model import VisualRewardModel
from eagleray.models.rovrm.scratch import add_image_token, build_llava, image_processor, llava_config
from eagleray.models.rovrm.synthetic import draw
from eagleray.models.rovrm.templates import VisualTemplate

RED = draw((("red", "circle"), ("blue", "square")))
BLUE = draw((("blue", "circle"), ("green", "triangle")))
_CORPUS = ["USER: What is there? ASSISTANT: There is a red circle. user assistant system picture"]


def png(size: tuple[int, int], colour: Any = "red", *, mode: str = "RGB", kind: str = "PNG") -> bytes:
    """A picture of one colour."""
    with io.BytesIO() as file:
        Image.new(mode, size, colour).save(file, format=kind)
        return file.getvalue()


@lru_cache
def _tokenizer_text() -> PreTrainedTokenizerFast:
    return train_tokenizer(_CORPUS, vocab_size=300)


def tokenizer(*extra: str) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer of the backbone, with further control tokens."""
    import copy

    made = copy.deepcopy(_tokenizer_text())
    for token in extra:
        made.add_tokens([token], special_tokens=True)
    return made


def tiny_llava(*, max_length: int = 256, seed: int = 0) -> tuple[VisualRewardModel, VisualEncoder]:
    """A LLaVA of width 32 on pictures of 32 x 32 with patches of 16, in evaluation mode."""
    made = tokenizer()
    image_id = add_image_token(made)
    text = llama_config(vocab_size=len(made), width=32, layers=2, heads=4, pad_id=made.pad_token_id)
    config = llava_config(
        text, image_token_id=image_id, image_size=32, patch_size=16, width=32, layers=2, heads=4
    )
    model = build_llava(config, seed=seed)
    return _lively(model, seed), VisualEncoder(
        made, image_processor(32), model.family, VisualTemplate.named("llava"), max_length=max_length
    )


CHAT = (
    "{%- for message in messages -%}{{ message['role'] | upper }}: "
    "{%- for part in message['content'] -%}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}"
    "{%- endfor -%}{{ ' ' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}ASSISTANT: {%- endif -%}"
)


def tiny_visual_policy() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA that writes, of the size of `tiny_llava`, with the processor that lays out its prompts."""
    reward_model, encoder = tiny_llava()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(reward_model.config)
    processor = LlavaProcessor(
        encoder.image_processor,
        encoder.tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    return model, processor


def tiny_qwen(*, max_length: int = 256, seed: int = 0) -> tuple[VisualRewardModel, VisualEncoder]:
    """A Qwen2-VL of width 32 that takes pictures in their own shape."""
    made = tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    ids = {
        name: made.convert_tokens_to_ids(token)
        for name, token in (
            ("vision_start_token_id", "<|vision_start|>"),
            ("vision_end_token_id", "<|vision_end|>"),
            ("image_token_id", "<|image_pad|>"),
            ("video_token_id", "<|video_pad|>"),
        )
    }
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(made),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
        },
        **ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VisualRewardModel(Qwen2VLModel(config), seed=seed)
    processor = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 256, "longest_edge": 4096}
    )
    encoder = VisualEncoder(
        made, processor, model.family, VisualTemplate.named("chatml"), max_length=max_length
    )
    return _lively(model, seed), encoder


FAMILIES = {"llava": tiny_llava, "qwen2_vl": tiny_qwen}


def _lively(model: VisualRewardModel, seed: int) -> VisualRewardModel:
    """Weights large enough that another input gives another reward."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2 if "embed_tokens" not in name else 1.0, generator=generator)
    return model.eval()
