"""The reward of a policy's answers by a visual reward model: with a picture, or of texts alone.

Section 6 of the RoVRM specification. The function has the signature of trl's reward functions and is called by nothing else
here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from eagleray.models.gram.policy_reward import Reward, answer_text


class Scorer(Protocol):
    """What a reward needs of a `VisualScorer`."""

    def prepare(self, prompt: str, answers: Sequence[str], image: bytes | None = None, /) -> list[Any]: ...
    def rewards(self, prepared: Sequence[Any], /) -> list[float]: ...


def visual_reward(scorer: Scorer, *, name: str) -> Reward:
    """The reward model's number for each answer; all answers of a step are one call, and each picture is encoded once.

    Args:
        scorer: The reward model.
        name: Name in trl's metrics.

    Returns:
        A function of `request`, `completions` and, for prompts with one, `picture`: the path of the picture's file. It raises
        `TooLongError` for an answer that does not fit into the model.
    """

    def reward(
        *,
        request: Sequence[str],
        completions: Sequence[Any],
        picture: Sequence[str | None] | None = None,
        **_: Any,
    ) -> list[float]:
        shown = picture or [None] * len(request)
        prepared: list[Any] = []
        # Answers to one prompt stand side by side.
        for (prompt, path), members in groupby(
            zip(request, shown, completions, strict=True), lambda row: row[:2]
        ):
            answers = [answer_text(completion) for *_, completion in members]
            prepared += scorer.prepare(prompt, answers, Path(path).read_bytes() if path else None)
        return scorer.rewards(prepared)

    reward.__name__ = name
    return reward
