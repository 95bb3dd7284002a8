"""Acceptance checks 8 to 15: masks, caches, generation, checkpointing, kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from eagleray.models.lisa import kernels
from eagleray.models.lisa.accounting import cache_bytes_per_token
from eagleray.models.lisa.cache import cache_bytes
from eagleray.models.lisa.convert import Start, convert
from eagleray.models.lisa.kernels import GROUPED
from eagleray.models.lisa.model import ARCHITECTURES, LisaLlamaForCausalLM
from eagleray.models.lisa.spec import AlignSpec, LisaSpec

Make = Callable[..., Any]
EXACT = {"rtol": 1e-9, "atol": 1e-9}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"rank": 0},
    {"rope": "scaled", "source": "anchor"},
    {"rope": "none", "key_heads": 4, "align": AlignSpec(kind="glu")},
    {"row_center": "mean", "key_heads": 1},
    {"config": {"num_key_value_heads": 4}},
    {"row_center": "max", "align": AlignSpec(kind="ffn_res", bias=False, act="gelu")},
    {"stage": "weights", "rank": 0, "align": AlignSpec(kind="linear+ffn", act="relu")},
]
variants = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: ",".join(v) or "default")


@torch.no_grad()
def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    return model(input_ids=ids, **{"use_cache": False, **options}).logits


def in_pieces(model: Any, ids: Tensor, sizes: list[int], cache: Any, mask: Tensor | None = None) -> Tensor:
    parts, seen = [], 0
    for piece in ids.split(sizes, 1):
        seen += piece.shape[1]
        shown = None if mask is None else mask[:, :seen]
        parts.append(logits(model, piece, past_key_values=cache, use_cache=True, attention_mask=shown))
    return torch.cat(parts, 1)


@variants
def test_the_future_is_hidden(make_pair: Make, ids: Tensor, variant: dict[str, Any]) -> None:
    """Check 8: changing token 9 alters no earlier logit at all, and does alter later ones."""
    _, student = make_pair(**variant)
    other = ids.clone()
    other[:, 9] = (ids[:, 9] + 1) % 64
    difference = logits(student, ids) - logits(student, other)
    assert torch.equal(difference[:, :9], torch.zeros_like(difference[:, :9]))
    assert (difference[:, 9:].abs().amax(-1) > 1e-6).all()


@variants
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_pieces_equal_one_shot(make_pair: Make, ids: Tensor, variant: dict[str, Any], static: bool) -> None:
    """Check 9: token by token, and in uneven pieces."""
    _, student = make_pair(**variant)
    expected = logits(student, ids)
    for sizes in ([1] * 14, [5, 1, 7, 1]):
        cache = (
            StaticCache(config=student.config, max_cache_len=20)
            if static
            else DynamicCache(config=student.config)
        )
        torch.testing.assert_close(in_pieces(student, ids, sizes, cache), expected, **EXACT)


def test_a_small_score_budget_changes_nothing(make_pair: Make, ids: Tensor) -> None:
    """Check 9, inside one call: a prompt over the budget goes through the layers in pieces."""
    _, student = make_pair()
    long = ids.repeat(1, 30)
    expected = logits(student, long)
    sizes = []
    student.model.layers[2].register_forward_hook(lambda m, args, out: sizes.append(args[0].shape[1]))
    student.model.lisa = student.model.lisa.__class__(**vars(student.model.lisa) | {"score_budget": 1})
    mask = torch.ones_like(long)
    for options in (
        {},
        {"attention_mask": mask},
        {"past_key_values": StaticCache(student.config, max_cache_len=430)},
    ):
        sizes.clear()
        torch.testing.assert_close(logits(student, long, use_cache=True, **options), expected, **EXACT)
        assert max(sizes) * 2 * 4 * 420 * 8 <= 2**20 and sum(sizes) == 420 and len(sizes) > 1
    sizes.clear()
    hidden = student(input_ids=long, use_cache=True, output_hidden_states=True).hidden_states
    assert sizes == [420] and [h.shape[1] for h in hidden] == [420] * 7


@variants
def test_left_padding_changes_nothing(make_pair: Make, ids: Tensor, variant: dict[str, Any]) -> None:
    """Check 10: rows equal single runs, with and without a cache; rows that see nothing are no NaN."""
    _, student = make_pair(**variant)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    alone = logits(student, ids[:1, 5:])
    for options in ({}, {"use_cache": True}):
        padded = logits(student, ids, attention_mask=mask, position_ids=positions, **options)
        assert padded.isfinite().all()
        torch.testing.assert_close(padded[:1, 5:], alone, **EXACT)
        torch.testing.assert_close(padded[1:], logits(student, ids[1:]), **EXACT)
    cache = DynamicCache(config=student.config)
    student(
        input_ids=ids[:, :9], attention_mask=mask[:, :9], position_ids=positions[:, :9], past_key_values=cache
    )
    last = student(
        input_ids=ids[:, 9:], attention_mask=mask, position_ids=positions[:, 9:], past_key_values=cache
    )
    torch.testing.assert_close(last.logits[:1], alone[:, 4:], **EXACT)


@pytest.mark.parametrize("rope", ["pairs", "scaled", "none"])
def test_only_relative_positions_count(make_pair: Make, ids: Tensor, rope: str) -> None:
    """Check 11: position ids may all be larger by a constant."""
    _, student = make_pair(rope=rope)
    shifted = logits(student, ids, position_ids=torch.arange(14)[None] + 37)
    torch.testing.assert_close(shifted, logits(student, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("source", ["prev", "anchor"])
def test_ways_of_running_agree(make_pair: Make, ids: Tensor, source: str) -> None:
    """Check 12: cache or not, training mode, checkpointing; gradients with and without checkpointing."""
    _, student = make_pair(source=source)
    expected = logits(student, ids)
    torch.testing.assert_close(logits(student, ids, use_cache=True), expected, **EXACT)
    student.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            student.activation_checkpointing_enable()
        student.zero_grad()
        out = student(input_ids=ids, labels=ids)
        torch.testing.assert_close(out.logits.detach(), expected, **EXACT)
        out.loss.backward()
        gradients.append({name: p.grad.clone() for name, p in student.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0 or name.endswith("3.self_attn.align.b2"), name
        torch.testing.assert_close(gradients[1][name], gradient, **EXACT)


def test_checkpointing_saves_one_tensor_a_chain(make_pair: Make, ids: Tensor) -> None:
    """No score tensor outlives its chain: none of the size of scores is saved for the backward pass."""
    _, student = make_pair(shared=(2, 3, 4, 5))
    student.train()
    sizes: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tuple(tensor.shape))
        return tensor

    for checkpointing in (False, True):
        if checkpointing:
            student.activation_checkpointing_enable()
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            student(input_ids=ids, use_cache=False)
        scores = [s for s in sizes if s[-2:] == (14, 14) or s[-1] == 14 * 14]
        assert bool(scores) != checkpointing


def test_checkpointing_with_a_cache_is_refused(make_pair: Make, ids: Tensor) -> None:
    _, student = make_pair()
    student.train().activation_checkpointing_enable()
    with pytest.raises(ValueError, match="can't be used with gradient checkpointing"):
        student(input_ids=ids, past_key_values=DynamicCache(config=student.config))


@pytest.mark.parametrize(("key_heads", "rank"), [(2, 4), (4, 2), (1, 8), (2, 0)])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_cache_holds_what_the_formula_says(
    make_pair: Make, ids: Tensor, key_heads: int, rank: int, static: bool
) -> None:
    """Check 13: keys [B, G_r, T, r], values [B, G, T, d], bytes to the byte."""
    _, student = make_pair(key_heads=key_heads, rank=rank)
    cache: Any = (
        StaticCache(config=student.config, max_cache_len=14)
        if static
        else DynamicCache(config=student.config)
    )
    logits(student, ids, past_key_values=cache, use_cache=True)
    assert cache.layers[3].keys.shape == (2, key_heads, 14, rank)
    assert cache.layers[3].values.shape == (2, 2, 14, 8)
    assert cache.layers[1].keys.shape == (2, 2, 14, 8)
    per_token = cache_bytes_per_token(student.config, student.model.lisa, value_bytes=8)
    assert cache_bytes(cache) == 2 * 14 * per_token


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_greedy_generation_is_a_loop(make_pair: Make, ids: Tensor, architecture: str) -> None:
    """Check 14: greedy equals a loop without a cache; so do a static cache, pieces, and left padding."""
    _, student = make_pair(architecture)
    expected = ids
    for _ in range(6):
        expected = torch.cat([expected, logits(student, expected)[:, -1:].argmax(-1)], 1)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(student.generate(ids, **options), expected)
    assert torch.equal(student.generate(ids, cache_implementation="static", **options), expected)
    for cache in ("static", "dynamic"):
        pieces = student.generate(ids, cache_implementation=cache, prefill_chunk_size=5, **options)
        assert torch.equal(pieces, expected)
    padded = torch.cat([torch.zeros_like(ids[:, :3]), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    found = student.generate(padded, attention_mask=mask, **options)
    assert torch.equal(found[:, 17:], expected[:, 14:])


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    ("kv_heads", "left", "time_last"),
    [(4, True, True), (4, False, True), (2, True, True), (2, False, False)],
)
def test_time_is_last_where_it_is_read_faster(
    make_pair: Make,
    ids: Tensor,
    static: bool,
    kv_heads: int,
    left: bool,
    time_last: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Values of producers and shared layers, and low-rank keys; whatever the memory, the axes are as ever."""
    monkeypatch.setattr(kernels, "_VALUES_ON_THE_LEFT", left)
    _, student = make_pair(config={"num_key_value_heads": kv_heads})
    cache: Any = (
        StaticCache(config=student.config, max_cache_len=20)
        if static
        else DynamicCache(config=student.config)
    )
    in_pieces(student, ids, [9, 5], cache)
    first = student.base_model.lisa.shared_layers[0]
    producer, shared, plain = (cache.layers[i] for i in (first - 1, first, 0))
    for stored in (shared.keys, shared.values, producer.values, producer.keys, plain.values):
        assert stored.shape[2] == (20 if static else 14)
        last = time_last and stored is not producer.keys and stored is not plain.values
        assert (stored.stride(2) == 1) == last


@pytest.mark.parametrize("rank", [0, 4])
def test_beam_search_reorders_shared_layers(make_pair: Make, ids: Tensor, rank: int) -> None:
    """Check 14: four beams equal four beams without a cache, also where keys have width 0."""
    _, student = make_pair(rank=rank)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "num_beams": 4}
    assert torch.equal(student.generate(ids, **options), student.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("rank", [0, 4])
def test_assisted_decoding_equals_greedy(make_pair: Make, ids: Tensor, rank: int) -> None:
    """Check 14: what the assistant guessed wrong is cropped from the cache."""
    _, student = make_pair(rank=rank)
    assistant = tiny_model("llama", vocab_size=64, seed=3).double()
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    plain = student.generate(ids[:1], **options)
    assert torch.equal(student.generate(ids[:1], assistant_model=assistant, **options), plain)


def test_cache_operations_reach_shared_layers(make_pair: Make, ids: Tensor) -> None:
    """Repeat, select, crop and start again, then go on as if the rest had never been there."""
    _, student = make_pair(rank=0)
    cache = DynamicCache(config=student.config)
    logits(student, ids, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    cache.crop(-4)
    swapped = ids[[1, 0]]
    found = logits(student, swapped[:, 10:], past_key_values=cache, use_cache=True)
    torch.testing.assert_close(found, logits(student, swapped)[:, 10:], **EXACT)
    cache.reset()
    found = logits(student, ids, past_key_values=cache, use_cache=True)
    torch.testing.assert_close(found, logits(student, ids), **EXACT)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_equal_sliding_windows_may_share(make_pair: Make, ids: Tensor, static: bool) -> None:
    """A window of 4 on all layers: cached decoding beyond it equals one shot."""
    _, student = make_pair("mistral", config={"sliding_window": 4})
    cache = (
        StaticCache(config=student.config, max_cache_len=20)
        if static
        else DynamicCache(config=student.config)
    )
    expected = logits(student, ids)
    torch.testing.assert_close(in_pieces(student, ids, [6, *[1] * 8], cache), expected, **EXACT)
    unlimited = make_pair("mistral")[1]
    unlimited.load_state_dict(student.state_dict())
    assert not torch.allclose(logits(unlimited, ids)[:, 4:], expected[:, 4:])


def test_mixed_windows_share_within_runs(make_pair: Make, ids: Tensor) -> None:
    """Qwen2 with full layers below and windows above, chains in both."""
    _, student = make_pair(
        "qwen2",
        shared=(1, 2, 4, 5),
        config={"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 3},
    )
    cache = DynamicCache(config=student.config)
    torch.testing.assert_close(in_pieces(student, ids, [6, *[1] * 8], cache), logits(student, ids), **EXACT)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_kernels_agree(make_pair: Make, ids: Tensor, architecture: str) -> None:
    """Check 15: the kernel of plain layers changes rounding only, with and without padding."""
    _, student = make_pair(architecture, dtype=torch.float32)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    found = {}
    for kernel in ("eager", "sdpa", GROUPED):
        student.set_attn_implementation(kernel)
        steps = in_pieces(student, ids, [6, *[1] * 8], DynamicCache(config=student.config), mask)
        found[kernel] = torch.cat([logits(student, ids), logits(student, ids, attention_mask=mask), steps])
    found = {kernel: values.nan_to_num() for kernel, values in found.items()}
    keep = torch.cat([torch.ones_like(ids), mask, mask]).bool()
    for kernel in ("sdpa", GROUPED):
        torch.testing.assert_close(found[kernel][keep], found["eager"][keep], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flex_attention", "paged|eager"])
def test_kernels_without_scores_are_refused_on_loading(make_pair: Make, tmp_path: Any, kernel: str) -> None:
    """Check 15: at load, not at step 1."""
    _, student = make_pair()
    student.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="do not give out the scores"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=kernel)


def test_outputs_are_recorded(make_pair: Make, ids: Tensor) -> None:
    """Hidden states of all layers; attention weights that sum to one, also of shared layers."""
    _, student = make_pair()
    student.set_attn_implementation("eager")
    out = student(input_ids=ids, output_attentions=True, output_hidden_states=True)
    assert len(out.hidden_states) == 7 and len(out.attentions) == 6
    for weights in out.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))


def test_half_precision_scores_are_float32_at_decode_time(make_pair: Make, ids: Tensor) -> None:
    """`auto`: float32 for one query, the model's type for a prompt."""
    _, student = make_pair(dtype=torch.bfloat16)
    types = []
    student.model.layers[3].self_attn.register_forward_hook(lambda m, args, out: types.append(out[2].dtype))
    cache = DynamicCache(config=student.config)
    in_pieces(student, ids, [13, 1], cache)
    assert types == [torch.bfloat16, torch.float32]


def test_unsuitable_caches_are_refused(make_pair: Make, ids: Tensor) -> None:
    """Eviction, quantisation, and caches of another model."""
    teacher, student = make_pair()

    class Forgetful(DynamicLayer):
        pass

    cache = DynamicCache(config=student.config)
    cache.layers[3] = Forgetful()
    with pytest.raises(ValueError, match="Layer 3 of the cache is a Forgetful"):
        student(input_ids=ids, past_key_values=cache)
    cache = DynamicCache(config=teacher.config)
    teacher(input_ids=ids, past_key_values=cache)
    with pytest.raises(ValueError, match="holds full keys"):
        student(input_ids=ids, past_key_values=cache)
    cache = DynamicCache(config=student.config)
    student(input_ids=ids, past_key_values=cache)
    for name in ("keys", "values"):
        setattr(cache.layers[3], name, getattr(cache.layers[3], name)[:, :, 2:])
    with pytest.raises(ValueError, match="dropped keys from the cache"):
        student(input_ids=ids[:, :1], past_key_values=cache)
    short = DynamicCache(config=student.config)
    short.layers.pop()
    with pytest.raises(ValueError, match="has 5 layers, the model 6"):
        student(input_ids=ids, past_key_values=short)


def test_an_empty_cache_made_without_a_config_works(make_pair: Make, ids: Tensor) -> None:
    _, student = make_pair()
    torch.testing.assert_close(in_pieces(student, ids, [9, 5], DynamicCache()), logits(student, ids), **EXACT)


def test_inputs_are_ids_or_embeddings(make_pair: Make, ids: Tensor) -> None:
    _, student = make_pair()
    assert isinstance(student, LisaLlamaForCausalLM)
    embeds = student.get_input_embeddings()(ids)
    found = student(inputs_embeds=embeds, use_cache=False).logits.detach()
    torch.testing.assert_close(found, logits(student, ids), **EXACT)
    with pytest.raises(ValueError, match="either `input_ids` or `inputs_embeds`"):
        student.model(input_ids=ids, inputs_embeds=embeds)


def test_layers_that_do_not_know_the_cache_are_refused(
    make_teacher: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from transformers 5.24 on: they would take `past_key_values` as just another keyword."""

    def forward(self: Any, hidden_states: Tensor, cache: Any = None, **kwargs: Any) -> Tensor:
        return hidden_states

    teacher = make_teacher()
    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    with pytest.raises(ImportError, match=r"decode without one\. Install `transformers<5\.24`"):
        convert(teacher, LisaSpec(shared_layers=(2,), rank=4), start=Start(align="identity"))
