"""Rows in all layouts, and what is wrong with those that are refused."""

from __future__ import annotations

from typing import Any

import pytest

from eagleray.models.rovrm.records import RecordError, VisualPreference, in_form, read_row, without_marker

FACT = {
    "id": "f",
    "image": "a.png",
    "kind": "ct",
    "prompt": "State one fact.",
    "chosen": "One.",
    "rejected": "Two.",
}
FACT |= {"caption": "one box", "world": "w", "boxes": []}
OFFICIAL = {
    "id": 7,
    "image": "b.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nIs there a cat?"},
        {"from": "gpt", "value": ["Yes.", "No.", "Three."]},
    ],
}
SCIENCE = {
    "id": "s",
    "image": "images/c.png",
    "question": "Which?",
    "hint": "Look.",
    "choices": ["ice", "gas", "rock"],
    "answer": 1,
    "caption": "a table",
    "model_answers": [{"correct": True, "text": "Gas. B."}, {"correct": False, "text": "Ice. A."}],
}


def test_our_own_layout() -> None:
    row = {
        "id": "v-1",
        "phase": 3,
        "image": "1.jpg",
        "prompt": "How many?",
        "responses": ["Two.", "Five."],
        "origin": "o",
    }
    assert read_row(row) == [VisualPreference("v-1", "How many?", ("Two.", "Five."), "1.jpg", None, "o")]
    assert read_row(row | {"image": None})[0].image is None


def test_the_official_layout_keeps_the_order_and_moves_the_marker() -> None:
    [record] = read_row(OFFICIAL)
    assert (record.id, record.prompt, record.image) == ("7", "Is there a cat?", "b.jpg")
    assert record.responses == ("Yes.", "No.", "Three.")


def test_pairs_with_a_picture() -> None:
    [record] = read_row(FACT)
    assert record == VisualPreference(
        "f", "State one fact.", ("One.", "Two."), "a.png", "one box", None, "ct"
    )


def test_multiple_choice() -> None:
    records = read_row(SCIENCE)
    assert [(r.id, r.responses) for r in records] == [("s-c0", ("gas", "ice")), ("s-c2", ("gas", "rock"))]
    assert records[0].prompt == "Which?\nLook." and records[0].image == "images/c.png"
    [verdict] = read_row(SCIENCE, "verdicts")
    assert verdict.responses == ("Gas. B.", "Ice. A.")
    assert verdict.prompt == "Which?\nLook.\n(A) ice\n(B) gas\n(C) rock"


def test_forms() -> None:
    [record] = read_row(FACT)
    shown = in_form(record, "caption")
    assert shown.image is None and shown.origin == "a.png"
    assert shown.prompt == "Image description: one box\nQuestion: State one fact."
    assert in_form(record, "image") is record
    blind = in_form(record, "question")
    assert blind.image is None and blind.prompt == record.prompt
    with pytest.raises(RecordError, match="`caption` is missing"):
        in_form(read_row(FACT | {"caption": ""})[0], "caption")


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("<image>\nWhat?", "What?"),
        ("<image>What?", "What?"),
        ("What?\n<image>", "What?"),
        ("What?<image>", "What?"),
        ("Is there a cat?", "Is there a cat?"),
        ("gaming <image>", "gaming "),
    ],
)
def test_check_19_the_marker_goes_as_a_whole(prompt: str, text: str) -> None:
    assert without_marker(prompt, has_image=True) == text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (FACT | {"image": ["a.png", "b.png"]}, "more than one image: `image` lists 2"),
        (FACT | {"prompt": "<image><image> What?"}, "more than one image: the prompt holds <image> 2 times"),
        (FACT | {"image": None, "prompt": "<image>\nWhat?"}, "an image marker without an image"),
        (FACT | {"prompt": "What <image> is it?"}, "the image marker stands inside the prompt"),
        (FACT | {"image": "../../secret.png"}, "leads out of the folder of images: '../../secret.png'"),
        (FACT | {"image": "/etc/secret.png"}, "leads out of the folder of images"),
        (FACT | {"image": "http://host/a.png"}, "leads out of the folder of images"),
        (FACT | {"image": 3}, "`image` is not the name of a file: it is a int"),
        (FACT | {"chosen": "Two."}, "two of the answers are equal"),
        (FACT | {"chosen": "  "}, "an empty answer"),
        (FACT | {"chosen": None, "responses": ["x"]}, "fewer than two answers: it has 1"),
        (FACT | {"chosen": 3}, "`chosen` is not text: `chosen` is a int"),
        (FACT | {"chosen": "a <image>"}, "an image marker in an answer"),
        (FACT | {"id": None}, "`id` is missing"),
        ({"id": "x", "prompt": "p"}, "the row has no answers: its columns are id, prompt"),
        (OFFICIAL | {"conversations": [{"from": "gpt"}]}, "one turn of `human` and one of `gpt`"),
        (
            {"id": "x", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "one"}]},
            "not a list of answers, best first: a single answer is data for a policy",
        ),
        (SCIENCE | {"answer": 3}, "`answer` must be a position in `choices`: it is 3"),
    ],
)
def test_refusals(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message.replace("(", r"\(")):
        read_row(row)


def test_an_unknown_layout() -> None:
    with pytest.raises(ValueError, match="must be auto or one of ranked, official, pairs"):
        read_row(FACT, "llava")
