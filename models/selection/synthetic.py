"""Generated preference pairs of two kinds, of which a selection has to find one.

`picture`: questions such as are asked about a picture, answered by a statement; the worse answer says something else of
it. `kitchen`: unrelated requests for advice. The `source` of a pair is its kind. No prompt occurs twice, and prompts of
different seeds differ: each carries a number made from the seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Literal

Kind = Literal["picture", "kitchen"]

_THINGS = ("cup", "dog", "ball", "chair", "kite", "boat", "hat", "bird", "car", "lamp")
_COLOURS = ("red", "blue", "green", "yellow", "black", "white")
_PLACES = ("on the table", "left of the door", "behind the fence", "under the tree", "beside the window")
_FOODS = ("bread", "soup", "rice", "beans", "cake", "stew", "pasta", "salad")
_ACTIONS = ("keep", "warm", "store", "season", "cook", "freeze", "serve")
_QUESTIONS = (
    "How many {thing}s are {place} in picture {number}?",
    "What colour is the {thing} {place} in picture {number}?",
    "Is the {thing} {place} in picture {number}?",
    "What stands {place} in picture {number}, a {thing} or something else?",
)
_REQUESTS = (
    "How do I {action} {food} for {number} guests?",
    "Tell me how to {action} {food} after {number} minutes.",
    "What is a good way to {action} {food}, recipe {number}?",
    "My {food} has waited {number} hours. Can I still {action} it?",
)


def planted_pairs(
    count: int, *, seed: int, kinds: Sequence[Kind] = ("picture", "kitchen")
) -> list[dict[str, str]]:
    """Rows with id, source, prompt, chosen and rejected; the kinds take turns."""
    return [_pair(index, seed, kinds[index % len(kinds)]) for index in range(count)]


def _pair(index: int, seed: int, kind: Kind) -> dict[str, str]:
    rng = Random(f"{seed}/{index}")
    words = {"number": str(seed * 1_000_003 + index), "place": rng.choice(_PLACES)}
    thing, other = rng.sample(_THINGS, 2)
    food, action = rng.choice(_FOODS), rng.choice(_ACTIONS)
    colour, wrong = rng.sample(_COLOURS, 2)
    if kind == "picture":
        prompt = rng.choice(_QUESTIONS).format(thing=thing, **words)
        chosen, rejected = f"I see a {colour} {thing}.", f"I see a {wrong} {other}."
    else:
        prompt = rng.choice(_REQUESTS).format(food=food, action=action, **words)
        chosen, rejected = f"Use fresh {food} and salt.", f"Do not {action} anything."
    return {
        "id": f"{kind}-{seed}-{index:06d}",
        "source": kind,
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
    }
