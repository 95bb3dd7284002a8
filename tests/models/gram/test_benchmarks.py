"""Figures of the benchmarks: acceptance checks 23 to 27, parts that are missing, and the real files."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eagleray.models.gram.benchmark_formats import REWARDBENCH_SECTIONS
from eagleray.models.gram.benchmarks import (
    BENCHMARKS,
    BenchmarkPair,
    benchmark_metrics,
    check_benchmark,
    macro_micro,
    read_benchmark,
    reasoning_score,
    strictly_correct,
    style_accuracies,
)
from eagleray.models.gram.judge import Comparison, read_out

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"

WON, LOST, TIED = read_out(1.0, -1.0), read_out(-1.0, 1.0), read_out(0.0, 0.0)
TEXTS = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}


def verdicts(right: int, wrong: int) -> list[Comparison]:
    return [WON] * right + [LOST] * wrong


def pairs_of(counts: dict[str, int]) -> list[BenchmarkPair]:
    return [
        BenchmarkPair(f"{group}-{i}", "q", "a", "b", group) for group, n in counts.items() for i in range(n)
    ]


def rmbench_row(**fields: Any) -> dict[str, Any]:
    answers = {"chosen": ["c0", "c1", "c2"], "rejected": ["r0", "r1", "r2"]}
    return {"id": "m1", "prompt": "2+2?", **answers, "domain": "math", **fields}


# Acceptance checks


def test_check_23_reasoning_and_sections_of_rewardbench() -> None:
    assert reasoning_score(0.8, 0.9) == pytest.approx(0.85, abs=1e-6)
    assert reasoning_score(0.8, 0.9, weighting="pooled") == pytest.approx(0.868763, abs=1e-6)
    assert macro_micro([0.95, 0.75, 0.88, 0.85], [1] * 4)[0] == pytest.approx(0.8575, abs=1e-6)
    sizes = {section: sum(subsets.values()) for section, subsets in REWARDBENCH_SECTIONS.items()}
    assert sizes == {"chat": 358, "chat_hard": 456, "safety": 740, "reasoning": 1431}
    assert sum(sizes.values()) == 2985
    assert sum(len(subsets) for subsets in REWARDBENCH_SECTIONS.values()) == 23


def test_check_23_on_a_whole_rewardbench() -> None:
    """Right in 340, 342, 655 pairs of the first sections, 358 of 447 in maths and 886 of 984 in code."""
    right = {"chat": 340, "chat_hard": 342, "safety": 655}
    pairs, comparisons = [], []
    for section, subsets in REWARDBENCH_SECTIONS.items():
        pairs += pairs_of(subsets)
        if section != "reasoning":
            size = sum(subsets.values())
            comparisons += verdicts(right[section], size - right[section])
    comparisons += verdicts(358, 89) + verdicts(886, 98)
    means = [340 / 358, 342 / 456, 655 / 740]
    for weighting, reasoning in (("official", (358 / 447 + 886 / 984) / 2), ("pooled", 1244 / 1431)):
        report = benchmark_metrics("rewardbench", pairs, comparisons, reasoning_weighting=weighting)
        assert report["sections"]["reasoning"]["accuracy"] == pytest.approx(reasoning)
        assert report["overall"] == pytest.approx(np.mean([*means, reasoning]))
        assert report["reasoning_weighting"] == weighting
        assert report["missing_subsets"] == []
        assert [section["pairs"] for section in report["sections"].values()] == [358, 456, 740, 1431]
    assert report["pairs"] == 2985
    # The leaderboard's own recipe: accuracies of subsets weighted by its counts, where math-prm counts 984.
    subsets = {name: found["accuracy"] for name, found in report["subsets"].items()}
    counts = {name: 984 if name == "math-prm" else n for name, n in REWARDBENCH_SECTIONS["reasoning"].items()}
    leaderboard = np.average([subsets[name] for name in counts], weights=list(counts.values()))
    assert leaderboard == pytest.approx((358 / 447 + 886 / 984) / 2)


JUDGEBENCH_COUNTS = {"knowledge": (97, 154), "reasoning": (63, 98), "math": (50, 56), "coding": (29, 42)}
JUDGEBENCH_SOURCES = ("mmlu-pro-law", "livebench-reasoning", "livebench-math", "livecodebench")


def test_check_24_averages_of_judgebench() -> None:
    rows = [
        {"pair_id": f"{source}-{i}", "source": source, **TEXTS}
        for source, (_, size) in zip(JUDGEBENCH_SOURCES, JUDGEBENCH_COUNTS.values(), strict=True)
        for i in range(size)
    ]
    comparisons = [v for right, size in JUDGEBENCH_COUNTS.values() for v in verdicts(right, size - right)]
    report = benchmark_metrics("judgebench", read_benchmark("judgebench", rows), comparisons)
    for metric in (report["strict"], report["avgprob"]):
        accuracies = {name: round(100 * group["accuracy"], 2) for name, group in metric["groups"].items()}
        assert accuracies == {"knowledge": 62.99, "reasoning": 64.29, "math": 89.29, "coding": 69.05}
        assert 100 * metric["macro"] == pytest.approx(71.4015, abs=1e-4)
        assert 100 * metric["micro"] == pytest.approx(68.2857, abs=1e-4)
        assert metric["missing_groups"] == []
    # The script of the release averages the 350 pairs together with the four accuracies of the groups.
    faulty = np.mean(
        [c.p_a > 0.5 for c in comparisons] + [g["accuracy"] for g in report["avgprob"]["groups"].values()]
    )
    assert 100 * faulty == pytest.approx(68.3209, abs=1e-4)


@pytest.mark.parametrize(
    ("first", "second", "correct"),
    [
        ("right", "right", True),
        ("right", "tie", True),
        ("tie", "right", True),
        ("right", "wrong", False),
        ("wrong", "right", False),
        ("tie", "tie", False),
        ("wrong", "tie", False),
        ("wrong", "wrong", False),
    ],
)
def test_check_25_strict_rule_of_judgebench(first: str, second: str, correct: bool) -> None:
    margins = {"right": 3.0, "tie": 0.0, "wrong": -1.0}
    assert strictly_correct(read_out(margins[first], -margins[second])) is correct


def test_strict_and_averaged_rule_differ_where_the_orders_disagree() -> None:
    pairs = read_benchmark("judgebench", [{"source": "livebench-math", **TEXTS}])
    report = benchmark_metrics("judgebench", pairs, [read_out(3.0, 1.0)])
    assert (report["strict"]["micro"], report["avgprob"]["micro"]) == (0.0, 1.0)


def test_check_26_styles_of_rm_bench() -> None:
    figures = style_accuracies([[0.7, 0.5, 0.3], [0.8, 0.6, 0.5], [0.9, 0.8, 0.7]])
    assert figures == pytest.approx(
        {"hard": 0.433333, "normal": 0.666667, "easy": 0.833333, "accuracy": 0.644444}, abs=1e-6
    )
    assert figures["accuracy"] == pytest.approx((figures["hard"] + figures["normal"] + figures["easy"]) / 3)


def test_check_26_from_judged_pairs() -> None:
    """Ten prompts of which 10 · M[i][j] win cell (i, j)."""
    matrix = np.array([[7, 5, 3], [8, 6, 5], [9, 8, 7]])
    pairs = read_benchmark("rmbench", [rmbench_row(id=f"m{k}") for k in range(10)])
    comparisons = [
        WON if k < matrix[pair.cell] else LOST for k, pair in zip(np.repeat(range(10), 9), pairs, strict=True)
    ]
    report = benchmark_metrics("rmbench", pairs, comparisons)
    assert report["all_prompts"] == pytest.approx(style_accuracies(matrix / 10))
    assert [report["overall"], report["accuracy"]] == pytest.approx([0.644444] * 2, abs=1e-6)


def test_check_27_averages_of_hhh() -> None:
    macro, micro = macro_micro([0.9, 0.8, 0.85, 0.7], [58, 59, 61, 43])
    assert (macro, micro) == pytest.approx((0.8125, 0.820588), abs=1e-6)
    counts = {"harmless": (52, 58), "helpful": (47, 59), "honest": (52, 61), "other": (30, 43)}
    pairs = pairs_of({name: size for name, (_, size) in counts.items()})
    report = benchmark_metrics(
        "hhh", pairs, [v for right, size in counts.values() for v in verdicts(right, size - right)]
    )
    assert report["micro"] == report["accuracy"] == pytest.approx(181 / 221)
    assert report["macro"] == pytest.approx((52 / 58 + 47 / 59 + 52 / 61 + 30 / 43) / 4)


# Figures


def test_missing_parts_of_rewardbench_are_named_and_left_out() -> None:
    pairs = pairs_of({"alpacaeval-easy": 4, "math-prm": 2, "hep-go": 8})
    comparisons = [*verdicts(3, 1), *verdicts(1, 1), *verdicts(8, 0)]
    report = benchmark_metrics("rewardbench", pairs, comparisons)
    assert report["sections"] == {
        "chat": {"accuracy": 0.75, "pairs": 4, "official_pairs": 358},
        "reasoning": {"accuracy": 0.75, "pairs": 10, "official_pairs": 1431},
    }
    assert report["overall"] == 0.75
    assert len(report["missing_subsets"]) == 20
    pooled = benchmark_metrics("rewardbench", pairs, comparisons, reasoning_weighting="pooled")
    assert pooled["sections"]["reasoning"]["accuracy"] == pytest.approx(0.9)
    only_maths = benchmark_metrics("rewardbench", pairs[4:6], comparisons[4:6])
    assert only_maths["overall"] == 0.5


def test_ties_are_wrong_everywhere() -> None:
    for name, rows in {
        "rewardbench": [{**TEXTS, "subset": "math-prm"}],
        "judgebench": [{**TEXTS, "source": "livecodebench"}],
        "rmbench": [rmbench_row()],
        "hhh": [{**TEXTS, "category": "other"}],
        "llmbar": [{**TEXTS, "subset": "natural"}],
    }.items():
        pairs = read_benchmark(name, rows)
        report = benchmark_metrics(name, pairs, [TIED] * len(pairs))
        assert (report["benchmark"], report["accuracy"], report["ties"]) == (name, 0.0, 1.0)
        headline = (
            report["strict"]["micro"] if name == "judgebench" else report.get("overall", report.get("micro"))
        )
        assert headline == 0.0


def test_judgebench_for_each_model_that_answered() -> None:
    rows = [{**TEXTS, "source": "livecodebench", "response_model": model} for model in ("m1", "m1", "m2")]
    report = benchmark_metrics("judgebench", read_benchmark("judgebench", rows), [WON, LOST, WON])
    assert report["avgprob"]["micro"] == pytest.approx(2 / 3)
    assert {m: found["strict"]["micro"] for m, found in report["by_response_model"].items()} == {
        "m1": 0.5,
        "m2": 1.0,
    }
    assert report["strict"]["missing_groups"] == ["knowledge", "reasoning", "math"]


def test_rmbench_domains_and_safety_pooled_by_count() -> None:
    """Three refusal prompts all won and one response prompt all lost: safety 3/4, not 1/2."""
    rows = [rmbench_row(id=str(i), domain="safety-refuse") for i in range(3)]
    rows += [rmbench_row(id="0", domain="safety-response"), rmbench_row(id="0", domain="chat")]
    pairs = read_benchmark("rmbench", rows)
    diagonal = [WON if pair.cell and pair.cell[0] >= pair.cell[1] else LOST for pair in pairs[36:]]
    report = benchmark_metrics("rmbench", pairs, [WON] * 27 + [LOST] * 9 + diagonal)
    domains = report["domains"]
    assert {name: round(found["accuracy"], 6) for name, found in domains.items()} == {
        "chat": 0.666667,
        "safety": 0.75,
        "safety-refuse": 1.0,
        "safety-response": 0.0,
    }
    assert (domains["chat"]["hard"], domains["chat"]["normal"], domains["chat"]["easy"]) == (0.0, 1.0, 1.0)
    assert report["overall"] == pytest.approx((2 / 3 + 0.75) / 2)
    assert report["all_prompts"]["hard"] == pytest.approx(3 / 5)
    assert (report["prompts"], domains["safety"]["prompts"]) == (5, 4)
    assert report["missing_domains"] == ["code", "math"]


def test_rmbench_does_not_depend_on_the_order_of_rows() -> None:
    pairs = read_benchmark("rmbench", [rmbench_row(id=str(i)) for i in range(4)])
    rng = np.random.default_rng(0)
    comparisons = [read_out(margin, -margin) for margin in rng.normal(size=len(pairs)).tolist()]
    order = rng.permutation(len(pairs)).tolist()
    shuffled = benchmark_metrics("rmbench", [pairs[i] for i in order], [comparisons[i] for i in order])
    assert shuffled == benchmark_metrics("rmbench", pairs, comparisons)


def test_rmbench_prompts_without_all_nine_cells_are_refused_before_judging() -> None:
    pairs = read_benchmark("rmbench", [rmbench_row(), rmbench_row(id="m2")])
    check_benchmark("rmbench", pairs)
    with pytest.raises(ValueError, match=r"'m2' \(math\) has 7 of 9 comparisons; missing: 0-1, 2-2"):
        check_benchmark("rmbench", [*pairs[:10], *pairs[11:17]])
    with pytest.raises(ValueError, match=r"'m1' \(math\) has the comparison \(0, 0\) twice"):
        check_benchmark("rmbench", [*pairs, pairs[0]])
    with pytest.raises(ValueError, match=r"1 of 9"):
        benchmark_metrics("rmbench", pairs[:1], [WON])


def test_llmbar_averages_only_its_own_subsets() -> None:
    pairs = pairs_of({"natural": 2, "adv_manual": 1, "adv_neighbor": 4, "mt_bench": 3})
    report = benchmark_metrics("llmbar", pairs, [*verdicts(2, 0), LOST, *verdicts(2, 2), *verdicts(3, 0)])
    assert (report["natural"], report["adversarial"]) == (1.0, 0.25)
    assert (report["macro"], report["micro"]) == (0.5, pytest.approx(4 / 7))
    assert report["groups"]["mt_bench"] == {"accuracy": 1.0, "pairs": 3}
    assert (report["accuracy"], report["missing_groups"]) == (0.7, ["adv_gptinst", "adv_gptout"])
    other = benchmark_metrics("llmbar", pairs_of({"mt_bench": 1}), [WON])
    assert (other["macro"], other["natural"], other["adversarial"]) == (None, None, None)


def test_figures_without_prompts_that_were_trained_on() -> None:
    rows = [{**TEXTS, "subset": "natural", "prompt_in_train": seen} for seen in (True, False, False)]
    report = benchmark_metrics("llmbar", read_benchmark("llmbar", rows), [WON, WON, LOST])
    assert report["micro"] == pytest.approx(2 / 3)
    assert report["without_prompts_in_train"]["micro"] == 0.5
    unseen = benchmark_metrics("llmbar", read_benchmark("llmbar", rows[1:]), [WON, LOST])
    assert "without_prompts_in_train" not in unseen


@pytest.mark.parametrize(
    "call", [lambda: read_benchmark("mmlu", []), lambda: benchmark_metrics("mmlu", [], [])]
)
def test_unknown_benchmarks_are_refused(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"no benchmark 'mmlu'; known are rewardbench, judgebench, rmbench"):
        call()


def test_unknown_weighting_missing_pairs_and_unequal_lengths_are_refused() -> None:
    pairs = pairs_of({"math-prm": 1, "hep-go": 1})
    with pytest.raises(
        ValueError, match=r"`reasoning_weighting` is 'half'; it must be one of official, pooled"
    ):
        benchmark_metrics("rewardbench", pairs, [WON, WON], reasoning_weighting="half")
    with pytest.raises(ValueError, match="no pairs of 'hhh'"):
        benchmark_metrics("hhh", [], [])
    with pytest.raises(ValueError, match="2 pairs but 1 comparisons"):
        benchmark_metrics("rewardbench", pairs, [WON])


# Real files


def real_pairs(name: str, file: str) -> list[BenchmarkPair]:
    path = DATA / file
    if not path.is_file():
        pytest.skip(f"no data at ../shared/data/{file}")
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    pairs = read_benchmark(name, [json.loads(line) for line in content.decode().split("\n") if line])
    check_benchmark(name, pairs)
    return pairs


def longer_answer(pairs: Sequence[BenchmarkPair]) -> list[Comparison]:
    margins = [float(np.sign(len(pair.chosen) - len(pair.rejected))) for pair in pairs]
    return [read_out(margin, -margin) for margin in margins]


def test_real_judgebench() -> None:
    pairs = real_pairs("judgebench", "judgebench/test.jsonl.gz")
    assert Counter(pair.group for pair in pairs) == {
        "knowledge": 146,
        "reasoning": 70,
        "math": 46,
        "coding": 28,
    }
    report = benchmark_metrics("judgebench", pairs, longer_answer(pairs))
    assert report["strict"] == report["avgprob"]  # a scorer without slots
    assert {
        m: sum(g["pairs"] for g in found["strict"]["groups"].values())
        for m, found in report["by_response_model"].items()
    } == {
        "claude-3-5-sonnet-20240620": 126,
        "gpt-4o-2024-05-13": 164,
    }


def test_real_rmbench() -> None:
    pairs = real_pairs("rmbench", "rm_bench/test.jsonl.gz")
    assert len(pairs) == 460 * 9
    report = benchmark_metrics("rmbench", pairs, longer_answer(pairs))
    assert {name: found["prompts"] for name, found in report["domains"].items()} == {
        "chat": 119,
        "code": 101,
        "safety": 240,
        "safety-refuse": 159,
        "safety-response": 81,
    }
    assert report["missing_domains"] == ["math"]
    # Richer styles are longer: length is right below the diagonal and wrong above it.
    assert report["all_prompts"]["easy"] > 0.8
    assert report["all_prompts"]["hard"] < 0.2
    assert report["without_prompts_in_train"]["prompts"] == 460 - 91


def test_real_hhh() -> None:
    pairs = real_pairs("hhh", "hhh_alignment/test.jsonl")
    report = benchmark_metrics("hhh", pairs, longer_answer(pairs))
    counts = {name: group["pairs"] for name, group in report["groups"].items()}
    assert counts == {"harmless": 23, "helpful": 21, "honest": 42, "other": 27}
    assert round(report["micro"], 2) == 0.66  # as its description says


def test_real_llmbar() -> None:
    pairs = real_pairs("llmbar", "llmbar/test.jsonl")
    report = benchmark_metrics("llmbar", pairs, longer_answer(pairs))
    assert report["pairs"] == 296 and report["missing_groups"] == []
    # As its description says, which counts the four equal lengths half.
    assert report["accuracy"] + report["ties"] / 2 == pytest.approx(0.365, abs=5e-4)
    assert report["adversarial"] < 0.25 < report["natural"]  # where length is made to mislead
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_every_benchmark_gives_json() -> None:
    groups = {"rewardbench": "math-prm", "judgebench": "knowledge", "hhh": "other", "llmbar": "natural"}
    for name in BENCHMARKS:
        pairs = (
            read_benchmark("rmbench", [rmbench_row()]) if name == "rmbench" else pairs_of({groups[name]: 2})
        )
        report = benchmark_metrics(name, pairs, [WON] * len(pairs))
        assert json.loads(json.dumps(report, allow_nan=False)) == report
