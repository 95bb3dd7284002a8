"""One GRPO step of `align.policy` with its judge in process, against trl with a scalar reward model of the same size.

    python -m benchmarks.grpo_step [--quick] [--threads N]

Every side is trl's GRPOTrainer on the same policy, prompts and settings: it samples 8 answers of at most 48 tokens to each
of 4 prompts of 256, rewards them, computes the reference model's probabilities, and makes one optimiser step. They differ in
the reward alone. Models of random weights and one size, fp32, on the CPU. A step is the clock between trl's
`on_step_begin` and `on_step_end`; its reward is the clock around `_calculate_rewards`. The first step of each is left out. trl has
a process, our three trainers another.

- `judge_over_scalar`: the step with the GRAM judge over the step with trl's own way of using a sequence classifier with one
  label. The judge reads each pair of answers in both orders, so it sees more than four times the tokens; it compares with answers
  of the start policy, which are there already (`reward.reference: start`).
- `policy_over_scalar`: the same with the job's default, the paper's reference: the greedy answers of the policy as it is now,
  which have to be generated in every step.
- `prefix_sharing`: seconds that the judge takes of a step when it computes every prompt whole, over those when it computes
  what prompts have in common once.

`share_of_step` in the JSON is the part of a step that its reward takes.
"""

from __future__ import annotations

import copy
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import (
    MadeUpWords,
    Ratio,
    Side,
    finish,
    in_fresh_process,
    interleave,
    median_ratio,
    start,
)
from eagleray.models.backbone.model import build_llama, llama_config
from eagleray.models.gram.checkpoint import JudgeSettings
from eagleray.models.gram.prompts import JudgeTemplate

REWARDS: dict[str, dict[str, Any] | None] = {
    "scalar": None,
    "judge": {"reference": "start"},
    "unshared": {"reference": "start", "options": {"share_prefix": False}},
    "policy": {"reference": "policy"},
}
"""Side -> the section `reward` of its config; none for trl's own reward model."""


@dataclass(frozen=True)
class Size:
    """Models and batch."""

    width: int = 256
    layers: int = 6
    vocab_size: int = 8192
    prompt: int = 256
    completion: int = 48
    prompts: int = 4
    answers: int = 8
    rounds: int = 7


QUICK = Size(width=64, layers=2, vocab_size=2000, prompt=96, completion=8, prompts=2, answers=4, rounds=3)

Reading = tuple[float, float]
"""Seconds of a step, and those of its reward."""


def prepare(*, folder: Path, size: Size) -> None:
    """Write policy, judge and reward model, and the prompts as the job's workers find them."""
    from transformers import LlamaForSequenceClassification

    from eagleray.jobs.align.training import write_rows

    words = MadeUpWords(vocab_size=size.vocab_size, also=JudgeTemplate.load("eagleray").render("", "", ""))
    tokenizer: Any = words.tokenizer
    config = llama_config(
        vocab_size=size.vocab_size,
        width=size.width,
        layers=size.layers,
        heads=size.width // 32,
        pad_id=tokenizer.pad_token_id,
        eos_id=tokenizer.eos_token_id,
    )
    for seed, name in enumerate(("policy", "judge", "scalar")):
        model = build_llama(config, seed=seed)
        if name == "scalar":
            one_label = copy.deepcopy(config)
            one_label.num_labels = 1
            classifier = LlamaForSequenceClassification(one_label)
            classifier.model.load_state_dict(model.model.state_dict())
            classifier.save_pretrained(folder / name)
        else:
            model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    JudgeSettings().save(folder / "judge")
    rng = random.Random(0)
    for name in ("train", "eval"):
        rows = [{"request": words.text(size.prompt, rng)} for _ in range(size.prompts)]
        write_rows(folder / f"{name}.jsonl", rows)


def build_steps(*, folder: Path, size: Size, names: list[str]) -> Callable[[str], Reading]:
    """Trainers by name; a round is one step of one of them."""
    steps = {name: _step(folder, size, REWARDS[name]) for name in names}
    return lambda name: steps[name]()


def _step(folder: Path, size: Size, reward: dict[str, Any] | None) -> Callable[[], Reading]:
    from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback

    from eagleray.jobs.align import policy
    from eagleray.jobs.align.training import trainer_arguments
    from eagleray.platform.config import validate_config
    from eagleray.platform.pretrained import load_pretrained, load_tokenizer

    batch = size.prompts * size.answers
    cfg = validate_config(
        policy.Config,
        {
            "model": {"path": str(folder / "policy")},
            "prompts": {part: [{"path": str(folder / f"{part}.jsonl")}] for part in ("train", "eval")},
            "prompt_format": "plain",
            "reward": {"path": str(folder / "judge"), **(reward or {})},
            "generation": {"answers": size.answers, "max_tokens": size.completion},
            "train": {"max_steps": 1, "batch_size": batch, "micro_batch_size": batch},
        },
        "benchmark",
    )
    with tempfile.TemporaryDirectory(prefix="eagleray-trl-") as output:
        arguments = {
            **trainer_arguments(cfg, Path(output)),
            "eval_strategy": "no",
            "eval_on_start": False,
            "save_strategy": "no",
        }
    model, tokenizer = load_pretrained(AutoModelForCausalLM, cfg.model), load_tokenizer(cfg.model)
    build = _scalar_trainer if reward is None else policy.build_trainer
    trainer = build(cfg, model, tokenizer, folder, arguments)
    marks: list[float] = []
    rewarding: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            marks.append(time.perf_counter())

        on_step_end = on_step_begin

    calculate = trainer._calculate_rewards

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        found = calculate(*args, **kwargs)
        rewarding.append(time.perf_counter() - started)
        return found

    trainer._calculate_rewards = timed
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Clock())

    def step() -> Reading:
        marks.clear()
        rewarding.clear()
        trainer.train()
        begin, end = marks
        return end - begin, sum(rewarding)

    return step


def _scalar_trainer(cfg: Any, model: Any, tokenizer: Any, folder: Path, arguments: dict[str, Any]) -> Any:
    """trl's trainer with trl's reward model, and in all else the settings of `align.policy`."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    from eagleray.jobs.align.training import read_rows_back

    tokenizer.padding_side = "left"
    rows = read_rows_back(folder / "train.jsonl")
    return GRPOTrainer(
        model=model,
        reward_funcs=AutoModelForSequenceClassification.from_pretrained(folder / "scalar"),
        reward_processing_classes=AutoTokenizer.from_pretrained(folder / "scalar"),
        args=GRPOConfig(
            **arguments,
            num_generations=cfg.generation.answers,
            max_completion_length=cfg.generation.max_tokens,
            beta=cfg.beta,
        ),
        train_dataset=Dataset.from_list([{"prompt": cfg.formatted(row["request"])} for row in rows]),
        processing_class=tokenizer,
    )


def main() -> None:
    """Measure and print."""
    options, machine = start(__doc__ or "", use_gpu=False)
    size, threads = QUICK if options.quick else Size(), options.threads
    with tempfile.TemporaryDirectory(prefix="eagleray-benchmark-") as name, ExitStack() as stack:
        folder = Path(name)
        in_fresh_process(prepare, threads=threads, folder=folder, size=size)
        ours = [name for name in REWARDS if name != "scalar"]
        sides: dict[str, Callable[[], Reading]] = {}
        for names in (["scalar"], ours):  # a process each
            side = stack.enter_context(
                Side(build_steps, threads=threads, folder=folder, size=size, names=names)
            )
            sides |= {name: partial(side, name) for name in names}
        interleave(sides, rounds=1)  # the first step makes the moments of AdamW
        results: dict[str, list[Reading]] = interleave(sides, rounds=size.rounds, seconds=90)
    steps = {side: [step for step, _ in readings] for side, readings in results.items()}
    rewards = {side: [reward for _, reward in readings] for side, readings in results.items()}
    middle = {side: median(values) for side, values in steps.items()}
    finish(
        "grpo_step",
        [
            Ratio(
                "judge_over_scalar",
                "GRPO step, GRAM judge over scalar reward model",
                median_ratio(steps["judge"], steps["scalar"]),
                1.25,
                "low",
                f"{middle['judge']:.3g} s, {middle['scalar']:.3g} s",
            ),
            Ratio(
                "policy_over_scalar",
                "GRPO step, judge with greedy references over scalar",
                median_ratio(steps["policy"], steps["scalar"]),
                1.5,
                "low",
                f"{middle['policy']:.3g} s, {middle['scalar']:.3g} s",
            ),
            Ratio(
                "prefix_sharing",
                "judge's seconds of a step, prompts whole over shared",
                median_ratio(rewards["unshared"], rewards["judge"]),
                2.0,
                "high",
                f"{median(rewards['unshared']):.3g} s, {median(rewards['judge']):.3g} s",
            ),
        ],
        machine=machine,
        quick=options.quick,
        size=asdict(size),
        precision="fp32",
        rounds=len(steps["judge"]),
        step_s=steps,
        reward_s=rewards,
        share_of_step={
            side: round(median(r / s for r, s in zip(rewards[side], steps[side], strict=True)), 4)
            for side in steps
        },
    )


if __name__ == "__main__":
    main()
