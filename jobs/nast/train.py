"""Train CTC-NAST, or its autoregressive sibling, from speech with transcripts and translations.

    python -m eagleray.jobs.nast.train --config configs/nast/train_tiny.yaml optim.lr=1e-3

Loss, curriculum and model are those of `models/nast`; this job adds the data: features made on the fly (with speed
perturbation and SpecAugment drawn from the seed, the step and the utterance, whatever worker it falls to) or read
from the cache, passes cut by a budget of frames, greedy decoding of the development set, and the mean of the best
models. The result is a model folder that `nast.translate`, `nast.evaluate` and `eagleray serve` read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor, nn

from eagleray.jobs.nast.data import FrontendSection, SpeechData, VocabularySection, prepare_examples
from eagleray.jobs.nast.model import LossSection, NastSection
from eagleray.models.nast.audio import from_pcm, read_clips
from eagleray.models.nast.features import add_noise, spec_augment, speed
from eagleray.models.nast.manifest import clips_from_text
from eagleray.models.nast.metrics import bleu, exact_match, word_error_rate
from eagleray.models.nast.model import SpeechModel
from eagleray.models.nast.translator import decode
from eagleray.models.nast.vocabulary import PAD_ID, load_vocabularies, save_vocabularies
from eagleray.platform.config import Config as Section
from eagleray.platform.launch import TrainedRun, train
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import OptimSection, TrainingConfig, TrainSection
from eagleray.platform.task import Batch, Task

JOB = "nast.train"


class AugmentSection(Section):
    """Changes to the training audio; evaluation never sees them."""

    speeds: tuple[float, ...] = (1.0,)
    """Speeds of which each utterance gets one, drawn anew at every step, e.g. [0.9, 1.0, 1.1]; paper: off."""
    warps: tuple[float, ...] = (1.0,)
    """Warpings of the frequency axis, drawn in the same way: other lengths of the vocal tract, e.g. [0.9, 1.0, 1.1]."""
    noise_db: tuple[float, float] | None = None
    """Range that the level of the speech over added white noise is drawn from, in decibels, e.g. [10, 40]."""
    spec_augment: bool = True
    """Mask bands of time and frequency (policy `ld2` of the release)."""

    @model_validator(mode="after")
    def _values_are_possible(self) -> AugmentSection:
        for name, factors, low, high in (("speeds", self.speeds, 0.5, 2), ("warps", self.warps, 0.7, 1.4)):
            if not factors or any(not low <= factor <= high for factor in factors):
                raise ValueError(f"`augment.{name}` is {list(factors)}; give numbers from {low} to {high}")
        if self.noise_db and self.noise_db[0] > self.noise_db[1]:
            raise ValueError(f"`augment.noise_db` is {list(self.noise_db)}; give the smaller number first")
        return self

    @property
    def changes_audio(self) -> bool:
        """Whether anything but SpecAugment is on."""
        return self.speeds != (1.0,) or self.warps != (1.0,) or self.noise_db is not None

    def change_audio(self, waveform_N: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
        """The waveform at another speed and with noise, and a warp for its features."""
        waveform_N = speed(waveform_N, _draw(self.speeds, generator))
        warp = _draw(self.warps, generator)
        if self.noise_db is not None:
            low, high = self.noise_db
            decibels = low + (high - low) * torch.rand((), generator=generator).item()
            waveform_N = add_noise(waveform_N, decibels, generator=generator)
        return waveform_N, warp


class Config(TrainingConfig):
    """Config of `nast.train`; defaults follow the released recipe `reproduction_nast`."""

    job: Literal["nast.train"] = JOB
    data: SpeechData
    vocabulary: VocabularySection = VocabularySection()
    frontend: FrontendSection = FrontendSection()
    augment: AugmentSection = AugmentSection()
    model: NastSection = NastSection()
    loss: LossSection = LossSection()
    optim: OptimSection = OptimSection(
        lr=1e-3, betas=(0.9, 0.98), schedule="inverse_sqrt", warmup_ratio=1 / 30, clip_norm=10.0
    )
    train: TrainSection = TrainSection(
        batch_size=512, micro_batch_size=512, micro_batch_length=40_000, max_steps=300_000, average_best=10
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if self.data.cache == "features" and self.augment.changes_audio:
            raise ValueError(
                "`augment.speeds`, `augment.warps` and `augment.noise_db` need audio; set `data.cache: audio`"
            )
        if self.lora is not None:
            raise ValueError("`lora` is for language models; leave it out")
        if self.model.architecture == "autoregressive" and self.deepspeed.zero_stage == 3:
            # Each worker's search takes its own number of steps, and in stage 3 every step is collective.
            raise ValueError("`model.architecture: autoregressive` needs `deepspeed.zero_stage` 0, 1 or 2")
        return self


class SpeechTask(Task):
    """Utterances with source and target pieces; evaluated by greedy decoding."""

    metric: ClassVar[str] = "bleu"
    mode: ClassVar[Literal["min", "max"]] = "max"

    def __init__(self, cfg: Config, data_dir: Path) -> None:
        super().__init__(cfg, data_dir)
        self.cfg = cfg
        self.frontend = cfg.frontend.build()
        self.target, self.source = load_vocabularies(data_dir)

    def build_model(self) -> nn.Module:
        separate = None if self.source is self.target else len(self.source)
        config = self.cfg.model.config(vocab_size=len(self.target), source_vocab_size=separate)
        return self.cfg.model.build(config)

    def train_batch(self, indices: Sequence[int], *, step: int) -> Batch:
        return self._collate([(self.train[i], self._augmented(i, step)) for i in indices])

    def collate(self, rows: Sequence[dict[str, Any]]) -> Batch:
        return self._collate([(row, self._features(row)) for row in rows])

    def loss(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.cfg.loss.compute(model, tensors)

    def evaluate_batch(self, model: nn.Module, tensors: dict[str, Tensor]) -> list[Any]:
        return decode(cast(SpeechModel, model), tensors["features"], tensors["lengths"])

    def summarise(self, records: list[Any]) -> dict[str, float]:
        rows = [self.eval[i] for i in range(len(records))]
        texts = [self.target.decode(record.target) for record in records]
        targets = [row["target"] for row in rows]
        metrics = {
            "bleu": bleu(texts, targets).score,
            "exact_match": exact_match(texts, targets),
            "target_wer": word_error_rate(texts, targets),
        }
        heard = [(self.source.decode(r.source), row["source"]) for r, row in zip(records, rows, strict=True)]
        if any(source for _, source in heard) and self.cfg.model.architecture == "nast":
            metrics["source_wer"] = word_error_rate(*zip(*heard, strict=True))
        return metrics

    def save_extras(self, path: Path) -> None:
        save_vocabularies(path, self.target, self.source)
        self.frontend.save(path)

    def _augmented(self, index: int, step: int) -> Tensor:
        """Features of a training utterance as this step sees them: a function of the seed, the step and the index."""
        row, augment = self.train[index], self.cfg.augment
        key = np.random.SeedSequence([self.cfg.train.seed, step, index]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(key >> 1))
        if augment.changes_audio:
            waveform_N, warp = augment.change_audio(torch.from_numpy(_waveform(row)), generator)
            features_TF = self.frontend(waveform_N.numpy(), warp=warp)
        else:
            features_TF = self._features(row)
        return spec_augment(features_TF, generator=generator) if augment.spec_augment else features_TF

    def _features(self, row: dict[str, Any]) -> Tensor:
        if "features" in row:
            # A copy, because the row is read-only memory of the file.
            return torch.from_numpy(row["features"].copy()).view(row["length"], -1)
        return self.frontend(_waveform(row))

    def _collate(self, examples: Sequence[tuple[dict[str, Any], Tensor]]) -> Batch:
        """`features` [B, T, 80] with `lengths` [B], `source` and `target` [B, U] with theirs, padded on the right."""
        rows, features = [row for row, _ in examples], [features for _, features in examples]
        sources, targets = ([_ids(row[f"{side}_ids"]) for row in rows] for side in ("source", "target"))
        tensors = {
            "features": nn.utils.rnn.pad_sequence(features, batch_first=True),
            "lengths": _sizes(features),
        }
        for name, ids in (("source", sources), ("target", targets)):
            tensors[name] = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PAD_ID)
            tensors[f"{name}_lengths"] = _sizes(ids)
        return Batch(
            tensors,
            # Paper: the loss is a sum over clips, divided by target pieces with one </s> each.
            weight=float(tensors["target_lengths"].sum() + len(rows)),
            ids=tuple(row["id"] for row in rows),
            tokens=int(tensors["lengths"].sum()),
        )


def main(cfg: Config, **options: Any) -> TrainedRun:
    """Prepare the data on the driver, then train."""
    return train(SpeechTask, cfg, job=JOB, prepare=lambda run: _prepare(cfg, run), **options)


def _prepare(cfg: Config, run: RunFolder) -> None:
    strides = cfg.model.config(vocab_size=8).all_strides
    summary = prepare_examples(
        cfg.data, cfg.vocabulary, cfg.frontend.build(), run.data, strides=strides, seed=cfg.train.seed
    )
    if (count := summary["train"]["without_transcript"]) and cfg.loss.uses_transcripts:
        raise ValueError(
            f"{count} of {summary['train']['utterances']} training utterances have no transcript. Give transcripts, or "
            "set `loss.source: 0` and `loss.inner_source: 0`."
        )
    hashes = {part: summary[part]["sha256"] for part in ("train", "eval")}
    run.update_manifest(data_hashes=hashes, data=summary)


def _waveform(row: dict[str, Any]) -> np.ndarray:
    return from_pcm(row["audio"]) if "audio" in row else read_clips(clips_from_text(row["clips"]))


def _draw(values: tuple[float, ...], generator: torch.Generator) -> float:
    return values[int(torch.randint(len(values), (), generator=generator))]


def _ids(ids: np.ndarray) -> Tensor:
    return torch.from_numpy(ids.astype(np.int64))


def _sizes(sequences: Sequence[Tensor]) -> Tensor:
    return torch.tensor([len(sequence) for sequence in sequences])


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
