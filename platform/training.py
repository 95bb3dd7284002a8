"""The one training loop.

Special here:
- The loss of a step is divided by the weight of the *global* batch (all workers, all accumulation passes),
  so 1x8, 2x4 and accumulated splits give the same loss and the same gradients.
- Batches and random numbers are functions of (seed, step, rank); a checkpoint needs no sampler or generator
  state, and a resumed run is bit-identical to an undisturbed one.
- A loss that is not finite stops the run *before* the optimiser step, with the ids of the batch.
- The best model is exported when it is found, so even a killed run leaves its best model behind.
- Before every step the workers add up what the step needs (the global weight) and, in the same all-reduce, who
  has written its checkpoint, who was asked to stop and whose machine will be taken away. So all of them act at
  the same step, without a message of its own.
"""

from __future__ import annotations

import logging
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist

from eagleray.platform.averaging import average_models
from eagleray.platform.checkpoints import Checkpointer, CheckpointError, LoopState
from eagleray.platform.config import config_hash
from eagleray.platform.data.sampler import BatchSampler, cut_by_length
from eagleray.platform.engine import build_engine, own_rates, sharded_loading
from eagleray.platform.pretrained import export_model
from eagleray.platform.remote import WORKERS_PARTS, SharedFolder
from eagleray.platform.runs import FREE_ON_RESUME
from eagleray.platform.sections import TrainingConfig, TrainSection
from eagleray.platform.stopping import stop_requested
from eagleray.platform.task import Batch, Task
from eagleray.platform.tracking import METRICS_FILE, MetricsSink

logger = logging.getLogger(__name__)

Report = Callable[[dict[str, float]], None]


class NonFiniteLossError(ValueError):
    """The loss of a step is NaN or infinite; the message names the step and the ids of the batch."""


def total_steps(train: TrainSection, examples: int) -> int:
    """Optimiser steps of a run: `max_steps`, or enough for `epochs` passes over `examples`."""
    if train.max_steps is not None:
        return train.max_steps
    return max(1, math.ceil(train.epochs * examples / train.batch_size))


def run_training(
    task: Task,
    cfg: TrainingConfig,
    folder: SharedFolder | Path,
    *,
    report: Report = lambda _: None,
    evicted: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Train `task` to the end, resuming from the newest whole checkpoint of the run folder.

    Without one, the run begins at step 0, or at the step of `train.start_from`.

    Every worker calls this inside an initialised `torch.distributed` process group, with the same arguments.

    Args:
        task: The method's part.
        cfg: The run's config.
        folder: The run folder; a path is one that all workers share.
        report: Called by every worker with the metrics of each evaluation (`ray.train.report`).
        evicted: Whether this worker's machine is about to be taken away; asked before every step. The loop then
            saves a checkpoint, once, and goes on.

    Returns:
        Metrics of the last evaluation, the best value of the selection metric and the counts of the run;
        `None` if the run was asked to stop (`stopping.request_stop`) and has done so after a checkpoint.

    Raises:
        NonFiniteLossError: The loss is NaN or infinite.
        CheckpointError: A checkpoint can't be written, or none of those there can be used.
    """
    folder = SharedFolder(folder) if isinstance(folder, Path) else folder
    return _Loop(task, cfg, folder, report, evicted).run()


@dataclass(frozen=True)
class _Agreed:
    """Sums over all workers before a step: of the step's batch, and of the workers that say yes."""

    weight: float
    tokens: float
    examples: float
    written: float
    stop: float
    evicted: float


class _Loop:
    def __init__(
        self,
        task: Task,
        cfg: TrainingConfig,
        folder: SharedFolder,
        report: Report,
        evicted: Callable[[], bool],
    ) -> None:
        self.task, self.cfg, self.report, self.evicted = task, cfg, report, evicted
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.folder, self.run_dir = folder, folder.path
        self.model_dir, self.best_models = self.run_dir / "model", self.run_dir / "best"
        self.metric = cfg.train.metric or task.metric
        self.mode = task.mode
        self.sampler = BatchSampler(
            task.train_lengths,
            batch_size=cfg.train.batch_size,
            micro_batch_size=cfg.train.micro_batch_size,
            seed=cfg.train.seed,
            bucket_batches=cfg.train.bucket_batches,
            micro_batch_length=cfg.train.micro_batch_length,
        )
        self.steps = total_steps(cfg.train, len(task.train_lengths))
        self.last_step = min(self.steps, cfg.train.stop_at or self.steps)
        self.eval_every = cfg.train.eval_every or max(1, math.ceil(self.steps / 10))
        self.checkpoint_every = cfg.train.checkpoint_every or self.eval_every
        seed_step(cfg.train.seed, step=0, rank=0)  # every worker initialises the same model
        with sharded_loading(cfg):
            model = task.build_model()
        if cfg.train.gradient_checkpointing:
            cast(Any, model).gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        self.engine = build_engine(model, cfg, total_steps=self.steps)
        self.checkpointer = Checkpointer(
            self.engine,
            folder,
            config_hash=config_hash(cfg, exclude=[*FREE_ON_RESUME]),
            keep=cfg.train.keep_checkpoints,
        )
        self.state = self.checkpointer.restore() or self._start()
        self.saved_for_eviction = False
        self.sink: MetricsSink | None = None
        if self.rank == 0:
            folder.begin_writing()
            self.sink = MetricsSink(self.run_dir, cfg.tracking, self.state.step)

    def _start(self) -> LoopState:
        if self.cfg.train.start_from is None:
            return LoopState()
        with own_rates(self.engine):
            state = self.checkpointer.start_from(self.cfg.train.start_from)
        if state.step >= self.last_step:
            raise CheckpointError(
                f"`train.start_from` has done {state.step} steps and this run ends after {self.last_step}. "
                "Raise `train.max_steps` or `train.stop_at`, or start from an earlier checkpoint."
            )
        return state

    def run(self) -> dict[str, float] | None:
        try:
            with ThreadPoolExecutor(1) as pool:
                for batches in self._prefetch(pool):
                    agreed = self._agree(batches)
                    if agreed.written == self.world_size or agreed.stop or agreed.evicted:
                        self._mind_checkpoints(agreed)
                    if agreed.stop:
                        return None
                    self._train_step(batches, agreed)
                    if self._at(self.eval_every) and self._evaluate_and_keep():
                        logger.info(
                            "Stopped early: %d evaluations without a better %s.",
                            self.state.stale,
                            self.metric,
                        )
                        break
            self.checkpointer.finish()
            if self.state.best is None or self.cfg.train.keep_model == "last":
                self._export(self.model_dir)
            elif self.cfg.train.average_best > 1:
                self._average_best()
            self._close_sink()
            if self.rank == 0:
                self.folder.freeze(*WORKERS_PARTS)()
            return self._summary()
        finally:
            self.checkpointer.close()
            self._close_sink()

    def _close_sink(self) -> None:
        if self.sink:
            self.sink.close()
            self.sink = None

    def _at(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.last_step

    def _prefetch(self, pool: ThreadPoolExecutor) -> Iterator[list[Batch]]:
        """Micro-batches of each remaining step; the next step is collated while this one computes."""

        def collate(step: int) -> list[Batch]:
            shares = self.sampler.micro_batches(step, rank=self.rank, world_size=self.world_size)
            return [self.task.train_batch(indices, step=step) for indices in shares]

        upcoming = pool.submit(collate, self.state.step) if self.state.step < self.last_step else None
        while upcoming is not None:
            batches = upcoming.result()
            following = self.state.step + 1
            upcoming = pool.submit(collate, following) if following < self.last_step else None
            yield batches

    def _agree(self, batches: list[Batch]) -> _Agreed:
        mine = _Agreed(
            weight=sum(b.weight for b in batches),
            tokens=sum(b.tokens for b in batches),
            examples=sum(len(b.ids) for b in batches),
            written=self.checkpointer.written,
            # One worker looks: the file may reach the machines of the others a moment later.
            stop=self.rank == 0 and stop_requested(self.folder),
            evicted=self.evicted(),
        )
        return _Agreed(*self._sum_over_workers(list(vars(mine).values())).tolist())

    def _mind_checkpoints(self, agreed: _Agreed) -> None:
        """Make the one that all workers have written valid; save one now if the workers are about to end."""
        if agreed.stop or (agreed.evicted and not self.saved_for_eviction):
            self.checkpointer.begin(self.state)
            self.saved_for_eviction = bool(agreed.evicted)
            if self.rank == 0:
                reason = "Asked to stop" if agreed.stop else "A machine of this run is about to be taken away"
                logger.info("%s: a checkpoint is saved at step %d.", reason, self.state.step)
        self.checkpointer.finish()

    def _train_step(self, batches: list[Batch], agreed: _Agreed) -> None:
        started = time.perf_counter()
        seed_step(self.cfg.train.seed, step=self.state.step, rank=self.rank)
        self.engine.train()
        weight = agreed.weight
        if weight == 0:
            raise ValueError(f"Step {self.state.step}: no example of the batch has a target; check `data`.")
        sums: dict[str, torch.Tensor] = {}
        for batch in batches:
            loss, further = self.engine(self.task.loss, batch.to(self.engine.device).tensors)
            # DeepSpeed averages gradients over the workers; the mean we want is over the global weight.
            self.engine.backward(loss * (self.world_size / weight), scale_wrt_gas=False)
            for name, value in {"loss": loss.detach(), **further}.items():
                sums[name] = sums.get(name, torch.zeros_like(value, dtype=torch.float64)) + value
        means = dict(zip(sums, (self._sum_over_workers(list(sums.values())) / weight).tolist(), strict=True))
        if not math.isfinite(means["loss"]):
            self._stop_at_non_finite(means["loss"], batches)
        rate = self.engine.get_lr()[0]
        self.engine.step()
        self.state.step += 1
        self.state.examples += int(agreed.examples)
        self.state.tokens += int(agreed.tokens)
        self._log_step(means, rate, agreed.tokens, time.perf_counter() - started)

    def _log_step(self, means: dict[str, float], rate: float, tokens: float, seconds: float) -> None:
        window = self.state.window
        further = {
            "grad_norm": float(self.engine.get_global_grad_norm() or 0.0),
            "tokens": tokens,
            "steps": 1.0,
        }
        for name, value in {**means, **further, "seconds": seconds}.items():
            window[name] = window.get(name, 0.0) + value
        if not self._at(self.cfg.train.log_every):
            return
        steps, tokens, seconds = window.pop("steps"), window.pop("tokens"), window.pop("seconds")
        line = {name: value / steps for name, value in window.items()}
        line |= {"lr": rate, "tokens_per_s": tokens / seconds, "step_s": seconds / steps}
        line |= {"examples": self.state.examples, "epoch": self.state.examples / len(self.task.train_lengths)}
        window.clear()
        if self.sink:
            self.sink.log(self.state.step, line, kind="train")
            self.folder.send_soon(METRICS_FILE)

    def _evaluate_and_keep(self) -> bool:
        """Evaluate, keep the model if it is the best, checkpoint; true if training should stop."""
        if len(self.task.eval_lengths):
            train = self.cfg.train
            metrics = evaluate(
                self.task,
                self.engine,
                batch_size=train.micro_batch_size,
                batch_length=train.micro_batch_length,
            )
            self.state.last_eval = metrics
            if self.sink:
                self.sink.log(self.state.step, metrics, kind="eval")
            self._note_best(metrics)
            self.report({"step": self.state.step, **metrics})
        stop = self.cfg.train.patience is not None and self.state.stale >= self.cfg.train.patience
        if stop or self._at(self.checkpoint_every):
            self.checkpointer.begin(self.state)
        return stop

    def _note_best(self, metrics: dict[str, float]) -> None:
        if self.metric not in metrics:
            raise ValueError(f"`train.metric` is {self.metric!r}; this job evaluates: {', '.join(metrics)}.")
        value, best = metrics[self.metric], self.state.best
        if self.cfg.train.average_best > 1:
            self._keep_for_average(value)
        if best is None or (value < best if self.mode == "min" else value > best):
            self.state.best, self.state.best_step, self.state.stale = value, self.state.step, 0
            if self.cfg.train.keep_model == "best":
                self._export(self.model_dir)
        else:
            self.state.stale += 1

    def _keep_for_average(self, value: float) -> None:
        """Export the model if it is among the best, and remove the one that is no longer."""
        sign = 1 if self.mode == "min" else -1
        step = f"step-{self.state.step:08d}"
        values = {**self.state.best_models, step: value}
        kept = sorted(values, key=lambda name: sign * values[name])[: self.cfg.train.average_best]
        if step in kept:
            self._export(self.best_models / step)
        if self.rank == 0:
            for name in values.keys() - set(kept):
                shutil.rmtree(self.best_models / name, ignore_errors=True)
        self.state.best_models = {name: values[name] for name in kept}

    def _average_best(self) -> None:
        if self.rank == 0:
            average_models([self.best_models / name for name in self.state.best_models], self.model_dir)
        dist.barrier()

    def _export(self, path: Path) -> None:
        export_model(self.engine.module.model, path, save_extras=self.task.save_extras)

    def _summary(self) -> dict[str, float]:
        state = self.state
        summary = {**state.last_eval, "steps": state.step, "examples": state.examples, "tokens": state.tokens}
        if state.best is not None:
            summary |= {f"best_{self.metric}": state.best, "best_step": state.best_step or 0}
        return summary

    def _sum_over_workers(self, values: Sequence[float | torch.Tensor]) -> torch.Tensor:
        total = torch.tensor([float(v) for v in values], dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(total)
        return total

    def _stop_at_non_finite(self, loss: float, batches: list[Batch]) -> None:
        self.checkpointer.finish()
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, [i for batch in batches for i in batch.ids])
        ids = [i for part in everyone for i in part]
        shown = ", ".join(ids[:64]) + (f" and {len(ids) - 64} more" if len(ids) > 64 else "")
        raise NonFiniteLossError(
            f"The loss of step {self.state.step} is {loss}. Nothing was updated; the last checkpoint is whole. "
            f"Lower `optim.lr`, use fp32 or bf16, or look at the examples of this batch: {shown}"
        )


@torch.no_grad()
def evaluate(
    task: Task, engine: Any, *, batch_size: int, batch_length: int | None = None
) -> dict[str, float]:
    """Metrics of the whole evaluation set, the same on every worker and for any number of workers."""
    engine.eval()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    lengths = task.eval_lengths
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    pieces = cut_by_length([lengths[i] for i in order], batch_size, batch_length)
    chunks = [order[piece] for piece in pieces]
    mine: list[tuple[int, Any]] = []
    for first in range(0, len(chunks), world_size):
        own = first + rank
        # Under ZeRO-3 every forward is collective: a worker without a chunk of its own repeats the shortest.
        chunk = chunks[own] if own < len(chunks) else chunks[-1]
        batch = task.eval_batch(chunk).to(engine.device)
        records = engine(task.evaluate_batch, batch.tensors)
        if own < len(chunks):
            mine.extend(zip(chunk, records, strict=True))
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, mine)
    ordered = sorted((pair for part in everyone for pair in part), key=lambda pair: pair[0])
    return task.summarise([record for _, record in ordered])


def seed_step(seed: int, *, step: int, rank: int) -> None:
    """Seed torch, NumPy and Python from (seed, step, rank), so that no generator state has to be saved."""
    mixed = int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)
    torch.manual_seed(mixed)
    np.random.seed(mixed % 2**32)
    random.seed(mixed)
