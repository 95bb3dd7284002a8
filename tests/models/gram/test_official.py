"""Official GRAM files: both stages, and the faults that other readers of them have."""

from __future__ import annotations

import pytest

from eagleray.models.gram.official import labelled_row, unlabelled_row
from eagleray.models.gram.prompts import JudgeTemplate, render_pair

ANSWERS = ("The Ucayali {really}.\n\nIt is long }.", "Probably the Nile, says “{x}” \\n.")


def test_stage_2_row_of_any_wording() -> None:
    template = JudgeTemplate(name="other", instruction="Some other judge text.\n\nOf two paragraphs.")
    row = {
        "instruction": template.render("Name a river in Peru.", *ANSWERS),
        "input": "",
        "output": "B",
        "id": "7",
    }
    assert labelled_row(row) == {
        "id": "7",
        "prompt": "Name a river in Peru.",
        "response_a": ANSWERS[0],
        "response_b": ANSWERS[1],
        "label": "B",
    }


def test_stage_1_row() -> None:
    user, assistant = render_pair("Name a river in Peru.", *ANSWERS)
    row = unlabelled_row({"instruction": user, "input": "", "output": assistant})
    assert row == {"prompt": "Name a river in Peru.", "response_a": ANSWERS[0], "response_b": ANSWERS[1]}


def test_input_is_joined_by_a_line_break() -> None:
    _, assistant = render_pair("", "yes", "no")
    row = unlabelled_row({"instruction": "[User Question]\nIs it?", "input": "Say why.", "output": assistant})
    assert row["prompt"] == "Is it?\nSay why."


def test_line_breaks_written_out_by_the_official_converter() -> None:
    """Around markers they become line breaks; the answers, which mention one at either end, stay as they are."""
    answers = (r"Print \n twice: \n\n", r"\n is a line break.")
    user, assistant = render_pair("What is it?", *answers)
    expected = {"prompt": "What is it?", "response_a": answers[0], "response_b": answers[1]}
    assert unlabelled_row({"instruction": user, "input": "", "output": assistant}) == expected
    user, assistant = render_pair("What is it?", "one", "two")
    row = {"instruction": user, "input": "", "output": assistant}
    written = {name: value.replace("\n", r"\n") for name, value in row.items()}
    assert unlabelled_row(written) == unlabelled_row(row)
    judge = JudgeTemplate("t", "judge").render("What is it?", "one", "two")
    assert labelled_row({"instruction": judge.replace("\n", r"\n"), "output": "A"})["response_b"] == "two"


def test_stray_chat_tokens_are_removed_and_nothing_else() -> None:
    user, assistant = render_pair("Write <b>|x|</b>.", "Done.<|im_end|>", "a <| b |> c")
    row = unlabelled_row({"instruction": user, "output": assistant})
    assert (row["prompt"], row["response_a"], row["response_b"]) == (
        "Write <b>|x|</b>.",
        "Done.",
        "a <| b |> c",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": "C"}, "`output` is 'C'; a stage 2 row has A or B"),
        ({"output": " "}, "`output` is missing or empty"),
        ({"instruction": None}, "`instruction` is missing or empty"),
        ({"instruction": "no markers"}, "has no line"),
        ({"instruction": "x\n\n[User Question]\nq"}, r"has 0 times .*Start of Assistant A's Answer"),
    ],
)
def test_faulty_rows_say_what_is_wrong(change: dict[str, object], message: str) -> None:
    good = {"instruction": JudgeTemplate("t", "judge").render("q", "one", "two"), "input": "", "output": "A"}
    assert labelled_row(good)["label"] == "A"
    with pytest.raises(ValueError, match=message):
        labelled_row({**good, **change})
