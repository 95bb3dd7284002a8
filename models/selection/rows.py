"""Feature rows: what every selection checks of them, and how they are read in blocks.

Rows are a tensor, a NumPy array or a SciPy sparse matrix (TF-IDF) of shape [N, D]; whatever they are, arithmetic sees
dense blocks of them in the type and on the device that it asks for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from scipy import sparse

Rows = Any
"""`torch.Tensor`, `numpy.ndarray` or `scipy.sparse.csr_matrix`, two-dimensional."""

_SHOWN = 5
_CHECK_ROWS = 65_536


class SelectionError(ValueError):
    """Data that nothing can be selected from; the message names the rows and says what to do."""


def check_rows(rows: Rows, ids: Sequence[str], what: str) -> None:
    """Refuse features that would spoil a selection.

    Args:
        rows: Features [N, D].
        ids: Name of each row.
        what: What the rows are, for messages: `pool` or `target`.

    Raises:
        SelectionError: There is none, there are not as many ids as rows, an id occurs twice, or a value is not finite.
    """
    if len(rows.shape) != 2 or not rows.shape[0] or not rows.shape[1]:
        raise SelectionError(
            f"The {what} has features of shape {tuple(rows.shape)}; they must be [rows, width] with at least one of each."
        )
    if rows.shape[0] != len(ids):
        raise SelectionError(f"The {what} has {rows.shape[0]} feature rows and {len(ids)} ids.")
    check_ids(ids, what)
    broken: list[str] = []
    for start, stop in spans(rows.shape[0], _CHECK_ROWS):
        block = rows[start:stop]
        if sparse.issparse(block):
            fine = np.ones(stop - start, dtype=bool)
            fine[block.nonzero()[0][~np.isfinite(block.data)]] = False
        else:
            values = block.detach().float().cpu().numpy() if isinstance(block, torch.Tensor) else block
            fine = np.isfinite(values).all(axis=1)
        broken += [ids[start + int(i)] for i in np.flatnonzero(~fine)]
    if broken:
        raise SelectionError(f"The {what} has features that are not finite numbers: {shown(broken)}.")


def check_ids(ids: Sequence[str], what: str) -> None:
    """Refuse ids that occur more than once.

    Raises:
        SelectionError: With the ids.
    """
    if len(set(ids)) == len(ids):
        return
    seen: set[str] = set()
    twice = sorted({name for name in ids if name in seen or seen.add(name)})
    raise SelectionError(f"The {what} has ids that occur more than once: {shown(twice)}. Ids must be unique.")


def check_same_width(pool: Rows, target: Rows) -> None:
    """Refuse features of two kinds.

    Raises:
        SelectionError: Pool and target have rows of different width.
    """
    if pool.shape[1] != target.shape[1]:
        raise SelectionError(
            f"Features of the pool have width {pool.shape[1]} and those of the target {target.shape[1]}; "
            "both must come from the same model and the same settings."
        )


def check_disjoint(
    pool: Sequence[str], pool_ids: Sequence[str], other: Sequence[str], other_ids: Sequence[str], *, what: str
) -> None:
    """Refuse a pool that shares prompts with another set, case and punctuation aside.

    Args:
        pool: Prompt of each row of the pool.
        pool_ids: Id of each row of the pool.
        other: Prompts that the pool may not hold.
        other_ids: Their ids.
        what: What the other set is, for the message, e.g. `target`.

    Raises:
        SelectionError: With the ids of both sides.
    """
    names = {prompt_key(prompt): name for prompt, name in zip(other, other_ids, strict=True)}
    shared = [f"{pool_ids[row]} (= {names[prompt_key(pool[row])]})" for row in overlapping(pool, other)]
    if shared:
        raise SelectionError(
            f"{len(shared)} row(s) of the pool have a prompt that the {what} has too: {shown(shared)}. "
            "Take them out of the pool; what is selected with or tested on must not be selected."
        )


def overlapping(pool: Sequence[str], other: Sequence[str]) -> list[int]:
    """Numbers of the prompts in `pool` that are in `other` too, case and punctuation aside."""
    known = {prompt_key(prompt) for prompt in other}
    return [row for row, prompt in enumerate(pool) if prompt_key(prompt) in known]


def prompt_key(prompt: str) -> str:
    """What makes two prompts the same: their words, case and punctuation aside."""
    return re.sub(r"\W+", " ", prompt.lower()).strip()


def spans(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Start and stop of consecutive blocks of at most `size` rows.

    >>> list(spans(5, 2))
    [(0, 2), (2, 4), (4, 5)]
    """
    for start in range(0, count, size):
        yield start, min(start + size, count)


def dense_block(
    rows: Rows, start: int, stop: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Rows `start` to `stop` as a dense tensor."""
    block = rows[start:stop]
    if isinstance(block, torch.Tensor):
        return block.detach().to(device=device, dtype=dtype)
    if sparse.issparse(block):
        block = block.toarray()
    # A copy, because arrays that come from another process are read-only, which tensors cannot be.
    return torch.from_numpy(np.array(block)).to(device=device, dtype=dtype)


def unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows scaled to length 1; a zero row stays zero, so it is similar to nothing."""
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)


def mean_row(rows: Rows, *, scaled: bool = False, block_rows: int = 8192) -> torch.Tensor:
    """Mean of the rows [D] in float64; `scaled`: of the rows scaled to length 1."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for start, stop in spans(rows.shape[0], block_rows):
        block = dense_block(rows, start, stop, dtype=torch.float64)
        total += (unit(block) if scaled else block).sum(dim=0)
    return total / rows.shape[0]


def shown(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
