"""Rows of the benchmarks in every form they come in, and rows that do not fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from eagleray.models.gram.benchmarks import BenchmarkPair, read_benchmark

TEXTS = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
SOURCES = {
    "mmlu-pro-law": "knowledge",
    "livebench-reasoning": "reasoning",
    "livebench-math": "math",
    "livecodebench": "coding",
}


def one(name: str, row: dict[str, Any], group: str | None = None) -> BenchmarkPair:
    (pair,) = read_benchmark(name, [row], group=group)
    return pair


def test_rewardbench_row() -> None:
    row = {"id": 12, **TEXTS, "chosen_model": "m1", "rejected_model": "m2", "subset": "math-prm"}
    assert one("rewardbench", row) == BenchmarkPair(
        "12", "2+2?", "4", "5", "math-prm", None, {"chosen_model": "m1", "rejected_model": "m2"}
    )


@pytest.mark.parametrize("label", ["A>B", "B>A"])
def test_judgebench_raw_row_becomes_the_converted_one(label: str) -> None:
    answers = ("4", "5") if label == "A>B" else ("5", "4")
    common = {"pair_id": "p1", "original_id": "7", "source": "livebench-math", "response_model": "gpt-4o"}
    raw = {**common, "question": "2+2?", "response_A": answers[0], "response_B": answers[1], "label": label}
    pair = one("judgebench", raw)
    assert pair == one("judgebench", {**common, **TEXTS})
    assert (pair.id, pair.prompt, pair.chosen, pair.rejected, pair.group) == ("p1", "2+2?", "4", "5", "math")
    assert pair.extra == {"original_id": "7", "source": "livebench-math", "response_model": "gpt-4o"}


def test_judgebench_categories() -> None:
    groups = {source: one("judgebench", {"source": source, **TEXTS}).group for source in SOURCES}
    assert groups == SOURCES


def rmbench_row(**fields: Any) -> dict[str, Any]:
    answers = {"chosen": ["c0", "c1", "c2"], "rejected": ["r0", "r1", "r2"]}
    return {"id": "m1", "prompt": "2+2?", **answers, "domain": "math", **fields}


def exploded(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for i, chosen in enumerate(row["chosen"]):
        for j, rejected in enumerate(row["rejected"]):
            yield {**row, "chosen": chosen, "rejected": rejected, "matrix_id": f"{i}-{j}"}


def test_rmbench_raw_row_is_nine_pairs_as_after_the_converter() -> None:
    pairs = read_benchmark("rmbench", [rmbench_row()])
    assert pairs == read_benchmark("rmbench", exploded(rmbench_row()))
    assert [pair.cell for pair in pairs] == [(i, j) for i in range(3) for j in range(3)]
    assert pairs[5] == BenchmarkPair("m1/1-2", "2+2?", "c1", "r2", "math", (1, 2), {"item": "m1"})
    without_id = [{k: v for k, v in row.items() if k != "id"} for row in exploded(rmbench_row())]
    assert len({pair.extra["item"] for pair in read_benchmark("rmbench", without_id)}) == 1


def test_hhh_hub_row_becomes_the_converted_one() -> None:
    hub = {"input": "2+2?", "targets": {"choices": ["5", "4"], "labels": [0, 1]}}
    pair = one("hhh", hub, "honest")
    assert pair == one("hhh", {**TEXTS, "category": "honest"})
    assert (pair.chosen, pair.rejected, pair.group, pair.extra) == ("4", "5", "honest", {})
    first = {"input": "2+2?", "targets": {"choices": ["4", "5"], "labels": [1, 0]}}
    assert one("hhh", first, "honest") == pair
    assert one("hhh", {**hub, "category": "other"}, "honest").group == "other"


@pytest.mark.parametrize(("label", "answers"), [(1, ("4", "5")), (2, ("5", "4"))])
def test_llmbar_original_row_becomes_the_converted_one(label: int, answers: tuple[str, str]) -> None:
    original = {"input": "2+2?", "output_1": answers[0], "output_2": answers[1], "label": label}
    pair = one("llmbar", original, "Adversarial/GPTInst")
    assert pair == one("llmbar", {**TEXTS, "subset": "adv_gptinst"})
    assert (pair.chosen, pair.rejected, pair.group, pair.extra) == ("4", "5", "adv_gptinst", {})


def test_llmbar_subsets_under_all_their_names() -> None:
    for given, group in {
        "natural": "natural",
        "Natural": "natural",
        "LLMBar/Adversarial/Neighbor": "adv_neighbor",
        "adv_gptout": "adv_gptout",
        "Manual": "adv_manual",
        "mt_bench": "mt_bench",
        "Base-9": "Base-9",
    }.items():
        assert one("llmbar", {**TEXTS, "subset": given}).group == group


def test_ids_made_from_the_texts_do_not_depend_on_the_place() -> None:
    rows = [{**TEXTS, "category": "honest"}, {**TEXTS, "chosen": "four", "category": "honest"}]
    first, second = read_benchmark("hhh", rows)
    assert [pair.id for pair in read_benchmark("hhh", rows[::-1])] == [second.id, first.id]
    assert first.id != second.id


BAD_ROWS = [
    ("rewardbench", {**TEXTS}, r"`subset` is missing; where the file does not say it, give it as `group`"),
    (
        "rewardbench",
        {**TEXTS, "subset": "maths"},
        r"`subset` is 'maths'; it must be one of alpacaeval-easy, .*math-prm",
    ),
    ("rewardbench", {**TEXTS, "subset": "math-prm", "chosen": ["4"]}, r"`chosen` must be a text, found list"),
    (
        "rewardbench",
        {**TEXTS, "subset": "math-prm", "prompt": None},
        r"`prompt` is missing; the row has prompt",
    ),
    (
        "hhh",
        {**TEXTS, "category": "honest", "rejected": " \n"},
        r"`rejected` must be a text, found one that is empty",
    ),
    ("hhh", {**TEXTS, "category": "honest", "rejected": "4"}, r"`chosen` and `rejected` are equal"),
    ("hhh", {**TEXTS, "category": "kind"}, r"`category` is 'kind'; it must be one of harmless, helpful"),
    ("hhh", {"input": "q", "targets": "4", "category": "other"}, r"`targets` must be an object"),
    (
        "hhh",
        {"input": "q", "targets": {"choices": ["a", "b", "c"], "labels": [1, 0, 0]}, "category": "other"},
        r"`targets.choices` must be a list of two",
    ),
    (
        "hhh",
        {"input": "q", "targets": {"choices": ["a", "b"], "labels": [1, 1]}, "category": "other"},
        r"`targets.labels` is \[1, 1\]",
    ),
    ("judgebench", {**TEXTS, "source": "gsm8k"}, r"`source` is 'gsm8k'; it must start with mmlu-pro"),
    (
        "judgebench",
        {"question": "q", "response_A": "a", "response_B": "b", "label": "A=B", "source": "livecodebench"},
        r"`label` is 'A=B'; it must be one of A>B, B>A",
    ),
    (
        "llmbar",
        {"input": "q", "output_1": "a", "output_2": "b", "label": 0, "subset": "natural"},
        r"it must be 1 or 2",
    ),
    ("llmbar", {"input": "q", "output_1": "a", "label": 1, "subset": "natural"}, r"`output_2` is missing"),
    ("rmbench", rmbench_row(chosen=["a", "b"]), r"`chosen` must be a list of three texts"),
    ("rmbench", rmbench_row(rejected=["a", "b", 3]), r"`rejected` must be a text, found int"),
    ("rmbench", rmbench_row(domain="safety"), r"`domain` is 'safety'; it must be one of chat, code"),
    (
        "rmbench",
        {**TEXTS, "domain": "chat", "matrix_id": "3-0"},
        r"`matrix_id` is '3-0'; .* from '0-0' to '2-2'",
    ),
]


@pytest.mark.parametrize(("name", "row", "reason"), BAD_ROWS)
def test_a_row_that_does_not_fit_says_why(name: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_benchmark(name, [row])


def test_rows_are_read_one_at_a_time_so_the_caller_knows_which_one_is_bad() -> None:
    taken: list[int] = []

    def rows() -> Iterator[dict[str, Any]]:
        for number, rejected in enumerate(["5", "", "6"]):
            taken.append(number)
            yield {**TEXTS, "rejected": rejected, "category": "honest"}

    with pytest.raises(ValueError, match="`rejected`"):
        read_benchmark("hhh", rows())
    assert taken == [0, 1]
