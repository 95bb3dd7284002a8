"""Generated pairs of two preference types with rated answers, so that type, label and margin are known.

- Type `length`: the answer with more sentences is better; its score is their number.
- Type `banned`: both answers have the same number of sentences; one mistake a banned word, its score 6 minus the mistakes.

Requests and sentences come from the same lists for both types. Everything is a function of the arguments.
"""

from __future__ import annotations

from random import Random
from typing import Any

MAX_GAP = 5.0
"""Largest difference of two scores."""
BANNED = "damn"

_TOPICS = (
    "stove",
    "garden",
    "boat",
    "lamp",
    "kettle",
    "shelf",
    "bicycle",
    "tent",
    "piano",
    "well",
    "roof",
    "cart",
)
_REQUESTS = (
    "How do I care for the {}?",
    "Tell me about the {}.",
    "What helps with the {}?",
    "Is the {} useful?",
)
_SENTENCES: tuple[str, ...] = (
    "Keep it dry and clean.",
    "Use a soft cloth.",
    "Look at it once a week.",
    "Ask a neighbour for help.",
    "Oil the moving parts.",
    "Store it in the shade.",
    "Read the note on its side.",
    "Check the screws first.",
    "Cover it over night.",
    "Write down what you did.",
)


def make_typed_pairs(pairs: int, seed: int, *, split: str = "train") -> list[dict[str, Any]]:
    """Rows with `id, prompt, chosen, rejected, tags, score_chosen, score_rejected`; types take turns.

    Args:
        pairs: Number of rows.
        seed: Another seed gives other rows of the same distribution.
        split: Part of every prompt, so that the parts share none.
    """
    rng = Random(f"typed {seed} {split}")
    rows = []
    for i in range(pairs):
        kind = ("length", "banned")[i % 2]
        prompt = f"{rng.choice(_REQUESTS).format(rng.choice(_TOPICS))} ({split} {i})"
        (better, high), (worse, low) = _by_length(rng) if kind == "length" else _by_banned_word(rng)
        rows.append(
            {
                "id": f"{split}-{seed}-{i:05d}",
                "prompt": prompt,
                "chosen": better,
                "rejected": worse,
                "tags": [kind],
                "score_chosen": high,
                "score_rejected": low,
            }
        )
    return rows


def _by_length(rng: Random) -> list[tuple[str, float]]:
    more, fewer = sorted(rng.sample(range(1, 7), 2), reverse=True)
    return [(" ".join(rng.choices(_SENTENCES, k=n)), float(n)) for n in (more, fewer)]


def _by_banned_word(rng: Random) -> list[tuple[str, float]]:
    count, mistakes = rng.randint(3, 5), rng.randint(1, 5)
    good, bad = (rng.choices(_SENTENCES, k=count) for _ in range(2))
    for _ in range(mistakes):
        place = rng.randrange(count)
        bad[place] = f"{bad[place][:-1]} {BANNED}."
    return [(" ".join(good), 6.0), (" ".join(bad), 6.0 - mistakes)]
