"""Improve a policy by a GRAM or RoVRM reward: GRPO or RLOO of trl, on Ray Train, with a watch for over-optimisation.

    python -m eagleray.jobs.align.policy --config configs/align/policy_tiny.yaml

For each prompt the policy samples several answers. The reward of one is a judge's probability that it beats a reference
answer (GRAM section 6; the paper uses PPO, which trl no longer has), or the number that a visual reward model gives it
(RoVRM section 6), of texts or of prompts with pictures. The reward model sits in each worker beside the policy. On
held-out prompts three things are watched that the policy is not trained on: the reward itself, the win rate against the
answers of the start policy, which do not move, and a gold reward, if there is one. When the reward rises while the gold
reward falls, the policy is learning the judge's mistakes: `report.json` names the step with the best gold reward.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, Literal

from pydantic import Field, model_validator

from eagleray.jobs.align.generation import GenerationSection, greedy_answers, model_text, prepare_tokenizer
from eagleray.jobs.align.gold import GoldSection
from eagleray.jobs.align.prompts import Prompt, PromptColumns, load_prompts
from eagleray.jobs.align.training import PolicyConfig, Rows, read_rows_back, train_policy, write_rows
from eagleray.jobs.align.watch import looks, over_optimisation, plot_rewards
from eagleray.models.gram.alignment import RewardTransform
from eagleray.models.gram.checks import CHECKS
from eagleray.models.gram.discriminative import DiscriminativeScorer
from eagleray.models.gram.judge import Judge
from eagleray.models.gram.policy_reward import (
    References,
    Reward,
    checked_reward,
    judge_reward,
    scored_reward,
)
from eagleray.models.rovrm.policy_reward import visual_reward
from eagleray.models.rovrm.scoring import VisualScorer
from eagleray.platform.config import Config as Section
from eagleray.platform.data.sources import SourceConfig, file_hashes
from eagleray.platform.launch import TrainedRun
from eagleray.platform.pretrained import load_pretrained
from eagleray.platform.runs import REPORT_FILE, RunFolder
from eagleray.platform.sections import ModelPath
from eagleray.platform.storage import write_json
from eagleray.platform.tracking import METRICS_FILE, read_metrics

JOB = "align.policy"
logger = logging.getLogger(__name__)


class PromptSection(PromptColumns):
    """Prompts to train on, and others to watch."""

    train: list[SourceConfig] = Field(min_length=1)
    """Rows with a prompt, e.g. preference data; equal prompts count once."""
    eval: list[SourceConfig] = Field(min_length=1)
    """Held-out prompts."""
    eval_limit: int = Field(default=64, ge=1)
    """Held-out prompts to watch."""


class RewardSection(Section):
    """The reward model, and for a judge what it compares with."""

    kind: Literal["gram", "rovrm"] = "gram"
    """A GRAM judge, or a visual reward model of RoVRM, which can also be asked about texts alone."""
    path: ModelPath
    """Folder or hub name of a judge, or folder of a visual reward model."""
    reference: Literal["policy", "start", "dataset"] = "policy"
    """Of a judge, whose answer is the reference. `policy`: the greedy answer of the policy as it is now (the paper); `start`:
    that of the policy before training, made once; `dataset`: a column of the prompts."""
    transform: RewardTransform = "prob"
    """Of a judge: `prob` (the paper), `centred` 2r - 1, or `logit`."""
    options: dict[str, Any] = Field(default={})
    """Further settings of the scorer, e.g. `swap_average: logit` or `share_prefix: false` of a judge."""

    @model_validator(mode="after")
    def _references_are_of_judges(self) -> RewardSection:
        if self.kind == "rovrm" and (self.reference, self.transform) != ("policy", "prob"):
            raise ValueError(
                "`reward.reference` and `reward.transform` belong to kind gram: leave them out; a visual reward model gives "
                "each answer a number of its own"
            )
        return self


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
        by_dataset = self.reward.reference == "dataset" or (
            self.gold is not None and self.gold.kind == "last_number"
        )
        if by_dataset != (self.prompts.reference is not None):
            raise ValueError(
                "`prompts.reference` belongs to `reward.reference: dataset` and to `gold.kind: last_number`, and only there"
            )
        return self

    @model_validator(mode="after")
    def _pictures_are_seen(self) -> Config:
        if self.prompts.images is None:
            return self
        if self.reward.kind != "rovrm" or (self.gold is not None and self.gold.kind not in CHECKS):
            raise ValueError(
                "with `prompts.images` the reward must be of kind rovrm, and `gold` a rule: judges and discriminative models "
                "do not see pictures"
            )
        if self.prompt_format != "chat":
            raise ValueError(
                "with `prompts.images` prompts are laid out by the processor: `prompt_format: chat`"
            )
        return self

    def load(self) -> tuple[Any, Any]:
        if self.prompts.images is None:
            return super().load()
        from transformers import AutoModelForImageTextToText, AutoProcessor

        processor = AutoProcessor.from_pretrained(self.model.path, revision=self.model.revision)
        return load_pretrained(AutoModelForImageTextToText, self.model), processor


def main(cfg: Config) -> TrainedRun:
    """Train, and tell where the gold reward was best."""

    def prepare(run: RunFolder) -> None:
        taken: set[tuple[str, str]] = set()
        for name, sources, limit in (
            ("eval", cfg.prompts.eval, cfg.prompts.eval_limit),
            ("train", cfg.prompts.train, None),
        ):
            pictures = run.data / "pictures"
            found = load_prompts(sources, cfg.prompts, without=taken, pictures=pictures)
            kept = list(found.items())[:limit]
            taken |= {key for key, _ in kept}
            write_rows(run.data / f"{name}.jsonl", [prompt for _, prompt in kept])
            hashes = {k: v for source in sources for k, v in file_hashes(source).items()}
            run.update_manifest(data_hashes=hashes)

    done = train_policy(JOB, cfg, build_trainer, prepare=prepare)
    found = looks(read_metrics(done.path / METRICS_FILE), cfg.reward.kind)
    summary = {**done.summary, **over_optimisation(found)}
    write_json(done.path / REPORT_FILE, summary)
    if found:
        plot_rewards(found, done.path / "plots" / "over_optimisation.png")
    return TrainedRun(done.path, summary)


def build_trainer(cfg: Config, model: Any, processor: Any, data: Path, arguments: dict[str, Any]) -> Any:
    """The trainer, in a worker."""
    from peft import LoraConfig
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_config import RLOOConfig
    from trl.trainer.rloo_trainer import RLOOTrainer

    prompts = {name: read_rows_back(data / f"{name}.jsonl") for name in ("train", "eval")}
    tokenizer = prepare_tokenizer(getattr(processor, "tokenizer", processor))
    policy = _Policy(cfg, tokenizer)
    # Before the arguments: with ZeRO-3 these make every model that is loaded later a sharded one.
    rewards = _rewards(cfg, policy, model, prompts, data)
    sampling: dict[str, Any] = {
        "num_generations": cfg.generation.answers,
        "max_completion_length": cfg.generation.max_tokens,
        "temperature": cfg.generation.temperature,
        "top_p": cfg.generation.top_p,
        "beta": cfg.beta,
        "reward_weights": [1.0] + [0.0] * (len(rewards) - 1),
        "shuffle_dataset": False,  # the rows stand in the order of training
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
    sets = {name: _data_set(cfg, rows) for name, rows in prompts.items()}
    wanted = cfg.train.max_steps * (cfg.train.batch_size // cfg.generation.answers)
    trainer = trainer_class(
        model=model,
        reward_funcs=rewards,
        args=settings,
        train_dataset=sets["train"].select(prompt_order(len(sets["train"]), wanted, cfg.train.seed)),
        eval_dataset=sets["eval"],
        processing_class=processor,
        peft_config=adapter,
    )
    policy.trainer = trainer
    return trainer


def _data_set(cfg: Config, prompts: Rows) -> Any:
    """Prompts as trl takes them, with their pictures in the column `image`."""
    from datasets import Dataset, Image

    rows = [{**row, "prompt": cfg.formatted(row["request"])} for row in prompts]
    if cfg.prompts.images is None:
        return Dataset.from_list(rows)
    shown = Dataset.from_list([{**row, "image": row["picture"]} for row in rows])
    return shown.cast_column("image", Image(mode="RGB"))


def _rewards(
    cfg: Config, policy: _Policy, model: Any, prompts: dict[str, list[Prompt]], data: Path
) -> list[Reward]:
    """The reward that is trained on, then those that are watched."""
    section = cfg.reward
    if section.kind == "rovrm":
        first = visual_reward(
            VisualScorer.from_pretrained(section.path, **section.options), name=section.kind
        )
        start = _start_answers(policy, model, prompts, cfg, data / "start.jsonl")
        return [first, *_gold(cfg, policy, start)]
    judge = Judge.from_pretrained(section.path, **section.options)
    start = _start_answers(policy, model, prompts, cfg, data / "start.jsonl")
    given = {row["request"]: row.get("reference", "") for part in prompts.values() for row in part}
    references: dict[str, References] = {
        "policy": policy,
        "start": lambda requests: [start[request] for request in requests],
        "dataset": lambda requests: [given[request] for request in requests],
    }
    rewards = [
        judge_reward(judge, references[section.reference], name=section.kind, transform=section.transform)
    ]
    if section.reference == "policy":
        rewards.append(policy.only_held_out(judge_reward(judge, references["start"], name="win_rate")))
    return [*rewards, *_gold(cfg, policy, start)]


def _gold(cfg: Config, policy: _Policy, start: dict[str, str]) -> list[Reward]:
    section = cfg.gold
    if section is None:
        return []
    if section.kind in CHECKS:
        reward = checked_reward(CHECKS[section.kind], name="gold")
    elif section.kind == "judge":
        judge = Judge.from_pretrained(str(section.path))
        reward = judge_reward(judge, lambda requests: [start[request] for request in requests], name="gold")
    else:
        reward = scored_reward(DiscriminativeScorer.from_pretrained(str(section.path)), name="gold")
    return [policy.only_held_out(reward)]


def prompt_order(prompts: int, wanted: int, seed: int) -> list[int]:
    """Places of the prompts of a whole run: each prompt once in an order drawn by the seed, then all in another order.

    trl's own sampler begins its draws anew when a run is resumed: every pass would then repeat the order of the first.
    """
    rng = Random(seed)
    order: list[int] = []
    while len(order) < wanted:
        order += rng.sample(range(prompts), prompts)
    return order[:wanted]


def _start_answers(
    policy: _Policy, model: Any, prompts: dict[str, list[Prompt]], cfg: Config, cache: Path
) -> dict[str, str]:
    """Greedy answers of the start policy to what is compared with them, shared out among the workers and kept."""
    import torch.distributed as dist

    reference = cfg.reward.reference if cfg.reward.kind == "gram" else None
    if reference == "start":
        requests = [row["request"] for part in prompts.values() for row in part]
    elif reference == "policy" or (cfg.gold is not None and cfg.gold.kind == "judge"):
        requests = [row["request"] for row in prompts["eval"]]
    else:
        return {}
    if cache.is_file():
        return {row["request"]: row["answer"] for row in read_rows_back(cache)}
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = requests[rank::world]
    answered = dict(zip(mine, policy.answers(model, mine), strict=True))
    parts: list[Any] = [answered]
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, answered)
    found = {request: answer for part in parts for request, answer in part.items()}
    if rank == 0:
        write_rows(cache, [{"request": request, "answer": answer} for request, answer in found.items()])
    return found


class _Policy:
    """Greedy answers of a model; of the trainer's policy as it is now when called."""

    def __init__(self, cfg: Config, tokenizer: Any) -> None:
        self._cfg, self._tokenizer = cfg, tokenizer
        self.trainer: Any = None

    def __call__(self, requests: Sequence[str]) -> list[str]:
        from trl.models.utils import unwrap_model_for_generation

        wrapped = self.trainer.model_wrapped
        with unwrap_model_for_generation(wrapped, self.trainer.accelerator) as model:
            return self.answers(model, requests)

    def only_held_out(self, reward: Reward) -> Any:
        """The reward on held-out prompts; in training nothing, which trl leaves out of its means."""

        def watched(**columns: Any) -> Any:
            training = self.trainer.model.training
            return [None] * len(columns["completions"]) if training else reward(**columns)

        watched.__name__ = getattr(reward, "__name__", "watched")
        return watched

    def answers(self, model: Any, requests: Sequence[str]) -> list[str]:
        """Answers in the order of the requests."""
        cfg = self._cfg
        found = greedy_answers(
            model,
            self._tokenizer,
            [model_text(request, cfg.prompt_format, self._tokenizer) for request in requests],
            max_tokens=cfg.generation.max_tokens,
            batch_size=4 * cfg.train.micro_batch_size,
        )
        # A reference must hold something to be compared with.
        return [answer or "..." for answer in found]


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
