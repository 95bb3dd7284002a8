"""The sibling: teacher forcing by hand, beams against enumeration, caches, batches."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from nast_cases import batch_of, tiny_sibling

from eagleray.models.nast.autoregressive import AutoregressiveModel, beam_search, score_hypotheses
from eagleray.models.nast.losses import LossWeights, autoregressive_loss


def sharp_sibling() -> AutoregressiveModel:
    """Random weights with larger logits, so that beams differ."""
    model = tiny_sibling().eval()
    model.decoder.norm.weight.data.mul_(3.0)
    return model


def test_targets_end_with_the_end_token() -> None:
    model = tiny_sibling()
    ended = model.with_end(torch.tensor([[5, 6, 7], [8, 9, 9]]), torch.tensor([3, 1]))
    assert ended.tolist() == [[5, 6, 7, 2], [8, 2, 1, 1]]


def test_cross_entropy_is_summed_over_real_tokens() -> None:
    model, batch = tiny_sibling().eval(), batch_of(2)
    zero = LossWeights(0.0, 0.0, 0.0, 0.0)
    loss, terms = autoregressive_loss(model, *batch, weights=zero, label_smoothing=0.0)
    found = score_hypotheses(model, *batch[:2], [[batch[4][i, : batch[5][i]].tolist()] for i in range(2)])
    torch.testing.assert_close(loss, -torch.tensor(found).sum(), atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, terms["cross_entropy"], check_device=False)


def test_label_smoothing_by_hand() -> None:
    """(1 − ε) NLL + ε mean over the vocabulary of −log p, summed over tokens."""
    model, batch = tiny_sibling().eval(), batch_of(1)
    _, logits = model(*batch[:2], *batch[4:])
    log_p = logits[0].log_softmax(-1)
    expected = model.with_end(*batch[4:])[0]
    nll = -log_p.gather(1, expected[:, None])[: int(batch[5]) + 1].sum()
    uniform = -log_p.mean(1)[: int(batch[5]) + 1].sum()
    _, terms = autoregressive_loss(model, *batch, label_smoothing=0.1)
    torch.testing.assert_close(terms["cross_entropy"], (0.9 * nll + 0.1 * uniform).detach())


def test_a_token_does_not_see_later_ones() -> None:
    model, batch = tiny_sibling().eval(), batch_of(1)
    changed = batch[4].clone()
    changed[0, 3] = (changed[0, 3] + 1) % 9 + 3
    _, first = model(*batch[:2], batch[4], batch[5])
    _, second = model(*batch[:2], changed, batch[5])
    torch.testing.assert_close(first[0, :4], second[0, :4])
    assert not torch.allclose(first[0, 4], second[0, 4])


def test_wide_beams_find_the_best_of_all_translations() -> None:
    """All translations of up to two of the nine ordinary tokens, scored in one teacher-forced pass."""
    model, (features, lengths, *_) = sharp_sibling(), batch_of(1)
    everything = [list(t) for n in range(3) for t in itertools.product(range(3, 12), repeat=n)]
    scores = score_hypotheses(model, features, lengths, [everything])[0]
    ranked = sorted(zip(scores, everything, strict=True), reverse=True)
    found = beam_search(model, features, lengths, width=91, length_penalty=0.0, max_length=2)[0]
    assert len(found) == 91
    for hypothesis, (score, tokens) in zip(found[:20], ranked, strict=False):
        assert hypothesis.tokens == tokens
        assert hypothesis.log_prob == pytest.approx(score, abs=1e-4)


def test_scores_from_the_cache_equal_one_parallel_pass_and_batches_change_nothing() -> None:
    """40 steps also make the cache grow."""
    model, (features, lengths, *_) = sharp_sibling(), batch_of(3)
    together = beam_search(model, features, lengths, width=4, min_length=36, max_length=40)
    again = score_hypotheses(model, features, lengths, [[h.tokens for h in found] for found in together])
    for clip, found in enumerate(together):
        size = int(lengths[clip])
        alone = beam_search(
            model,
            features[clip : clip + 1, :size],
            lengths[clip : clip + 1],
            width=4,
            min_length=36,
            max_length=40,
        )[0]
        assert [h.tokens for h in alone] == [h.tokens for h in found]
        for hypothesis, score in zip(found, again[clip], strict=True):
            assert hypothesis.log_prob == pytest.approx(score, abs=1e-3)
            assert 36 <= len(hypothesis.tokens) <= 40


def test_width_1_takes_the_best_token_at_each_step() -> None:
    model, (features, lengths, *_) = sharp_sibling(), batch_of(2)
    found = beam_search(model, features, lengths, width=1, max_length=8)
    for clip in range(2):
        tokens: list[int] = []
        while len(tokens) < 8:
            given = torch.tensor([[*tokens, 0]])
            _, logits = model(features[[clip]], lengths[[clip]], given, torch.tensor([len(tokens)]))
            logits[..., :2] = -torch.inf
            token = int(logits[0, len(tokens)].argmax())
            if token == 2:
                break
            tokens.append(token)
        assert found[clip][0].tokens == tokens


def test_length_penalty_ranks_by_mean_log_probability() -> None:
    model, (features, lengths, *_) = sharp_sibling(), batch_of(1)
    for penalty in (0.0, 1.0, 2.0):
        found = beam_search(model, features, lengths, width=5, length_penalty=penalty, max_length=6)[0]
        for hypothesis in found:
            expected = hypothesis.log_prob / (len(hypothesis.tokens) + 1) ** penalty
            assert hypothesis.score == pytest.approx(expected)
        assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)


def test_nothing_to_score_and_errors() -> None:
    model, (features, lengths, *_) = tiny_sibling().eval(), batch_of(2)
    assert score_hypotheses(model, features, lengths, [[], []]) == [[], []]
    (scores,) = score_hypotheses(model, features[:1], lengths[:1], [[[], [5]]])
    assert len(scores) == 2
    with pytest.raises(
        ValueError, match="`width` is 0, `min_length` 0 and `max_length` 200; needed are width >= 1"
    ):
        beam_search(model, features, lengths, width=0)
    with pytest.raises(ValueError, match="`min_length` 9 and `max_length` 3"):
        beam_search(model, features, lengths, min_length=9, max_length=3)


def test_the_empty_batch_mate_of_a_long_translation_is_padding() -> None:
    """A target of length 0 is `</s>` alone; its loss is that of one token."""
    model, batch = tiny_sibling().eval(), batch_of(1)
    _, logits = model(*batch[:2], batch[4], torch.tensor([0]))
    expected = F.cross_entropy(logits[0, :1], torch.tensor([2]))
    empty = (*batch[:5], torch.tensor([0]))
    _, terms = autoregressive_loss(model, *empty, label_smoothing=0.0)
    torch.testing.assert_close(terms["cross_entropy"], expected.detach())
