"""The judge: which of two answers is better, with what probability, by a causal language model (equation 5).

    r(x, y; y_r) = 1/2 [ pi(A | x, y, y_r) + pi(B | x, y_r, y) ]

What is special here: both orders of a pair are always judged; equal prompts are computed once, so an answer
against itself is worth exactly 0.5; batches are filled by tokens, and prompts that start alike share the
computation of their common prefix. None of that changes a score beyond rounding.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from eagleray.models.gram.batching import pad_right, prefix_groups, token_batches
from eagleray.models.gram.checkpoint import JudgeSettings, SwapAverage, load_language_model
from eagleray.models.gram.prompts import JudgeEncoder
from eagleray.models.gram.scoring import (
    can_share_prefix,
    label_logits,
    label_logits_shared,
    model_device,
    unwrapped,
)

logger = logging.getLogger(__name__)

Pair = tuple[str, str, str]
"""Prompt, first answer, second answer."""


@dataclass(frozen=True)
class Comparison:
    """The verdict on one pair. Probabilities are of the *first* answer being better, in both orders."""

    p_a: float
    """Equation 5, or its variant by `swap_average`."""
    p_order1: float
    """As judged with the first answer shown first."""
    p_order2: float
    """As judged with the first answer shown second."""
    delta1: float
    """Z_a - Z_b with the first answer in slot A."""
    delta2: float
    """Z_a - Z_b with the first answer in slot B; (delta1 + delta2) / 2 is the bias towards slot A."""
    consistent: bool
    """Whether both orders prefer the same answer."""

    def swapped(self) -> Comparison:
        """The verdict on the same pair with its answers named the other way round."""
        return Comparison(
            p_a=1.0 - self.p_a,
            p_order1=1.0 - self.p_order2,
            p_order2=1.0 - self.p_order1,
            delta1=self.delta2,
            delta2=self.delta1,
            consistent=self.consistent,
        )

    @property
    def p_b(self) -> float:
        """Probability that the second answer is better."""
        return 1.0 - self.p_a


def read_out(delta1: float, delta2: float, *, swap_average: SwapAverage = "prob") -> Comparison:
    """The verdict that follows from the label margins Z_a - Z_b of the two orders.

    Args:
        delta1: Margin with the first answer in slot A.
        delta2: Margin with the first answer in slot B.
        swap_average: `prob` averages the two probabilities (equation 5), `logit` the two margins (cancels a
            constant bias towards a slot), `none` takes the first order alone (the protocol of single-order
            judges).

    >>> round(read_out(1.5, 0.8).p_a, 6), round(read_out(1.5, 0.8, swap_average="logit").p_a, 6)
    (0.5638, 0.586618)
    """
    p_order1, p_order2 = _sigmoid(delta1), _sigmoid(-delta2)
    if swap_average == "none":
        p_a = p_order1
    elif swap_average == "logit":
        p_a = _sigmoid((delta1 - delta2) / 2)
    elif swap_average == "prob":
        # Equal margins are a tie exactly; the sum of the two sigmoids may be off by one rounding.
        p_a = 0.5 if delta1 == delta2 else (p_order1 + p_order2) / 2
    else:
        raise ValueError(
            f"`swap_average` is {swap_average!r}; it must be one of {', '.join(get_args(SwapAverage))}."
        )
    return Comparison(p_a, p_order1, p_order2, delta1, delta2, _sign(delta1) == -_sign(delta2))


class Judge:
    """Compares answers with a causal language model; may be called from several threads."""

    def __init__(
        self,
        model: nn.Module,
        encoder: JudgeEncoder,
        *,
        swap_average: SwapAverage = "prob",
        max_batch_tokens: int = 16384,
        share_prefix: bool = True,
    ) -> None:
        """Wrap a model, which stays where it is and keeps its training mode.

        Args:
            model: A causal language model of transformers, also wrapped by peft or DeepSpeed.
            encoder: Makes the prompts.
            swap_average: How the two orders are averaged, see `read_out`.
            max_batch_tokens: Most tokens of one forward pass, padding included.
            share_prefix: Compute common prefixes once where that saves enough.
        """
        if swap_average not in get_args(SwapAverage):
            raise ValueError(
                f"`swap_average` is {swap_average!r}; it must be one of {', '.join(get_args(SwapAverage))}."
            )
        self.model = model
        self.encoder = encoder
        self.swap_average: SwapAverage = swap_average
        self.max_batch_tokens = max_batch_tokens
        self.share_prefix = share_prefix and can_share_prefix(model)
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        max_batch_tokens: int = 16384,
        share_prefix: bool = True,
        **overrides: Any,
    ) -> Judge:
        """Load a model folder or hub name, or a peft adapter (merged into its base model).

        Settings come from its `gram.json`. A model without one (an instruct model used as a judge, a
        checkpoint released by others) is judged with the default template and labels, unless `overrides` say
        otherwise.

        Args:
            path: Folder or hub name; weights must be safetensors.
            device: Default: the GPU if there is one.
            dtype: Default: as saved.
            revision: Hub revision.
            max_batch_tokens: See the constructor.
            share_prefix: See the constructor.
            overrides: Fields of `JudgeSettings`; `template` may be a name or a file.
        """
        settings = JudgeSettings.load(path, revision=revision)
        if settings is None:
            settings = JudgeSettings()
            if "template" not in overrides:
                logger.warning(
                    "%s has no gram.json: judging with template %r and labels %s. If the model was trained "
                    "with other ones, pass `template` and `label_strings`.",
                    path,
                    settings.template.name,
                    settings.label_strings,
                )
        settings = settings.replaced(**overrides)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = load_language_model(path, dtype=dtype, revision=revision)
        model.to(device)  # type: ignore[arg-type]
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
        encoder = JudgeEncoder(
            tokenizer,
            settings.template,
            label_strings=settings.label_strings,
            max_length=settings.max_length,
            overlong=settings.overlong,
        )
        return cls(
            model,
            encoder,
            swap_average=settings.swap_average,
            max_batch_tokens=max_batch_tokens,
            share_prefix=share_prefix,
        )

    def save_settings(
        self,
        path: str | Path,
        *,
        label_smoothing: float | None = None,
        smoothing_convention: Literal["paper", "torch"] | None = None,
    ) -> None:
        """Write `gram.json` into a model folder, so that `from_pretrained` judges as this judge does."""
        JudgeSettings(
            template=self.encoder.template,
            label_strings=self.encoder.label_strings,
            max_length=self.encoder.max_length,
            overlong=self.encoder.overlong,
            swap_average=self.swap_average,
            label_smoothing=label_smoothing,
            smoothing_convention=smoothing_convention,
        ).save(path)

    def compare(self, pairs: Sequence[Pair]) -> list[Comparison]:
        """Judge (prompt, first answer, second answer) triples, in both orders; one result for each pair."""
        prompts: dict[tuple[int, ...], int] = {}
        slots: list[tuple[int, int]] = []
        for number, (prompt, first, second) in enumerate(pairs):
            slot1 = prompts.setdefault(self._encoded(prompt, first, second, number), len(prompts))
            slot2 = prompts.setdefault(self._encoded(prompt, second, first, number), len(prompts))
            slots.append((slot1, slot2))
        deltas = self._deltas(list(prompts))
        return [read_out(deltas[i], deltas[j], swap_average=self.swap_average) for i, j in slots]

    def reward(self, prompt: str, answers: Sequence[str], reference: str) -> list[float]:
        """Rewards r(x, y; y_ref) in (0, 1) of answers against one reference; 0.5 is parity."""
        return [result.p_a for result in self.compare([(prompt, answer, reference) for answer in answers])]

    def _encoded(self, prompt: str, first: str, second: str, number: int) -> tuple[int, ...]:
        ids = self.encoder.encode(prompt, first, second)
        if ids is None:
            raise ValueError(
                f"Pair {number} is longer than `max_length` = {self.encoder.max_length} tokens. Remove it, "
                "or set `overlong` to 'shorten' to have its answers cut."
            )
        return tuple(ids)

    def _deltas(self, prompts: list[tuple[int, ...]]) -> list[float]:
        """Margins Z_a - Z_b of distinct prompts."""
        if not prompts:
            return []
        logits_N2 = torch.empty(len(prompts), 2, dtype=torch.float64)
        # Not `inference_mode`: the model may be in training, and tensors that ZeRO-3 or a rotary embedding
        # makes under it could not take part in the next backward pass.
        with self._lock, torch.no_grad(), _evaluating(self.model):
            for members, logits_B2 in self._forward(prompts):
                logits_N2[members] = logits_B2.double().cpu()
        if not bool(logits_N2.isfinite().all()):
            broken = int((~logits_N2.isfinite()).any(1).sum())
            raise FloatingPointError(
                f"The model gave label logits that are not finite for {broken} of {len(prompts)} prompts. "
                "Its weights are broken, or its dtype overflows: try torch.float32."
            )
        return (logits_N2[:, 0] - logits_N2[:, 1]).tolist()

    def _forward(self, prompts: list[tuple[int, ...]]) -> Iterator[tuple[list[int], Tensor]]:
        label_ids = self.encoder.label_ids
        groups, rest = prefix_groups(prompts) if self.share_prefix else ([], list(range(len(prompts))))
        for group in groups:
            shared = group.prefix_length
            yield (
                group.members,
                label_logits_shared(
                    self.model,
                    prompts[group.members[0]][:shared],
                    [prompts[i][shared:] for i in group.members],
                    label_ids,
                    max_batch_tokens=self.max_batch_tokens,
                ),
            )
        device = model_device(self.model)
        for batch in token_batches([len(prompts[i]) for i in rest], max_tokens=self.max_batch_tokens):
            members = [rest[i] for i in batch]
            ids_BT, mask_BT = pad_right([prompts[i] for i in members])
            yield members, label_logits(self.model, ids_BT.to(device), mask_BT.to(device), label_ids)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = unwrapped(model).training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _sigmoid(value: float) -> float:
    if value >= 0:
        return 1 / (1 + math.exp(-value))
    power = math.exp(value)
    return power / (1 + power)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
