"""Generated pictures with facts that are true or false of them, for tests and tiny configs.

A picture is a white strip with a few coloured shapes. Scenes are taken two by two, as NLVR's facts are: both get the
same two facts, each true of one of them. So right and wrong answers have the same distribution, and a model that does
not see the picture is right in half of the cases. The caption names everything, so with it every fact can be decided.

Everything is a pure function of its arguments, down to the bytes of the PNG files.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image, ImageDraw

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "black": (0, 0, 0)}
SHAPES = ("circle", "square", "triangle")
CELL = 24
"""Pixels of the square that a shape lies in."""

Scene = tuple[tuple[str, str], ...]
"""Colour and shape of each cell, from left to right."""

_NUMBERS = ("no", "one", "two", "three", "four")
_OBJECTS = ("lamp", "river", "letter", "garden", "engine", "blanket")


def make_visual(
    n: int, seed: int, *, split: str = "train", cells: int = 4
) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Facts about pictures: `n` rows (`id`, `image`, `kind`, `prompt`, `chosen`, `rejected`, `caption`), and PNG files.

    Args:
        n: Number of rows; an odd one is rounded down.
        seed: Another seed gives other scenes.
        split: Goes into the seed and the names: the parts share no picture file.
        cells: Shapes in a picture.
    """
    rng = Random(f"visual {seed} {split}")
    rows: list[dict[str, Any]] = []
    files: dict[str, bytes] = {}
    while len(rows) + 2 <= n:
        first, second = _scene(rng, cells), _scene(rng, cells)
        facts = _differing_fact(rng, first, second)
        if facts is None:
            continue
        kind, of_first, of_second = facts
        for scene, chosen, rejected in ((first, of_first, of_second), (second, of_second, of_first)):
            name = f"{split}-{seed}-{len(rows)}.png"
            files[name] = draw(scene)
            rows.append(
                {
                    "id": f"v-{split}-{seed}-{len(rows)}",
                    "image": name,
                    "kind": kind,
                    "prompt": "State one fact about the picture.",
                    "chosen": chosen,
                    "rejected": rejected,
                    "caption": caption(scene),
                }
            )
    return rows, files


def make_text(n: int, seed: int, *, split: str = "train") -> list[dict[str, Any]]:
    """Text pairs for phase 1: the better answer says how often a list names a thing, the worse one how often another does.

    Lists are taken two by two, as scenes are, so that no number is right more often than another. An odd `n` is
    rounded down.
    """
    rng = Random(f"text {seed} {split}")
    rows: list[dict[str, Any]] = []
    while len(rows) + 2 <= n:
        thing = rng.choice(_OBJECTS)
        lists = [[rng.choice((thing, *_OBJECTS)) for _ in range(4)] for _ in range(2)]
        counts = [things.count(thing) for things in lists]
        if counts[0] == counts[1]:
            continue
        for things, right, wrong in zip(lists, counts, counts[::-1], strict=True):
            rows.append(
                {
                    "id": f"t-{split}-{seed}-{len(rows)}",
                    "prompt": f"A list: {', '.join(things)}. How many times does it name the {thing}?",
                    "chosen": f"It names the {thing} {_NUMBERS[right]} times.",
                    "rejected": f"It names the {thing} {_NUMBERS[wrong]} times.",
                }
            )
    return rows


def write_visual(folder: str | Path, n: int, seed: int, *, split: str = "train", cells: int = 4) -> Path:
    """Write rows and pictures: `<split>.jsonl` and `images/` in a folder; the path of the rows."""
    rows, files = make_visual(n, seed, split=split, cells=cells)
    images = Path(folder) / "images"
    images.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (images / name).write_bytes(content)
    path = Path(folder) / f"{split}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def draw(scene: Scene) -> bytes:
    """The scene as a PNG file."""
    image = Image.new("RGB", (CELL * len(scene), CELL), "white")
    pen = ImageDraw.Draw(image)
    for place, (colour, shape) in enumerate(scene):
        left, right, top, bottom = place * CELL + 3, place * CELL + CELL - 4, 3, CELL - 4
        if shape == "circle":
            pen.ellipse((left, top, right, bottom), fill=COLOURS[colour])
        elif shape == "square":
            pen.rectangle((left, top, right, bottom), fill=COLOURS[colour])
        else:
            pen.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=COLOURS[colour])
    with io.BytesIO() as file:
        image.save(file, format="PNG")
        return file.getvalue()


def caption(scene: Scene) -> str:
    """All shapes by colour and kind, with their numbers."""
    counts = Counter(scene)
    parts = [f"{_NUMBERS[counts[item]]} {item[0]} {item[1]}" for item in sorted(counts)]
    return "; ".join(parts)


def _scene(rng: Random, cells: int) -> Scene:
    return tuple((rng.choice(list(COLOURS)), rng.choice(SHAPES)) for _ in range(cells))


def _differing_fact(rng: Random, first: Scene, second: Scene) -> tuple[str, str, str] | None:
    """Kind of fact, the fact of the first scene and that of the second; None if the scenes agree on all."""
    options: list[tuple[str, str, str]] = []
    for position, names, text in (
        (0, tuple(COLOURS), "The number of {} shapes is {}."),
        (1, SHAPES, "The number of shapes that are a {} is {}."),
    ):
        for name in names:
            counts = [sum(item[position] == name for item in scene) for scene in (first, second)]
            if counts[0] != counts[1]:
                kind = ("colour", "shape")[position]
                of_first, of_second = (text.format(name, _NUMBERS[count]) for count in counts)
                options.append((kind, of_first, of_second))
    return rng.choice(options) if options else None
