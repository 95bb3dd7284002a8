"""The best CTC path of a label sequence, for a whole batch on any device; and the frames of each label.

The usual Viterbi recursion steps through the frames. This one steps through the *labels* and does all frames at once:
subtract the blank's log-probability from every frame (which changes no comparison of paths), and a label with
cumulative score R that may be entered at frame t from a best predecessor c[t − 1] has

    best[t] = R[t] + max over t' <= t of (c[t' − 1] − R[t' − 1]),

a running maximum. For blanks R = 0, so c is a running maximum of the label before, too. That is four array operations
a label and none a frame. A path entered a label where its running maximum was reached, which is where it begins to
be constant.

Only the scores of a clip's own labels are needed, a few per cent of the vocabulary or less. They are gathered on the
device and the recursion runs on the host, in float64: its operations are so small that starting them on a GPU, or
going through torch's dispatcher, takes longer than computing them.

Ties prefer to stay, then one step, then the skip over a blank; at the end the last label over the last blank.

Shapes: B clips, S frames, V tokens, U labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eagleray.models.nast.subsampler import keep_mask

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
    device, size = log_probs_BSV.device, log_probs_BSV.shape[1]
    index_BN = F.pad(targets_BU.long(), (1, 0), value=blank_id)
    gathered = log_probs_BSV.gather(2, index_BN[:, None].expand(-1, size, -1)).permute(2, 0, 1)
    scores_NBS = gathered.to("cpu", torch.float64).contiguous().numpy()
    np.maximum(scores_NBS, FLOOR, out=scores_NBS)
    index = index_BN.cpu().numpy()
    equal_UB = np.zeros_like(index[:, 1:].T, dtype=bool)
    equal_UB[1:] = index[:, 2:].T == index[:, 1:-1].T
    blank_BS, grid = scores_NBS[0], _forward(scores_NBS[1:] - scores_NBS[0], equal_UB)

    # Flat memory views give single numbers several times faster than arrays do.
    views = _Grid(*(array.reshape(-1).data for array in grid))
    states = np.zeros(blank_BS.shape, dtype=np.int64)
    totals = np.empty(len(states))
    equal = equal_UB.T.tolist()
    for clip, (length, count) in enumerate(zip(lengths_B.tolist(), target_lengths_B.tolist(), strict=True)):
        totals[clip] = blank_BS[clip, :length].sum()
        if count:
            path, relative = _backtrack(views, blank_BS.shape, clip, length, count, equal[clip])
            states[clip, : len(path)] = path
            totals[clip] += relative
    # Column 0 of the index is the blank, which even states stand for.
    labels = index[np.arange(len(states))[:, None], (states + 1 >> 1) * (states & 1)]
    labels_BS, states_BS, score_B = (torch.from_numpy(found).to(device) for found in (labels, states, totals))
    return Alignment(labels_BS, states_BS, score_B, score_B > -torch.inf)


class _Grid(NamedTuple):
    """Best scores relative to blanks, [U, B, ...]; arrays, or memory views of them."""

    label: Any
    """Of paths that end in label u at frame t: [U, B, S]."""
    entry: Any
    """Maximum over the entries to label u up to t: [U, B, S]."""
    best: Any
    """Maximum of `label` up to t, at index t + 2, so that earlier frames are shifts: [U, B, S + 2]."""


def _forward(relative_UBS: np.ndarray, equal_UB: np.ndarray) -> _Grid:
    labels, batch, size = relative_UBS.shape
    total = np.zeros((labels, batch, size + 1))
    np.cumsum(relative_UBS, axis=2, out=total[:, :, 1:])
    label, entry = np.empty_like(relative_UBS), np.empty_like(relative_UBS)
    best = np.full((labels, batch, size + 2), -np.inf)
    some_equal = np.logical_or.reduce(equal_UB, axis=1).tolist()
    previous = delayed = np.zeros((batch, size))  # the blank before the first label
    # Views of all labels at once: sliced one by one they would take a third of the time.
    shifts = (best[:, :, 2:], best[:, :, 1:-1], best[:, :, :-2])
    rows = zip(total[:, :, :-1], total[:, :, 1:], entry, label, *shifts, strict=True)
    for u, (before_BS, after_BS, entry_BS, label_BS, upto_0, upto_1, upto_2) in enumerate(rows):
        if some_equal[u]:
            # From the label before, or from the blank between; only from the blank if the two labels are equal.
            previous = np.where(equal_UB[u, :, None], delayed, previous)
        np.maximum.accumulate(previous - before_BS, axis=1, out=entry_BS)
        np.add(entry_BS, after_BS, out=label_BS)
        np.maximum.accumulate(label_BS, axis=1, out=upto_0)
        previous, delayed = upto_1, upto_2
    return _Grid(label, entry, best)


def _backtrack(
    grid: _Grid, shape: tuple[int, ...], clip: int, length: int, count: int, equal: list[bool]
) -> tuple[np.ndarray, float]:
    """States of one clip with at least one label, and its score relative to blanks; no states if it has no path."""
    label, entry, best = grid
    batch, size = shape
    u, last = count, length - 1  # in label u or in the blank before it, whose last frame is this one
    # Offsets of the rows of label u − 1.
    row, best_row = ((count - 1) * batch + clip) * size, ((count - 1) * batch + clip) * (size + 2)
    step, best_step = batch * size, batch * (size + 2)
    score = best[best_row + last + 1]
    in_label = label[row + last] >= score
    if in_label:
        score = label[row + last]
        u, row, best_row = u - 1, row - step, best_row - best_step
    if score == -np.inf:
        return np.empty(0), score
    states: list[int] = []
    durations: list[int] = []
    while True:
        states.append(2 * u + in_label)
        if in_label:
            start = row + step
            at = start + last
            value = entry[at]
            while at > start and entry[at - 1] == value:  # staying wins ties: the earliest entry
                at -= 1
            durations.append(last + 1 - (at - start))
            last = at - start - 1
            if u and not equal[u] and label[row + last] > best[best_row + last + 1]:
                u, row, best_row = u - 1, row - step, best_row - best_step
            else:
                in_label = False
        elif u == 0:
            durations.append(last + 1)
            break
        else:
            at = best_row + last + 1
            value = best[at]
            while best[at - 1] == value:  # two impossible entries stand before the first frame
                at -= 1
            durations.append(last + 2 - (at - best_row))
            last = at - best_row - 2
            u, row, best_row, in_label = u - 1, row - step, best_row - best_step, True
    return np.repeat(states[::-1], durations[::-1]), score
