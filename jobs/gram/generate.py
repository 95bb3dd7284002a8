"""Generated data with a known rule, as the files that the other jobs read.

    python -m eagleray.jobs.gram.generate pairs=4000

The better of two answers gives its steps in order (`models/gram/synthetic.py`). The run folder gets `corpus.txt` for a
backbone, `unlabelled.jsonl` for stage 1, `train.jsonl`, `dev.jsonl` and `test.jsonl` in TRL preference format without
common prompts, and `candidates.jsonl`: several answers to each prompt with their true scores, for best-of-n. A policy that
`align.policy` can improve starts from `policy.txt`: requests with answers whose steps stand in any order.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from eagleray.models.gram.synthetic import (
    make_candidates,
    make_corpus,
    make_preferences,
    make_unlabelled,
)
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import JobConfig

JOB = "gram.generate"


class Config(JobConfig):
    """Config of `gram.generate`."""

    job: Literal["gram.generate"] = JOB
    pairs: int = Field(default=4000, ge=10)
    """Labelled training pairs; as many unlabelled ones are made for stage 1."""
    held_out: int = Field(default=300, ge=10)
    """Test pairs, and prompts with candidates; a third as many pairs are for choosing a model."""
    candidates: int = Field(default=16, ge=2)
    """Answers to each prompt of `candidates.jsonl`."""
    characters: int = Field(default=1_000_000, ge=1000)
    """Length of `corpus.txt`, and about that of `policy.txt`."""
    seed: int = Field(default=0, ge=0)
    """Seed of the generator."""


def main(cfg: Config) -> dict[str, int]:
    """Write the files.

    Returns:
        The report: rows (or characters) of each file.
    """
    with RunFolder.create(JOB, cfg).recording() as run:
        rows = preference_files(cfg.pairs, cfg.seed, dev=-(-cfg.held_out // 3), test=cfg.held_out)
        rows["candidates.jsonl"] = make_candidates(cfg.held_out, cfg.candidates, cfg.seed)
        for name, lines in rows.items():
            write_jsonl(run.path / name, lines)
        (run.path / "corpus.txt").write_text(make_corpus(cfg.characters, cfg.seed), encoding="utf-8")
        mixed = make_candidates(cfg.characters // 250, 1, cfg.seed, split="train")
        texts = (f"{row['prompt']}\n{row['candidates'][0]['text']}\n" for row in mixed)
        (run.path / "policy.txt").write_text("\n".join(texts), encoding="utf-8")
        report = {name: len(lines) for name, lines in rows.items()} | {"corpus.txt": cfg.characters}
        run.write_report(report)
    return report


def preference_files(pairs: int, seed: int, *, dev: int, test: int) -> dict[str, list[dict[str, Any]]]:
    """Labelled pairs in three parts and unlabelled ones, by the names of their files."""
    return {
        "train.jsonl": make_preferences(pairs, seed),
        "dev.jsonl": make_preferences(dev, seed, split="dev"),
        "test.jsonl": make_preferences(test, seed, split="test"),
        "unlabelled.jsonl": make_unlabelled(pairs, seed),
    }


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One JSON object a line."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
