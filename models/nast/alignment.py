"""The best CTC path of a label sequence, for a whole batch, on CPU and GPU; and time stamps from it.

The usual Viterbi recursion steps through the frames. This one steps through the *labels* and does all frames at once:
subtract the blank's log-probability from every frame (which changes no comparison of paths), and a label with
cumulative score R that may be entered at frame t from a best predecessor c[t − 1] has

    best[t] = R[t] + max over t' <= t of (c[t' − 1] − R[t' − 1]),

a running maximum. For blanks R = 0, so c is a running maximum of the label before, too. That is four tensor operations
a label and none a frame. A running maximum also says *when* a path entered a label, so the way back, on the host, jumps
from label to label.

Ties prefer to stay, then one step, then the skip over a blank; at the end the last label over the last blank.

Shapes: B clips, S frames, V tokens, U labels. Arrays of the recursion are [U, S, B], so that each slice is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from eagleray.models.nast.subsampler import keep_mask

Array = TypeVar("Array")

# Log-probabilities below this count as this; it keeps cumulative sums finite and exact enough.
FLOOR = -1e4


class Span(NamedTuple):
    """Frames that a label occupies, `end` excluded."""

    start: int
    end: int


@dataclass(frozen=True)
class Alignment:
    """Best paths of a batch."""

    labels_BS: Tensor
    """Label of each frame, the blank in padding and where there is no path; int64."""
    states_BS: Tensor
    """State of each frame: 2u is the blank before label u, 2u + 1 label u; 0 in padding; int64."""
    score_B: Tensor
    """Log-probability of the path, −inf where there is none; float64."""
    feasible_B: Tensor
    """Whether there is a path: frames >= labels + equal neighbours."""

    def spans(self, clip: int) -> list[Span]:
        """Frames of each label of one clip; empty if there is no path."""
        states = self.states_BS[clip].cpu().numpy()
        frames = np.flatnonzero(states % 2)
        starts = frames[np.diff(states[frames], prepend=-1) != 0]
        ends = frames[np.diff(states[frames], append=-1) != 0] + 1
        return [Span(int(start), int(end)) for start, end in zip(starts, ends, strict=True)]


def required_frames(targets_BU: Tensor, target_lengths_B: Tensor) -> Tensor:
    """Frames [B] that CTC needs: one a label and one more between equal neighbours."""
    inside = keep_mask(target_lengths_B, targets_BU.shape[1])
    repeats_B = ((targets_BU[:, 1:] == targets_BU[:, :-1]) & inside[:, 1:]).sum(1)
    return target_lengths_B + repeats_B


@torch.no_grad()
def align(
    log_probs_BSV: Tensor,
    lengths_B: Tensor,
    targets_BU: Tensor,
    target_lengths_B: Tensor,
    *,
    blank_id: int = 0,
) -> Alignment:
    """Best CTC path of each target.

    Args:
        log_probs_BSV: Log-probabilities. Logits give the same paths, with a score that is no log-probability.
        lengths_B: Frames of each clip, int.
        targets_BU: Labels without blanks, int; beyond its length anything in the vocabulary.
        target_lengths_B: Labels of each clip, int, may be 0.
        blank_id: The blank.
    """
    targets_BU = targets_BU.long()
    size, labels = log_probs_BSV.shape[1], targets_BU.shape[1]
    blank_SB = log_probs_BSV[:, :, blank_id].T.double().clamp(min=FLOOR)
    index = targets_BU[:, None].expand(-1, size, -1)
    relative_USB = log_probs_BSV.gather(2, index).permute(2, 1, 0).double()
    relative_USB = relative_USB.clamp_(min=FLOOR).sub_(blank_SB)
    grid = _forward(relative_USB, targets_BU)

    # Memory views give single numbers faster than arrays do.
    host = _Grid(*(tensor.cpu().numpy().data for tensor in grid))
    repeats = _equal_neighbours(targets_BU).tolist()
    states = np.zeros((len(targets_BU), size), dtype=np.int64)
    scores = np.zeros(len(states))
    for clip, (length, count) in enumerate(zip(lengths_B.tolist(), target_lengths_B.tolist(), strict=True)):
        if count:
            path, scores[clip] = _backtrack(host, clip, length, count, repeats[clip])
            states[clip, : len(path)] = path
    states_BS = torch.from_numpy(states).to(log_probs_BSV.device)
    score_B = torch.from_numpy(scores).to(log_probs_BSV.device)
    score_B += (blank_SB.T * keep_mask(lengths_B, size)).sum(1)
    labels_BS = torch.full_like(states_BS, blank_id)
    if labels:
        chosen = targets_BU.gather(1, (states_BS // 2).clamp_(max=labels - 1))
        labels_BS = torch.where(states_BS % 2 == 1, chosen, labels_BS)
    return Alignment(labels_BS, states_BS, score_B, score_B > -torch.inf)


class _Grid(NamedTuple, Generic[Array]):
    """Best scores relative to blanks, and where running maxima were reached (at the last frame of several that tie)."""

    label: Array
    """Of paths that end in label u at frame t: [U, S, B]."""
    entry: Array
    """Maximum over the entries to label u up to t: [U, S, B]."""
    entry_at: Array
    """Where it was reached: [U, S, B]."""
    best: Array
    """Maximum of `label` up to t, at index t + 2, so that earlier frames are shifts: [U, S + 2, B]."""
    best_at: Array
    """Where it was reached: [U, S, B]."""


def _forward(relative_USB: Tensor, targets_BU: Tensor) -> _Grid[Tensor]:
    labels, size, batch = relative_USB.shape
    total = relative_USB.new_zeros(labels, size + 1, batch)
    torch.cumsum(relative_USB, dim=1, out=total[:, 1:])
    best = relative_USB.new_full((labels, size + 2, batch), -torch.inf)
    label, entry = torch.empty_like(relative_USB), torch.empty_like(relative_USB)
    entry_at, best_at = (torch.empty(relative_USB.shape, dtype=torch.long, device=label.device) for _ in "ab")
    equal_UB = _equal_neighbours(targets_BU).T
    some_equal = equal_UB.any(1).tolist()
    # All views at once: making them one by one would take as long as the computation.
    before, after = total[:, :-1].unbind(), total[:, 1:].unbind()
    upto_t, upto_1, upto_2 = best[:, 2:].unbind(), best[:, 1:-1].unbind(), best[:, :-2].unbind()
    entries, entries_at, in_label, best_ats = (x.unbind() for x in (entry, entry_at, label, best_at))
    for u in range(labels):
        if u == 0:
            source = before[0].neg()
        else:
            # From the label before, or from the blank between; only from the blank if the two labels are equal.
            source = (
                torch.where(equal_UB[u], upto_2[u - 1], upto_1[u - 1]) if some_equal[u] else upto_1[u - 1]
            )
            source = source - before[u]
        torch.cummax(source, dim=0, out=(entries[u], entries_at[u]))
        torch.add(entries[u], after[u], out=in_label[u])
        torch.cummax(in_label[u], dim=0, out=(upto_t[u], best_ats[u]))
    return _Grid(label, entry, entry_at, best, best_at)


def _backtrack(
    grid: _Grid[memoryview], clip: int, length: int, count: int, repeats: list[bool]
) -> tuple[np.ndarray, float]:
    """States of one clip with at least one label, and its score relative to blanks; no states if it has no path."""
    label, entry, entry_at, best, best_at = grid
    u, last = count, length - 1  # in label u or in the blank before it, whose last frame is this one
    score = best[u - 1, last + 1, clip]
    in_label = label[u - 1, last, clip] >= score
    if in_label:
        u -= 1
        score = label[u, last, clip]
    if score == -np.inf:
        return np.empty(0), score
    states: list[int] = []
    durations: list[int] = []
    while True:
        states.append(2 * u + in_label)
        if in_label:
            first, value = entry_at[u, last, clip], entry[u, last, clip]
            while first and entry[u, first - 1, clip] == value:  # staying wins ties: the earliest entry
                first -= 1
            durations.append(last + 1 - first)
            last = first - 1
            skips = u and not repeats[u] and label[u - 1, last, clip] > best[u - 1, last + 1, clip]
            if skips:
                u -= 1
            else:
                in_label = False
        elif u == 0:
            durations.append(last + 1)
            break
        else:
            u -= 1
            before, value = best_at[u, last - 1, clip], best[u, last + 1, clip]
            while before and best[u, before + 1, clip] == value:
                before -= 1
            durations.append(last - before)
            last, in_label = before, True
    return np.repeat(states[::-1], durations[::-1]), score


def _equal_neighbours(targets_BU: Tensor) -> Tensor:
    """Whether each label [B, U] equals the one before it."""
    equal = torch.zeros_like(targets_BU, dtype=torch.bool)
    equal[:, 1:] = targets_BU[:, 1:] == targets_BU[:, :-1]
    return equal
