"""Generated preference pairs with a known rule, unlabelled pairs, and plain text from the same grammar.

The rule: *the better answer gives its three steps in order; the worse one gives them out of order.* Requests, steps,
openings and endings of both answers come from the same distributions, so neither length nor words nor word pairs tell
the answers apart: the longer answer and a bag of words are at chance. A transformer of two layers learns to look for
what stands before "First" within a few hundred steps, because the two answers of a pair can be told apart by either.

Everything is a pure function of its arguments. A request belongs to exactly one of train, dev and test by a hash of
its text, whatever the seed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any, Literal

from eagleray.models.gram.judge import Comparison, Pair, read_out

Split = Literal["train", "dev", "test"]

MARKERS = (("First,", "To begin,"), ("Then,", "After that,"), ("Finally,", "At the end,"))
"""Wordings of each position of a step."""

_GREETINGS = ("", "Hello. ", "Please. ", "One question. ")
_QUESTIONS = (
    "How do I {verb} the {adjective} {thing}?",
    "Tell me how to {verb} the {adjective} {thing}.",
    "What are the steps to {verb} the {adjective} {thing}?",
    "I want to {verb} the {adjective} {thing}. What should I do?",
    "Can you explain how to {verb} the {adjective} {thing}?",
    "Help me {verb} the {adjective} {thing}.",
)
_OPENINGS = (
    "You need the {thing}.",
    "It is easier with the {thing}.",
    "Do not forget the {thing}.",
    "Find the {thing}.",
)
_ENDINGS = (
    "Mind the {thing}.",
    "Keep the {thing}.",
    "Put away the {thing}.",
    "Thank the owner of the {thing}.",
)
_WORDS = {
    "verb": ["fix", "clean", "paint", "carry", "build", "open", "repair", "move", "pack", "wash"],
    "adjective": ["old", "small", "wooden", "heavy", "new", "broken", "green", "dusty", "round", "good"],
    "thing": [
        "door",
        "wall",
        "tree",
        "cart",
        "shelf",
        "lamp",
        "coat",
        "stove",
        "bag",
        "table",
        "horse",
        "knife",
        "boat",
        "rope",
        "cloth",
        "box",
        "wheel",
        "lid",
        "floor",
        "plank",
        "cup",
        "valve",
        "board",
        "chair",
    ],
    "action": [
        "warm",
        "cut",
        "fold",
        "turn",
        "press",
        "tie",
        "wipe",
        "lift",
        "fill",
        "check",
        "close",
        "stir",
        "count",
        "dry",
        "measure",
        "hold",
    ],
}


def make_preferences(
    n: int, seed: int, *, split: Split = "train", label_noise: float = 0.0
) -> list[dict[str, Any]]:
    """Labelled pairs in TRL preference format: `id`, `prompt`, `chosen`, `rejected`.

    Args:
        n: Number of rows.
        seed: Another seed gives other rows of the same distribution.
        split: Which part the requests come from; the parts share no request.
        label_noise: Share of rows whose label is flipped at random, in [0, 0.5). A perfect judge is then right in
            a share `1 - label_noise` of the rows.
    """
    if not 0.0 <= label_noise < 0.5:
        raise ValueError(f"`label_noise` is {label_noise}; it must be in [0, 0.5).")
    rng = Random(f"preferences {seed} {split}")
    rows: list[dict[str, Any]] = []
    for index, (request, better, worse) in zip(range(n), _triples(rng, split), strict=False):
        flipped = rng.random() < label_noise
        chosen, rejected = (worse, better) if flipped else (better, worse)
        rows.append(
            {"id": f"{split}-{seed}-{index}", "prompt": request, "chosen": chosen, "rejected": rejected}
        )
    return rows


def make_unlabelled(n: int, seed: int, *, split: Split = "train") -> list[dict[str, Any]]:
    """Pairs in random order without a label, for stage 1: `id`, `prompt`, `response_a`, `response_b`."""
    rng = Random(f"unlabelled {seed} {split}")
    rows: list[dict[str, Any]] = []
    for index, (request, *answers) in zip(range(n), _triples(rng, split), strict=False):
        rng.shuffle(answers)
        row = {"prompt": request, "response_a": answers[0], "response_b": answers[1]}
        rows.append({"id": f"unlabelled-{split}-{seed}-{index}", **row})
    return rows


def make_candidates(n: int, size: int, seed: int, *, split: Split = "test") -> list[dict[str, Any]]:
    """Prompts with several answers of known quality, for best-of-n: `id`, `prompt`, `candidates` of `text`, `score`.

    Args:
        n: Number of prompts.
        size: Answers to each, with their steps in any order.
        seed: Another seed gives other rows of the same distribution.
        split: Which part the requests come from.
    """
    rng = Random(f"candidates {seed} {split}")
    rows: list[dict[str, Any]] = []
    for index in range(n):
        prompt = _request(rng, split)
        answers = [_answer(rng, rng.sample(range(3), 3)) for _ in range(size)]
        candidates = [{"text": answer, "score": order_score(answer)} for answer in answers]
        rows.append({"id": f"candidates-{split}-{seed}-{index}", "prompt": prompt, "candidates": candidates})
    return rows


def make_corpus(n_chars: int, seed: int) -> str:
    """Exactly `n_chars` characters of plain text: requests of the train part, each followed by a good answer."""
    rng = Random(f"corpus {seed}")
    pieces: list[str] = []
    length = 0
    while length < n_chars:
        pieces.append(f"{_request(rng, 'train')}\n{_answer(rng, (0, 1, 2))}\n\n")
        length += len(pieces[-1])
    return "".join(pieces)[:n_chars]


class RuleJudge:
    """The perfect judge: a pair scorer that knows the rule. Its accuracy is the ceiling, `1 - label_noise`."""

    def compare(self, pairs: Sequence[Pair]) -> list[Comparison]:
        """All but certain about a pair of which exactly one answer is in order, 0.5 otherwise."""
        deltas = [20.0 * (in_order(first) - in_order(second)) for _, first, second in pairs]
        return [read_out(delta, -delta) for delta in deltas]


def in_order(answer: str) -> bool:
    """Whether the steps of an answer stand in their order."""
    return order_score(answer) == 1.0


def order_score(answer: str) -> float:
    """Share of the three pairs of steps that stand in their order; a pair of which a step is missing does not count.

    >>> order_score("First, a. Finally, b. Then, c.")
    0.6666666666666666
    """
    places = [min((answer.find(word) for word in words if word in answer), default=None) for words in MARKERS]
    pairs = ((places[i], places[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    return sum(first is not None and second is not None and first < second for first, second in pairs) / 3


def split_of(request: str) -> Split:
    """The part a request belongs to: 80 % train, 10 % dev, 10 % test by the hash of its text."""
    bucket = int(hashlib.sha256(request.encode()).hexdigest()[:8], 16) % 10
    return "dev" if bucket == 8 else "test" if bucket == 9 else "train"


def _triples(rng: Random, split: Split) -> Iterator[tuple[str, str, str]]:
    """Request, answer in order, answer out of order."""
    while True:
        wrong = (0, 1, 2)
        while wrong == (0, 1, 2):
            wrong = tuple(rng.sample(range(3), 3))
        yield _request(rng, split), _answer(rng, (0, 1, 2)), _answer(rng, wrong)


def _request(rng: Random, split: Split) -> str:
    while True:
        request = _fill(rng, rng.choice(_GREETINGS) + rng.choice(_QUESTIONS))
        if split_of(request) == split:
            return request


def _answer(rng: Random, order: Sequence[int]) -> str:
    # An opening and an ending always stand there, and all end with a thing as the steps do: otherwise the words
    # before "First" and after the last step would give the order away.
    steps = [_fill(rng, f"{rng.choice(MARKERS[place])} {{action}} the {{thing}}.") for place in order]
    return " ".join([_fill(rng, rng.choice(_OPENINGS)), *steps, _fill(rng, rng.choice(_ENDINGS))])


def _fill(rng: Random, template: str) -> str:
    return re.sub(r"\{(\w+)\}", lambda slot: rng.choice(_WORDS[slot.group(1)]), template)
