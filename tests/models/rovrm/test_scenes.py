"""Made-up scenes: captions by hand, and that what is told and what is described are the same things."""

from __future__ import annotations

from collections import Counter

import pytest

from eagleray.models.rovrm.scenes import CAPTIONS, MOST_THINGS, count, describe, make_scenes, read_caption


def _listed(box: str) -> Counter[str]:
    return Counter(box.removeprefix("one box: ").split(", "))


def _counted(box: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    for part in box.removeprefix("one box has ").split(", "):
        count, size, colour, shape = part.split()
        assert shape.endswith("s") == (count != "1")
        counts[f"{size} {colour} {shape.removesuffix('s')}"] += int(count)
    return counts


def test_a_caption_counts_kinds_the_most_frequent_first_then_by_words() -> None:
    square, circle, triangle = (
        ("small", "yellow", "square"),
        ("small", "blue", "circle"),
        ("big", "black", "triangle"),
    )
    boxes = [[circle, square, triangle, square], [circle], [triangle, circle]]
    assert describe(boxes) == (
        "one box has 2 small yellow squares, 1 big black triangle, 1 small blue circle; one box has 1 small blue circle; "
        "one box has 1 big black triangle, 1 small blue circle"
    )


def test_everything_in_common_is_counted() -> None:
    square, circle, triangle = (
        ("small", "yellow", "square"),
        ("small", "blue", "circle"),
        ("big", "black", "triangle"),
    )
    said = count([[circle, square, square], [circle], [triangle] + [square] * 9])
    assert dict(number.split(": ") for number in said) == {
        "yellow circles": "none",
        "yellow squares": "11",
        "yellow triangles": "none",
        "black circles": "none",
        "black squares": "none",
        "black triangles": "one",
        "blue circles": "two",
        "blue squares": "none",
        "blue triangles": "none",
        "yellow objects": "11",
        "black objects": "one",
        "blue objects": "two",
        "circles": "two",
        "squares": "11",
        "triangles": "one",
        "small objects": "13",
        "medium objects": "none",
        "big objects": "one",
        "objects": "14",
        "boxes with something yellow": "two",
        "boxes with something black": "one",
        "boxes with something blue": "two",
        "boxes with a circle": "two",
        "boxes with a square": "two",
        "boxes with a triangle": "one",
        "yellow or black objects": "yellow",
        "yellow or blue objects": "yellow",
        "black or blue objects": "blue",
    }
    assert len(said) == 28
    assert "black or blue objects: as many" in count([[circle, triangle]])


def test_numbers_are_half_of_those_of_the_caption_in_any_order() -> None:
    """A fixed order would let a model go by the place in the text in place of the words."""
    first = Counter()
    for scene in make_scenes(200, 3):
        numbers = scene.numbers.split(". ")
        assert len(set(numbers)) == 14
        assert set(numbers) < set(count(read_caption(scene.caption)))
        first[numbers[0].split(":")[0]] += 1
    assert len(first) > 20
    assert max(first.values()) < 40


def test_what_is_told_is_what_is_described() -> None:
    listed = 0
    for scene in make_scenes(400, 3):
        if scene.told == scene.caption:
            continue
        listed += 1
        for told, described in zip(scene.told.split("; "), scene.caption.split("; "), strict=True):
            assert _listed(told) == _counted(described)
            assert 1 <= _listed(told).total() <= MOST_THINGS
    # A fifth either way is more than eight standard deviations.
    assert abs(listed / 400 - (1 - CAPTIONS)) < 0.2


def test_things_are_told_in_any_order() -> None:
    """Else a model could copy without looking: of the lists with several kinds few are in the order of the caption."""
    in_order = total = 0
    for scene in make_scenes(400, 3):
        for told, described in zip(scene.told.split("; "), scene.caption.split("; "), strict=True):
            if told.startswith("one box: ") and len(_listed(told)) >= 3:
                total += 1
                in_order += list(_listed(told)) == list(_counted(described))
    assert total > 200
    assert in_order < total / 3


def test_scenes_depend_on_seed_and_split_alone() -> None:
    again = make_scenes(20, 3)
    assert make_scenes(20, 3) == again == make_scenes(40, 3)[:20]
    texts = {scene.caption for scene in again}
    assert len({scene.id for scene in again}) == 20
    for other in (make_scenes(20, 4), make_scenes(20, 3, split="eval")):
        assert not texts & {scene.caption for scene in other}
        assert not {scene.id for scene in again} & {scene.id for scene in other}


CAPTION = "one box has 2 small yellow squares, 1 big black triangle; one box has 1 small blue circle; one box has 3 big black circles"


def test_a_caption_is_read_as_the_things_it_names() -> None:
    assert read_caption(CAPTION) == [
        [("small", "yellow", "square"), ("small", "yellow", "square"), ("big", "black", "triangle")],
        [("small", "blue", "circle")],
        [("big", "black", "circle")] * 3,
    ]
    for scene in make_scenes(50, 1):
        assert describe(read_caption(scene.caption)) == scene.caption


@pytest.mark.parametrize(
    "caption",
    [
        "two red circles",
        CAPTION.replace("yellow", "green"),
        CAPTION.replace("squares", "square"),
        CAPTION + ", and a dog",
        "",
    ],
)
def test_captions_in_other_words_are_refused(caption: str) -> None:
    with pytest.raises(ValueError, match="Not a caption in the words of NLVR's"):
        make_scenes(4, 0, captions=[caption])


def test_every_other_scene_is_a_given_caption() -> None:
    scenes = make_scenes(40, 0, captions=[CAPTION])
    assert {scene.caption for scene in scenes[1::2]} == {CAPTION}
    assert CAPTION not in {scene.caption for scene in scenes[::2]}
    told = {scene.told for scene in scenes[1::2]}
    assert CAPTION in told
    assert len(told) > 2
