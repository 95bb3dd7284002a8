"""Costs between pool and target rows, given as a matrix or computed from features one block of rows at a time."""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
import torch

from eagleray.models.selection.rows import (
    Rows,
    SelectionError,
    check_same_width,
    dense_block,
    mean_row,
    spans,
    unit,
)

CostKind = Literal["cosine", "sqeuclid"]


class Cost(Protocol):
    """A matrix C_NM of finite costs >= 0 that need not exist as a whole."""

    shape: tuple[int, int]
    device: torch.device
    largest: float
    """No entry is larger."""

    def block(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows `start` to `stop` [B, M], a tensor of the caller's own."""
        ...

    def mean(self) -> float:
        """Mean of all entries."""
        ...

    def part(self, start: int, stop: int) -> Cost:
        """The cost of these rows alone."""
        ...


class MatrixCost:
    """A cost matrix in memory."""

    def __init__(self, matrix_NM: torch.Tensor | np.ndarray) -> None:
        """Take the matrix.

        Raises:
            SelectionError: It is not two-dimensional, or an entry is not finite or is negative.
        """
        matrix = torch.as_tensor(matrix_NM)
        if matrix.dim() != 2 or not matrix.numel():
            raise SelectionError(
                f"A cost matrix has two dimensions and entries, not shape {tuple(matrix.shape)}."
            )
        if not bool(torch.isfinite(matrix).all()):
            raise SelectionError("The cost matrix holds NaN or infinite entries; costs must be finite.")
        if float(matrix.min()) < 0:
            raise SelectionError(
                f"The cost matrix holds {float(matrix.min()):g}; costs must not be negative."
            )
        self.matrix = matrix
        self.shape = (matrix.shape[0], matrix.shape[1])
        self.device = matrix.device
        self.largest = float(matrix.max())

    def block(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        return self.matrix[start:stop].to(dtype, copy=True)

    def mean(self) -> float:
        return float(self.matrix.double().mean())

    def part(self, start: int, stop: int) -> MatrixCost:
        return MatrixCost(self.matrix[start:stop])


class FeatureCost:
    """`cosine`: 1 - cos(x_i, y_j), in [0, 2]. `sqeuclid`: |x_i - y_j|^2, on unit rows twice the cosine cost.

    Args:
        pool: Features [N, D].
        target: Features [M, D]; they are held densely.
        kind: Which cost.
        device: Where blocks are computed.
    """

    def __init__(
        self,
        pool: Rows,
        target: Rows,
        kind: CostKind = "cosine",
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        check_same_width(pool, target)
        self.kind: CostKind = kind
        self.device = torch.device(device)
        self.shape = (pool.shape[0], target.shape[0])
        self._pool, self._target = pool, target
        self._dense: dict[torch.dtype, torch.Tensor] = {}
        self.largest = 2.0 if kind == "cosine" else (_longest(pool) + _longest(target)) ** 2

    def block(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        rows = dense_block(self._pool, start, stop, dtype=dtype, device=self.device)
        if dtype not in self._dense:
            goal = dense_block(self._target, 0, self.shape[1], dtype=dtype, device=self.device)
            self._dense[dtype] = unit(goal) if self.kind == "cosine" else goal
        goal = self._dense[dtype]
        if self.kind == "cosine":
            return (unit(rows) @ goal.T).neg_().add_(1).clamp_(min=0)
        products = (rows @ goal.T).mul_(-2)
        return products.add_(rows.square().sum(1)[:, None]).add_(goal.square().sum(1)).clamp_(min=0)

    def mean(self) -> float:
        if self.kind == "cosine":
            return float(1 - mean_row(self._pool, scaled=True) @ mean_row(self._target, scaled=True))
        between = 2 * float(mean_row(self._pool) @ mean_row(self._target))
        return _mean_square(self._pool) + _mean_square(self._target) - between

    def part(self, start: int, stop: int) -> FeatureCost:
        return FeatureCost(self._pool[start:stop], self._target, self.kind, device=self.device)


def _longest(rows: Rows) -> float:
    return max(
        float(dense_block(rows, start, stop, dtype=torch.float64).norm(dim=1).max())
        for start, stop in spans(rows.shape[0], 8192)
    )


def _mean_square(rows: Rows) -> float:
    squares = (
        float(dense_block(rows, start, stop, dtype=torch.float64).square().sum())
        for start, stop in spans(rows.shape[0], 8192)
    )
    return sum(squares) / rows.shape[0]
