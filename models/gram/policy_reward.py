"""Rewards for a policy's answers: a GRAM judge against reference answers, and gold rewards to watch it by.

Section 6 of the GRAM specification: the reward of a sampled answer is r(x, y; y_ref) of equation 5 against a reference
answer to the same prompt. All answers of a step are judged in one call, so that the judge fills its batches by tokens and
computes what answers to one prompt have in common once.

The functions have the signature of trl's reward functions and are called by nothing else here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from eagleray.models.gram.alignment import RewardTransform, transform_reward
from eagleray.models.gram.judge import Pair
from eagleray.models.gram.ranking import HasProbability

Reward = Callable[..., list[float]]
References = Callable[[Sequence[str]], Sequence[str]]
"""Prompts to reference answers."""


class Comparer(Protocol):
    """What a reward needs of a judge."""

    def compare(self, pairs: Sequence[Pair], /) -> Sequence[HasProbability]: ...


class Scorer(Protocol):
    """What a reward needs of a discriminative reward model."""

    def score(self, conversations: Sequence[tuple[str, str]], /) -> list[float]: ...


def judge_reward(
    judge: Comparer,
    references: References,
    *,
    name: str,
    transform: RewardTransform = "prob",
    clip: float = 5.0,
) -> Reward:
    """The probability that an answer beats the reference, as a reward.

    An empty answer beats nothing: its probability is 0, and it is not shown to the judge.

    Args:
        judge: Compares pairs.
        references: Gives each prompt's reference; called once a step with the prompts without repetition.
        name: Name in trl's metrics.
        transform: As in `transform_reward`.
        clip: As in `transform_reward`.
    """

    def reward(*, request: Sequence[str], completions: Sequence[Any], **_: Any) -> list[float]:
        answers = [answer_text(completion) for completion in completions]
        prompts = list(dict.fromkeys(request))
        known = dict(zip(prompts, references(prompts), strict=True))
        shown = [i for i, answer in enumerate(answers) if answer]
        probability_B = torch.zeros(len(answers))
        for i, verdict in zip(
            shown, judge.compare([(request[i], answers[i], known[request[i]]) for i in shown]), strict=True
        ):
            probability_B[i] = float(verdict.p_a)
        return transform_reward(probability_B, transform, clip=clip).tolist()

    reward.__name__ = name
    return reward


def checked_reward(check: Callable[[str, str], float], *, name: str) -> Reward:
    """A rule of `checks` as a reward; prompts with a reference have it in the column `reference`."""

    def reward(
        *, completions: Sequence[Any], reference: Sequence[str] | None = None, **_: Any
    ) -> list[float]:
        known = reference or [""] * len(completions)
        return [check(answer_text(c), r) for c, r in zip(completions, known, strict=True)]

    reward.__name__ = name
    return reward


def scored_reward(scorer: Scorer, *, name: str) -> Reward:
    """The number that a discriminative reward model gives an answer."""

    def reward(*, request: Sequence[str], completions: Sequence[Any], **_: Any) -> list[float]:
        return scorer.score([(p, answer_text(c)) for p, c in zip(request, completions, strict=True)])

    reward.__name__ = name
    return reward


def answer_text(completion: Any) -> str:
    """The answer in a completion of trl: plain text, or the messages of an assistant."""
    text = completion if isinstance(completion, str) else "".join(m["content"] for m in completion)
    return text.strip()
