"""What the NAST tests share: the CTC cases of the specification, enumeration of paths, and models that take milliseconds."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from eagleray.models.nast.autoregressive import AutoregressiveModel
from eagleray.models.nast.config import AutoregressiveConfig, NastConfig
from eagleray.models.nast.model import NastModel

A = torch.tensor(
    [[0.6, 0.3, 0.1], [0.5, 0.2, 0.3], [0.4, 0.1, 0.5], [0.7, 0.2, 0.1]], dtype=torch.float64
).log()
"""Log-probabilities [T=4, V=3] of check A1."""

SECOND = torch.tensor(
    [[((3 * t + 5 * v) % 7) / 2 for v in range(4)] for t in range(5)], dtype=torch.float64
).log_softmax(-1)
"""Log-probabilities [T=5, V=4] of check A2."""


def paths_by_label(log_probs_TV: Tensor) -> dict[tuple[int, ...], list[tuple[tuple[int, ...], float]]]:
    """Every path with its log-probability, by the label sequence it collapses to."""
    found: dict[tuple[int, ...], list[tuple[tuple[int, ...], float]]] = {}
    rows = log_probs_TV.tolist()
    for path in itertools.product(range(log_probs_TV.shape[1]), repeat=len(rows)):
        label = tuple(p for p, before in zip(path, (0, *path), strict=False) if p != before and p != 0)
        found.setdefault(label, []).append((path, sum(row[p] for row, p in zip(rows, path, strict=True))))
    return found


def enumerated_loss(log_probs_TV: Tensor, label: tuple[int, ...]) -> float:
    """−log P(label) over all paths."""
    return -math.log(sum(math.exp(p) for _, p in paths_by_label(log_probs_TV)[label]))


def pad_labels(labels: list[tuple[int, ...]], *, value: int = 0) -> tuple[Tensor, Tensor]:
    """Labels [B, U] with their lengths [B]."""
    longest = max(map(len, labels))
    rows = [[*label, *[value] * (longest - len(label))] for label in labels]
    return torch.tensor(rows, dtype=torch.long).view(len(labels), longest), torch.tensor(
        [len(label) for label in labels]
    )


SIZES: dict[str, Any] = {
    "vocab_size": 12,
    "feature_size": 8,
    "width": 16,
    "heads": 2,
    "inner_width": 32,
    "subsampler_width": 32,
    "conv_kernel": 5,
    "acoustic_layers": 3,
    "textual_layers": 4,
    "inner_source_layers": [2],
    "inner_target_layers": [2, 3],
    "cross_layer_source": 1,
}


def tiny_model(**changes: Any) -> NastModel:
    """A model with random weights, always the same."""
    torch.manual_seed(0)
    return NastModel(NastConfig(**{**SIZES, **changes}))


def tiny_sibling(**changes: Any) -> AutoregressiveModel:
    """The autoregressive sibling."""
    torch.manual_seed(0)
    return AutoregressiveModel(AutoregressiveConfig(**{**SIZES, "decoder_layers": 2, **changes}))


def batch_of(size: int, *, frames: int = 48) -> tuple[Tensor, ...]:
    """Features, lengths, source with lengths, target with lengths; every clip has another length."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([frames - 5 * i for i in range(size)])
    features = torch.randn(size, frames, SIZES["feature_size"], generator=generator)
    labels = torch.randint(3, SIZES["vocab_size"], (2, size, 5), generator=generator)
    counts = torch.tensor([5 - i % 3 for i in range(size)])
    return features, lengths, labels[0], counts, labels[1], counts.flip(0)
