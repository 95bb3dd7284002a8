"""Scenes in the words of NLVR's captions: texts from which a small language model learns to read.

A scene is three boxes of things. It is told as a list of its things in any order, one mention each. It is described by a
caption, which counts the things of each kind, and by its numbers, which count everything that colours, shapes, sizes and
boxes have in common. To get from the list to either a model has to find what belongs together and to count it; and a
picture is such a list too, of what is seen at each place. So a tower that is aligned with this language model has to say
what is where, and what the model learns from captions later can hold for pictures (docs/rovrm.md).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from random import Random

SIZES: tuple[str, ...] = ("small", "medium", "big")
COLOURS: tuple[str, ...] = ("yellow", "black", "blue")
SHAPES: tuple[str, ...] = ("circle", "square", "triangle")
BOXES = 3
MOST_THINGS = 7
"""Most things in a box."""
CAPTIONS = 0.3
"""Share of scenes that are told by their caption, so that counts are read as well as counted."""

NUMBERS_PROMPT = "Count what is in the picture."
"""What a scene's numbers are the answer to."""

_NUMERALS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_THINGS = re.compile(rf"(\d+) ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})s?")

Thing = tuple[str, str, str]
"""Size, colour and shape."""


@dataclass(frozen=True, slots=True)
class Scene:
    """A scene in words."""

    id: str
    told: str
    """Every thing on its own; or the caption."""
    caption: str
    """The things of each box by kind, with their numbers, as NLVR's structures are put into words."""
    numbers: str
    """Half of what `count` says of them, in any order."""


def make_scenes(n: int, seed: int, *, split: str = "train", captions: Sequence[str] = ()) -> list[Scene]:
    """`n` scenes; a pure function of its arguments.

    Args:
        n: Number of scenes.
        seed: Another seed gives other scenes.
        split: Goes into the seed and the names.
        captions: Every other scene is one of these, told anew; the rest are made up, and all of them if there are none.

    Raises:
        ValueError: A caption is not in the words of NLVR's.
    """
    rng = Random(f"scenes {seed} {split}")
    known = [(read_caption(caption), caption) for caption in captions]
    scenes = []
    for i in range(n):
        if known and i % 2:
            boxes, caption = rng.choice(known)
        else:
            boxes = [_box(rng) for _ in range(BOXES)]
            caption = describe(boxes)
        told, numbers = _told(rng, boxes, caption), count(boxes)
        some = ". ".join(rng.sample(numbers, len(numbers) // 2))
        scenes.append(Scene(f"s-{split}-{seed}-{i}", told, caption, some))
    return scenes


def describe(boxes: list[list[Thing]]) -> str:
    """The caption of boxes: kinds of things with their numbers, the most frequent first, then by words."""
    return "; ".join(f"one box has {_counted(things)}" for things in boxes)


def count(boxes: list[list[Thing]]) -> list[str]:
    """How many things have a colour and a shape, a colour, a shape, a size, or are there at all; how many boxes hold one of
    a colour or a shape; which of two colours has more.
    """
    kinds: dict[str, tuple[str, ...]] = {
        **{f"{colour} {shape}s": (colour, shape) for colour, shape in product(COLOURS, SHAPES)},
        **{f"{colour} objects": (colour,) for colour in COLOURS},
        **{f"{shape}s": (shape,) for shape in SHAPES},
        **{f"{size} objects": (size,) for size in SIZES},
        "objects": (),
    }
    of_boxes = {
        **{f"boxes with something {colour}": colour for colour in COLOURS},
        **{f"boxes with a {shape}": shape for shape in SHAPES},
    }
    things = [thing for box in boxes for thing in box]
    numbers = {name: sum(set(kind) <= set(thing) for thing in things) for name, kind in kinds.items()}
    numbers |= {
        name: sum(any(kind in thing for thing in box) for box in boxes) for name, kind in of_boxes.items()
    }
    said = [
        f"{name}: {_NUMERALS[number] if number < len(_NUMERALS) else number}"
        for name, number in numbers.items()
    ]
    for one, other in combinations(COLOURS, 2):
        difference = numbers[f"{one} objects"] - numbers[f"{other} objects"]
        more = one if difference > 0 else other if difference < 0 else "as many"
        said.append(f"{one} or {other} objects: {more}")
    return said


def read_caption(caption: str) -> list[list[Thing]]:
    """The things of each box.

    Raises:
        ValueError: The caption is not one that `describe` could have written, but for the order of kinds.
    """
    boxes = [_THINGS.findall(box) for box in caption.split("; ")]
    things = [[(a, b, c) for count, a, b, c in found for _ in range(int(count))] for found in boxes]
    if sorted(_words(describe(things))) != sorted(_words(caption)):
        raise ValueError(
            f"Not a caption in the words of NLVR's, {describe([[('big', 'blue', 'circle')]])!r}: {caption!r}."
        )
    return things


def _words(caption: str) -> list[str]:
    return re.split(r"[,;]? ", caption)


def _counted(things: list[Thing]) -> str:
    kinds = sorted(Counter(things).items(), key=lambda kind: (-kind[1], kind[0]))
    return ", ".join(f"{count} {' '.join(thing)}{'s' if count > 1 else ''}" for thing, count in kinds)


def _told(rng: Random, boxes: list[list[Thing]], caption: str) -> str:
    """The caption, or every thing on its own and in any order inside its box."""
    if rng.random() < CAPTIONS:
        return caption
    listed = [", ".join(map(" ".join, rng.sample(things, len(things)))) for things in boxes]
    return "; ".join(f"one box: {things}" for things in listed)


def _box(rng: Random) -> list[Thing]:
    """Things, few more often than many. There are few kinds of them, as equal things are rare among all 27."""
    count = min(rng.randint(1, MOST_THINGS) for _ in range(2))
    kinds = rng.sample(list(product(SIZES, COLOURS, SHAPES)), rng.randint(1, count))
    return kinds + rng.choices(kinds, k=count - len(kinds))
