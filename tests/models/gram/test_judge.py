"""Acceptance checks 13 to 17 and the self-comparison of 21: read-out, invariances, errors."""

from __future__ import annotations

import math
import threading
from itertools import product

import pytest
import torch
from builders import ARCHITECTURES, Architecture, tiny_model, tiny_tokenizer

from eagleray.models.gram.batching import pad_right
from eagleray.models.gram.judge import Judge, read_out
from eagleray.models.gram.prompts import JudgeEncoder, JudgeTemplate
from eagleray.models.gram.ranking import rank
from eagleray.models.gram.scoring import label_logits

TEMPLATE = JudgeTemplate("short", "Which is better?")
PAIRS = [
    ("Name a river.", "The Ucayali flows.", "No."),
    ("Name a river.", "No.", "Maybe the Nile, " * 9),
    ("2+2?", "4", "5"),
    ("2+2?", "", "five, " * 20),
    ("Count to twenty. " * 12, "1 2 3 4 5", "1 2 3"),
    ("Say hello", "hello 🙂", "hi <|im_end|>"),
    ("Count to twenty. " * 12, "1 2 3", "one"),
    ("x", "y", "z"),
]


def make(
    architecture: Architecture = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **options
) -> Judge:  # type: ignore[no-untyped-def]
    encoder = JudgeEncoder(tiny_tokenizer(), TEMPLATE, max_length=512)
    return Judge(tiny_model(architecture, seed=seed).to(dtype), encoder, **options)


def probabilities(judge: Judge, pairs: list[tuple[str, str, str]]) -> list[float]:
    return [result.p_a for result in judge.compare(pairs)]


def test_check_13_read_out() -> None:
    result = read_out(2.0 - 0.5, 1.2 - 0.4)
    assert result.p_order1 == pytest.approx(0.817574, abs=6e-7)
    assert result.p_order2 == pytest.approx(0.310026, abs=6e-7)
    assert result.p_a == pytest.approx(0.563800, abs=6e-7)
    assert result.p_b == pytest.approx(0.436200, abs=6e-7)
    assert not result.consistent
    assert read_out(1.5, 0.8, swap_average="logit").p_a == pytest.approx(0.586618, abs=6e-7)
    assert read_out(1.5, 0.8, swap_average="none").p_a == pytest.approx(0.817574, abs=6e-7)


def test_check_14_labels_are_normalised_not_orders() -> None:
    """Logits (A 2.0, B 0.5) and (A 1.2, B 0.4), normalised over the two orders, would give 0.581915."""
    wrong = (1 / (1 + math.exp(0.4 - 2.0)) + 1 / (1 + math.exp(1.2 - 0.5))) / 2
    assert wrong == pytest.approx(0.581915, abs=6e-7)
    for swap_average in ("prob", "logit", "none"):
        result = read_out(2.0 - 0.5, 1.2 - 0.4, swap_average=swap_average)  # type: ignore[arg-type]
        assert abs(result.p_a - wrong) > 1e-3
        assert abs(result.p_b - (1 - wrong)) > 1e-3


@pytest.mark.parametrize("swap_average", ["prob", "logit"])
def test_check_15_complement_and_self_comparison_of_the_read_out(swap_average: str) -> None:
    for delta1, delta2 in product((-800.0, -3.1, -1e-9, 0.0, 0.7, 12.3, 800.0), repeat=2):
        r = read_out(delta1, delta2, swap_average=swap_average).p_a  # type: ignore[arg-type]
        swapped = read_out(delta2, delta1, swap_average=swap_average).p_a  # type: ignore[arg-type]
        assert r + swapped == pytest.approx(1.0, abs=1e-15)
        if delta1 == delta2:
            assert r == 0.5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("swap_average", ["prob", "logit"])
def test_check_15_complement_and_self_comparison_of_a_judge(
    architecture: Architecture, swap_average: str
) -> None:
    judge = make(architecture, swap_average=swap_average, max_batch_tokens=300)
    swapped = [(prompt, b, a) for prompt, a, b in PAIRS]
    for r, r_swapped in zip(probabilities(judge, PAIRS), probabilities(judge, swapped), strict=True):
        assert r + r_swapped == pytest.approx(1.0, abs=1e-6)
    both = probabilities(judge, [*PAIRS, *swapped])
    for r, r_swapped in zip(both[: len(PAIRS)], both[len(PAIRS) :], strict=True):
        assert r + r_swapped == pytest.approx(1.0, abs=1e-15)
    selves = [(prompt, a, a) for prompt, a, _ in PAIRS]
    assert probabilities(judge, selves) == [0.5] * len(PAIRS)


@pytest.mark.parametrize(
    ("bias", "d", "r"), [(2.0, 0.3, 0.531671), (2.0, -0.3, 0.468329), (0.0, 0.3, 0.574443)]
)
def test_check_16_slot_bias_shrinks_but_keeps_the_sign(bias: float, d: float, r: float) -> None:
    assert read_out(d + bias, -d + bias).p_a == pytest.approx(r, abs=6e-7)
    assert read_out(d + bias, -d + bias, swap_average="logit").p_a == pytest.approx(1 / (1 + math.exp(-d)))


def test_check_16_sign_for_every_bias() -> None:
    for bias, d in product((-9.0, -2.0, 0.0, 0.5, 9.0), (-3.0, -0.01, 0.01, 3.0)):
        result = read_out(d + bias, -d + bias)
        assert (result.p_a > 0.5) == (d > 0)
        assert result.consistent == (abs(d) > abs(bias))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_check_17_scores_do_not_depend_on_the_batch(
    architecture: Architecture, dtype: torch.dtype, tolerance: float
) -> None:
    judge = make(architecture, dtype=dtype)
    # bf16 keeps 8 bits: the logits of this random model are scaled to the size of a trained one's.
    with torch.no_grad():
        judge.model.get_output_embeddings().weight *= 0.2  # type: ignore[operator]
    alone = [probabilities(judge, [pair])[0] for pair in PAIRS]
    for size in range(2, 9):
        for start in range(0, len(PAIRS), size):
            chunk = probabilities(judge, PAIRS[start : start + size])
            assert chunk == pytest.approx(alone[start : start + size], abs=tolerance)
    assert probabilities(judge, PAIRS[::-1]) == pytest.approx(alone[::-1], abs=tolerance)
    for max_batch_tokens in (1, 333):
        judge.max_batch_tokens = max_batch_tokens
        assert probabilities(judge, PAIRS) == pytest.approx(alone, abs=tolerance)
    assert max(alone) - min(alone) > 3 * tolerance


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_check_17_padding_side(architecture: Architecture) -> None:
    judge = make(architecture)
    prompts = [judge.encoder.encode(*pair) for pair in PAIRS]
    assert all(prompts)
    right, right_mask = pad_right(prompts)  # type: ignore[arg-type]
    left, left_mask = (t.flip(1) for t in pad_right([p[::-1] for p in prompts]))  # type: ignore[index]
    labels = judge.encoder.label_ids
    torch.testing.assert_close(
        label_logits(judge.model, right, right_mask, labels),
        label_logits(judge.model, left, left_mask, labels),
        atol=1e-5,
        rtol=0,
    )


def test_results_are_those_of_the_full_model_on_each_prompt() -> None:
    judge, tokenizer = make(), tiny_tokenizer()
    id_a, id_b = tokenizer.convert_tokens_to_ids(["A", "B"])

    def delta(prompt: str, first: str, second: str) -> float:
        ids = judge.encoder.encode(prompt, first, second)
        with torch.no_grad():
            logits = judge.model(input_ids=torch.tensor([ids])).logits[0, -1]
        return (logits[id_a] - logits[id_b]).item()

    for (prompt, a, b), result in zip(PAIRS, judge.compare(PAIRS), strict=True):
        assert result.delta1 == pytest.approx(delta(prompt, a, b), abs=1e-4)
        assert result.delta2 == pytest.approx(delta(prompt, b, a), abs=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prefix_sharing_saves_tokens_and_changes_nothing(architecture: Architecture) -> None:
    answers = [f"answer {i}, " * (i + 1) for i in range(8)]
    pairs = [("Count to twenty, slowly. " * 6, a, b) for a in answers for b in answers if a < b]
    results, tokens = [], []
    for share_prefix in (True, False):
        judge, seen = make(architecture, share_prefix=share_prefix), []
        judge.model.get_input_embeddings().register_forward_hook(  # type: ignore[operator]
            lambda module, args, output, seen=seen: seen.append(args[0].numel())
        )
        results.append(probabilities(judge, pairs))
        tokens.append(sum(seen))
    assert results[0] == pytest.approx(results[1], abs=1e-5)
    assert tokens[0] < 0.7 * tokens[1]


def test_check_21_a_sample_equal_to_the_reference_earns_exactly_one_half() -> None:
    rewards = make().reward("Name a river.", ["The Nile.", "Ucayali", "none"], "Ucayali")
    assert rewards[1] == 0.5
    assert len(set(rewards)) == 3


def test_judge_ranks() -> None:
    judge, answers = make(), ["one", "two, and more", "three", "four four four"]
    ranking = rank(judge.compare, "Count.", answers)
    assert ranking.scores is not None
    by_hand = [sum(probabilities(judge, [("Count.", a, b) for b in answers if b != a])) / 3 for a in answers]
    assert ranking.scores == pytest.approx(by_hand, abs=1e-5)


def test_training_mode_and_gradients_are_left_alone() -> None:
    judge = make()
    judge.model.train()
    judge.compare(PAIRS[:1])
    assert judge.model.training
    assert all(p.grad is None and not p.is_inference() for p in judge.model.parameters())
    judge.model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()


def test_threads_do_not_disturb_each_other() -> None:
    judge = make()
    expected, results = probabilities(judge, PAIRS), {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: probabilities(judge, PAIRS)}))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(results.values()) == [expected] * 4


def test_no_pairs() -> None:
    assert make().compare([]) == []


def test_too_long_pair_is_named_when_it_may_not_be_cut() -> None:
    encoder = JudgeEncoder(tiny_tokenizer(), TEMPLATE, max_length=256, overlong="drop")
    with pytest.raises(ValueError, match="Pair 1 is longer than `max_length` = 256 tokens"):
        Judge(tiny_model(), encoder).compare([("q", "a", "b"), ("q", "long " * 400, "b")])


def test_broken_weights_are_reported() -> None:
    judge = make()
    with torch.no_grad():
        judge.model.get_output_embeddings().weight.fill_(torch.nan)  # type: ignore[operator]
    with pytest.raises(FloatingPointError, match="not finite for 2 of 2 prompts"):
        judge.compare(PAIRS[:1])


def test_unknown_swap_average() -> None:
    with pytest.raises(ValueError, match="`swap_average` is 'mean'; it must be one of prob, logit, none"):
        make(swap_average="mean")
    with pytest.raises(ValueError, match="`swap_average` is 'mean'"):
        read_out(0.0, 1.0, swap_average="mean")  # type: ignore[arg-type]
