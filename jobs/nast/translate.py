"""Translate audio files, folders or whole manifests.

    python -m eagleray.jobs.nast.translate model.path=runs/nast/model files='[talk.wav, recordings/]'

The run folder gets `translations.jsonl`, one line an utterance (id, text, transcript, score, seconds), and
`translations.txt`, the texts alone in the same order.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field, model_validator

from eagleray.jobs.nast.data import SpeechRules, SpeechSource
from eagleray.jobs.nast.translation import TranslatorSection, translate_utterances
from eagleray.models.nast.audio import AUDIO_SUFFIXES, MAX_SECONDS, Clip
from eagleray.models.nast.manifest import Utterance
from eagleray.platform.data.files import absolute_path, find_files
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import JobConfig

JOB = "nast.translate"


class Config(JobConfig):
    """Config of `nast.translate`."""

    job: Literal["nast.translate"] = JOB
    model: TranslatorSection
    files: list[str] = Field(default=[])
    """Audio files, patterns (`talks/*.flac`) or folders; relative to `data.root`."""
    sources: list[SpeechSource] = Field(default=[])
    """Manifests in place of `files`."""
    data: SpeechRules = SpeechRules(max_seconds=MAX_SECONDS)
    """How rows are read and which of them can be used."""

    @model_validator(mode="after")
    def _one_input(self) -> Config:
        if bool(self.files) == bool(self.sources):
            raise ValueError("give either `files` or `sources`")
        return self


def main(cfg: Config) -> list[dict[str, Any]]:
    """Translate, and write the results into the run folder.

    Returns:
        One row an utterance, in the order of the input.
    """
    with RunFolder.create(JOB, cfg).recording() as run:
        utterances, skipped = _utterances(cfg)
        results = translate_utterances(
            cfg.model, utterances, cfg.ray, skip_errors=cfg.data.on_error == "skip"
        )
        rows = [{"id": row.id, **result} for row, result in zip(utterances, results, strict=True)]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (run.path / "translations.jsonl").write_text("".join(lines), encoding="utf-8")
        texts = [f"{row['text']}\n" for row in rows]
        (run.path / "translations.txt").write_text("".join(texts), encoding="utf-8")
        failed = sum(bool(row["error"]) for row in rows)
        run.write_report({"utterances": len(rows), "not_decoded": failed, "skipped": skipped})
    return rows


def _utterances(cfg: Config) -> tuple[list[Utterance], dict[str, int]]:
    if cfg.sources:
        loaded = cfg.data.read(cfg.sources, need_target=False)
    else:
        paths = [absolute_path(path, cfg.data.root) for path in cfg.files]
        found = dict.fromkeys(file for path in paths for file in find_files(path, AUDIO_SUFFIXES))
        rows = [Utterance(str(file), (Clip(str(file)),), where=str(file)) for file in found]
        loaded = cfg.data.usable(rows, need_target=False)
    return loaded.utterances, dict(loaded.skipped)


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
