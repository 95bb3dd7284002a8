"""The autoregressive sibling (spec 11): the same encoders, with a decoder that writes one token after another.

Beam search keeps all beams of all clips in one batch. Keys and values of earlier tokens are cached and re-ordered with
the beams; those of the speech are computed once a clip, and its beams attend to them as so many queries.

Shapes: B clips, T feature frames, F features, S frames, W beams, N = B·W hypotheses, U tokens, V vocabulary, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eagleray.models.nast.attention import KeyValue, sinusoids
from eagleray.models.nast.config import AutoregressiveConfig
from eagleray.models.nast.decoding import Hypothesis
from eagleray.models.nast.encoder import DrawOracle, NastOutput, StackedEncoder
from eagleray.models.nast.layers import DecoderLayer
from eagleray.models.nast.model import SpeechModel
from eagleray.models.nast.subsampler import keep_mask


class Decoder(nn.Module):
    """Pre-norm Transformer decoder with sinusoidal positions; its tables are the target head's weight."""

    def __init__(self, config: AutoregressiveConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(
            DecoderLayer(
                width=config.width,
                heads=config.heads,
                inner_width=config.inner_width,
                dropout=config.dropout,
            )
            for _ in range(config.decoder_layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.output = nn.Linear(config.width, config.vocab_size, bias=False)

    def embed(self, tokens_NU: Tensor, start: int = 0) -> Tensor:
        """Embeddings [N, U, D] of tokens whose first stands at position `start`."""
        x_NUD = self.embedding(tokens_NU) * math.sqrt(self.embedding.embedding_dim)
        positions = torch.arange(start, start + tokens_NU.shape[1], device=x_NUD.device, dtype=torch.float32)
        return F.dropout(x_NUD + sinusoids(positions, x_NUD.shape[2]).to(x_NUD), self.dropout, self.training)

    def forward(self, tokens_BU: Tensor, encoded_BSD: Tensor, mask: Tensor) -> Tensor:
        x_BUD = self.embed(tokens_BU)
        for layer in self.layers:
            x_BUD = layer(x_BUD, encoded_BSD, mask)
        return self.output(self.norm(x_BUD))


class AutoregressiveModel(SpeechModel):
    """Speech to text by a decoder, with the CTC heads of the encoders as further training signals."""

    config_class = AutoregressiveConfig

    def __init__(self, config: AutoregressiveConfig) -> None:
        super().__init__(config)
        self.encoder = StackedEncoder(config)
        self.decoder = Decoder(config)
        self.tie_heads("decoder.embedding.weight", "decoder.output.weight")
        self.post_init()

    def forward(
        self,
        features_BTF: Tensor,
        lengths_B: Tensor,
        target_BU: Tensor,
        target_lengths_B: Tensor,
        *,
        draw_oracle: DrawOracle | None = None,
    ) -> tuple[NastOutput, Tensor]:
        """Encoder output, and logits [B, U + 1, V] of each token and `</s>` given the ones before.

        Args:
            features_BTF: Features, padded on the right.
            lengths_B: Frames of each clip.
            target_BU: Translation without `</s>`; beyond its length anything in the vocabulary.
            target_lengths_B: Tokens of each translation.
            draw_oracle: What inner target predictions are told in training.
        """
        output = self.encoder(features_BTF, lengths_B, draw_oracle=draw_oracle)
        mask = keep_mask(output.lengths, output.hidden_BSD.shape[1])[:, None, None]
        # As in the reference, `</s>` also begins a sentence.
        given_BU = F.pad(target_BU, (1, 0), value=self.config.eos_token_id)
        return output, self.decoder(given_BU, output.hidden_BSD, mask)

    def with_end(self, target_BU: Tensor, target_lengths_B: Tensor) -> Tensor:
        """What the decoder should say, [B, U + 1]: the tokens, `</s>`, padding."""
        expected = F.pad(target_BU, (0, 1)).masked_fill(
            ~keep_mask(target_lengths_B, target_BU.shape[1] + 1), self.config.pad_token_id
        )
        return expected.scatter(1, target_lengths_B[:, None].long(), self.config.eos_token_id)


@torch.inference_mode()
def beam_search(
    model: AutoregressiveModel,
    features_BTF: Tensor,
    lengths_B: Tensor,
    *,
    width: int = 5,
    length_penalty: float = 1.0,
    min_length: int = 0,
    max_length: int = 200,
) -> list[list[Hypothesis]]:
    """Best translations of each clip, best first, at most `width`; width 1 is greedy search.

    Each step keeps the best `width` unfinished hypotheses of a clip. One that ends among its best `width` continuations
    is finished; a clip is done once it has `width` of them. Ranked by log-probability / length^penalty, the length
    counting `</s>`.

    Args:
        model: The model, in evaluation mode.
        features_BTF: Features, padded on the right.
        lengths_B: Frames of each clip.
        width: Beams.
        length_penalty: 0 prefers short translations, 1 ranks by mean log-probability of a token.
        min_length: No `</s>` before so many tokens.
        max_length: `</s>` after so many tokens.

    Raises:
        ValueError: A bound is out of range.
    """
    if width < 1 or not 0 <= min_length <= max_length:
        raise ValueError(
            f"`width` is {width}, `min_length` {min_length} and `max_length` {max_length}; needed are width >= 1 and "
            "0 <= min_length <= max_length."
        )
    output = model.encoder(features_BTF, lengths_B)
    search = _Search(model, output, width=width, max_length=max_length)
    for position in range(max_length + 1):
        allow_end = position >= min_length
        if search.step(position, allow_end=allow_end, only_end=position == max_length):
            break
    return search.results(length_penalty)


class _Search:
    """Beams of a batch and their caches."""

    def __init__(
        self, model: AutoregressiveModel, output: NastOutput, *, width: int, max_length: int
    ) -> None:
        encoded, config = output.hidden_BSD, model.config
        self.decoder, self.config, self.width = model.decoder, config, width
        self.layers = cast(list[DecoderLayer], list(model.decoder.layers))
        self.batch, size = encoded.shape[:2]
        self.memories = [layer.cross_attention.memory(encoded) for layer in self.layers]
        self.mask = keep_mask(output.lengths, size)[:, None, None]
        self.room = min(32, max_length + 1)
        shape = (self.batch * width, config.heads, self.room, config.width // config.heads)
        self.caches = [KeyValue(encoded.new_empty(shape), encoded.new_empty(shape)) for _ in self.memories]
        self.score_BW = torch.full((self.batch, width), -math.inf, device=encoded.device)
        self.score_BW[:, 0] = 0.0  # all beams are equal at first: only one may be continued
        self.tokens_BWU = torch.empty(self.batch, width, 0, dtype=torch.long, device=encoded.device)
        self.last_N1 = torch.full((self.batch * width, 1), config.eos_token_id, device=encoded.device)
        self.first_row_B1 = torch.arange(self.batch, device=encoded.device)[:, None] * width
        self.finished: list[list[tuple[list[int], float]]] = [[] for _ in range(self.batch)]

    def step(self, position: int, *, allow_end: bool, only_end: bool) -> bool:
        """Continue every beam by one token; true when all clips are done."""
        x = self.decoder.embed(self.last_N1, position)
        if position == self.room:
            self._grow()
        for layer, cache, memory in zip(self.layers, self.caches, self.memories, strict=True):
            x = layer.step(x, cache, position, memory, self.mask)
        logits_NV = self.decoder.output(self.decoder.norm(x[:, 0])).float()
        total_N1 = logits_NV.logsumexp(-1, keepdim=True)
        end_BW = (logits_NV[:, self.config.eos_token_id, None] - total_N1).view_as(self.score_BW)
        end_BW = self.score_BW + end_BW
        if only_end:
            self._finish(end_BW, torch.ones_like(end_BW, dtype=torch.bool))
            return True
        # The ends are candidates of their own; the best `width` others exist in any case.
        for token in (self.config.eos_token_id, self.config.pad_token_id, self.config.blank_token_id):
            logits_NV[:, token] = -math.inf
        best_NK, token_NK = logits_NV.topk(min(self.width, logits_NV.shape[1]), dim=-1)
        others = (self.score_BW[..., None] + (best_NK - total_N1).view(*self.score_BW.shape, -1)).flatten(1)
        score_BW, choice_BW = others.topk(self.width, dim=-1)
        if allow_end:
            # An end counts if it is among the best `width` of all continuations, ends included.
            better = (others[:, None] > end_BW[..., None]).sum(-1)
            better += (end_BW[:, None] > end_BW[..., None]).sum(-1)
            self._finish(end_BW, better < self.width)
            if all(len(found) >= self.width for found in self.finished):
                return True
        parent_BW = choice_BW // token_NK.shape[1]
        token_BW = token_NK.view(self.batch, -1).gather(1, choice_BW)
        kept = self.tokens_BWU.gather(1, parent_BW[..., None].expand(-1, -1, self.tokens_BWU.shape[2]))
        self.tokens_BWU = torch.cat([kept, token_BW[..., None]], dim=2)
        self.score_BW, self.last_N1 = score_BW, token_BW.view(-1, 1)
        if self.width > 1:
            rows = (self.first_row_B1 + parent_BW).flatten()
            for cache in self.caches:
                for tensor in cache:
                    tensor[:, :, : position + 1] = tensor[rows, :, : position + 1]
        return False

    def results(self, length_penalty: float) -> list[list[Hypothesis]]:
        """Finished translations of each clip, best first."""
        ranked = []
        for found in self.finished:
            scored = [Hypothesis(t, p / (len(t) + 1) ** length_penalty, p) for t, p in found]
            ranked.append(sorted(scored, key=lambda h: -h.score)[: self.width])
        return ranked

    def _finish(self, end_BW: Tensor, ends_BW: Tensor) -> None:
        for clip, beam in (ends_BW & end_BW.isfinite()).nonzero().tolist():
            if len(self.finished[clip]) < self.width:
                self.finished[clip].append((self.tokens_BWU[clip, beam].tolist(), end_BW[clip, beam].item()))

    def _grow(self) -> None:
        self.room *= 2
        self.caches = [
            KeyValue(*(torch.cat([tensor, torch.empty_like(tensor)], dim=2) for tensor in cache))
            for cache in self.caches
        ]


@torch.inference_mode()
def score_hypotheses(
    model: AutoregressiveModel,
    features_BTF: Tensor,
    lengths_B: Tensor,
    hypotheses: Sequence[Sequence[Sequence[int]]],
) -> list[list[float]]:
    """Log-probabilities, `</s>` included, of given translations of each clip, in one parallel pass.

    Args:
        model: The model, in evaluation mode.
        features_BTF: Features, padded on the right.
        lengths_B: Frames of each clip.
        hypotheses: For each clip any number of token lists without `</s>`.
    """
    rows = [(clip, list(tokens)) for clip, found in enumerate(hypotheses) for tokens in found]
    if not rows:
        return [[] for _ in hypotheses]
    output = model.encoder(features_BTF, lengths_B)
    device, config = features_BTF.device, model.config
    longest = max(len(tokens) for _, tokens in rows)
    padded = [tokens + [config.pad_token_id] * (longest - len(tokens)) for _, tokens in rows]
    target_NU = torch.tensor(padded, dtype=torch.long, device=device).view(len(rows), longest)
    count_N = torch.tensor([len(tokens) for _, tokens in rows], device=device)
    clip_N = torch.tensor([clip for clip, _ in rows], device=device)
    mask = keep_mask(output.lengths, output.hidden_BSD.shape[1])[:, None, None]
    given_NU = F.pad(target_NU, (1, 0), value=config.eos_token_id)
    logits_NUV = model.decoder(given_NU, output.hidden_BSD[clip_N], mask[clip_N])
    expected_NU = model.with_end(target_NU, count_N)
    log_p_NU = -F.cross_entropy(
        logits_NUV.float().transpose(1, 2), expected_NU, ignore_index=config.pad_token_id, reduction="none"
    )
    scores = iter(log_p_NU.sum(1).tolist())
    return [[next(scores) for _ in found] for found in hypotheses]
