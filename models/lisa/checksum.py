"""A checksum of the weights that conversion leaves alone, so that added weights never meet another base."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from eagleray.models.lisa.distill import is_lisa_parameter


def base_checksum(model: Any) -> str:
    """SHA-256 over the names, types, shapes and bytes of a converted model's weights, the added ones left out."""
    return tensor_checksum((n, p) for n, p in model.named_parameters() if not is_lisa_parameter(n))


def tensor_checksum(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over named tensors in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
