"""Turning a trained model into one that shares attention scores, with a start computed from calibration text.

Alignment starts at the ridge solution M* = argmin ‖S_l - M S_source‖² + λ‖M‖², both sides centred per row over
visible keys, from H x H normal equations summed in float64. Low-rank weights start at no effect (`zero_k`), at the
rotary pairs of the teacher's own W_Q and W_K that explain most of what alignment leaves (`pairs`), or there and fitted
to it (`lstsq`). The teacher's other weights are taken over as they are, not copied.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eagleray.models.lisa.accounting import past_break_even
from eagleray.models.lisa.checksum import base_checksum
from eagleray.models.lisa.config import head_dim, resolve
from eagleray.models.lisa.distill import LayerDistiller, LocalWeights, record_inputs, sources
from eagleray.models.lisa.kernels import attention_weights
from eagleray.models.lisa.model import ARCHITECTURES
from eagleray.models.lisa.spec import LisaSpec
from eagleray.models.lisa.teacher import LayerView, check_supported, observing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """How the added weights start."""

    align: Literal["ridge", "identity", "random"] = "ridge"
    """The linear path M; a network without one starts at random."""
    low_rank: Literal["zero_k", "pairs", "lstsq"] = "zero_k"
    ridge: float = 1e-4
    """λ over the mean of the diagonal of the normal equations."""
    steps: int = 200
    """Adam steps of `lstsq`."""
    lr: float = 1e-2
    """Learning rate of `lstsq`."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("align", ("ridge", "identity", "random")),
            ("low_rank", ("zero_k", "pairs", "lstsq")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}."
                )


def convert(
    teacher: Any,
    spec: LisaSpec,
    texts: Sequence[Tensor] = (),
    *,
    start: Start | None = None,
    permutations: Mapping[int, Sequence[int]] | None = None,
) -> Any:
    """A model that shares scores as `spec` says and otherwise has the weights of `teacher` (the same tensors).

    Args:
        teacher: A causal language model of a supported architecture.
        spec: What to share.
        texts: Calibration token ids [B, T] without padding; needed by `ridge`, `pairs` and `lstsq`.
        start: How the added weights start.
        permutations: Instead of `start.align`: for each shared layer the order of the source's heads.

    Raises:
        ValueError: The model cannot be converted like this, or calibration text is missing.
    """
    start = start or Start()
    check_supported(teacher)
    config_class, model_class = ARCHITECTURES[teacher.config.model_type]
    spec = resolve(teacher.config, spec)
    _check(teacher, spec, texts, start, permutations)
    for layer, share in past_break_even(
        spec, heads=teacher.config.num_attention_heads, size=head_dim(teacher.config)
    ):
        logger.warning(
            "Layer %d: its scores take %.2f times the arithmetic of full ones; lower `rank` or `align.width`.",
            layer,
            share,
        )
    matrices = dict[int, Tensor]()
    if permutations is not None:
        matrices = {i: torch.eye(len(order))[list(order)] for i, order in permutations.items()}
    elif start.align == "ridge" and spec.align.kind in ("linear", "linear+ffn"):
        matrices = fit_alignment(teacher, spec, texts, ridge=start.ridge)
    if start.low_rank != "zero_k" and any(spec.ranks):
        spec = replace(spec, rope_pairs=choose_pairs(teacher, spec, texts, matrices))
    values = teacher.config.to_dict() | {
        "model_type": config_class.model_type,
        "architectures": [model_class.__name__],
    }
    config = config_class(**values, lisa_attention=spec.to_dict())
    config._attn_implementation = teacher.config._attn_implementation
    student = _assemble(teacher, config, model_class, start.seed)
    config.lisa_attention["base_checksum"] = base_checksum(student)
    student.base_model.lisa = LisaSpec.from_dict(config.lisa_attention)
    _fill(teacher, student, matrices, start)
    if start.low_rank == "lstsq" and any(spec.ranks):
        _fit_low_rank(teacher, student, texts, start)
    student.generation_config = teacher.generation_config
    return student.train(teacher.training)


def fit_alignment(
    teacher: Any, spec: LisaSpec, texts: Iterable[Tensor], *, ridge: float
) -> dict[int, Tensor]:
    """Shared layer -> M* [H, H] in float64."""
    pairs = sources(spec, teacher.config.num_hidden_layers)
    heads = teacher.config.num_attention_heads
    gram = {i: torch.zeros(heads, heads, dtype=torch.float64) for i in pairs}
    cross = {i: torch.zeros(heads, heads, dtype=torch.float64) for i in pairs}

    def add(view: LayerView) -> None:
        below, own = (_centred(view, s, spec) for s in (view.below, view.scores))
        gram[view.index] += (below @ below.T).cpu()
        cross[view.index] += (own @ below.T).cpu()

    _observe(teacher, texts, add, pairs)
    eye = torch.eye(heads, dtype=torch.float64)
    return {
        i: torch.linalg.solve(gram[i] + ridge * gram[i].trace() / heads * eye, cross[i].T).T for i in pairs
    }


def choose_pairs(
    teacher: Any, spec: LisaSpec, texts: Iterable[Tensor], matrices: Mapping[int, Tensor]
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """For each shared layer and key head the rotary pairs whose part of the score reduces the residual most.

    The residual is S_l - M S_source; adding the part c of a pair changes its square by c² - 2 c · residual.
    """
    pairs = sources(spec, teacher.config.num_hidden_layers)
    config = teacher.config
    size, heads = head_dim(config), config.num_attention_heads
    assert spec.key_heads is not None, "the specification is resolved"
    per_head = heads // spec.key_heads
    gain = {i: torch.zeros(spec.key_heads, size // 2, dtype=torch.float64) for i in pairs}

    def add(view: LayerView) -> None:
        residual = _centred(view, view.scores, spec)
        if spec.align.kind != "none":
            below = _centred(view, view.below, spec)
            residual = (
                residual - matrices.get(view.index, torch.eye(heads, dtype=torch.float64)).to(below) @ below
            )
        keys = view.k.repeat_interleave(heads // view.k.shape[1], 1)
        for p in range(size // 2):
            both = [p, p + size // 2]
            part = view.q[..., both] @ keys[..., both].transpose(2, 3) * view.attention.scaling
            part_HN = _centred(view, part, spec)
            gains_H = (2 * part_HN * residual - part_HN.square()).sum(-1)
            gain[view.index][:, p] += gains_H.view(-1, per_head).sum(-1).cpu()

    _observe(teacher, texts, add, pairs)
    return tuple(
        tuple(tuple(sorted(row.topk(rank // 2).indices.tolist())) for row in gain[i])
        for i, rank in zip(spec.shared_layers, spec.ranks, strict=True)
    )


def _check(teacher: Any, spec: LisaSpec, texts: Sequence[Tensor], start: Start, permutations: Any) -> None:
    linear = spec.align.kind in ("linear", "linear+ffn")
    sliced = start.low_rank != "zero_k" and any(spec.ranks)
    if (
        not len(texts)
        and spec.shared_layers
        and (sliced or (linear and start.align == "ridge" and permutations is None))
    ):
        raise ValueError(
            f"`texts` is empty; starting at `{start.align}` and `{start.low_rank}` needs calibration text. Give token "
            "ids, or start at `identity` and `zero_k`."
        )
    if permutations is not None and (not linear or set(permutations) != set(spec.shared_layers)):
        raise ValueError(
            f"`permutations` names layers {sorted(permutations)} for `align.kind` {spec.align.kind!r}; it needs a linear "
            f"path and one order for each shared layer: {list(spec.shared_layers)}."
        )
    if sliced and (
        spec.rope != "pairs" or spec.key_heads is None or spec.key_heads % teacher.config.num_key_value_heads
    ):
        raise ValueError(
            f"`low_rank` is {start.low_rank!r}, which copies rotary pairs of the teacher: it needs `rope: pairs` and "
            f"`key_heads` a multiple of its {teacher.config.num_key_value_heads} KV heads."
        )
    if start.low_rank == "pairs" and teacher.config.model_type == "qwen3":
        raise ValueError(
            "`low_rank` is 'pairs' and the model a 'qwen3', which normalises queries and keys before the rotary code, "
            "so parts of its weights give no parts of its scores. Use `zero_k` or `lstsq`."
        )


def _observe(teacher: Any, texts: Iterable[Tensor], visit: Any, layers: Mapping[int, int]) -> None:
    with torch.no_grad(), observing(teacher, visit, layers=layers):
        for ids in texts:
            teacher.base_model(input_ids=ids, use_cache=False)


def _centred(view: LayerView, scores: Tensor | None, spec: LisaSpec) -> Tensor:
    """Visible scores as [H, N] in float64, each row without its mean; attention weights if those are shared."""
    assert scores is not None, "a shared layer has a source"
    mask = view.mask
    if spec.stage == "weights":
        scores = attention_weights(scores, mask).double()
    else:
        scores = scores.double()
        mean = scores.masked_fill(~mask, 0.0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        scores = (scores - mean).masked_fill(~mask, 0.0)
    return scores.transpose(0, 1).flatten(1)


def _assemble(teacher: Any, config: Any, model_class: Any, seed: int) -> Any:
    """The student with the teacher's tensors and freshly made modules of its own."""
    with torch.device("meta"):
        student = model_class(config)
    kept = {
        name: value
        for name, value in teacher.state_dict(keep_vars=True).items()
        if name in student.state_dict()
    }
    like = next(teacher.parameters())
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in student.state_dict(keep_vars=True).items():
        if name not in kept:
            kept[name] = nn.Parameter(_random(name, parameter.shape, generator).to(like))
    student.load_state_dict(kept, assign=True)
    student.base_model.rotary_emb = teacher.base_model.rotary_emb
    student.tie_weights()
    return student


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Values of an added parameter before calibration: no effect of low-rank keys, biases and second layers."""
    if name.endswith(("k_lr.weight", ".bias", ".b1", ".b2")):
        return torch.zeros(shape)
    if name.endswith(".m"):
        return torch.eye(shape[0])
    std = shape[-1] ** -0.5 if name.endswith("q_lr.weight") else 0.02
    return torch.randn(shape, generator=generator) * std


@torch.no_grad()
def _fill(teacher: Any, student: Any, matrices: Mapping[int, Tensor], start: Start) -> None:
    spec: LisaSpec = student.base_model.lisa
    for i in spec.shared_layers:
        attention = student.base_model.layers[i].self_attn
        if i in matrices and attention.align.m is not None:
            attention.align.m.copy_(matrices[i])
        if attention.align.kind in ("ffn_res", "linear+ffn"):
            attention.align.w2.zero_()
        if start.align == "random" and attention.align.m is not None:
            nn.init.normal_(attention.align.m, std=0.02, generator=torch.Generator().manual_seed(start.seed))
        if start.low_rank != "zero_k" and attention.rank:
            copy_pairs(teacher.base_model.layers[i].self_attn, attention)


@torch.no_grad()
def copy_pairs(full: Any, shared: Any) -> None:
    """Copy the rows of W_Q and W_K (and biases) that belong to the chosen rotary pairs of a shared layer."""
    size = full.head_dim
    pairs = torch.tensor(shared.pairs)
    within = torch.cat([pairs, pairs + size // 2], 1)  # [G_r, R]: numbers of a head
    for name, source in (("q_lr", full.q_proj), ("k_lr", full.k_proj)):
        target = getattr(shared, name)
        heads = target.out_features // shared.rank
        teacher_heads = source.out_features // size
        of_head = torch.arange(heads) * teacher_heads // heads
        rows = (of_head[:, None] * size + within.repeat_interleave(heads // len(pairs), 0)).flatten()
        rows = rows.to(source.weight.device)
        target.weight.copy_(source.weight[rows])
        if source.bias is not None:
            target.bias.copy_(source.bias[rows])


def _fit_low_rank(teacher: Any, student: Any, texts: Sequence[Tensor], start: Start) -> None:
    """Adam on the squared error of the scores, over W_Q^LR and W_K^LR alone."""
    distiller = LayerDistiller(teacher, student)
    parameters = [
        p for name, p in distiller.students.named_parameters() if ".q_lr." in name or ".k_lr." in name
    ]
    optimiser = torch.optim.Adam(parameters, lr=start.lr)
    inputs = [record_inputs(teacher, ids, layers=distiller.layers) for ids in texts]
    weights = LocalWeights(kl=0.0, mse_scores=1.0, mse_out=0.0)
    with torch.enable_grad():
        for step in range(start.steps):
            optimiser.zero_grad()
            losses = distiller(inputs[step % len(inputs)], weights=weights)
            torch.stack(list(losses.values())).sum().backward()
            optimiser.step()
    for parameter in student.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None
