"""The pair encoder: a causal language model without its head, a row for the special token, and one linear unit.

    h = hidden state at `<|PREFERENCE|>`        u = w·h + c        p = σ(u) = P(y_1 is better)

The embedding of the new token is a parameter of its own beside the backbone. It is so trained in the same way with
full fine-tuning, with LoRA and under every ZeRO stage, no embedding matrix is resized, and nothing but this one row of
it moves under LoRA. The backbone is saved as the plain model it is.

Shapes: B sequences, T tokens, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from eagleray.models.backbone.last_layer import last_layer_at
from eagleray.models.gram.scoring import position_arguments

HEAD_FILE = "lrhp_head.safetensors"
Pool = Literal["at_token", "before_token"]
_BACKBONE = "backbone."
_CHUNK = 8192


class FloatLinear(nn.Linear):
    """A linear layer that computes in float32 at least, whatever its weights are kept in."""

    def forward(self, input: Tensor) -> Tensor:
        dtype = torch.promote_types(input.dtype, torch.float32)
        return F.linear(input.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class PairModel(nn.Module):
    """Representation and logit of pairs in one order."""

    def __init__(self, backbone: Any, *, token_id: int, pool: Pool = "at_token") -> None:
        """Wrap a backbone; the head starts at zero, where every pair has p = 1/2.

        Args:
            backbone: A model of transformers without its LM head (`AutoModel`), or peft's wrapper of one.
            token_id: Id of `<|PREFERENCE|>`.
            pool: Take the hidden state at the token, or the one before it.
        """
        super().__init__()
        width = backbone.config.get_text_config().hidden_size
        self.backbone = backbone
        self.token_id = token_id
        self.pool: Pool = pool
        self.preference_row = nn.Parameter(torch.zeros(width))
        self.head = FloatLinear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @torch.no_grad()
    def start_row(self, tokens: int) -> None:
        """Set the token's embedding to the mean over the first `tokens` ids; the embedding must be whole (ZeRO-3)."""
        embed = self.backbone.get_input_embeddings()
        ids = torch.arange(tokens, device=embed.weight.device)
        total_D = torch.stack([embed(chunk).double().sum(0) for chunk in ids.split(_CHUNK)]).sum(0)
        self.preference_row.copy_(total_D / tokens)

    def forward(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Representations h [B, D] and logits u [B], both float32 (float64 for a float64 model).

        Args:
            input_ids_BT: Sequences of `PreferenceEncoder`, padded on either side.
            attention_mask_BT: 1 at tokens, 0 at padding.

        Raises:
            ValueError: A sequence has no `<|PREFERENCE|>`, or several.
        """
        at_token_BT = input_ids_BT == self.token_id
        index_B = preference_index(input_ids_BT, self.token_id)
        # The id may lie beyond the matrix; id 0 stands in and is replaced. Not in place: hooks may need the output.
        embeds_BTD = self.backbone.get_input_embeddings()(input_ids_BT.masked_fill(at_token_BT, 0))
        row_D = self.preference_row.to(embeds_BTD.dtype)
        read_B = index_B if self.pool == "at_token" else index_B - 1
        with last_layer_at(self.backbone, read_B, attention_mask_BT) as at_last:
            states_BTD = self.backbone(
                inputs_embeds=torch.where(at_token_BT[..., None], row_D, embeds_BTD),
                **position_arguments(attention_mask_BT),
            ).last_hidden_state
        rows_B = torch.arange(len(index_B), device=index_B.device)
        h_BD = states_BTD[:, 0] if at_last else states_BTD[rows_B, read_B]
        h_BD = h_BD.to(torch.promote_types(h_BD.dtype, torch.float32))
        return h_BD, self.head(h_BD)[:, 0]

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """As the backbone's own method."""
        self.backbone.gradient_checkpointing_enable(**options)

    def save_pretrained(self, path: str | Path, *, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the backbone (or its adapter) in Hugging Face format, and row and head as float32 beside it."""
        state = self.state_dict() if state_dict is None else state_dict
        inner = {
            name.removeprefix(_BACKBONE): value for name, value in state.items() if name.startswith(_BACKBONE)
        }
        self.backbone.save_pretrained(path, state_dict=inner)
        own = {
            name: value.float().contiguous()
            for name, value in state.items()
            if not name.startswith(_BACKBONE)
        }
        save_file(own, Path(path) / HEAD_FILE)


def preference_index(input_ids_BT: Tensor, token_id: int) -> Tensor:
    """Index [B] of the special token in each row, found by its id and by nothing else.

    >>> preference_index(torch.tensor([[5, 9, 0], [7, 5, 9]]), 9).tolist()
    [1, 2]

    Raises:
        ValueError: A row has none, or more than one.
    """
    at_token_BT = input_ids_BT == token_id
    if bool((at_token_BT.sum(1) != 1).any()):
        row, count = next((i, n) for i, n in enumerate(at_token_BT.sum(1).tolist()) if n != 1)
        raise ValueError(
            f"Row {row} of the batch holds {count} tokens with the id {token_id} of <|PREFERENCE|>; there must be "
            "exactly one. Encode pairs with `PreferenceEncoder`."
        )
    return at_token_BT.int().argmax(1)
