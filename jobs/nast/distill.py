"""Sequence-level knowledge distillation: a training manifest whose targets are what a teacher says.

    python -m eagleray.jobs.nast.distill model.path=runs/teacher/model model.beam=5 sources='[{path: train.tsv}]'

The teacher is usually the autoregressive sibling. The run folder gets `train.tsv`, which `nast.train` reads as a
table; with `keep_original` it also holds the rows as they were, so that a model learns from both.
"""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from eagleray.jobs.nast.data import SpeechRules, SpeechSource
from eagleray.jobs.nast.translation import TranslatorSection, translate_utterances
from eagleray.models.nast.manifest import Utterance, clips_to_text
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import JobConfig

JOB = "nast.distill"


class Config(JobConfig):
    """Config of `nast.distill`."""

    job: Literal["nast.distill"] = JOB
    model: TranslatorSection
    sources: list[SpeechSource] = Field(min_length=1)
    """Training data to translate."""
    data: SpeechRules = SpeechRules()
    """How rows are read and which of them can be used."""
    keep_original: bool = False
    """Write the original rows, too."""


def main(cfg: Config) -> dict[str, Any]:
    """Translate the training data and write the manifest.

    Returns:
        The report: utterances, rows written, share of targets that changed, empty ones that were left out.
    """
    with RunFolder.create(JOB, cfg).recording() as run:
        loaded = cfg.data.read(cfg.sources)
        results = translate_utterances(
            cfg.model, loaded.utterances, cfg.ray, skip_errors=cfg.data.on_error == "skip"
        )
        pairs = list(zip(loaded.utterances, (str(row["text"]) for row in results), strict=True))
        taught = [replace(row, id=f"{row.id}_kd", target=text) for row, text in pairs if text.strip()]
        rows = [*(loaded.utterances if cfg.keep_original else []), *taught]
        write_manifest(run.path / "train.tsv", rows)
        report = {
            "utterances": len(pairs),
            "rows": len(rows),
            "empty": len(pairs) - len(taught),
            "changed": sum(row.target != text for row, text in pairs) / len(pairs),
            "skipped": dict(loaded.skipped),
        }
        run.update_manifest(data_hashes={"sources": loaded.content_hash()})
        run.write_report(report)
    return report


def write_manifest(path: Path, rows: list[Utterance]) -> None:
    """Write utterances as a table that `read_table` gives back."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(
            file, delimiter="\t", quoting=csv.QUOTE_NONE, escapechar="\\", quotechar=None, lineterminator="\n"
        )
        writer.writerow(("id", "audio", "src_text", "tgt_text", "speaker"))
        for row in rows:
            writer.writerow((row.id, clips_to_text(row.clips), row.source, row.target, row.speaker))


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
