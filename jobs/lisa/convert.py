"""Convert a model into one whose layers share attention scores, calibrated on text but not trained yet.

    python -m eagleray.jobs.lisa.convert --config configs/lisa/convert_tiny.yaml model.path=...

The run folder gets the model (Hugging Face format), the added weights alone (`delta/`), and what was added, removed
and saved in `report.json`.
"""

from __future__ import annotations

from typing import Any, Literal

from transformers import AutoModelForCausalLM

from eagleray.jobs.lisa.sections import BlocksSection, ShareSection, StartSection, as_texts, convert_model
from eagleray.models.lisa.accounting import added_parameters, cache_bytes_per_token, removed_parameters
from eagleray.models.lisa.delta import save_delta
from eagleray.models.lisa.probe import token_loss
from eagleray.models.lisa.spec import LisaSpec
from eagleray.platform.data.text import text_hashes
from eagleray.platform.pretrained import load_pretrained, load_tokenizer
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import JobConfig, ModelSection

JOB = "lisa.convert"


class Config(JobConfig):
    """Config of `lisa.convert`."""

    job: Literal["lisa.convert"] = JOB
    model: ModelSection
    data: BlocksSection
    share: ShareSection = ShareSection()
    start: StartSection = StartSection()
    seed: int = 0
    """Of the weights that start at random."""


def main(cfg: Config) -> dict[str, Any]:
    """Convert, save, report."""
    with RunFolder.create(JOB, cfg).recording() as run:
        teacher = load_pretrained(AutoModelForCausalLM, cfg.model).eval()
        tokenizer = load_tokenizer(cfg.model)
        student = convert_model(
            cfg.share, cfg.start, teacher, cfg.data.blocks(tokenizer, "train"), seed=cfg.seed
        )
        for part in (student, tokenizer):
            part.save_pretrained(run.model)
        save_delta(student, run.path / "delta")
        spec, held_out = student.base_model.lisa, as_texts(cfg.data.blocks(tokenizer, "dev"))
        report = {
            "shared_layers": list(spec.shared_layers),
            "added_parameters": added_parameters(student.config, spec),
            "removed_parameters": removed_parameters(student.config, spec),
            "cache_values_per_token": cache_bytes_per_token(student.config, spec, value_bytes=1),
            "cache_values_per_token_full": cache_bytes_per_token(student.config, LisaSpec(), value_bytes=1),
            "loss_full": token_loss(teacher, held_out),
            "loss": token_loss(student, held_out),
        }
        run.update_manifest(data_hashes=text_hashes(cfg.data))
        run.write_report(report)
    return report


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
