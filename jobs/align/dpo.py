"""Improve a policy directly on preference pairs: DPO of trl, on Ray Train.

    python -m eagleray.jobs.align.dpo --config configs/align/dpo_tiny.yaml

No reward model is involved: the policy's own log-ratio to the start policy is the reward. With several sources `order: given`
trains on them one after the other, e.g. on texts, then captions, then visual pairs as RoVRM orders its data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from eagleray.jobs.align.training import PolicyConfig, read_rows_back, train_policy, write_rows
from eagleray.jobs.gram.data import PairData, load_labelled
from eagleray.platform.launch import TrainedRun
from eagleray.platform.runs import RunFolder

JOB = "align.dpo"


class Config(PolicyConfig):
    """Config of `align.dpo`."""

    job: Literal["align.dpo"] = JOB
    data: PairData
    beta: float = Field(default=0.1, gt=0)
    """Weight of the divergence from the start policy in the implicit reward."""
    smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the label that goes to the other answer."""
    max_length: int = Field(default=2048, ge=16)
    """Longest prompt with its answer, in tokens; longer ones are cut."""
    order: Literal["shuffled", "given"] = "shuffled"
    """Draw pairs by the seed, or take them as they stand in the sources."""


def main(cfg: Config) -> TrainedRun:
    """Train; the report is the last evaluation."""

    def prepare(run: RunFolder) -> None:
        pairs = load_labelled(cfg.data, seed=cfg.train.seed)
        for name, part in (("train", pairs.train), ("eval", pairs.eval)):
            rows = [{"prompt": p.prompt_text, "chosen": p.chosen, "rejected": p.rejected} for p in part]
            write_rows(run.data / f"{name}.jsonl", rows)
        run.update_manifest(data_hashes=pairs.hashes)

    return train_policy(JOB, cfg, build_trainer, prepare=prepare)


def build_trainer(cfg: Config, model: Any, tokenizer: Any, data: Path, arguments: dict[str, Any]) -> Any:
    """The trainer, in a worker."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    settings = DPOConfig(
        **arguments,
        beta=cfg.beta,
        label_smoothing=cfg.smoothing,
        max_length=cfg.max_length,
        train_sampling_strategy="sequential" if cfg.order == "given" else "random",
    )
    lora = cfg.lora
    adapter = lora and LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.target_modules
    )
    sets = {
        name: Dataset.from_list([_row(cfg, row) for row in read_rows_back(data / f"{name}.jsonl")])
        for name in ("train", "eval")
    }
    return DPOTrainer(
        model=model,
        args=settings,
        train_dataset=sets["train"],
        eval_dataset=sets["eval"],
        processing_class=tokenizer,
        peft_config=adapter,
    )


def _row(cfg: Config, row: dict[str, str]) -> dict[str, Any]:
    if cfg.prompt_format == "plain":
        return {**row, "prompt": cfg.formatted(row["prompt"])}
    answers = {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
    return {"prompt": cfg.formatted(row["prompt"]), **answers}


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
