"""Read speech data in any layout, check it, learn the vocabulary, and write the examples that training reads.

    python -m eagleray.jobs.nast.prepare --config configs/nast/prepare_tiny.yaml

`nast.train` prepares its data itself; a run of this job is for data that is used more than once, and for finding out
what is wrong with it. Training takes it by `data.prepared=RUN`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from eagleray.jobs.nast.data import FrontendSection, SpeechData, VocabularySection, prepare_examples
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import JobConfig

JOB = "nast.prepare"


class Config(JobConfig):
    """Config of `nast.prepare`."""

    job: Literal["nast.prepare"] = JOB
    data: SpeechData
    vocabulary: VocabularySection = VocabularySection()
    frontend: FrontendSection = FrontendSection()
    strides: tuple[int, ...] = (2, 2)
    """Subsampling of the models to come; decides which targets count as too long for CTC."""
    seed: int = Field(default=0, ge=0)
    """Seed of the vocabulary's sample of texts."""

    @model_validator(mode="after")
    def _is_not_prepared_yet(self) -> Config:
        if self.data.prepared is not None:
            raise ValueError("`data.prepared` is what this job makes; give `data.train` and `data.eval`")
        return self


def main(cfg: Config) -> dict[str, Any]:
    """Prepare the data into `data/` of the run folder.

    Returns:
        The report: counts of each part, rows left out by reason, targets that are too long for CTC.
    """
    with RunFolder.create(JOB, cfg).recording() as run:
        summary = prepare_examples(
            cfg.data, cfg.vocabulary, cfg.frontend.build(), run.data, strides=cfg.strides, seed=cfg.seed
        )
        run.update_manifest(data_hashes={part: summary[part]["sha256"] for part in ("train", "eval")})
        run.write_report(summary)
    return summary


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
