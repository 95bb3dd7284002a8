"""Checks A12 (batch), A13 (permutation), A14 (cross-layer attention), A15 (size); switches, saving, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nast_cases import batch_of, tiny_model, tiny_sibling
from torch import Tensor, nn

from eagleray.models.nast.autoregressive import AutoregressiveModel
from eagleray.models.nast.config import AutoregressiveConfig, NastConfig
from eagleray.models.nast.layers import DepthwiseConvolution, MaskedBatchNorm, TextualLayer
from eagleray.models.nast.losses import nast_loss
from eagleray.models.nast.model import NastModel

LADDER: list[dict[str, Any]] = [
    {
        "acoustic_block": "transformer",
        "inner_source_layers": [],
        "inner_target_layers": [],
        "adapter": "none",
        "cross_layer_source": None,
    },
    {"inner_source_layers": [], "inner_target_layers": [], "adapter": "none", "cross_layer_source": None},
    {"source_prediction": "none", "target_prediction": "none", "adapter": "none", "cross_layer_source": None},
    {"cross_layer_source": None},
    {},
    {"subsampling": "progressive", "acoustic_layers": 4},
    {"subsampler": "conv2d"},
    {"subsampler": "conv2d", "subsampling": "progressive", "acoustic_layers": 4},
    {"conv_norm": "layer_norm", "source_prediction": "gated_league", "adapter": "league"},
]


@pytest.mark.parametrize("switches", LADDER)
def test_a12_logits_do_not_depend_on_padding_or_batch_mates(switches: dict[str, Any]) -> None:
    model = tiny_model(**switches).eval()
    features, lengths, *_ = batch_of(4)
    features[1:, 40:] = 7.0  # padding may hold anything
    together = model(features, lengths)
    for i in range(4):
        alone = model(features[i : i + 1, : lengths[i]], lengths[i : i + 1])
        size = int(alone.lengths)
        assert together.lengths[i] == size == alone.target_logits.shape[1]
        torch.testing.assert_close(
            together.target_logits[i, :size], alone.target_logits[0], atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            together.source_logits[i, :size], alone.source_logits[0], atol=1e-5, rtol=0
        )
        for layer, prediction in alone.inner_source.items():
            inner = together.inner_source[layer].logits_BSV[i, : prediction.logits_BSV.shape[1]]
            torch.testing.assert_close(inner, prediction.logits_BSV[0], atol=1e-5, rtol=0)


def test_a12_the_reference_without_the_mask_does_depend_on_padding() -> None:
    model = tiny_model(compat_unmasked_subsampler=True).eval()
    features, lengths, *_ = batch_of(2)
    alone = model(features[1:, : lengths[1]], lengths[1:]).target_logits[0]
    together = model(features, lengths).target_logits[1, : len(alone)]
    assert (together - alone).abs().max() > 1e-4


def test_a12_a_conformer_in_training_ignores_padding_too() -> None:
    """BatchNorm takes its statistics over real frames only, so more padding changes nothing."""
    features, lengths, *_ = batch_of(3)
    model = tiny_model(dropout=0.0, drop_net=0.0).train()
    plain = model(features, lengths).target_logits
    more = model(nn.functional.pad(features, (0, 0, 0, 16), value=3.0), lengths).target_logits
    for i, size in enumerate(model(features, lengths).lengths.tolist()):
        torch.testing.assert_close(more[i, :size], plain[i, :size], atol=1e-5, rtol=0)


def test_a13_the_textual_encoder_is_permutation_equivariant() -> None:
    model = tiny_model().eval()
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    order, lengths = torch.randperm(9, generator=torch.Generator().manual_seed(1)), torch.tensor([9, 9])
    encoder = model.encoder
    plain, _, inner = encoder.textual(x, lengths, encoder.target_head)
    moved, _, inner_moved = encoder.textual(x[:, order], lengths, encoder.target_head)
    assert list(inner) == [2, 3]
    torch.testing.assert_close(moved, plain[:, order], atol=1e-5, rtol=0)
    torch.testing.assert_close(inner_moved[3].logits_BSV, inner[3].logits_BSV[:, order], atol=1e-5, rtol=0)


def test_a14_without_its_output_cross_layer_attention_is_a_plain_layer() -> None:
    torch.manual_seed(0)
    sizes = {"width": 16, "heads": 2, "inner_width": 32, "dropout": 0.0}
    crossed, plain = (
        TextualLayer(**sizes, cross_layer=True, drop_net=0.5).eval(),
        TextualLayer(**sizes).eval(),
    )
    assert crossed.cross_attention is not None
    nn.init.zeros_(crossed.cross_attention.output.weight)
    nn.init.zeros_(crossed.cross_attention.output.bias)
    plain.attention, plain.feed_forward = crossed.attention, crossed.feed_forward
    plain.norms = nn.ModuleList([crossed.norms[0], crossed.norms[2]])
    x, low, keep = torch.randn(2, 5, 16), torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool)
    for _ in range(3):  # in evaluation drop-net never fires
        torch.testing.assert_close(crossed(x, keep, low), plain(x, keep, None))


def test_a14_all_users_attend_to_the_low_layer_also_after_a_prediction() -> None:
    """Source is layer 1; layers 2 to 4 get the same tensor, although layers 2 and 3 feed predictions back."""
    model = tiny_model().eval()
    memories: list[Tensor | None] = []
    outputs: list[Tensor] = []
    textual = model.encoder.textual

    def note(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        memories.append(inputs[2])
        outputs.append(output)

    for layer in textual.layers:
        layer.register_forward_hook(note)
    model(*batch_of(2)[:2])
    assert memories[0] is None
    low_norm = textual.low_norm
    assert low_norm is not None
    for memory in memories[1:]:
        assert memory is memories[1]
    torch.testing.assert_close(memories[1], low_norm(outputs[0]))


def test_a14_drop_net_at_1_gives_self_attention_of_users_no_gradient() -> None:
    model = tiny_model(drop_net=1.0, dropout=0.0).train()
    nast_loss(model, *batch_of(2))[0].backward()
    for number, layer in enumerate(model.encoder.textual.layers, start=1):
        gradient = layer.attention.query_key_value.weight.grad
        crossed = layer.cross_attention
        assert gradient.any() == (number == 1)
        assert (crossed is None) == (number == 1)
        assert crossed is None or crossed.query.weight.grad.any()


def test_a15_size_and_shared_weights() -> None:
    with torch.device("meta"):
        model = NastModel(NastConfig())
        progressive = NastModel(NastConfig(subsampling="progressive"))
    # The reference's 149,637,664 less nine LayerNorms that it never uses.
    assert sum(p.numel() for p in model.parameters()) == 149_628_448
    encoder = model.encoder
    assert encoder.source_head.weight is encoder.target_head.weight
    tables = [
        encoder.acoustic.inner.adapter.weight,
        encoder.adapter.weight,
        encoder.textual.inner.adapter.weight,
    ]
    assert len({id(t) for t in (*tables, encoder.source_head.weight)}) == 4
    assert sum(p.numel() for p in encoder.acoustic.subsamplers.parameters()) == 6_065_152 + 1_024
    assert sum(p.numel() for p in encoder.acoustic.layers[0].parameters()) == 6_313_472
    assert sum(p.numel() for p in encoder.textual.layers[0].parameters()) == 3_152_384
    assert sum(p.numel() for p in encoder.textual.layers[3].parameters()) == 4_205_056 - 1_024
    assert progressive.encoder.acoustic.stage_layers == 3


@pytest.mark.parametrize("build", [tiny_model, tiny_sibling])
def test_saved_and_loaded_models_are_the_same(build: Any, tmp_path: Path) -> None:
    model = build()
    model.train()
    model.encoder(*batch_of(3)[:2])  # moves BatchNorm's running statistics
    model.eval().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = type(model).from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.encoder.source_head.weight is loaded.encoder.target_head.weight
    if isinstance(loaded, AutoregressiveModel):
        assert loaded.decoder.output.weight is loaded.encoder.target_head.weight
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    weights = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_separate_vocabularies_untie_the_source_head_only(tmp_path: Path) -> None:
    model = tiny_sibling(source_vocab_size=7)
    model.save_pretrained(tmp_path)
    loaded = AutoregressiveModel.from_pretrained(tmp_path)
    assert loaded.encoder.source_head.weight.shape == (7, 16)
    assert loaded.decoder.embedding.weight is loaded.encoder.target_head.weight
    assert loaded.encoder.acoustic.inner.adapter.weight.shape == (7, 16)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(drop_net=0.5).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(3)
        nast_loss(model, *batch_of(2))[0].backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
        assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) == checkpointing
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_batch_norm_equals_torch_without_padding() -> None:
    ours, theirs = MaskedBatchNorm(6), nn.BatchNorm1d(6)
    x = torch.randn(3, 5, 6) * 2 + 1
    keep = torch.ones(3, 5, dtype=torch.bool)
    for _ in range(2):
        torch.testing.assert_close(
            ours(x, keep), theirs(x.transpose(1, 2)).transpose(1, 2), atol=1e-5, rtol=1e-5
        )
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_variance, theirs.running_var)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x, keep), theirs(x.transpose(1, 2)).transpose(1, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kernel", "frames"), [(15, 40), (5, 3), (1, 4)])
def test_depthwise_convolution_equals_torch_over_one_dimension(kernel: int, frames: int) -> None:
    """Values and both gradients, also of clips shorter than the kernel."""
    ours = DepthwiseConvolution(6, kernel).double()
    theirs = nn.Conv1d(6, 6, kernel, padding=kernel // 2, groups=6, bias=False).double()
    theirs.load_state_dict(ours.state_dict())
    x, downstream = torch.randn(2, 2, frames, 6).double().unbind()
    x.requires_grad_()
    found = ours(x)
    expected = theirs(x.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    for of_ours, of_theirs in zip(
        torch.autograd.grad(found, (x, ours.weight), downstream),
        torch.autograd.grad(expected, (x, theirs.weight), downstream),
        strict=True,
    ):
        torch.testing.assert_close(of_ours, of_theirs)


def test_relative_attention_equals_the_sum_over_offsets() -> None:
    """Transformer-XL's score, one pair of frames after another."""
    from eagleray.models.nast.attention import RelativeSelfAttention, relative_offsets, split_heads

    torch.manual_seed(0)
    attention = RelativeSelfAttention(width=8, heads=2, dropout=0.0).double()
    for size in (1, 4):
        x = torch.randn(1, size, 8).double()
        codes = relative_offsets(size, x)
        found = attention(x, torch.ones(1, 1, 1, size, dtype=torch.bool), offsets_PD=codes)
        query, (key, value) = attention.project(x)
        (r,) = split_heads(attention.position(codes)[None], 1, 2)
        mixed = torch.zeros_like(query)
        for h in range(2):
            for i in range(size):
                u, v = attention.content_bias[h], attention.position_bias[h]
                scores = torch.stack(
                    [
                        (query[0, h, i] + u) @ key[0, h, j]
                        + (query[0, h, i] + v) @ r[0, h, size - 1 - (i - j)]
                        for j in range(size)
                    ]
                )
                mixed[0, h, i] = (scores / 2.0).softmax(0) @ value[0, h]
        torch.testing.assert_close(found, attention.output(mixed.transpose(1, 2).flatten(2)))
        # The middle code is that of offset 0: sine 0, cosine 1.
        assert codes[size - 1].tolist() == [0.0, 1.0] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 20, "heads": 8}, r"`width` is 20; it must be a multiple of 2 x `heads` = 16"),
        (
            {"inner_source_layers": [12]},
            r"`inner_source_layers` is \[12\]; each must be at least 1 and below the 12",
        ),
        ({"inner_target_layers": [0]}, r"`inner_target_layers` is \[0\]"),
        (
            {"cross_layer_source": 12},
            r"`cross_layer_source` is 12; it must be at least 1 and below `textual_layers`",
        ),
        ({"conv_kernel": 4}, r"`conv_kernel` is 4; it must be odd"),
        (
            {"subsampling": "progressive", "acoustic_layers": 10},
            r"must be a multiple of the 4 stages in `strides`",
        ),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NastConfig(**changes)


def test_defaults_of_the_sibling() -> None:
    config = AutoregressiveConfig()
    assert (config.textual_layers, config.decoder_layers, config.cross_layer_source) == (6, 6, 2)
    assert (config.inner_source_layers, config.inner_target_layers) == ([6, 9], [4])
    assert not config.prediction_from_normalised
