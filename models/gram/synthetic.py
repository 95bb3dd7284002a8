"""Generated preference pairs with a known rule, unlabelled pairs, and plain text from the same grammar.

The rule: *the better answer answers the question that was asked; the worse one answers another question about the
same thing.* ("Where is the lamp?" — "It stands near the river." against "It is made of brass.") Both answers of a
pair are drawn from one distribution over kinds of answer, wordings, styles and lengths, so an answer on its own says
nothing about its label: the longer answer and any bag of words of the answers are at chance, and only a model that
matches answer and question can do better. Which answer goes with which question is something a language model of a
few layers learns by predicting the next token; a judge has to bring it to bear on two answers at once.

Everything is a pure function of its arguments. A request belongs to exactly one of train, dev and test by a hash
of its text, whatever the seed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from eagleray.models.gram.judge import Comparison, read_out

Split = Literal["train", "dev", "test"]


@dataclass(frozen=True)
class Kind:
    """One kind of question: how it is asked, how it is answered, and the values that its answers give."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    values: tuple[str, ...]


KINDS = {
    "colour": Kind(
        ("What colour is {thing}?", "Which colour does {thing} have?", "Can you name the colour of {thing}?"),
        (
            "{it} is {value}.",
            "{it} is painted {value}.",
            "The colour is {value}.",
            "I would call it {value}.",
        ),
        tuple(["red", "blue", "green", "yellow", "black", "white", "grey", "brown", "purple", "orange", "pink", "golden"]),
    ),
    "place": Kind(
        ("Where is {thing}?", "Where can I find {thing}?", "In which place is {thing} kept?"),
        (
            "{it} stands near the {value}.",
            "Look near the {value}.",
            "{it} is kept at the {value}.",
            "Go to the {value}.",
        ),
        tuple(["river", "church", "market", "harbour", "station", "bridge", "school", "mill", "park", "inn", "library", "farm"]),
    ),
    "owner": Kind(
        ("Who owns {thing}?", "Whose is {thing}?", "To whom does {thing} belong?"),
        (
            "{it} belongs to {value}.",
            "The owner is {value}.",
            "{value} owns it.",
            "Ask {value}, who owns it.",
        ),
        tuple(["Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "Jacob", "Karen", "Leo"]),
    ),
    "price": Kind(
        ("How much is {thing}?", "What does {thing} cost?", "What is the price of {thing}?"),
        (
            "{it} costs {value} coins.",
            "The price is {value} coins.",
            "You pay {value} coins.",
            "They ask {value} coins.",
        ),
        tuple(["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "twenty"]),
    ),
    "material": Kind(
        ("What is {thing} made of?", "Which material is {thing} made from?", "Of what stuff is {thing}?"),
        (
            "{it} is made of {value}.",
            "The maker used {value}.",
            "{it} is solid {value}.",
            "The stuff is {value}.",
        ),
        tuple(["wood", "iron", "glass", "brass", "stone", "clay", "paper", "leather", "silver", "wool", "copper", "marble"]),
    ),
    "time": Kind(
        ("When was {thing} bought?", "When did {thing} come here?", "Since when do we have {thing}?"),
        (
            "{it} came in {value}.",
            "{it} was bought in {value}.",
            "We have it since {value}.",
            "That was in {value}.",
        ),
        tuple(["spring", "summer", "autumn", "winter", "January", "March", "April", "June", "July", "August", "October", "December"]),
    ),
}

_THINGS = ["lamp", "chair", "table", "boat", "clock", "mirror", "basket", "kettle", "ladder", "carpet", "piano", "violin", "drum", "bicycle", "cart", "wagon", "bench", "bottle", "blanket", "pillow", "hammer", "shovel", "bucket", "candle", "painting", "statue", "vase", "cup", "bowl", "plate", "knife", "spoon", "hat", "coat", "scarf", "umbrella", "box", "chest", "door", "gate"]
_ADJECTIVES = ["old", "new", "small", "large", "heavy", "broken", "round", "pretty"]
_GREETINGS = ("", "", "", "Hello. ", "Please. ")
_OPENINGS = ("", "", "", "Well, ", "Sure, ")
_CLOSINGS = ("", "", "", " I think.", " That is all.", " Really.")
_MAX_STATEMENTS = 2


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


def make_corpus(n_chars: int, seed: int) -> str:
    """Exactly `n_chars` characters of plain text: requests of the train part, each followed by a fitting answer."""
    rng = Random(f"corpus {seed}")
    pieces: list[str] = []
    length = 0
    while length < n_chars:
        request, answer, _ = next(_triples(rng, "train"))
        pieces.append(f"{request}\n{answer}\n\n")
        length += len(pieces[-1])
    return "".join(pieces)[:n_chars]


class RuleJudge:
    """The perfect judge: a pair scorer that knows the rule. Its accuracy is the ceiling, `1 - label_noise`."""

    certainty = 20.0
    """|Z_a - Z_b| of a pair that the rule decides."""

    def compare(self, pairs: Sequence[tuple[str, str, str]]) -> list[Comparison]:
        """All but certain about a pair of which exactly one answer fits the request, 0.5 otherwise."""
        deltas = [self.certainty * (fits(prompt, a) - fits(prompt, b)) for prompt, a, b in pairs]
        return [read_out(delta, -delta) for delta in deltas]


def fits(request: str, answer: str) -> bool:
    """Whether the answer is of the kind that the request asks for."""
    (asked,) = (
        name for name, kind in KINDS.items() if any(_pattern(q).search(request) for q in kind.questions)
    )
    return any(value in re.findall(r"\w+", answer) for value in KINDS[asked].values)


def split_of(request: str) -> Split:
    """The part a request belongs to: 80 % train, 10 % dev, 10 % test by the hash of its text."""
    bucket = int(hashlib.sha256(request.encode()).hexdigest()[:8], 16) % 10
    return "dev" if bucket == 8 else "test" if bucket == 9 else "train"


def _triples(rng: Random, split: Split) -> Iterator[tuple[str, str, str]]:
    """Request, fitting answer, other answer."""
    while True:
        asked, other = rng.sample(sorted(KINDS), 2)
        noun = rng.choice(_THINGS)
        thing = f"the {rng.choice(_ADJECTIVES)} {noun}"
        question = rng.choice(KINDS[asked].questions).format(thing=thing)
        request = rng.choice(_GREETINGS) + question
        worse = _answer(rng, KINDS[other], noun)
        answers = _answer(rng, KINDS[asked], noun), worse
        if split_of(request) == split:
            yield request, *answers


def _answer(rng: Random, kind: Kind, noun: str) -> str:
    sentences = []
    for template in rng.sample(kind.answers, rng.randint(1, _MAX_STATEMENTS)):
        sentences.append(template.format(it=rng.choice(("It", f"The {noun}")), value=rng.choice(kind.values)))
    return rng.choice(_OPENINGS) + " ".join(sentences) + rng.choice(_CLOSINGS)


def _pattern(question: str) -> re.Pattern[str]:
    return re.compile(re.escape(question).replace(re.escape("{thing}"), r"the \w+ \w+"))
