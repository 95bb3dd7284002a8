"""Improve a policy by a GRAM reward: GRPO or RLOO of trl, on Ray Train, with a watch for over-optimisation.

    python -m eagleray.jobs.align.policy --config configs/align/policy_tiny.yaml

For each prompt the policy samples several answers; the reward of one is the judge's probability that it beats a reference
answer (GRAM section 6; the paper uses PPO, which trl no longer has). The judge sits in each worker beside the policy. On
held-out prompts three things are watched that the policy is not trained on: the reward itself, the win rate against the
answers of the start policy, which do not move, and a gold reward, if there is one. When the reward rises while the gold
reward falls, the policy is learning the judge's mistakes: `report.json` names the step with the best gold reward.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from eagleray.jobs.align.training import PolicyConfig, read_rows_back, train_policy, write_rows
from eagleray.models.gram.alignment import RewardTransform
from eagleray.models.gram.discriminative import DiscriminativeScorer
from eagleray.models.gram.judge import Judge
from eagleray.models.gram.policy_reward import References, Reward, answer_text, judge_reward, steps_in_order
from eagleray.platform.config import Config as Section
from eagleray.platform.data.sources import DataError, SourceConfig, file_hashes, read_rows
from eagleray.platform.launch import TrainedRun
from eagleray.platform.runs import REPORT_FILE, RunFolder
from eagleray.platform.storage import write_json
from eagleray.platform.tracking import METRICS_FILE, read_metrics

JOB = "align.policy"
logger = logging.getLogger(__name__)


class PromptSection(Section):
    """Prompts to train on, and others to watch."""

    train: list[SourceConfig] = Field(min_length=1)
    """Rows with a prompt, e.g. preference data; equal prompts count once."""
    eval: list[SourceConfig] = Field(min_length=1)
    """Held-out prompts."""
    column: str = "prompt"
    """Column of the prompt: text, or messages of which the last is the user's."""
    reference: str | None = None
    """Column of the reference answer, for `reward.reference: dataset`."""
    eval_limit: int = Field(default=64, ge=1)
    """Held-out prompts to watch."""


class RewardSection(Section):
    """The judge and what it compares with."""

    path: str
    """Folder or hub name of a GRAM judge."""
    reference: Literal["policy", "start", "dataset"] = "policy"
    """Whose answer is the reference. `policy`: the greedy answer of the policy as it is now (the paper); `start`: that of
    the policy before training, made once; `dataset`: a column of the prompts."""
    transform: RewardTransform = "prob"
    """`prob` (the paper), `centred` 2r - 1, or `logit`."""
    options: dict[str, Any] = Field(default={})
    """Further settings of the judge, e.g. `swap_average: logit` or `share_prefix: false`."""


class GoldSection(Section):
    """A reward that the policy is watched by and never trained on."""

    kind: Literal["judge", "discriminative", "steps_in_order"]
    """Another judge or reward model, or the rule of generated data."""
    path: str | None = None
    """Its folder; none for the rule."""

    @model_validator(mode="after")
    def _models_have_a_path(self) -> GoldSection:
        if (self.kind == "steps_in_order") != (self.path is None):
            raise ValueError("`gold.path` belongs to kind judge or discriminative, and only there")
        return self


class GenerationSection(Section):
    """How answers are sampled."""

    answers: int = Field(default=8, ge=2)
    """Answers to each prompt, the group whose mean is the baseline."""
    max_tokens: int = Field(default=256, ge=1)
    """Longest answer."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the samples."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the likeliest tokens that together have this probability."""


class Config(PolicyConfig):
    """Config of `align.policy`."""

    job: Literal["align.policy"] = JOB
    algorithm: Literal["grpo", "rloo"] = "grpo"
    """GRPO: advantages within the group, clipped ratios. RLOO: each answer against the mean of the others."""
    prompts: PromptSection
    reward: RewardSection
    gold: GoldSection | None = None
    generation: GenerationSection = GenerationSection()
    beta: float = Field(default=0.05, ge=0)
    """Weight of the KL divergence from the start policy."""
    scale_rewards: bool = True
    """Divide advantages by their standard deviation (GRPO: in the group, RLOO: in the batch)."""

    @model_validator(mode="after")
    def _groups_fit(self) -> Config:
        answers, micro = self.generation.answers, self.train.micro_batch_size * self.ray.max_workers
        if self.train.batch_size % answers or micro % answers:
            raise ValueError(
                f"`generation.answers` is {answers}; it must divide `train.batch_size` ({self.train.batch_size}) and "
                f"`train.micro_batch_size` x `ray.num_workers` ({micro}), so that groups stay whole"
            )
        if (self.reward.reference == "dataset") != (self.prompts.reference is not None):
            raise ValueError("`reward.reference: dataset` and `prompts.reference` belong together")
        return self


def main(cfg: Config) -> TrainedRun:
    """Train, and tell where the gold reward was best."""

    def prepare(run: RunFolder) -> None:
        taken: set[str] = set()
        for name, sources, limit in (
            ("eval", cfg.prompts.eval, cfg.prompts.eval_limit),
            ("train", cfg.prompts.train, None),
        ):
            rows = load_prompts(sources, cfg.prompts, without=taken)[:limit]
            taken |= {row["request"] for row in rows}
            write_rows(run.data / f"{name}.jsonl", rows)
            hashes = {k: v for source in sources for k, v in file_hashes(source).items()}
            run.update_manifest(data_hashes=hashes)

    done = train_policy(JOB, cfg, build_trainer, prepare=prepare)
    summary = {**done.summary, **over_optimisation(read_metrics(done.path / METRICS_FILE))}
    write_json(done.path / REPORT_FILE, summary)
    return TrainedRun(done.path, summary)


def load_prompts(
    sources: Sequence[SourceConfig], section: PromptSection, *, without: set[str]
) -> list[dict[str, str]]:
    """Prompts in order, each once: `request`, and `reference` where a column gives it.

    Raises:
        DataError: A row has no prompt, or none is left.
    """
    found: dict[str, dict[str, str]] = {}
    for source in sources:
        for row in read_rows(source):
            if isinstance(row, DataError):
                raise row
            request = row.values.get(section.column)
            if isinstance(request, list) and request and isinstance(request[-1], dict):
                request = request[-1].get("content")
            columns = {"request": request}
            if section.reference is not None:
                columns["reference"] = row.values.get(section.reference)
            for name, value in columns.items():
                if not isinstance(value, str) or not value.strip():
                    column = section.column if name == "request" else section.reference
                    raise DataError(
                        row.where, f"`{column}` is no text", f"the row has {', '.join(row.values)}"
                    )
            if request not in without:
                found.setdefault(str(request), columns)  # type: ignore[arg-type]
    if not found:
        raise DataError(", ".join(source.path for source in sources), "no prompt is left", "all are held out")
    return list(found.values())


def over_optimisation(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """From the evaluations: the gold reward at the start, at its best and at the end, and the step of the best."""
    points = [
        (r["rewards_gold_mean"], r["step"])
        for r in records
        if r["kind"] == "eval" and "rewards_gold_mean" in r
    ]
    if not points:
        return {}
    best, step = max(points, key=lambda point: (point[0], -point[1]))
    return {"gold_start": points[0][0], "gold_best": best, "gold_best_step": step, "gold_end": points[-1][0]}


def build_trainer(cfg: Config, model: Any, tokenizer: Any, data: Path, arguments: dict[str, Any]) -> Any:
    """The trainer, in a worker."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_config import RLOOConfig
    from trl.trainer.rloo_trainer import RLOOTrainer

    # Before the arguments: with ZeRO-3 these make every model that is loaded later a sharded one.
    judge = Judge.from_pretrained(cfg.reward.path, **cfg.reward.options)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = {name: read_rows_back(data / f"{name}.jsonl") for name in ("train", "eval")}
    greedy = _Greedy(cfg, tokenizer)
    start = _start_answers(greedy, model, rows, cfg, data / "start.jsonl")
    given = {row["request"]: row.get("reference", "") for part in rows.values() for row in part}
    references: dict[str, References] = {
        "policy": greedy,
        "start": lambda prompts: [start[prompt] for prompt in prompts],
        "dataset": lambda prompts: [given[prompt] for prompt in prompts],
    }
    rewards: list[Any] = [
        judge_reward(judge, references[cfg.reward.reference], name="gram", transform=cfg.reward.transform)
    ]
    if cfg.reward.reference == "policy":
        rewards.append(greedy.only_held_out(judge_reward(judge, references["start"], name="win_rate")))
    if cfg.gold is not None:
        rewards.append(greedy.only_held_out(_gold(cfg.gold, references["start"])))
    sampling: dict[str, Any] = {
        "num_generations": cfg.generation.answers,
        "max_completion_length": cfg.generation.max_tokens,
        "temperature": cfg.generation.temperature,
        "top_p": cfg.generation.top_p,
        "beta": cfg.beta,
        "reward_weights": [1.0] + [0.0] * (len(rewards) - 1),
    }
    grpo, scaled = cfg.algorithm == "grpo", cfg.scale_rewards
    scaling = {"scale_rewards": "group" if scaled else "none"} if grpo else {"normalize_advantages": scaled}
    trainer_class: Any = GRPOTrainer if grpo else RLOOTrainer
    settings_class: Any = GRPOConfig if grpo else RLOOConfig
    settings = settings_class(**arguments, **sampling, **scaling)
    lora = cfg.lora
    adapter = lora and LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.target_modules
    )
    sets = {
        name: Dataset.from_list([{**row, "prompt": cfg.formatted(row["request"])} for row in part])
        for name, part in rows.items()
    }
    trainer = trainer_class(
        model=model,
        reward_funcs=rewards,
        args=settings,
        train_dataset=sets["train"],
        eval_dataset=sets["eval"],
        processing_class=tokenizer,
        peft_config=adapter,
    )
    greedy.trainer = trainer
    return trainer


def _gold(section: GoldSection, references: References) -> Reward:
    if section.kind == "steps_in_order":
        return _named("gold", steps_in_order)
    assert section.path is not None
    if section.kind == "judge":
        return judge_reward(Judge.from_pretrained(section.path), references, name="gold")
    scorer = DiscriminativeScorer.from_pretrained(section.path)
    return _named(
        "gold",
        lambda *, request, completions, **_: scorer.score(
            [(prompt, answer_text(answer)) for prompt, answer in zip(request, completions, strict=True)]
        ),
    )


def _named(name: str, reward: Reward) -> Reward:
    """The same function under the name that its metrics get."""

    def renamed(**columns: Any) -> list[float]:
        return reward(**columns)

    renamed.__name__ = name
    return renamed


def _start_answers(
    greedy: _Greedy, model: Any, rows: dict[str, list[dict[str, str]]], cfg: Config, cache: Path
) -> dict[str, str]:
    """Greedy answers of the start policy to what is compared with them, shared out among the workers and kept."""
    import torch.distributed as dist

    if cfg.reward.reference == "start":
        prompts = [row["request"] for part in rows.values() for row in part]
    elif cfg.reward.reference == "policy" or (cfg.gold is not None and cfg.gold.kind == "judge"):
        prompts = [row["request"] for row in rows["eval"]]
    else:
        return {}
    if cache.is_file():
        return {row["request"]: row["answer"] for row in read_rows_back(cache)}
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = prompts[rank::world]
    answered = dict(zip(mine, greedy.answers(model, mine), strict=True))
    parts: list[Any] = [answered]
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, answered)
    found = {prompt: answer for part in parts for prompt, answer in part.items()}
    if rank == 0:
        write_rows(cache, [{"request": prompt, "answer": answer} for prompt, answer in found.items()])
    return found


class _Greedy:
    """Greedy answers of a model; of the trainer's policy as it is now when called."""

    def __init__(self, cfg: Config, tokenizer: Any) -> None:
        self._cfg, self._tokenizer = cfg, tokenizer
        self.trainer: Any = None

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        from trl.models.utils import unwrap_model_for_generation

        wrapped = self.trainer.model_wrapped
        with unwrap_model_for_generation(wrapped, self.trainer.accelerator) as model:
            return self.answers(model, prompts)

    def only_held_out(self, reward: Reward) -> Any:
        """The reward on held-out prompts; in training nothing, which trl leaves out of its means."""

        def watched(**columns: Any) -> Any:
            training = self.trainer.model.training
            return [None] * len(columns["completions"]) if training else reward(**columns)

        watched.__name__ = getattr(reward, "__name__", "watched")
        return watched

    def answers(self, model: Any, prompts: Sequence[str]) -> list[str]:
        """Answers in the order of the prompts, in batches of like length."""
        import torch

        texts = [self._text(prompt) for prompt in prompts]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found = [""] * len(texts)
        size = 4 * self._cfg.train.micro_batch_size
        was_training = model.training
        model.eval()
        for start in range(0, len(order), size):
            members = order[start : start + size]
            batch = self._tokenizer(
                [texts[i] for i in members], return_tensors="pt", padding=True, add_special_tokens=False
            )
            with torch.no_grad():
                tokens_BT = model.generate(
                    **batch.to(model.device),
                    max_new_tokens=self._cfg.generation.max_tokens,
                    do_sample=False,
                    pad_token_id=self._tokenizer.pad_token_id,
                )
            new_BT = tokens_BT[:, batch["input_ids"].shape[1] :]
            for i, text in zip(
                members, self._tokenizer.batch_decode(new_BT, skip_special_tokens=True), strict=True
            ):
                # A reference must hold something to be compared with.
                found[i] = text.strip() or "..."
        model.train(was_training)
        return found

    def _text(self, prompt: str) -> str:
        formatted = self._cfg.formatted(prompt)
        if isinstance(formatted, str):
            return formatted
        return self._tokenizer.apply_chat_template(formatted, tokenize=False, add_generation_prompt=True)


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
