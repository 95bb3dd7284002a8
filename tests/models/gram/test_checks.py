"""Rules that grade answers, by hand and on marked solutions."""

from __future__ import annotations

import gzip
import json
from decimal import Decimal
from pathlib import Path

import pytest

from eagleray.models.gram.checks import CHECKS, last_number, same_last_number

GSM8K = Path(__file__).parents[4] / "shared" / "data" / "gsm8k_solutions" / "dev.jsonl.gz"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 42.", "42"),
        ("It costs $1,234.50, then.", "1234.5"),
        ("8 - 3 = <<8-3=5>>5 apples", "5"),
        ("It falls to -7", "-7"),
        ("7-3", "3"),
        ("(2)-3", "3"),
        ("3, 4,", "4"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


def test_equal_numbers_may_be_written_differently() -> None:
    assert same_last_number("70.00", "#### 70") == same_last_number("1,000", "1000") == 1.0
    assert same_last_number("no idea", "#### 70") == same_last_number("71", "#### 70") == 0.0
    with pytest.raises(ValueError, match="'none' holds no number"):
        same_last_number("1", "none")


def test_every_rule_takes_answer_and_reference() -> None:
    assert {name: check("First, 1. Then, 2. Finally, 3.", "3") for name, check in CHECKS.items()} == {
        "steps_in_order": 1.0,
        "last_number": 1.0,
    }


@pytest.mark.skipif(
    not GSM8K.is_file(), reason="the marked GSM8K solutions are not beside the working folder"
)
def test_the_rule_agrees_with_the_marks_of_gsm8k() -> None:
    """The data's own marks compare final numbers too."""
    rows = [json.loads(line) for line in gzip.decompress(GSM8K.read_bytes()).splitlines()]
    agree = [
        (same_last_number(c["text"], row["reference"]) == 1.0) == c["is_correct"]
        for row in rows
        for c in row["candidates"]
    ]
    assert len(agree) == 528 and all(agree)
