"""Sample several answers to each prompt from a language model: candidates for best-of-n.

    python -m eagleray.jobs.align.sample --config configs/align/sample_tiny.yaml

The run folder gets `candidates/part-00000.parquet` and so on, which `align.best_of_n` reads: `prompt`, `reference` where the
prompts have one, and `candidates`, each with `text` and `model`. The answers to a prompt depend on the model, the prompt and
the seed alone. A run that was stopped goes on with the same command: parts that are there stay, the others are made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import pyarrow as pa
import pyarrow.dataset as ds
from pydantic import Field, field_validator

from eagleray.jobs.align.generation import (
    GenerationSection,
    PromptFormat,
    model_text,
    prepare_tokenizer,
    sampled_answers,
)
from eagleray.jobs.align.prompts import PromptColumns, load_prompts
from eagleray.jobs.align.training import write_rows
from eagleray.models.gram.checkpoint import load_language_model
from eagleray.platform.data.parts import cut_into_parts
from eagleray.platform.data.preferences import ReadReport
from eagleray.platform.data.sources import DataError, Row, SourceConfig, file_hashes
from eagleray.platform.pretrained import load_tokenizer
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import JobConfig, ModelSection
from eagleray.platform.shards import process_parts, read_parts

JOB = "align.sample"


class PromptSection(PromptColumns):
    """Prompts to answer."""

    sources: list[SourceConfig] = Field(min_length=1)
    """Rows with a prompt; equal prompts count once."""

    @field_validator("images")
    @classmethod
    def _texts_only(cls, images: str | None) -> str | None:
        if images is not None:
            raise ValueError(
                "answers to prompts with pictures are not sampled here; leave `prompts.images` out"
            )
        return images


class Config(JobConfig):
    """Config of `align.sample`."""

    job: Literal["align.sample"] = JOB
    model: ModelSection
    """The language model, in the dtype it was saved in; an adapter is merged into its base model."""
    label: str | None = None
    """What the candidates' `model` says. Default: `model.path`."""
    prompts: PromptSection
    prompt_format: PromptFormat = "chat"
    """`chat`: by the model's chat template. `plain`: the prompt and a newline, for a model that has read plain text."""
    generation: GenerationSection = GenerationSection()
    rows_per_part: int = Field(default=100, ge=1)
    """Prompts after which a part ends: what a kill may cost a worker."""
    seed: int = Field(default=0, ge=0)
    """Seed of the samples."""


class Sampler:
    """Answers the prompts of a part; lives in a worker."""

    schema = pa.schema(
        [
            ("prompt", pa.string()),
            ("reference", pa.string()),
            ("candidates", pa.list_(pa.struct([("text", pa.string()), ("model", pa.string())]))),
        ]
    )

    def __init__(self, cfg: Config) -> None:
        import torch

        self._cfg = cfg
        self._tokenizer = prepare_tokenizer(load_tokenizer(cfg.model))
        model: Any = load_language_model(cfg.model.path, revision=cfg.model.revision)
        self._model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def __call__(self, rows: Iterable[Row | DataError], report: ReadReport) -> Iterator[list[dict[str, Any]]]:
        """Candidates of each prompt."""
        cfg = self._cfg
        for row in rows:
            assert isinstance(row, Row), row
            report.read += 1
            prompt = row.values["request"]
            text = model_text(prompt, cfg.prompt_format, self._tokenizer)
            answers = sampled_answers(self._model, self._tokenizer, text, cfg.generation, seed=cfg.seed)
            model = cfg.label or cfg.model.path
            candidates = [{"text": answer, "model": model} for answer in answers]
            yield [{"prompt": prompt, "reference": row.values.get("reference"), "candidates": candidates}]


def main(cfg: Config) -> dict[str, Any]:
    """Sample, and sum up.

    Returns:
        The report: `prompts`, `answers`, and of these the mean share that is distinct within a prompt, and the share that is
        empty.

    Raises:
        DataError: A row has no prompt.
    """
    with RunFolder.create(JOB, cfg, shared=True).recording() as run:
        file = run.data / "prompts.jsonl"
        if not file.is_file():
            prompts = list(load_prompts(cfg.prompts.sources, cfg.prompts).values())
            hashes = {k: v for source in cfg.prompts.sources for k, v in file_hashes(source).items()}
            run.update_manifest(data_hashes=hashes)
            run.data.mkdir(exist_ok=True)
            write_rows(file, prompts)
        parts = list(cut_into_parts(SourceConfig(path=str(file)), cfg.rows_per_part))
        place = f"{run.folder.place}/candidates"
        process_parts(Sampler, {"cfg": cfg}, parts, place, cfg.ray)
        report = _summary(read_parts(place, len(parts), Sampler.schema))
        run.write_report(report)
    return report


def _summary(candidates: ds.Dataset) -> dict[str, Any]:
    prompts = answers = empty = 0
    distinct = 0.0
    for batch in candidates.to_batches():
        for row in batch.to_pylist():
            texts = [candidate["text"] for candidate in row["candidates"]]
            prompts += 1
            answers += len(texts)
            empty += texts.count("")
            distinct += len(set(texts)) / len(texts)
    return {"prompts": prompts, "answers": answers, "distinct": distinct / prompts, "empty": empty / answers}


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
