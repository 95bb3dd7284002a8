"""Cosine similarity of pool rows to a target set (LRHP section 5), in row blocks.

Arithmetic is float64 on one block at a time: a row gets the same score, to the last digits that ties are judged by,
wherever it stands in the pool, and the pool may be as large as memory holds it.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from eagleray.models.selection.rows import Rows, SelectionError, check_same_width, dense_block, spans, unit

Aggregate = Literal["mean", "max", "topk_mean", "centroid"]

_BLOCK_ROWS = 8192
_BLOCK_VALUES = 2**24
"""Entries of the similarity matrix that are held at a time."""


def cosine_scores(
    pool: Rows,
    target: Rows,
    *,
    aggregate: Aggregate = "mean",
    top: int = 10,
    centre_D: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """How similar each row of the pool is to the target set; higher is more similar.

    Args:
        pool: Features [N, D].
        target: Features [M, D].
        aggregate: `mean` of the cosines with all targets, their `max`, `topk_mean` of the `top` largest, or the cosine
            with the mean direction of the targets (`centroid`), which ranks like `mean`.
        top: How many, for `topk_mean`; all, where there are fewer targets.
        centre_D: Subtracted from every row of both sides first, e.g. `rows.mean_row(pool)`: hidden states of language
            models share one large direction.
        device: Where to compute.

    Returns:
        Scores [N], float64.

    Raises:
        SelectionError: Pool and target differ in width, or the targets of a centroid cancel out.
    """
    check_same_width(pool, target)
    centre = None if centre_D is None else centre_D.to(device=device, dtype=torch.float64)
    goal_MD = _unit_block(target, 0, target.shape[0], centre, device)
    scores = np.empty(pool.shape[0])
    if aggregate in ("mean", "centroid"):
        direction = goal_MD.mean(dim=0)
        if aggregate == "centroid":
            if direction.norm() < 1e-12:
                raise SelectionError("The targets cancel out, so they have no centroid; use `mean` or `max`.")
            direction = direction / direction.norm()
        for start, stop in spans(pool.shape[0], _BLOCK_ROWS):
            scores[start:stop] = (_unit_block(pool, start, stop, centre, device) @ direction).cpu().numpy()
        return scores
    for start, stop in spans(pool.shape[0], _rows_of_a_block(target.shape[0])):
        similarity_BM = _unit_block(pool, start, stop, centre, device) @ goal_MD.T
        if aggregate == "max":
            found = similarity_BM.amax(dim=1)
        else:
            found = similarity_BM.topk(min(top, target.shape[0]), dim=1).values.mean(dim=1)
        scores[start:stop] = found.cpu().numpy()
    return scores


def nearest_targets(
    pool: Rows,
    target: Rows,
    *,
    centre_D: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Number of the most similar target of each row of the pool [N]; the first of equals."""
    centre = None if centre_D is None else centre_D.to(device=device, dtype=torch.float64)
    goal_MD = _unit_block(target, 0, target.shape[0], centre, device)
    nearest = np.empty(pool.shape[0], dtype=int)
    for start, stop in spans(pool.shape[0], _rows_of_a_block(target.shape[0])):
        similarity_BM = _unit_block(pool, start, stop, centre, device) @ goal_MD.T
        nearest[start:stop] = similarity_BM.argmax(dim=1).cpu().numpy()
    return nearest


def _rows_of_a_block(targets: int) -> int:
    return max(1, min(_BLOCK_ROWS, _BLOCK_VALUES // targets))


def _unit_block(
    rows: Rows, start: int, stop: int, centre: torch.Tensor | None, device: torch.device | str
) -> torch.Tensor:
    block = dense_block(rows, start, stop, dtype=torch.float64, device=device)
    return unit(block if centre is None else block - centre)
