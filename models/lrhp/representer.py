"""Pairs in, representations out: the one piece of code behind encoding, evaluation and serving.

Shapes: N pairs, D width, 2 orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from eagleray.models.gram.batching import Ids, pad_right, token_batches
from eagleray.models.gram.judge import Comparison, Pair, read_out
from eagleray.models.lrhp.checkpoint import load_pair_model, untrained_pair_model
from eagleray.models.lrhp.model import PairModel
from eagleray.models.lrhp.prompts import PreferenceEncoder

Order = Literal["canonical", "both", "diff"]
"""`canonical`: h with the chosen answer first; `both`: the mean of the two orders; `diff`: h(w, l) − h(l, w)."""
ORDERS: tuple[Order, ...] = ("canonical", "both", "diff")

_LEAST_FILL = 0.85
"""Padding of a batch is 15 % at most, and about half of that on average."""


@dataclass(frozen=True)
class Representation:
    """A pair of (prompt, chosen, rejected) as the model sees it."""

    h_D: np.ndarray
    """float32."""
    u: float
    """Logit that the chosen answer is better: u(w, l), or (u(w, l) − u(l, w)) / 2 if both orders were read."""
    truncated: bool


class Representer:
    """Computes representations with batches of like length; none depends on what shares its batch."""

    def __init__(
        self, model: PairModel, encoder: PreferenceEncoder, *, max_batch_tokens: int = 16384
    ) -> None:
        self.model = model.eval()
        self.encoder = encoder
        self.max_batch_tokens = max_batch_tokens

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        untrained: bool = False,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        max_batch_tokens: int = 16384,
    ) -> Representer:
        """Load a model folder or hub name.

        Args:
            path: A model of `lrhp.train`, or with `untrained` any causal language model.
            untrained: Take a plain language model as it is.
            device: Default: the GPU if there is one.
            dtype: Of the backbone; default: as saved.
            max_batch_tokens: Tokens of one forward pass, padding included.
        """
        load = untrained_pair_model if untrained else load_pair_model
        model, encoder = load(path, dtype=dtype)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.to(device), encoder, max_batch_tokens=max_batch_tokens)

    def represent(self, pairs: Sequence[Pair], *, order: Order = "canonical") -> list[Representation]:
        """Representations of (prompt, chosen, rejected) triples, in their order."""
        if order == "canonical":
            encoded = [self.encoder.encode(*pair) for pair in pairs]
            h_ND, u_N = self.forward([e.ids for e in encoded])
            cut = [e.truncated for e in encoded]
        else:
            h_N2D, u_N2, cut = self.both_orders(pairs)
            h_ND = h_N2D.mean(1) if order == "both" else h_N2D[:, 0] - h_N2D[:, 1]
            u_N = (u_N2[:, 0] - u_N2[:, 1]) / 2
        return [Representation(h_ND[i], float(u_N[i]), cut[i]) for i in range(len(pairs))]

    def both_orders(self, pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray, list[bool]]:
        """h [N, 2, D] and u [N, 2] with the chosen answer shown first, then second, and whether text was cut."""
        encoded = [self.encoder.encode_orders(*pair) for pair in pairs]
        h_MD, u_M = self.forward([e.ids for both in encoded for e in both])
        return (
            h_MD.reshape(len(pairs), 2, -1),
            u_M.reshape(-1, 2),
            [any(e.truncated for e in both) for both in encoded],
        )

    def compare(self, pairs: Sequence[Pair]) -> list[Comparison]:
        """Judge (prompt, first, second) triples in both orders: the figures of a judge apply to this model too."""
        _, u_N2, _ = self.both_orders(pairs)
        return [read_out(*deltas) for deltas in u_N2.tolist()]

    def forward(self, sequences: Sequence[Ids]) -> tuple[np.ndarray, np.ndarray]:
        """h [N, D] and u [N] of token ids, float32."""
        device = self.model.head.weight.device
        h_ND = np.zeros((len(sequences), self.model.head.in_features), dtype=np.float32)
        u_N = np.zeros(len(sequences), dtype=np.float32)
        for members in self.batches(sequences):
            ids_BT, mask_BT = pad_right([sequences[i] for i in members])
            with torch.inference_mode():
                h_BD, u_B = self.model(ids_BT.to(device), mask_BT.to(device))
            h_ND[members], u_N[members] = h_BD.float().cpu().numpy(), u_B.float().cpu().numpy()
        return h_ND, u_N

    def batches(self, sequences: Sequence[Ids]) -> list[list[int]]:
        """Which sequences go through the model together."""
        lengths = list(map(len, sequences))
        return list(token_batches(lengths, max_tokens=self.max_batch_tokens, least_fill=_LEAST_FILL))
