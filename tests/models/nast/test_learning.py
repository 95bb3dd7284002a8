"""Check A20: the model over-fits 32 spoken utterances to exact greedy translations; tones are the speech."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from eagleray.models.nast.config import NastConfig
from eagleray.models.nast.decoding import greedy
from eagleray.models.nast.features import fbank, normalise
from eagleray.models.nast.losses import nast_loss
from eagleray.models.nast.model import NastModel

WORDS = 4
FIRST = 4
"""Source words are tokens 4 to 7; the translation of a word is the token 4 above it."""


def speak(words: list[int]) -> Tensor:
    """Features of one tone a word, 0.12 s each with a pause of 0.04 s."""
    time = torch.arange(1920) / 16_000
    pause = torch.zeros(640)
    tones = [0.3 * torch.sin(2 * math.pi * (300 * 1.5 ** (word - FIRST)) * time) for word in words]
    return normalise(fbank(torch.cat([part for tone in tones for part in (tone, pause)])))


def corpus(*, reverse: bool) -> tuple[Tensor, ...]:
    """Features, lengths, source with lengths, target with lengths of 32 different utterances."""
    rng = random.Random(0)
    sources: set[tuple[int, ...]] = set()
    while len(sources) < 32:
        sources.add(tuple(rng.choices(range(FIRST, FIRST + WORDS), k=rng.randint(1, 3))))
    ordered = sorted(sources)
    clips = [speak([*words]) for words in ordered]
    counts = torch.tensor([len(words) for words in ordered])
    targets = [[word + WORDS for word in (words[::-1] if reverse else words)] for words in ordered]
    pad = [pad_sequence([torch.tensor(w) for w in rows], batch_first=True) for rows in (ordered, targets)]
    lengths = torch.tensor([len(clip) for clip in clips])
    return pad_sequence(clips, batch_first=True), lengths, pad[0], counts, pad[1], counts


def steps_to_exact(
    batch: tuple[Tensor, ...], *, limit: int, seed: int = 0, **changes: int | None
) -> int | None:
    """Optimiser steps until every utterance is translated exactly, looked at every ten; none: not within `limit`."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": FIRST + 2 * WORDS,
        "width": 32,
        "heads": 2,
        "inner_width": 64,
        "subsampler_width": 64,
    }
    layers = {"acoustic_layers": 2, "textual_layers": 3, "cross_layer_source": 1, "conv_kernel": 5}
    inner = {"inner_source_layers": [1], "inner_target_layers": [2]}
    model = NastModel(NastConfig(**{**sizes, **layers, **inner, "dropout": 0.0, **changes}))
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3, betas=(0.9, 0.98))
    features, lengths, _, _, targets, counts = batch
    expected = [row[:n].tolist() for row, n in zip(targets, counts, strict=True)]
    weight = (counts + 1).sum()
    for step in range(1, limit + 1):
        loss, _ = nast_loss(model.train(), *batch)
        (loss / weight).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            with torch.inference_mode():
                output = model.eval()(features, lengths)
            if greedy(output.target_logits, output.lengths) == expected:
                return step
    return None


@pytest.mark.parametrize("reverse", [False, True])
def test_a20_over_fits_32_utterances_also_in_reversed_order(reverse: bool) -> None:
    assert steps_to_exact(corpus(reverse=reverse), limit=250) is not None
