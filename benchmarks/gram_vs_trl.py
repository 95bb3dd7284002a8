"""`gram.finetune` with one worker, against trl's SFTTrainer and against a bare PyTorch loop.

    python -m benchmarks.gram_vs_trl [--quick] [--threads N]

All three start from the same folder with a model of random weights and see the same judge prompts of about 256
tokens in the same batches (no padding to speak of, so length bucketing gains us nothing here), in fp32 on the
CPU, with fused AdamW, clipping and a cosine schedule, and the same number of threads, each in a fresh process.
They run in turn, twice, the second time in the opposite order. One core is left to Ray's own processes, of which
a dozen wake up many times a second: where every core computes, each of them holds up the whole step. `--threads`
with all cores measures that.

- `tokens_per_s`: tokens of judge prompts a second, ours over trl's. Ours is the real job: run folder, Ray Train,
  DeepSpeed, and a line of metrics for every step (ten times its default). Time is the clock between the lines of
  `metrics.jsonl`, so whatever the loop does between steps counts. trl gets the prompts as token ids, the label and the
  end of turn as completion and completion-only loss, without gradient checkpointing; its time is the clock
  between the ends of steps. On a CPU trl 1.16 scores every position of the batch with the whole vocabulary, in
  tiles; on a GPU it scores the completion only, so this ratio is one for CPUs.
- `step_overhead`: the median step of our loop, timed in the same way, over the median step of a bare loop with
  our loss: batches collated beforehand, forward, backward, clipping, optimiser, schedule, nothing else. The first
  losses must agree.

The first steps of every run are left out.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.harness import MadeUpWords, Ratio, finish, in_fresh_process, interleave, median_ratio, start
from eagleray.models.backbone.model import build_llama, llama_config
from eagleray.models.gram.losses import pair_logit_loss
from eagleray.models.gram.prompts import JudgeEncoder, JudgeTemplate
from eagleray.models.gram.scoring import label_logits

LR = 1e-4


@dataclass(frozen=True)
class Size:
    """Model, batch and length of the runs."""

    width: int = 256
    layers: int = 6
    vocab_size: int = 16_384
    tokens: int = 256
    batch: int = 4
    left_out: int = 5
    steps: int = 50
    """Measured steps of ours and of the bare loop in a round."""
    trl_steps: int = 10
    rounds: int = 2


QUICK = Size(
    width=64, layers=2, vocab_size=2000, tokens=192, batch=4, left_out=2, steps=4, trl_steps=4, rounds=1
)


@dataclass(frozen=True)
class Timing:
    """Seconds of the measured steps of one run, their tokens a second, and the loss of the first step."""

    seconds: list[float]
    tokens_per_s: float
    first_loss: float


def prepare(*, folder: Path, size: Size) -> None:
    """Write the model with its tokenizer, and the pairs as JSONL, into a folder."""
    template = JudgeTemplate.load("eagleray")
    words = MadeUpWords(vocab_size=size.vocab_size, also=template.render("", "", ""))
    config = llama_config(
        vocab_size=size.vocab_size,
        width=size.width,
        layers=size.layers,
        heads=size.width // 32,
    )
    build_llama(config, seed=0).save_pretrained(folder / "model")
    words.tokenizer.save_pretrained(folder / "model")
    structure = len(JudgeEncoder(words.tokenizer, template).encode("", "", "") or [])
    part = (size.tokens - structure) // 3
    rng = random.Random(0)
    for name, pairs in (("train", size.batch * (size.left_out + size.steps)), ("eval", size.batch)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(pairs):
                row = {text: words.text(part, rng) for text in ("prompt", "chosen", "rejected")}
                file.write(json.dumps(row) + "\n")


def ours(*, folder: Path, run: str, size: Size, workers: int = 1) -> Timing:
    """The job itself, in a run folder of its own; each worker has the threads of this process."""
    from eagleray.jobs.gram import finetune
    from eagleray.platform.config import validate_config

    steps = size.left_out + size.steps
    config = validate_config(
        finetune.Config,
        {
            "model": {"path": str(folder / "model")},
            "data": {
                part: {"sources": [{"path": str(folder / f"{part}.jsonl")}]} for part in ("train", "eval")
            },
            "run": {"dir": str(folder / run)},
            "ray": {"num_workers": workers, "cpus_per_worker": torch.get_num_threads(), "use_gpu": False},
            "train": {
                "batch_size": size.batch,
                "micro_batch_size": size.batch // workers,
                "max_steps": steps,
                "eval_every": steps,
                "log_every": 1,
            },
            "optim": {"lr": LR},
        },
        "benchmark",
    )
    finetune.main(config)
    lines = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    tokens = [int(mask_BT.sum()) for _, mask_BT, _ in _batches(folder / run / "data", size)]
    return _timing([line["time"] for line in train], tokens, train[0]["loss"], size.left_out)


def bare(*, folder: Path, data: str, size: Size) -> Timing:
    """The same steps in as few lines as PyTorch needs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

    steps = size.left_out + size.steps
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).train()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    label_ids = JudgeEncoder(tokenizer, JudgeTemplate.load("eagleray")).label_ids
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    schedule = get_scheduler(
        "cosine", optimizer, num_warmup_steps=round(0.1 * steps), num_training_steps=steps
    )
    batches = _batches(folder / data, size)
    marks, first_loss = [], 0.0
    for step, (ids_BT, mask_BT, labels_B) in enumerate(batches):
        logits_B2 = label_logits(model, ids_BT, mask_BT, label_ids)
        loss = pair_logit_loss(logits_B2, labels_B, smoothing=0.1, convention="torch")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step == 0:
            first_loss = loss.item()
        marks.append(time.time())
    return _timing(marks, [int(mask_BT.sum()) for _, mask_BT, _ in batches], first_loss, size.left_out)


def trl(*, folder: Path, data: str, size: Size) -> Timing:
    """SFTTrainer on the same rows in the same order."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    steps = size.left_out + size.trl_steps
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    encoder = JudgeEncoder(tokenizer, JudgeTemplate.load("eagleray"))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    rows: dict[str, list[list[int]]] = {"input_ids": [], "completion_mask": []}
    tokens = []
    for ids_BT, mask_BT, labels_B in _batches(folder / data, size)[:steps]:
        tokens.append(int(mask_BT.sum()))
        for ids, mask, label in zip(ids_BT, mask_BT, labels_B.tolist(), strict=True):
            prompt = ids[mask.bool()].tolist()
            rows["input_ids"].append([*prompt, encoder.label_ids[label], end])
            rows["completion_mask"].append([0] * len(prompt) + [1, 1])
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            marks.append(time.time())

    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict(rows),
        callbacks=[Clock()],
        args=SFTConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=size.batch,
            max_steps=steps,
            completion_only_loss=True,
            max_length=None,
            learning_rate=LR,
            lr_scheduler_type="cosine",
            warmup_steps=round(0.1 * steps),
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            train_sampling_strategy="sequential",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return _timing(marks, tokens, losses[0] if losses else float("nan"), size.left_out)


def main() -> None:
    """Measure and print."""
    options, machine = start(__doc__ or "", use_gpu=False, spare_cores=1)
    size, threads = QUICK if options.quick else Size(), options.threads
    with tempfile.TemporaryDirectory(prefix="eagleray-benchmark-") as name:
        folder = Path(name)
        in_fresh_process(prepare, threads=threads, folder=folder, size=size)
        runs: list[str] = []

        def run_ours() -> Timing:
            runs.append(f"run-{len(runs)}")
            return in_fresh_process(ours, threads=threads, folder=folder, run=runs[-1], size=size)

        def run_other(function: Callable[..., Timing]) -> Callable[[], Timing]:
            # The first run of ours has written the rows that all others read.
            return lambda: in_fresh_process(
                function, threads=threads, folder=folder, data="run-0/data", size=size
            )

        sides = {"ours": run_ours, "bare": run_other(bare), "trl": run_other(trl)}
        results: dict[str, list[Timing]] = interleave(sides, rounds=size.rounds)
    losses = [timing.first_loss for timing in (*results["ours"], *results["bare"])]
    if max(losses) - min(losses) > 1e-4:
        raise AssertionError(f"our loop and the bare loop begin with different losses: {losses}")
    rates = {side: [timing.tokens_per_s for timing in timings] for side, timings in results.items()}
    steps = {side: [median(timing.seconds) for timing in timings] for side, timings in results.items()}
    finish(
        "gram_vs_trl",
        [
            Ratio(
                "tokens_per_s",
                "tokens/s, gram.finetune over SFTTrainer",
                median_ratio(rates["ours"], rates["trl"]),
                1.2,
                "high",
                f"{median(rates['ours']):.0f}, {median(rates['trl']):.0f} tokens/s",
            ),
            Ratio(
                "step_overhead",
                "median step, gram.finetune over a bare loop",
                median_ratio(steps["ours"], steps["bare"]),
                1.05,
                "low",
                f"{1000 * median(steps['ours']):.1f} ms, {1000 * median(steps['bare']):.1f} ms",
            ),
        ],
        machine=machine,
        quick=options.quick,
        size=asdict(size),
        precision="fp32",
        tokens_per_s=rates,
        median_step_s=steps,
    )


def _batches(data: Path, size: Size) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The batches of the run, in its order: ids [B, T], mask [B, T], labels [B]."""
    from eagleray.models.gram.batching import pad_right
    from eagleray.platform.data.examples import Examples
    from eagleray.platform.data.sampler import BatchSampler

    examples = Examples(data / "train.arrow")
    sampler = BatchSampler(
        examples.column("length"), batch_size=size.batch, micro_batch_size=size.batch, seed=0
    )
    batches = []
    for step in range(size.left_out + size.steps):
        [indices] = sampler.micro_batches(step, rank=0, world_size=1)
        rows = [examples[index] for index in indices]
        labels_B = torch.tensor([row["label"] for row in rows])
        batches.append((*pad_right([row["input_ids"].tolist() for row in rows]), labels_B))
    return batches


def _timing(marks: list[float], tokens: list[int], first_loss: float, left_out: int) -> Timing:
    """Marks are the times at which steps ended; the first `left_out` steps do not count."""
    marks, tokens = marks[left_out - 1 :], tokens[left_out:]
    seconds = [after - before for before, after in pairwise(marks)]
    return Timing(seconds, sum(tokens[: len(seconds)]) / sum(seconds), first_loss)


if __name__ == "__main__":
    main()
