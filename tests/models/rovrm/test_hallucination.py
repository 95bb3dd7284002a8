"""Figures of hallucination benchmarks against sums done by hand."""

from __future__ import annotations

import pytest

from eagleray.models.rovrm.hallucination import (
    Vocabulary,
    amber_discriminative_figures,
    amber_generative_figures,
    chair_figures,
    mmhal_figures,
    parse_rating,
)
from eagleray.models.rovrm.records import RecordError, read_row


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Fine.\nRating: 5, very informative", 5),
        ("rating: 0", 0),
        ("Rating: 4 or Rating: 2", None),
        ("Rating: 3. Again: Rating: 3", 3),
        ("Rating: 12", None),
        ("no idea", None),
    ],
)
def test_a_rating_is_read_where_there_is_exactly_one(reply: str, rating: int | None) -> None:
    assert parse_rating(reply) == rating


def test_mmhal_figures() -> None:
    found = mmhal_figures([6, 2, None, 3], ["counting", "other", "counting", "other"])
    assert found["score"] == 2.75 and found["hallucination_rate"] == 0.5 and found["unreadable"] == 1
    assert found["informativeness"] == pytest.approx(5 / 12)
    assert found["score_by_type"] == {"counting": 3.0, "other": 2.5}


def test_names_are_found_in_plurals_and_in_two_words() -> None:
    lines = ["person, man, woman, child", "dog, puppy", "hot dog", "knife", "bus", "glass, wine glass"]
    vocabulary = Vocabulary.from_synonyms(lines)
    text = "Two women and three Children ate hot dogs with knives; puppies on buses. A wine glass, no dogma, a glassy man."
    assert vocabulary.mentions(text) == [
        ("woman", "person"),
        ("child", "person"),
        ("hot dog", "hot dog"),
        ("knife", "knife"),
        ("puppy", "dog"),
        ("bus", "bus"),
        ("wine glass", "glass"),
        ("man", "person"),
    ]


def test_chair_figures() -> None:
    found = chair_figures([["dog", "dog", "cat"], ["tree"], []], [{"dog"}, {"tree", "car"}, {"cat"}])
    assert found["chair_s"] == pytest.approx(1 / 3) and found["chair_s_refined"] == 0.5
    assert found["chair_i"] == 0.25 and found["recall"] == 0.5
    assert chair_figures([[]], [set()])["chair_i"] is None


def test_amber_descriptions() -> None:
    annotations = {
        1: {"truth": ["dog", "beach"], "hallu": ["sea", "person"]},
        2: {"truth": ["sky"], "hallu": ["sun"]},
    }
    association = {
        "dog": ["puppy"],
        "beach": ["sand", "shore"],
        "sea": ["ocean"],
        "person": ["man"],
        "sky": [],
        "sun": [],
        "picture": [],
    }
    answers = {1: "Puppies on the sand by the ocean; a man in the picture.", 2: "The sky."}
    found = amber_generative_figures(answers, annotations, association, ["picture"])
    # Named: puppy, sand, ocean, man, picture; sky. False: ocean and man.
    assert found["chair"] == pytest.approx(2 / 6) and found["hal"] == 0.5
    assert found["cover"] == 1.0 and found["cog"] == pytest.approx(2 / 3)
    safe = amber_generative_figures(answers, annotations, association, ["picture", "man"])
    assert safe["chair"] == pytest.approx(1 / 6) and safe["cog"] == pytest.approx(1 / 3)


def test_amber_questions() -> None:
    annotations = {
        5: {"type": "discriminative-hallucination", "truth": "yes"},
        6: {"type": "discriminative-attribute-state", "truth": "no"},
        7: {"type": "relation", "truth": "no"},
        8: {"type": "discriminative-attribute-action", "truth": "yes"},
    }
    found = amber_discriminative_figures({5: "Yes", 6: "No.", 7: "yes, it is", 8: "Perhaps"}, annotations)
    assert found["all"] == {
        "questions": 4,
        "accuracy": 0.5,
        "precision": 1.0,
        "recall": 0.5,
        "f1": pytest.approx(2 / 3),
        "unreadable": 1,
    }
    assert {name: part["questions"] for name, part in found.items()} == {
        "all": 4,
        "existence": 1,
        "attribute": 2,
        "relation": 1,
    }
    assert found["relation"]["precision"] is None and found["relation"]["f1"] == 0.0


def test_vl_reward_bench_rows() -> None:
    row = {
        "id": "RLAIF-V-12",
        "query": "What is there?",
        "response": ["A cat.", "A dog."],
        "human_ranking": [1, 0],
        "image": "a.jpg",
    }
    [record] = read_row(row)
    assert (
        record.responses == ("A dog.", "A cat.")
        and record.group == "hallucination"
        and record.image == "a.jpg"
    )
    groups = {
        "mathverse_3": "reasoning",
        "mmmu-1": "reasoning",
        "wildvision-7": "general",
        "RLHF-V-1": "hallucination",
    }
    for name, group in groups.items():
        assert read_row(row | {"id": name})[0].group == group
    with pytest.raises(RecordError, match="`human_ranking` is no ranking: it is \\[1, 1\\]"):
        read_row(row | {"human_ranking": [1, 1]})
    with pytest.raises(RecordError, match="must be lists of one length"):
        read_row(row | {"human_ranking": [0]})
