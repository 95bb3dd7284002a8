"""Decoding with continuous batching: sequences join and leave the batch between steps.

All rows end in the same column. A sequence that joins is read on its own first; then whichever is shorter, it or the
batch, is padded on the left, and the caches are put together. A row that has ended leaves at once, and columns that no
row uses any more are cut off. Padding is masked, positions count a row's own tokens, and every sequence draws from its
own generator, so a sequence gives the same text alone and in company (up to rounding).

Works with every causal language model of transformers whose layers all see the whole past, those with shared attention
scores included.

Shapes: B rows, T columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

FinishReason = Literal["stop", "length"]


@dataclass(eq=False)
class Continuation:
    """A prompt and how it is to be continued; `tokens` grows while it is decoded."""

    prompt: Sequence[int]
    """Token ids; at least one."""
    max_tokens: int
    """New tokens at most."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    seed: int = 0
    """Of the draws; the same seed, prompt and settings give the same tokens."""
    tokens: list[int] = field(default_factory=list)
    """New tokens, the end-of-text token excluded."""
    finished: FinishReason | None = None
    """`stop` after an end-of-text token, `length` after `max_tokens`; `None` while it goes on."""

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def take(self, logits_V: Tensor, end_ids: Collection[int]) -> int:
        """Choose the next token from float32 logits on the CPU, and note it."""
        token = self._choose(logits_V)
        if token in end_ids:
            self.finished = "stop"
        else:
            self.tokens.append(token)
            if len(self.tokens) >= self.max_tokens:
                self.finished = "length"
        return token

    def _choose(self, logits_V: Tensor) -> int:
        if self.temperature == 0:
            return int(logits_V.argmax())
        probabilities_V, order_V = (logits_V / self.temperature).softmax(-1).sort(descending=True)
        upto_V = probabilities_V.double().cumsum(-1)
        # The first token always counts; a further one if those before it have not reached `top_p`.
        kept = int((upto_V - probabilities_V < self.top_p).sum())
        # By the inverse of the distribution function: one number a token, whatever the batch.
        drawn = torch.rand((), generator=self._generator, dtype=torch.float64) * upto_V[kept - 1]
        return int(order_V[min(int(torch.searchsorted(upto_V[:kept], drawn, right=True)), kept - 1)])


class ContinuousDecoder:
    """A batch of continuations in progress; not thread-safe."""

    def __init__(self, model: Any, *, end_ids: Collection[int]) -> None:
        """Take a model in evaluation mode.

        Args:
            model: A causal language model of transformers.
            end_ids: Tokens that end a text.

        Raises:
            ValueError: Some of its layers see a sliding window only: rows of different lengths would not line up.
        """
        kinds = set(getattr(model.config, "layer_types", None) or ())
        if kinds - {"full_attention"} or (getattr(model.config, "sliding_window", None) and not kinds):
            raise ValueError(
                f"{type(model).__name__} has layers that see a sliding window of the text; continuous batching needs "
                "layers that see all of it. Use `generate` of transformers for this model."
            )
        self._model, self._end_ids = model, frozenset(end_ids)
        self._rows: list[Continuation] = []
        self._cache: DynamicCache | None = None
        self._mask_BT = torch.zeros(0, 0, dtype=torch.long)
        self._last_B1 = torch.zeros(0, 1, dtype=torch.long)

    @property
    def active(self) -> list[Continuation]:
        """Those that are not finished."""
        return list(self._rows)

    @property
    def columns(self) -> int:
        """Cached tokens of a row, padding included."""
        return self._mask_BT.shape[1]

    @torch.inference_mode()
    def add(self, new: Sequence[Continuation]) -> None:
        """Read prompts together and choose the first token of each; they are in the batch from then on.

        Raises:
            ValueError: A prompt is empty.
        """
        if not new:
            return
        if not all(len(one.prompt) for one in new):
            raise ValueError(
                "A prompt has no token; give at least one, e.g. that for the beginning of a text."
            )
        device = self._model.device
        longest = max(len(one.prompt) for one in new)
        ids = [[0] * (longest - len(one.prompt)) + list(one.prompt) for one in new]
        mask = [[0] * (longest - len(one.prompt)) + [1] * len(one.prompt) for one in new]
        ids_BT, mask_BT = (torch.tensor(rows, dtype=torch.long, device=device) for rows in (ids, mask))
        cache = DynamicCache(config=self._model.config)
        last_B1 = self._forward(ids_BT, mask_BT, cache, new)
        if self._cache is None:
            self._cache, self._mask_BT, self._last_B1 = cache, mask_BT, last_B1
        else:
            width = max(self.columns, longest)
            _pad_left(self._cache, width - self.columns)
            _pad_left(cache, width - longest)
            _append_rows(self._cache, cache)
            both = (F.pad(one_BT, (width - one_BT.shape[1], 0)) for one_BT in (self._mask_BT, mask_BT))
            self._mask_BT, self._last_B1 = torch.cat(list(both)), torch.cat([self._last_B1, last_B1])
        self._rows += new
        self._keep([row for row, one in enumerate(self._rows) if one.finished is None])

    @torch.inference_mode()
    def step(self) -> None:
        """Choose the next token of each row; rows that end leave."""
        if self._cache is None:
            return
        self._mask_BT = F.pad(self._mask_BT, (0, 1), value=1)
        self._last_B1 = self._forward(self._last_B1, self._mask_BT, self._cache, self._rows)
        self._keep([row for row, one in enumerate(self._rows) if one.finished is None])

    def drop(self, given_up: Collection[Continuation]) -> None:
        """Take continuations out that nobody waits for."""
        self._keep([row for row, one in enumerate(self._rows) if one not in given_up])

    def _forward(
        self, ids_BQ: Tensor, mask_BT: Tensor, cache: DynamicCache, rows: Sequence[Continuation]
    ) -> Tensor:
        """Run the model and let each row take a token; the tokens [B, 1]."""
        positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
        logits_BV = self._model(
            input_ids=ids_BQ,
            attention_mask=mask_BT,
            position_ids=positions_BT[:, -ids_BQ.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        logits_BV = logits_BV.float().cpu()
        chosen = [one.take(logits_V, self._end_ids) for one, logits_V in zip(rows, logits_BV, strict=True)]
        return torch.tensor(chosen, dtype=torch.long, device=ids_BQ.device)[:, None]

    def _keep(self, kept: list[int]) -> None:
        if len(kept) == len(self._rows):
            return
        self._rows = [self._rows[row] for row in kept]
        if not kept:
            self._cache = None
            self._mask_BT, self._last_B1 = self._mask_BT[:0, :0], self._last_B1[:0]
            return
        assert self._cache is not None
        index = torch.tensor(kept, device=self._mask_BT.device)
        mask_BT = self._mask_BT[index]
        unused = int((mask_BT.sum(0) == 0).int().cumprod(0).sum())
        for layer in _layers(self._cache):
            layer.keys, layer.values = (x[index, :, unused:] for x in (layer.keys, layer.values))
        self._mask_BT, self._last_B1 = mask_BT[:, unused:], self._last_B1[index]


def _layers(cache: DynamicCache) -> list[Any]:
    return list(cache.layers)


def _pad_left(cache: DynamicCache, columns: int) -> None:
    for layer in _layers(cache):
        layer.keys, layer.values = (F.pad(x, (0, 0, columns, 0)) for x in (layer.keys, layer.values))


def _append_rows(cache: DynamicCache, more: DynamicCache) -> None:
    for layer, other in zip(_layers(cache), _layers(more), strict=True):
        layer.keys, layer.values = (
            torch.cat([layer.keys, other.keys]),
            torch.cat([layer.values, other.values]),
        )
