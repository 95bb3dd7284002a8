"""Rewards of a policy's answers, by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from eagleray.models.gram.checks import CHECKS
from eagleray.models.gram.judge import Comparison, Pair, read_out
from eagleray.models.gram.policy_reward import answer_text, checked_reward, judge_reward, scored_reward


class Longer:
    """Prefers the longer answer by the difference of lengths; notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Pair] = []

    def compare(self, pairs: Sequence[Pair]) -> list[Comparison]:
        self.asked += pairs
        return [read_out(float(len(a) - len(b)), float(len(b) - len(a))) for _, a, b in pairs]


def test_reward_is_the_probability_to_beat_the_reference() -> None:
    """Each answer meets the reference of its prompt, all in one call; an empty one meets nobody and gets 0."""
    judge, calls = Longer(), []

    def references(prompts: Sequence[str]) -> list[str]:
        calls.append(list(prompts))
        return [{"p": "abc", "q": "z"}[prompt] for prompt in prompts]

    reward = judge_reward(judge, references, name="gram")
    found = reward(request=["p", "p", "q", "q"], completions=["abc", " abcd ", "zz", "  "])
    assert found == pytest.approx([0.5, 0.731059, 0.731059, 0.0], abs=1e-6)
    assert judge.asked == [("p", "abc", "abc"), ("p", "abcd", "abc"), ("q", "zz", "z")]
    assert calls == [["p", "q"]] and reward.__name__ == "gram"  # type: ignore[attr-defined]


def test_transforms_apply_to_empty_answers_too() -> None:
    reward = judge_reward(
        Longer(), lambda prompts: ["abc"] * len(prompts), name="x", transform="logit", clip=3
    )
    assert reward(request=["p", "p"], completions=["abc", ""]) == [0.0, -3.0]


def test_rules_and_texts_of_completions() -> None:
    messages = [{"role": "assistant", "content": "First, a. Then, b. Finally, c."}]
    assert answer_text(messages) == "First, a. Then, b. Finally, c."
    reward = checked_reward(CHECKS["steps_in_order"], name="gold")
    assert reward(completions=[messages, "Then, b. First, a."], request=["p", "p"]) == [1.0, 0.0]
    assert reward.__name__ == "gold"  # type: ignore[attr-defined]
    reward = checked_reward(CHECKS["last_number"], name="gold")
    assert reward(completions=["so 12.", "so 3."], reference=["#### 12", "#### 12"]) == [1.0, 0.0]


def test_a_discriminative_model_sees_prompt_and_answer() -> None:
    class Lengths:
        def score(self, conversations: Sequence[tuple[str, str]], /) -> list[float]:
            return [float(len(prompt) * 10 + len(answer)) for prompt, answer in conversations]

    assert scored_reward(Lengths(), name="x")(request=["p", "pp"], completions=[" abc ", ""]) == [13.0, 20.0]
