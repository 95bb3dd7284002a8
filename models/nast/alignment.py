"""The best CTC path of a label sequence, for a whole batch, on CPU and GPU; and time stamps from it.

The usual Viterbi recursion steps through the frames. This one steps through the *labels* and does all frames at once:
subtract the blank's log-probability from every frame (which changes no comparison of paths), and a label with
cumulative score R that may be entered at frame t from a best predecessor c[t − 1] has

    best[t] = R[t] + max over t' <= t of (c[t' − 1] − R[t' − 1]),

a running maximum; for blanks R = 0. That is five tensor operations a label and no operation a frame. The running
maximum also says *when* the path entered each label, so the way back jumps from label to label, on the host.

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

    host = _Grid(*(tensor.cpu().numpy() for tensor in grid))
    lengths, counts = lengths_B.tolist(), target_lengths_B.tolist()
    repeats = _equal_neighbours(targets_BU).cpu().numpy()
    states = np.zeros((len(lengths), size), dtype=np.int64)
    scores = np.array(
        [
            _backtrack(host, clip, length, count, repeats[clip], states[clip])
            for clip, (length, count) in enumerate(zip(lengths, counts, strict=True))
        ]
    )
    states_BS = torch.from_numpy(states).to(log_probs_BSV.device)
    score_B = torch.from_numpy(scores).to(log_probs_BSV.device)
    score_B += (blank_SB.T * keep_mask(lengths_B, size)).sum(1)
    labels_BS = torch.full_like(states_BS, blank_id)
    if labels:
        chosen = targets_BU.gather(1, (states_BS // 2).clamp_(max=labels - 1))
        labels_BS = torch.where(states_BS % 2 == 1, chosen, labels_BS)
    return Alignment(labels_BS, states_BS, score_B, score_B > -torch.inf)


class _Grid(NamedTuple, Generic[Array]):
    """Best scores relative to blanks; index 0 of the second axis is the time before the first frame."""

    label: Array
    """Ends in label u: [U, S + 1, B]."""
    blank: Array
    """Ends in the blank before label u: [U + 1, S + 1, B]."""
    label_entry: Array
    """A frame at which the best path ending in label u entered it, the last if several tie: [U, S, B]."""
    blank_entry: Array
    """The same for blanks: [U + 1, S, B]."""
    label_run: Array
    """The running maxima behind `label_entry`: [U, S, B]."""


def _forward(relative_USB: Tensor, targets_BU: Tensor) -> _Grid[Tensor]:
    labels, size, batch = relative_USB.shape
    total = relative_USB.new_zeros(labels, size + 1, batch)
    torch.cumsum(relative_USB, dim=1, out=total[:, 1:])
    label = relative_USB.new_full((labels, size + 1, batch), -torch.inf)
    blank = relative_USB.new_full((labels + 1, size + 1, batch), -torch.inf)
    blank[0] = 0.0
    run = relative_USB.new_empty(labels, size, batch)
    label_entry = torch.empty(labels, size, batch, dtype=torch.long, device=run.device)
    blank_entry = torch.zeros(labels + 1, size, batch, dtype=torch.long, device=run.device)
    equal_UB = _equal_neighbours(targets_BU).T
    some_equal = equal_UB.any(1).tolist()
    for u in range(labels):
        source = blank[u, :-1]
        if u:
            skip = label[u - 1, :-1]
            if some_equal[u]:
                skip = skip.masked_fill(equal_UB[u], -torch.inf)
            source = torch.maximum(source, skip)
        source = source - total[u, :-1]
        torch.cummax(source, dim=0, out=(run[u], label_entry[u]))
        torch.add(run[u], total[u, 1:], out=label[u, 1:])
        torch.cummax(label[u, :-1], dim=0, out=(blank[u + 1, 1:], blank_entry[u + 1]))
    return _Grid(label, blank, label_entry, blank_entry, run)


def _backtrack(
    grid: _Grid[np.ndarray], clip: int, length: int, count: int, repeats: np.ndarray, states: np.ndarray
) -> float:
    """Fill the states of one clip from its end and return its score relative to blanks."""
    label, blank = grid.label[:, :, clip], grid.blank[:, :, clip]
    score = blank[count, length]
    in_label = count > 0 and label[count - 1, length] >= score
    if in_label:
        score = label[count - 1, length]
    if score == -np.inf:
        return -np.inf
    u, last = (count - 1 if in_label else count), length - 1  # label or blank u, and its last frame
    while u or in_label:
        run = grid.label_run[u, :, clip] if in_label else blank[u, 1:]
        first = (grid.label_entry if in_label else grid.blank_entry)[u, last, clip]
        while first and run[first - 1] == run[last]:  # staying wins ties, so the earliest entry is the one
            first -= 1
        states[first : last + 1] = 2 * u + in_label
        last = first - 1
        if not in_label:
            u, in_label = u - 1, True
        elif u and not repeats[u] and label[u - 1, first] > blank[u, first]:
            u -= 1
        else:
            in_label = False
        if last < 0:
            break
    return float(score)


def _equal_neighbours(targets_BU: Tensor) -> Tensor:
    """Whether each label [B, U] equals the one before it."""
    equal = torch.zeros_like(targets_BU, dtype=torch.bool)
    equal[:, 1:] = targets_BU[:, 1:] == targets_BU[:, :-1]
    return equal
