"""The task behind every job that trains a causal LM on tokens: next-token cross-entropy from a start position.

An example is `input_ids` and `start`, the index of the first token that is a target; what lies before it
is context. Packed text starts at 1, a rendered pair (GRAM stage 1) at the end of its prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from eagleray.models.backbone.losses import token_losses
from eagleray.platform.task import Batch, Task


class LanguageModelTask(Task):
    """Subclasses say where the model comes from and what the model folder holds besides weights."""

    metric: ClassVar[str] = "loss"
    mode: ClassVar[Literal["min", "max"]] = "min"

    def collate(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """`input_ids` and `target_mask` (true where the token is a target), both [B, T].

        What fills the right end does not matter: no real token looks at it and none of it is a target.
        """
        size = (len(rows), max(row["length"] for row in rows))
        input_ids_BT = torch.zeros(size, dtype=torch.long)
        target_mask_BT = torch.zeros(size, dtype=torch.bool)
        for i, row in enumerate(rows):
            length = row["length"]
            input_ids_BT[i, :length] = torch.from_numpy(row["input_ids"].astype("int64"))
            target_mask_BT[i, row["start"] : length] = True
        return Batch(
            {"input_ids": input_ids_BT, "target_mask": target_mask_BT},
            weight=float(target_mask_BT.sum()),
            ids=tuple(row["id"] for row in rows),
            tokens=sum(row["length"] for row in rows),
        )

    def loss(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return token_losses(model, **tensors).sum(), {}

    def evaluate_batch(self, model: nn.Module, tensors: dict[str, Tensor]) -> list[Any]:
        losses_B = token_losses(model, **tensors).sum(-1)
        return list(zip(losses_B.tolist(), tensors["target_mask"].sum(-1).tolist(), strict=True))

    def summarise(self, records: list[Any]) -> dict[str, float]:
        loss = sum(total for total, _ in records) / sum(count for _, count in records)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
