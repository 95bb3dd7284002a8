import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from eagleray.platform.config import load_config, to_yaml
from eagleray.platform.data.preferences import (
    DataError,
    PreferenceData,
    PreferenceMixture,
    ReadReport,
    SourceConfig,
    load_preferences,
    load_response_pairs,
    split_by_prompt,
)

GOOD = {"prompt": "Which river?", "chosen": "Ucayali", "rejected": "Nile"}
SHARED = Path(__file__).parents[4] / "shared" / "data"


@pytest.fixture
def data(tmp_path):
    """Writes rows to a file and returns a config that reads it."""

    def write(*rows, name="rows.jsonl", **options):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return PreferenceData(sources=[SourceConfig(path=str(tmp_path / name))], **options)

    return write


def only(data):
    (pair,), _ = load_preferences(data)
    return pair


# What a row becomes


def test_fields_margin_and_the_rest(data):
    pair = only(data(GOOD | {"id": "r1", "margin": 2, "model": "m"}))
    assert (pair.id, pair.prompt_text, pair.chosen, pair.rejected) == (
        "r1",
        "Which river?",
        "Ucayali",
        "Nile",
    )
    assert pair.prompt == [{"role": "user", "content": "Which river?"}]
    assert (pair.margin, pair.extra) == (2.0, {"model": "m"})


def test_margin_from_scores_unless_given_and_none_without(data):
    scores = {"score_chosen": 8, "score_rejected": 6.5}
    assert only(data(GOOD | scores)).margin == 1.5
    assert only(data(GOOD | scores)).extra == scores
    assert only(data(GOOD | scores | {"margin": 9})).margin == 9.0
    assert only(data(GOOD | {"score_chosen": 8, "score_rejected": None, "margin": None})).margin is None


def test_columns_by_other_names(data):
    row = {"question": "Which river?", "best": "Ucayali", "worst": "Nile", "gap": 3, "key": 7, "prompt": "no"}
    columns = {"prompt": "question", "chosen": "best", "rejected": "worst", "margin": "gap", "id": "key"}
    pair = only(data(row, columns=columns))
    assert (pair.id, pair.prompt_text, pair.chosen, pair.rejected, pair.margin) == (
        "7", "Which river?", "Ucayali", "Nile", 3.0,
    )  # fmt: skip
    assert pair.extra == {"prompt": "no"}


@pytest.mark.parametrize(
    ("label", "options", "first_is_better"),
    [
        ("A", {}, True),
        ("b", {}, False),
        (" B ", {}, False),
        (1, {"label_first": 1, "label_second": 2}, True),
        (2.0, {"label_first": 1, "label_second": 2}, False),
        ("1", {"label_first": 0, "label_second": 1}, False),
        (False, {"label_first": True, "label_second": False}, False),
    ],
)
def test_label_column(data, label, options, first_is_better):
    row = {"prompt": "Which river?", "response_a": "x", "response_b": "y", "label": label, "votes": [1]}
    pair = only(data(row, **options))
    assert (pair.chosen, pair.rejected) == (("x", "y") if first_is_better else ("y", "x"))
    assert pair.extra == {"votes": [1]}


def test_ties_are_left_out_and_counted_even_where_errors_raise(data):
    labelled = {"prompt": "p", "response_a": "x", "response_b": "y", "label": "tie"}
    pairs, report = load_preferences(data(GOOD, GOOD | {"margin": 0}, labelled))
    assert len(pairs) == 1
    assert (report.read, report.kept, report.skipped) == (3, 1, {"tie": 2})
    pairs, report = load_preferences(data(GOOD | {"margin": 0}, labelled, drop_ties=False))
    assert [(pair.chosen, pair.margin) for pair in pairs] == [("Ucayali", 0.0), ("x", 0.0)]
    assert report.skipped == {}


def test_layouts_may_be_mixed_under_auto_and_null_columns_count_as_absent(data):
    nothing = {"chosen": None, "rejected": None, "response_a": None, "response_b": None, "label": None}
    transcript = {name: f"\n\nHuman: Hi\n\nAssistant: {name}" for name in ("chosen", "rejected")}
    rows = [
        nothing | GOOD,
        nothing | transcript,
        nothing | {"prompt": "p", "response_a": "x", "response_b": "y", "label": "B"},
    ]
    pairs, _ = load_preferences(data(*rows))
    assert [(pair.prompt_text, pair.chosen) for pair in pairs] == [
        ("Which river?", "Ucayali"),
        ("Hi", "chosen"),
        ("p", "y"),
    ]


def test_layout_can_be_forced(data):
    row = GOOD | {"prompt": "\n\nHuman: Hi\n\nAssistant:"}
    assert only(data(row)).prompt_text == "Hi"
    assert only(data(row, layout="hh")).prompt_text == "Hi"
    assert only(data(row, layout="trl")).prompt_text == row["prompt"]
    with pytest.raises(DataError, match="`response_a` is missing"):
        load_preferences(data(GOOD | {"label": "A"}, layout="responses"))


def test_rewrite_brings_in_a_format_of_its_own(data):
    def rewrite(values):
        if "text" not in values:
            raise ValueError("no `text`")
        prompt, chosen, rejected = values["text"].split("|")
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    rows = data({"text": "p|x|y"}, {"other": 1}, on_error="skip")
    (pair,), report = load_preferences(rows, rewrite=rewrite)
    assert (pair.prompt_text, pair.chosen, pair.rejected) == ("p", "x", "y")
    assert report.skipped == {"no `text`": 1}
    assert load_response_pairs(rows, rewrite=rewrite)[0][0].prompt_text == "p"


# Names


def test_names_are_stable_and_unique(data):
    pairs, _ = load_preferences(data(GOOD, GOOD, GOOD | {"chosen": "Amazon"}))
    again, _ = load_preferences(data(GOOD | {"chosen": "Amazon"}, GOOD, name="other.jsonl"))
    names = [pair.id for pair in pairs]
    assert names[1] == names[0] + "#2"
    assert [pair.id for pair in again] == [names[2], names[0]]
    assert names[0] == "162e5b6ee9dd83fc"  # must not change: reports and vectors refer to it


def test_given_names_that_repeat_stay_unique(data):
    pairs, _ = load_preferences(data(*(GOOD | {"id": name} for name in ("x", "x#2", "x", 5, 5, ""))))
    assert [pair.id for pair in pairs][:5] == ["x", "x#2", "x#3", "5", "5#2"]
    assert len({pair.id for pair in pairs}) == 6


# Rows that do not fit

FAULTS = [
    ("{broken", "broken JSON", "Expecting property name"),
    ("[1]", "not a JSON object", "found list"),
    ({"prompt": "x", "chosen": "a"}, "`rejected` is missing", "the row has prompt, chosen"),
    (GOOD | {"prompt": ""}, "`prompt` is empty", ""),
    (GOOD | {"prompt": [{"role": "user", "content": " "}]}, "`prompt` holds only whitespace", ""),
    (GOOD | {"chosen": ""}, "`chosen` is empty", ""),
    (GOOD | {"rejected": " \n\t"}, "`rejected` holds only whitespace", ""),
    (GOOD | {"rejected": None}, "`rejected` is null, not text", ""),
    (GOOD | {"chosen": 12}, "`chosen` is a number, not text", ""),
    (GOOD | {"rejected": " Ucayali\n"}, "`chosen` and `rejected` are equal", ""),
    (GOOD | {"chosen": "x" * 1_000_000}, "`chosen` is too long", "1000000 characters; `max_chars` is 200000"),
    (GOOD | {"prompt": "x" * 200_001}, "`prompt` is too long", "200001 characters"),
    (GOOD | {"chosen": "\ud83d cut"}, "`chosen` holds half a character", "a cut-off"),
    (GOOD | {"margin": "big"}, "`margin` is text, not a number", ""),
    (GOOD | {"margin": True}, "`margin` is true or false, not a number", ""),
    (GOOD | {"margin": float("nan")}, "`margin` is not a finite number", "nan"),
    (GOOD | {"score_chosen": 1, "score_rejected": "2"}, "`score_rejected` is text, not a number", ""),
    (GOOD | {"id": [1]}, "`id` is a list, not text or a whole number", ""),
    (
        {"prompt": "p", "response_a": "x", "response_b": "y"},
        "`label` is missing",
        "the row has prompt, response_a",
    ),
    (
        {"prompt": "p", "response_a": "x", "response_b": "y", "label": "C"},
        "`label` holds a value that is not a label",
        "given 'C'; set `label_first`, `label_second` and `label_ties` (now tie, a, b)",
    ),
]


@pytest.mark.parametrize(("row", "reason", "detail"), FAULTS)
def test_fault_stops_with_file_line_and_reason(data, row, reason, detail):
    rows = data(GOOD, row)
    with pytest.raises(DataError) as error:
        load_preferences(rows)
    expected = f"{rows.sources[0].path}:2: {reason}" + (f": {detail}" if detail else "")
    assert str(error.value).startswith(expected)


def test_faults_are_skipped_and_counted_by_reason(data):
    rows = data(GOOD, *(row for row, _, _ in FAULTS), GOOD, FAULTS[2][0], on_error="skip")
    pairs, report = load_preferences(rows)
    assert len(pairs) == report.kept == 2
    assert report.read == len(FAULTS) + 3
    assert report.skipped == {reason: 1 for _, reason, _ in FAULTS} | {"`rejected` is missing": 2}
    assert len(report.examples) == 5
    assert report.examples[0].startswith(f"{rows.sources[0].path}:2: broken JSON")


def test_no_row_left_says_why(data):
    rows = data(GOOD | {"margin": 0}, GOOD | {"chosen": ""}, on_error="skip")
    with pytest.raises(
        DataError, match=r"no row is left: read 2 rows, kept 0, left out 2 \(tie: 1, `chosen` is empty"
    ):
        load_preferences(rows)


def test_empty_file(data, tmp_path):
    rows = data(GOOD)
    (tmp_path / "empty.jsonl").touch()
    both = rows.model_copy(
        update={"sources": [*rows.sources, SourceConfig(path=str(tmp_path / "empty.jsonl"))]}
    )
    with pytest.raises(DataError, match=r"empty\.jsonl:1: the file is empty"):
        load_preferences(both)
    pairs, report = load_preferences(both.model_copy(update={"on_error": "skip"}))
    assert (len(pairs), report.skipped) == (1, {"the file is empty": 1})


def test_report_in_one_line_and_hashes_of_all_files(data, tmp_path):
    _, report = load_preferences(data(GOOD, GOOD | {"margin": 0}, GOOD | {"margin": 0}))
    assert report.summary() == "read 3 rows, kept 1, left out 2 (tie: 2)"
    assert list(report.hashes) == [str(tmp_path / "rows.jsonl")]
    assert ReadReport(read=2, kept=2).summary() == "read 2 rows, kept 2"


def test_mixture_of_files_with_different_columns(data):
    other = data({"q": "p", "good": "x", "bad": "y", "id": "1"}, GOOD | {"id": "1"}, name="other.jsonl")
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    mixed = TypeAdapter(PreferenceMixture).validate_python(
        [data(GOOD | {"id": "1"}), {**other.model_dump(), "columns": columns, "on_error": "skip"}]
    )
    pairs, report = load_preferences(mixed)
    assert [(pair.id, pair.chosen) for pair in pairs] == [("1", GOOD["chosen"]), ("1#2", "x")]
    assert (report.read, report.kept, sum(report.skipped.values()), len(report.hashes)) == (3, 2, 1, 2)
    assert TypeAdapter(PreferenceMixture).validate_python(other) == [other]


# Unlabelled pairs


def test_response_pairs_drop_every_trace_of_the_label(data):
    row = {
        "id": "u",
        "prompt": "p",
        "response_a": "x",
        "response_b": "y",
        "label": "B",
        "margin": 3,
        "model": "m",
    }
    (pair,), _ = load_response_pairs(data(row))
    assert (pair.id, pair.prompt_text, pair.response_a, pair.response_b) == ("u", "p", "x", "y")
    assert pair.extra == {"model": "m"}
    del row["label"], row["margin"]
    assert load_response_pairs(data(row))[0] == [pair]


def test_order_of_chosen_and_rejected_tells_nothing(data):
    rows = [GOOD | {"prompt": f"Question {i}", "chosen": "better", "rejected": "worse"} for i in range(400)]
    pairs, _ = load_response_pairs(data(*rows))
    first = sum(pair.response_a == "better" for pair in pairs)
    assert abs(first - 200) < 3 * 10  # three standard deviations of 400 fair coins
    assert load_response_pairs(data(*rows))[0] == pairs


def test_response_pairs_with_equal_answers_are_errors_too(data):
    with pytest.raises(DataError, match="`response_a` and `response_b` are equal"):
        load_response_pairs(data({"prompt": "p", "response_a": "x", "response_b": "x "}))


# Holding out prompts


def test_split_keeps_prompts_together_and_depends_on_the_prompt_alone(data):
    rows = [GOOD | {"prompt": f"Question {i % 200}?", "chosen": f"answer {i}"} for i in range(600)]
    pairs, _ = load_preferences(data(*rows))
    rest, held_out = split_by_prompt(pairs, fraction=0.2, seed=1)
    ours = {pair.prompt_text for pair in held_out}
    assert len(rest) + len(held_out) == 600
    assert not ours & {pair.prompt_text for pair in rest}
    assert abs(len(ours) - 40) < 3 * 5.7  # binomial, 200 prompts
    shouted = [GOOD | {"prompt": f"QUESTION  {i}!"} for i in range(200)]
    _, again = split_by_prompt(load_response_pairs(data(*shouted))[0], fraction=0.2, seed=1)
    assert {pair.prompt_text.lower().split()[1].strip("!") for pair in again} == {
        p.split()[1].strip("?") for p in ours
    }
    assert {pair.prompt_text for pair in split_by_prompt(pairs, fraction=0.2, seed=2)[1]} != ours


def test_split_refuses_impossible_fractions_and_empty_sides(data):
    pairs, _ = load_preferences(data(GOOD))
    for fraction in (0, 1, -0.5):
        with pytest.raises(ValueError, match=f"`fraction` is {fraction}; it must lie between 0 and 1"):
            split_by_prompt(pairs, fraction=fraction)
    with pytest.raises(
        ValueError, match=r"Splitting 1 prompt\(s\) by `fraction` 0.5 and `seed` 0 leaves one side"
    ):
        split_by_prompt(pairs, fraction=0.5)


# Config


def test_config_round_trips_and_resolves_paths(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(GOOD))
    path = tmp_path / "data.yaml"
    path.write_text(
        "sources: [{path: rows.jsonl}]\nlabel_first: 1\nlabel_second: 2\nlabel_ties: [0, split]\n"
    )
    data = load_config(PreferenceData, path)
    assert (data.label_first, data.label_ties) == (1, (0, "split"))
    path.write_text(to_yaml(data))
    assert load_config(PreferenceData, path) == data
    assert data.resolved(tmp_path).sources[0].path == str(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="no such file or folder"):
        data.resolved(tmp_path / "elsewhere")


# Real data, where it is at hand

VOTES = {
    "columns": {"prompt": ["instruction", "input"], "response_a": "response_1", "response_b": "response_2"},
    "label_first": 1,
    "label_second": 2,
    "label_ties": ["tie", "split"],
}


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real data in ../shared/data")
@pytest.mark.parametrize(
    ("path", "options", "read", "skipped"),
    [
        ("hh_harmless", {}, 1559, {}),
        ("ultrafeedback_small", {}, 844, {"tie": 98}),
        ("pandalm_human/dev.jsonl", VOTES, 80, {"tie": 7}),
    ],
)
def test_real_preferences(path, options, read, skipped):
    data = PreferenceData(sources=[SourceConfig(path=str(SHARED / path))], **options)
    _, report = load_preferences(data)
    assert (report.read, report.skipped) == (read, skipped)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real data in ../shared/data")
def test_real_response_pairs():
    source = SourceConfig(path=str(SHARED / "alpacaeval" / "unlabelled_dev.jsonl.gz"))
    pairs, report = load_response_pairs(PreferenceData(sources=[source]))
    assert (report.read, report.kept) == (348, 348)
    assert set(pairs[0].extra) == {"prompt_id", "model_a", "model_b"}
