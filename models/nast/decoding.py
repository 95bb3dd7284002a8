"""From CTC logits to token ids: greedy, prefix beam search, rescoring, and time stamps.

The beam search sums over all paths of a prefix (spec 9). All clips and beams are one batch; a frame costs a fixed number
of small tensor operations. A prefix is known by a 64-bit rolling hash, so that an extension that equals another beam
is found by comparison of numbers, and its tokens are read off back-pointers at the end.

Shapes: B clips, S frames, V vocabulary, W beams, K candidate tokens a frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from eagleray.models.nast.subsampler import keep_mask

# An odd multiplier: hash(prefix + token) = hash(prefix) * this + token, modulo 2^64.
_MULTIPLIER = 6364136223846793005


class Hypothesis(NamedTuple):
    """A translation with the score that ranks it, and its log-probability without length or language model terms."""

    tokens: list[int]
    score: float
    log_prob: float


class LanguageModel(Protocol):
    """Anything that scores token sequences, for example `ngram.NgramModel`."""

    def log_prob(self, token: int, context: Sequence[int]) -> float:
        """Natural log-probability of a token after all tokens before it."""
        ...


def collapse(path: Sequence[int], *, blank_id: int = 0) -> list[int]:
    """Labels of a CTC path: repeats merged, then blanks dropped.

    >>> collapse([3, 0, 3, 3, 0, 2, 2])
    [3, 3, 2]
    """
    return [label for label, _ in groupby(path) if label != blank_id]


@torch.no_grad()
def greedy(logits_BSV: Tensor, lengths_B: Tensor, *, blank_id: int = 0) -> list[list[int]]:
    """Labels of the most probable path of each clip."""
    return [found.tokens for found in greedy_hypotheses(logits_BSV, lengths_B, blank_id=blank_id)]


@torch.no_grad()
def greedy_hypotheses(logits_BSV: Tensor, lengths_B: Tensor, *, blank_id: int = 0) -> list[Hypothesis]:
    """The same with scores: the log-probability of that path, Σ_t max_v log p_t(v).

    Paper: the reference sums non-blank frames only and negates the sum (spec 14, defect 4).
    """
    best_BS, path_BS = logits_BSV.max(-1)
    log_p_BS = best_BS.float() - logits_BSV.logsumexp(-1).float()
    score_B = (log_p_BS * keep_mask(lengths_B, logits_BSV.shape[1])).sum(1)
    return [
        Hypothesis(collapse(path[:length], blank_id=blank_id), score, score)
        for path, length, score in zip(path_BS.tolist(), lengths_B.tolist(), score_B.tolist(), strict=True)
    ]


@torch.inference_mode()
def prefix_beam_search(
    logits_BSV: Tensor,
    lengths_B: Tensor,
    *,
    width: int = 5,
    candidates: int = 40,
    blank_id: int = 0,
    language_model: LanguageModel | None = None,
    language_weight: float = 0.0,
    token_bonus: float = 0.0,
) -> list[list[Hypothesis]]:
    """Most probable label sequences of each clip, best first, at most `width`.

    A prefix is ranked by log P(prefix) + weight · log P_LM(prefix) + bonus · tokens.

    Args:
        logits_BSV: Logits, or log-probabilities.
        lengths_B: Frames of each clip.
        width: Prefixes kept after each frame.
        candidates: Tokens that may extend a prefix at a frame: the most probable ones.
        blank_id: The blank.
        language_model: Scores tokens in their context; of sequences without `</s>`.
        language_weight: Its weight.
        token_bonus: Added for every token; a language model alone prefers short sequences.

    Raises:
        ValueError: A number is out of range.
    """
    if width < 1 or candidates < 1:
        raise ValueError(f"`width` is {width} and `candidates` {candidates}; both must be at least 1.")
    logits_BSV = logits_BSV if logits_BSV.dtype == torch.float64 else logits_BSV.float()
    lattice = _Lattice(logits_BSV, lengths_B, candidates=candidates, blank_id=blank_id)
    beams = _Beams(lattice, width=width)
    fusion = _Fusion(language_model, language_weight, token_bonus, beams) if language_model else None
    for frame in range(int(lengths_B.max())):
        beams.step(frame, token_bonus, fusion)
    return beams.results()


class _Lattice:
    """Log-probabilities that the search reads; in padding only the blank is possible, so nothing changes there."""

    def __init__(self, logits_BSV: Tensor, lengths_B: Tensor, *, candidates: int, blank_id: int) -> None:
        vocab_size = logits_BSV.shape[2]
        total_BS = logits_BSV.logsumexp(-1)
        real_BS = keep_mask(lengths_B, logits_BSV.shape[1])
        best_BSK, self.token_BSK = logits_BSV.topk(min(candidates + 1, vocab_size), dim=-1)
        # One more than asked for, as the blank is most often among them; without it the last one is one too many.
        drop_BSK = self.token_BSK == blank_id
        if candidates < vocab_size:
            drop_BSK[..., -1] |= ~drop_BSK.any(-1)
        drop_BSK |= ~real_BS[..., None]
        self.extend_BSK = (best_BSK - total_BS[..., None]).masked_fill_(drop_BSK, -math.inf)
        blank_BS = logits_BSV[..., blank_id] - total_BS
        self.blank_BS1 = blank_BS.masked_fill_(~real_BS, 0.0)[..., None]
        self.logits_BSV = logits_BSV
        self.shift_BS1 = total_BS.masked_fill_(~real_BS, math.inf)[..., None]


class _Beams:
    """The prefixes of all clips: scores, last tokens, hashes and back-pointers."""

    def __init__(self, lattice: _Lattice, *, width: int) -> None:
        self.lattice, self.width = lattice, width
        batch, self.candidates = len(lattice.logits_BSV), lattice.token_BSK.shape[2]
        device = lattice.logits_BSV.device
        self.blank_BW = lattice.logits_BSV.new_full((batch, width), -math.inf)
        self.label_BW = self.blank_BW.clone()
        self.blank_BW[:, 0] = 0.0
        self.bonus_BW = torch.zeros_like(self.blank_BW)
        self.total_BW = self.blank_BW.clone()
        self.last_BW = torch.zeros(batch, width, dtype=torch.long, device=device)
        self.hash_BW = torch.zeros(batch, width, dtype=torch.long, device=device)
        self.parent_hash_BW = torch.full_like(self.hash_BW, -1)
        self.parents: list[Tensor] = []
        self.emitted: list[Tensor] = []

    def step(self, frame: int, token_bonus: float, fusion: _Fusion | None) -> None:
        lattice, width = self.lattice, self.width
        token_BK, extend_BK = lattice.token_BSK[:, frame], lattice.extend_BSK[:, frame]
        last_BW, total_BW = self.last_BW, self.total_BW
        again_BW = lattice.logits_BSV[:, frame].gather(1, last_BW) - lattice.shift_BS1[:, frame]
        # A beam j that is beam i plus one token also gains from i: [B, W_j, W_i].
        child_BWW = self.parent_hash_BW[:, :, None] == self.hash_BW[:, None]
        repeat_BWW = last_BW[:, :, None] == last_BW[:, None]
        gain_BWW = torch.where(repeat_BWW, self.blank_BW[:, None], total_BW[:, None])
        gain_BW = gain_BWW.masked_fill_(~child_BWW, -math.inf).amax(2)
        label_BW = torch.logaddexp(self.label_BW, gain_BW) + again_BW
        blank_BW = total_BW + lattice.blank_BS1[:, frame]
        stay_BW = torch.logaddexp(label_BW, blank_BW)
        # Extensions by a token the beam ends in need a blank between; those that are a beam already are taken out.
        same_BWK = token_BK[:, None] == last_BW[..., None]
        before_BWK = torch.where(same_BWK, self.blank_BW[..., None], total_BW[..., None])
        extend_BWK = before_BWK + extend_BK[:, None]
        taken_BWK = (child_BWW.mT[..., None] & same_BWK[:, None]).any(2)
        extend_BWK.masked_fill_(taken_BWK, -math.inf)

        if fusion is None:
            bonus_BWK = self.bonus_BW[..., None] + token_bonus if token_bonus else None
        else:
            bonus_BWK = self.bonus_BW[..., None] + fusion.gains(token_BK, extend_BWK)
        new_BN = torch.cat([stay_BW, extend_BWK.flatten(1)], dim=1)
        if bonus_BWK is None:
            new_BW, choice_BW = new_BN.topk(width, dim=1)
        else:
            bonus_BWK = bonus_BWK.expand_as(extend_BWK)
            bonus_BN = torch.cat([self.bonus_BW, bonus_BWK.flatten(1)], dim=1)
            choice_BW = (new_BN + bonus_BN).topk(width, dim=1).indices
            new_BW, self.bonus_BW = new_BN.gather(1, choice_BW), bonus_BN.gather(1, choice_BW)
        self._choose(new_BW, choice_BW, token_BK, blank_BW, label_BW)
        if fusion is not None:
            fusion.follow(self.parents[-1], self.emitted[-1])

    def _choose(
        self, new_BW: Tensor, choice_BW: Tensor, token_BK: Tensor, blank_BW: Tensor, label_BW: Tensor
    ) -> None:
        """Make the chosen ones (the first `width` are those that stay) the new beams."""
        stays_BW = choice_BW < self.width
        extension_BW = (choice_BW - self.width).clamp_(min=0)
        parent_BW = torch.where(stays_BW, choice_BW, extension_BW // self.candidates)
        token_BW = token_BK.gather(1, extension_BW % self.candidates)
        old_hash_BW = self.hash_BW.gather(1, parent_BW)
        # What is chosen for want of better and impossible may equal a real beam; it is nobody's child.
        self.parent_hash_BW = torch.where(
            stays_BW, self.parent_hash_BW.gather(1, parent_BW), old_hash_BW
        ).masked_fill_(new_BW == -math.inf, -1)
        self.hash_BW = torch.where(stays_BW, old_hash_BW, old_hash_BW * _MULTIPLIER + token_BW + 1)
        self.last_BW = torch.where(stays_BW, self.last_BW.gather(1, parent_BW), token_BW)
        self.blank_BW = blank_BW.gather(1, parent_BW).masked_fill_(~stays_BW, -math.inf)
        self.label_BW = torch.where(stays_BW, label_BW.gather(1, parent_BW), new_BW)
        self.total_BW = new_BW
        self.parents.append(parent_BW)
        self.emitted.append(torch.where(stays_BW, -1, token_BW))

    def results(self) -> list[list[Hypothesis]]:
        """Tokens by back-pointers, best first."""
        parents = torch.stack(self.parents).cpu().numpy()
        emitted = torch.stack(self.emitted).cpu().numpy()
        tokens = _trace(parents, emitted)
        scores, totals = (self.total_BW + self.bonus_BW).tolist(), self.total_BW.tolist()
        return [
            [Hypothesis(*found) for found in zip(*columns, strict=True) if found[1] > -math.inf]
            for columns in zip(tokens, scores, totals, strict=True)
        ]


class _Fusion:
    """Language model scores of extensions, for prefixes that are still alive; one query a prefix and token."""

    def __init__(self, model: LanguageModel, weight: float, token_bonus: float, beams: _Beams) -> None:
        batch, width = beams.total_BW.shape
        self.model, self.weight, self.token_bonus = model, weight, token_bonus
        self.prefixes: list[list[tuple[int, ...]]] = [[()] * width for _ in range(batch)]

    def gains(self, token_BK: Tensor, extend_BWK: Tensor) -> Tensor:
        """weight · log P(token after prefix) + bonus, [B, W, K]; 0 where the extension is impossible."""
        gains = np.zeros(tuple(extend_BWK.shape))
        possible, tokens = extend_BWK.isfinite().cpu().numpy(), token_BK.tolist()
        for b, w, k in zip(*possible.nonzero(), strict=True):
            log_p = self.model.log_prob(tokens[b][k], self.prefixes[b][w])
            gains[b, w, k] = self.weight * log_p + self.token_bonus
        return torch.from_numpy(gains).to(extend_BWK)

    def follow(self, parent_BW: Tensor, emitted_BW: Tensor) -> None:
        """Update the prefixes after a frame."""
        self.prefixes = [
            [old[p] if token < 0 else (*old[p], token) for p, token in zip(parents, tokens, strict=True)]
            for old, parents, tokens in zip(
                self.prefixes, parent_BW.tolist(), emitted_BW.tolist(), strict=True
            )
        ]


def _trace(parents_SBW: np.ndarray, emitted_SBW: np.ndarray) -> list[list[list[int]]]:
    frames, batch, width = parents_SBW.shape
    beam_BW = np.broadcast_to(np.arange(width), (batch, width))
    read = np.empty((frames, batch, width), dtype=np.int64)
    for frame in reversed(range(frames)):
        read[frame] = np.take_along_axis(emitted_SBW[frame], beam_BW, axis=1)
        beam_BW = np.take_along_axis(parents_SBW[frame], beam_BW, axis=1)
    columns = np.moveaxis(read, 0, 2)
    return [[row[row >= 0].tolist() for row in clip] for clip in columns]


def rescore(
    hypotheses: Sequence[Sequence[Hypothesis]], log_probs: Sequence[Sequence[float]], *, weight: float
) -> list[list[Hypothesis]]:
    """Re-rank by (1 − λ) log P_ctc + λ log P_ar, as Orthros does (arXiv 2109.04411).

    Args:
        hypotheses: For each clip its n-best list.
        log_probs: log P_ar of each, from `autoregressive.score_hypotheses`.
        weight: λ.

    Raises:
        ValueError: λ is not in [0, 1].
    """
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"`weight` is {weight}; it must be in [0, 1].")
    return [
        sorted(
            (
                h._replace(score=(1 - weight) * h.log_prob + weight * p)
                for h, p in zip(found, ps, strict=True)
            ),
            key=lambda h: -h.score,
        )
        for found, ps in zip(hypotheses, log_probs, strict=True)
    ]


class TimedText(NamedTuple):
    """A token or word with its time in seconds."""

    text: str
    start: float
    end: float


def word_times(
    pieces: Sequence[str], spans: Sequence[tuple[int, int]], *, frame_seconds: float = 0.04
) -> list[TimedText]:
    """Times of words from the frames of their pieces (`Alignment.spans`); a piece with U+2581 begins a word.

    CTC labels are peaks: a word's end is where its last piece was seen, not where its sound ends.

    >>> word_times(["▁Gu", "ten", "▁Tag"], [(2, 3), (5, 6), (10, 12)])[0]
    TimedText(text='Guten', start=0.08, end=0.24)
    """
    words: list[TimedText] = []
    for piece, (start, end) in zip(pieces, spans, strict=True):
        if words and not piece.startswith("▁"):
            words[-1] = words[-1]._replace(text=words[-1].text + piece, end=end * frame_seconds)
        else:
            words.append(TimedText(piece.removeprefix("▁"), start * frame_seconds, end * frame_seconds))
    return words
