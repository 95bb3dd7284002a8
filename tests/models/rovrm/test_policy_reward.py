"""The visual reward of a policy's answers: grouped by prompt and picture, and equal to the scorer's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rovrm_cases import BLUE, RED, tiny_llava

from eagleray.models.rovrm.policy_reward import visual_reward
from eagleray.models.rovrm.scoring import VisualScorer


def test_answers_to_one_prompt_about_one_picture_are_prepared_together(tmp_path: Path) -> None:
    asked: list[Any] = []

    class Noted:
        def prepare(self, prompt: str, answers: Sequence[str], image: bytes | None = None, /) -> list[Any]:
            asked.append((prompt, list(answers), image))
            return list(answers)

        def rewards(self, prepared: Sequence[Any], /) -> list[float]:
            return [float(len(answer)) for answer in prepared]

    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode())
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    reward = visual_reward(Noted(), name="rovrm")
    found = reward(request=["p"] * 4, completions=["x", " yy ", "x", ""], picture=[a, a, b, b])
    assert found == [1.0, 2.0, 1.0, 0.0] and reward.__name__ == "rovrm"  # type: ignore[attr-defined]
    assert asked == [("p", ["x", "yy"], b"a"), ("p", ["x", ""], b"b")]
    asked.clear()
    assert reward(request=["p", "q"], completions=["x", "y"]) == [1.0, 1.0]
    assert asked == [("p", ["x"], None), ("q", ["y"], None)]


def test_rewards_are_those_of_the_scorer(tmp_path: Path) -> None:
    model, encoder = tiny_llava()
    scorer = VisualScorer(model, encoder)
    files = []
    for name, content in (("red", RED), ("blue", BLUE)):
        (tmp_path / name).write_bytes(content)
        files.append(str(tmp_path / name))
    found = visual_reward(scorer, name="x")(
        request=["What is there?"] * 4,
        completions=[[{"role": "assistant", "content": text}] for text in ("a circle", "a square") * 2],
        picture=[files[0], files[0], files[1], files[1]],
    )
    expected = [r for c in (RED, BLUE) for r in scorer.score("What is there?", ["a circle", "a square"], c)]
    assert found == pytest.approx(expected, abs=1e-5) and len(set(found)) == 4
