"""Rows of RewardBench, JudgeBench, RM-Bench, HHH and LLMBar as pairs with a known better answer (section 10).

Each reader takes one parsed JSON object, in the form the benchmark is published in or in the common
converted form (`prompt`, `chosen`, `rejected`), and gives the pairs it stands for: nine for a raw RM-Bench
row, else one. A row that does not fit raises a `ValueError` with the reason; the caller knows file and line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]

REWARDBENCH_SECTIONS: dict[str, dict[str, int]] = {
    "chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "chat_hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "reasoning": {
        "math-prm": 447,
        **{f"hep-{language}": 164 for language in ("cpp", "go", "java", "js", "python", "rust")},
    },
}
"""Subsets of each section of RewardBench with their number of pairs in the filtered set, 2985 together."""

JUDGEBENCH_CATEGORIES = {
    "mmlu-pro": "knowledge",
    "livebench-reasoning": "reasoning",
    "livebench-math": "math",
    "livecodebench": "coding",
}
"""Category by the start of `source`."""

RMBENCH_DOMAINS = ("chat", "code", "math", "safety-refuse", "safety-response")
HHH_CATEGORIES = ("harmless", "helpful", "honest", "other")

LLMBAR_ADVERSARIAL = ("adv_neighbor", "adv_gptinst", "adv_gptout", "adv_manual")
LLMBAR_SUBSETS = ("natural", *LLMBAR_ADVERSARIAL)


@dataclass(frozen=True)
class BenchmarkPair:
    """Two answers to a prompt, of which the benchmark says which one is better."""

    id: str
    prompt: str
    chosen: str
    rejected: str
    group: str
    """Subset, category or domain that the benchmark reports on its own."""
    cell: tuple[int, int] | None = None
    """RM-Bench: style of the chosen and of the rejected answer (concise, detailed, detailed markdown)."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """The other columns of the row."""


def rewardbench_row(row: Row, group: str | None = None) -> list[BenchmarkPair]:
    """`prompt`, `chosen`, `rejected`, `subset`; one of the 23 subsets of RewardBench v1."""
    subset = _group(row, "subset", group)
    known = [name for subsets in REWARDBENCH_SECTIONS.values() for name in subsets]
    return [_pair(row, _one_of(subset, known, "subset"), used=("subset",))]


def judgebench_row(row: Row, group: str | None = None) -> list[BenchmarkPair]:
    """Raw (`question`, `response_A`, `response_B`, `label` A>B or B>A) or converted.

    The group is the category of `source`. The official converter takes any other label for B>A; here it is an
    error.
    """
    source = _group(row, "source", group)
    starts = [start for start in JUDGEBENCH_CATEGORIES if source.startswith(start)]
    if not starts:
        raise ValueError(f"`source` is {source!r}; it must start with {', '.join(JUDGEBENCH_CATEGORIES)}")
    row = {**row, "source": source}  # kept among the extra columns: finer than the category
    if "response_A" in row:
        better = _one_of(_text(row, "label"), ("A>B", "B>A"), "label")[0]
        row = _renamed(
            row,
            prompt="prompt" if "prompt" in row else "question",
            chosen=f"response_{better}",
            rejected=f"response_{'B' if better == 'A' else 'A'}",
        )
    return [_pair(row, JUDGEBENCH_CATEGORIES[starts[0]], used=("label",))]


def rmbench_row(row: Row, group: str | None = None) -> list[BenchmarkPair]:
    """Raw (three `chosen` and three `rejected` texts) or exploded into rows with `matrix_id` "i-j".

    `extra["item"]` is the id of the prompt, which all nine pairs share; `id` is that of the pair.
    """
    domain = _one_of(_group(row, "domain", group), RMBENCH_DOMAINS, "domain")
    if "matrix_id" in row:
        parts = _text(row, "matrix_id").split("-")
        if len(parts) != 2 or not set(parts) <= {"0", "1", "2"}:
            raise ValueError(f"`matrix_id` is {row['matrix_id']!r}; it must be from '0-0' to '2-2'")
        return [_cell(row, _item(row), domain, (int(parts[0]), int(parts[1])))]
    chosen, rejected = _three(row, "chosen"), _three(row, "rejected")
    item = _item(row)
    return [
        _cell({**row, "chosen": chosen[i], "rejected": rejected[j]}, item, domain, (i, j))
        for i in range(3)
        for j in range(3)
    ]


def hhh_row(row: Row, group: str | None = None) -> list[BenchmarkPair]:
    """Hub (`input`, `targets` of two `choices` with `labels` 1 and 0) or converted; group = category.

    Rows of the hub do not say which category (configuration) they come from: it has to be given as `group`.
    """
    category = _one_of(_group(row, "category", group), HHH_CATEGORIES, "category")
    if "targets" in row:
        targets = row["targets"]
        if not isinstance(targets, Mapping):
            raise ValueError("`targets` must be an object with `choices` and `labels`")
        choices, labels = targets.get("choices"), targets.get("labels")
        if not isinstance(choices, list) or len(choices) != 2:
            raise ValueError("`targets.choices` must be a list of two answers")
        if labels not in ([1, 0], [0, 1]):
            raise ValueError(f"`targets.labels` is {labels!r}; it must be [1, 0] or [0, 1]")
        best = labels.index(1)
        row = {**_renamed(row, prompt="input"), "chosen": choices[best], "rejected": choices[1 - best]}
    return [_pair(row, category, used=("category", "targets"))]


def llmbar_row(row: Row, group: str | None = None) -> list[BenchmarkPair]:
    """Original (`input`, `output_1`, `output_2`, `label` 1 or 2) or converted; group = subset.

    Original rows do not say which subset (folder) they come from: it has to be given as `group`. `Natural`,
    `Adversarial/GPTInst` and the like become `natural`, `adv_gptinst`; other names (the sets that LLMBar is
    compared with) stay as they are.
    """
    subset = _group(row, "subset", group)
    plain = subset.rpartition("/")[2].lower().removeprefix("adv_")
    own = {name.removeprefix("adv_"): name for name in LLMBAR_SUBSETS}
    if "output_1" in row:
        label = row.get("label")
        if label not in (1, 2):
            raise ValueError(f"`label` is {label!r}; it must be 1 or 2")
        row = _renamed(row, prompt="input", chosen=f"output_{label}", rejected=f"output_{3 - label}")
    return [_pair(row, own.get(plain, subset), used=("subset", "label"))]


def _pair(
    row: Row, group: str, *, cell: tuple[int, int] | None = None, used: tuple[str, ...] = ()
) -> BenchmarkPair:
    prompt, chosen, rejected = (_text(row, name) for name in ("prompt", "chosen", "rejected"))
    if chosen == rejected:
        raise ValueError("`chosen` and `rejected` are equal")
    used = ("id", "pair_id", "prompt", "chosen", "rejected", *used)
    extra = {name: value for name, value in row.items() if name not in used}
    return BenchmarkPair(
        _identity(row, prompt, chosen, rejected), prompt, chosen, rejected, group, cell, extra
    )


def _cell(row: Row, item: str, domain: str, cell: tuple[int, int]) -> BenchmarkPair:
    row = {**row, "id": f"{item}/{cell[0]}-{cell[1]}", "item": item}
    return _pair(row, domain, cell=cell, used=("domain", "matrix_id"))


def _item(row: Row) -> str:
    return _identity(row, _text(row, "prompt"))


def _identity(row: Row, *texts: str) -> str:
    """The id of a row, or one made from its texts, which does not change with the order of rows."""
    for name in ("id", "pair_id"):
        if isinstance(row.get(name), str | int) and str(row[name]).strip():
            return str(row[name])
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if value is None:
        raise ValueError(f"`{name}` is missing; the row has {', '.join(map(str, row)) or 'no fields'}")
    if not isinstance(value, str) or not value.strip():
        found = "one that is empty" if isinstance(value, str) else type(value).__name__
        raise ValueError(f"`{name}` must be a text, found {found}")
    return value


def _group(row: Row, name: str, default: str | None) -> str:
    if row.get(name) is None and default is not None:
        return default
    if row.get(name) is None:
        raise ValueError(f"`{name}` is missing; where the file does not say it, give it as `group`")
    return _text(row, name)


def _one_of(value: str, allowed: tuple[str, ...] | list[str], name: str) -> str:
    if value not in allowed:
        raise ValueError(f"`{name}` is {value!r}; it must be one of {', '.join(allowed)}")
    return value


def _three(row: Row, name: str) -> list[Any]:
    value = row.get(name)
    if not isinstance(value, list) or len(value) != 3:
        raise ValueError(f"`{name}` must be a list of three texts (or give `matrix_id` with single texts)")
    return value


def _renamed(row: Row, **names: str) -> dict[str, Any]:
    """A row with the columns `names.values()` under the keys of `names`; a missing one is an error."""
    texts = {new: _text(row, old) for new, old in names.items()}
    return {name: value for name, value in row.items() if name not in names.values()} | texts
