"""What a method contributes to the one training loop: a `Task`.

A task owns the model, the examples and the loss; the loop owns everything else (batching, distribution,
optimisation, evaluation rhythm, checkpoints, metrics). A loss is returned as a *sum* with the batch's weight
known beforehand, so that the loop can divide by the weight of the whole global batch: the result then does
not depend on how the batch is split over workers and accumulation steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from eagleray.platform.data.examples import Examples
from eagleray.platform.sections import TrainingConfig


@dataclass(frozen=True)
class Batch:
    """Collated examples of one forward pass of one worker."""

    tensors: dict[str, Tensor]
    """Inputs of `Task.loss` or `Task.evaluate_batch`, on the CPU."""
    weight: float
    """What the summed loss is a sum over: examples, or target tokens."""
    ids: tuple[str, ...]
    """Ids of the examples, for messages."""
    tokens: int
    """Tokens (or frames) that are not padding, for the rate."""

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}
        return Batch(moved, self.weight, self.ids, self.tokens)


class Task(ABC):
    """One method's part of a training run; built anew in every worker from the config and the data folder.

    The examples are what the job wrote to `train.arrow` and `eval.arrow`: rows with an `id`, a `length` in the
    unit that padding costs, and whatever `collate` needs.
    """

    metric: ClassVar[str]
    """Evaluation metric that decides which model is kept, unless the config names another."""
    mode: ClassVar[Literal["min", "max"]]
    """Whether a smaller or a larger `metric` is better."""

    def __init__(self, cfg: TrainingConfig, data_dir: Path) -> None:
        """Open the prepared examples; must be cheap, the driver does it too."""
        self.train = Examples(data_dir / "train.arrow")
        self.eval = Examples(data_dir / "eval.arrow")

    @property
    def train_lengths(self) -> np.ndarray:
        """Length of each training example, shape (examples,)."""
        return self.train.column("length")

    @property
    def eval_lengths(self) -> np.ndarray:
        """Length of each evaluation example, shape (examples,)."""
        return self.eval.column("length")

    def train_batch(self, indices: Sequence[int], *, step: int) -> Batch:
        """Training examples, collated; a pure function of the indices and the step.

        A task that augments its examples draws from generators of its own, seeded by the seed, the step and the
        example: batches are collated in a thread while another step computes.
        """
        return self.collate([self.train[i] for i in indices])

    def eval_batch(self, indices: Sequence[int]) -> Batch:
        """Evaluation examples, collated."""
        return self.collate([self.eval[i] for i in indices])

    @abstractmethod
    def build_model(self) -> nn.Module:
        """The model to train, on the CPU; every worker calls this with the same seed."""

    @abstractmethod
    def collate(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """Rows of the example files as one batch."""

    @abstractmethod
    def loss(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed loss (scalar, with gradient) and further sums over the same weight (detached scalars)."""

    @abstractmethod
    def evaluate_batch(self, model: nn.Module, tensors: dict[str, Tensor]) -> list[Any]:
        """One picklable record an example, in batch order; runs without gradients in evaluation mode."""

    @abstractmethod
    def summarise(self, records: list[Any]) -> dict[str, float]:
        """Metrics of the whole evaluation set from its records in example order; must hold `metric`."""

    @abstractmethod
    def save_extras(self, path: Path) -> None:
        """Write what the model folder needs besides weights: tokenizer, settings."""
