"""A small Llama-style language model, untrained: the standard architecture of transformers at a chosen size."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

_MULTIPLE = 32  # widths of the MLP are rounded to this, which matrix products like


def llama_config(
    *,
    vocab_size: int,
    width: int,
    layers: int,
    heads: int,
    kv_heads: int | None = None,
    mlp_ratio: float = 8 / 3,
    max_length: int = 2048,
    rope_theta: float = 10_000.0,
    tie_embeddings: bool = True,
    pad_id: int | None = None,
    bos_id: int | None = None,
    eos_id: int | None = None,
) -> LlamaConfig:
    """Configuration of a Llama-style model.

    Args:
        vocab_size: Number of tokens.
        width: Width of the residual stream; a multiple of `heads`, with an even number per head.
        layers: Transformer blocks.
        heads: Query heads.
        kv_heads: Key and value heads, a divisor of `heads`; default: as many as `heads`.
        mlp_ratio: Width of the MLP over `width`, rounded to a multiple of 32. 8/3 gives the three matrices of
            a gated MLP the size of two matrices at ratio 4.
        max_length: Longest sequence.
        rope_theta: Base of the rotary position code.
        tie_embeddings: Share input and output embeddings, which saves most parameters of a small model.
        pad_id: Id of the padding token.
        bos_id: Id of the token at the beginning.
        eos_id: Id of the token at the end.

    Raises:
        ValueError: The sizes do not fit together.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    sizes = {"vocab_size": vocab_size, "width": width, "layers": layers, "heads": heads, "kv_heads": kv_heads}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"`{name}` is {size}; it must be at least 1.")
    if width % (2 * heads):
        raise ValueError(f"`width` is {width}; it must be a multiple of 2 x `heads` = {2 * heads}.")
    if heads % kv_heads:
        raise ValueError(f"`kv_heads` is {kv_heads}; it must divide `heads` = {heads}.")
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=max(1, round(width * mlp_ratio / _MULTIPLE)) * _MULTIPLE,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max_length,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        tie_word_embeddings=tie_embeddings,
        pad_token_id=pad_id,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
    )


def build_llama(config: LlamaConfig, *, seed: int) -> LlamaForCausalLM:
    """A model with random weights that depend on `seed` alone; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
