"""One phase of RoVRM: a visual reward model learns from texts (1), captions (2) or pictures (3).

    python -m eagleray.jobs.rovrm.train --config configs/rovrm/train_tiny.yaml

A phase starts from the whole weights of the phase before, head included, and says in its manifest and in the model's
`rovrm.json` which weights those were (by hash), on what data, and which parameters it trained.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from eagleray.jobs.rovrm.data import Sample, VisualData, load_parts
from eagleray.jobs.rovrm.start import (
    StartSection,
    prepare_start,
    start_encoder,
    start_history,
    start_model,
)
from eagleray.models.gram.metrics import expected_calibration_error
from eagleray.models.rovrm.checkpoint import CheckpointMismatch, PhaseRecord, save_companions
from eagleray.models.rovrm.encoding import VisualEncoder
from eagleray.models.rovrm.families import Pixels
from eagleray.models.rovrm.images import decode_image
from eagleray.models.rovrm.losses import plackett_luce_loss
from eagleray.models.rovrm.scoring import Prepared, collate
from eagleray.platform.data.examples import Examples, write_examples
from eagleray.platform.launch import TrainedRun, train
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import ModelSection, OptimSection, TrainingConfig
from eagleray.platform.task import Batch, Task

JOB = "rovrm.train"
logger = logging.getLogger(__name__)


class Config(TrainingConfig, StartSection):
    """Config of `rovrm.train`."""

    job: Literal["rovrm.train"] = JOB
    phase: Literal[1, 2, 3]
    """1: text preferences, 2: captions in the place of pictures, 3: pictures. It decides which parts are trained:
    the language model and the head always, the projector in phase 3 (which is also the one for a mixture)."""
    train_vision_tower: bool = False
    """Train the vision tower too, in phase 3. Pre-trained towers stay frozen; small ones made here must learn to see."""
    input_sha256: str | None = None
    """Hash that the weights to start from must have, as `rovrm.json` and the manifest of the earlier phase give it."""
    data: VisualData
    cache_images: int = Field(default=512, ge=0)
    """Pictures that a worker keeps as tensors, so that they are decoded and resized once."""
    optim: OptimSection = OptimSection(lr=1e-6, betas=(0.9, 0.95))

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if self.train_vision_tower and self.phase != 3:
            raise ValueError("`train_vision_tower` goes with `phase: 3`; the other phases have no pictures")
        if self.lora is not None:
            raise ValueError("`lora` is not available here: a phase hands its whole weights to the next")
        if self.train.average_best > 1:
            raise ValueError(
                "`train.average_best` is not available here: a mean of models has no hand-over hash"
            )
        return self


class VisualTask(Task):
    """Prompts with ranked answers; a row of the model's batch is one answer."""

    metric: ClassVar[str] = "accuracy"
    mode: ClassVar[Literal["min", "max"]] = "max"

    def __init__(self, cfg: Config, data_dir: Path) -> None:
        super().__init__(cfg, data_dir)
        self.cfg = cfg
        self.start = json.loads((data_dir / "start.json").read_text(encoding="utf-8"))
        self.section = cfg.model or ModelSection(path=str(data_dir / "scratch"))
        images = data_dir / "images.arrow"
        self.images = Examples(images) if images.exists() else None
        self.encoder = start_encoder(cfg, self.section)
        self.pixels = lru_cache(maxsize=cfg.cache_images)(self._pixels)
        self.trained: dict[str, int] = {}

    def build_model(self) -> nn.Module:
        model = start_model(self.section, seed=self.cfg.train.seed, expected_sha256=self.start["sha256"])
        names = model.train_parts(self.cfg.phase, train_vision_tower=self.cfg.train_vision_tower)
        parameters = dict(model.named_parameters())
        # Under ZeRO-3 a partitioned parameter is empty; DeepSpeed keeps its true size.
        self.trained = {
            name: getattr(parameters[name], "ds_numel", parameters[name].numel()) for name in names
        }
        return model

    def loss(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        rewards_BK, mask_BK = self._rewards(model, tensors)
        total = plackett_luce_loss(rewards_BK, mask_BK, reduction="sum")
        margin_B = (rewards_BK[:, 0] - rewards_BK[:, 1]).detach()
        return total, {"accuracy": (margin_B > 0).sum(), "margin": margin_B.sum()}

    def evaluate_batch(self, model: nn.Module, tensors: dict[str, Tensor]) -> list[Any]:
        rewards_BK, mask_BK = self._rewards(model, tensors)
        return [row[mask].tolist() for row, mask in zip(rewards_BK, mask_BK, strict=True)]

    def summarise(self, records: list[Any]) -> dict[str, float]:
        difference_N = np.array([a - b for rewards in records for a, b in combinations(rewards, 2)])
        return {
            "accuracy": float((difference_N > 0).mean()),
            "nll": float(np.logaddexp(0, -difference_N).mean()),
            "ece": expected_calibration_error(1 / (1 + np.exp(-difference_N))),
            "margin": float(difference_N.mean()),
            "mean_reward": float(np.mean([reward for rewards in records for reward in rewards])),
        }

    def save_extras(self, path: Path) -> None:
        record = PhaseRecord(
            phase=self.cfg.phase,
            input_sha256=self.start["sha256"],
            data_hashes=self.start["data_hashes"],
            trained=list(self.trained),
            trained_count=sum(self.trained.values()),
        )
        earlier = [PhaseRecord(**values) for values in self.start["lineage"]]
        save_companions(self.encoder, path, lineage=[*earlier, record])

    def collate(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """Answers of all prompts, padded on the right: `input_ids`, `attention_mask` [ΣK, T], `counts` [B] and pictures.

        Where the data has pictures and this batch none, one goes along that no row uses: all workers then run the
        same modules.
        """
        items: list[Prepared] = []
        for row in rows:
            pixels = None if row["image"] < 0 else self.pixels(row["image"])
            ends = np.cumsum(row["lengths"])[:-1]
            items += [Prepared(ids.tolist(), pixels) for ids in np.split(row["ids"], ends)]
        ids_NT, mask_NT, index_N, pixels = collate(items)
        if pixels is None and self.images is not None:
            index_N, pixels = torch.full((len(items),), -1), self.pixels(0)
        tensors = {"input_ids": ids_NT, "attention_mask": mask_NT}
        tensors["counts"] = torch.tensor([len(row["lengths"]) for row in rows])
        if index_N is not None and pixels is not None:
            tensors |= {"image_index": index_N, **{f"image.{name}": value for name, value in pixels.items()}}
        return Batch(
            tensors,
            weight=len(rows),
            ids=tuple(row["id"] for row in rows),
            tokens=int(mask_NT.sum()),
        )

    def _rewards(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Rewards [B, K] and where there are any."""
        pixels = {
            name.removeprefix("image."): value for name, value in tensors.items() if name.startswith("image.")
        }
        rewards_N = model(
            tensors["input_ids"], tensors["attention_mask"], tensors.get("image_index"), pixels or None
        )
        counts_B = tensors["counts"]
        places_K = torch.arange(int(counts_B.max()), device=counts_B.device)
        mask_BK = places_K[None] < counts_B[:, None]
        return rewards_N.new_zeros(mask_BK.shape).masked_scatter(mask_BK, rewards_N), mask_BK

    def _pixels(self, index: int) -> Pixels:
        assert self.images is not None
        return self.encoder.pixels(decode_image(self.images[index]["content"], self.cfg.data.images.limits()))


def main(cfg: Config, **options: Any) -> TrainedRun:
    """Encode the samples on the driver, then train; the manifest gets the lineage."""
    done = train(VisualTask, cfg, job=JOB, prepare=lambda run: _prepare(cfg, run), **options)
    _record_trained(done.path)
    return done


def _prepare(cfg: Config, run: RunFolder) -> None:
    parts = load_parts(cfg.data, seed=cfg.train.seed)
    texts = (text for s in parts.train for text in (s.record.prompt, *s.record.responses))
    section = prepare_start(cfg, run.data / "scratch", texts, seed=cfg.train.seed)
    sha256, lineage = start_history(section)
    if cfg.input_sha256 is not None and cfg.input_sha256 != sha256:
        raise CheckpointMismatch(
            f"`input_sha256` is {cfg.input_sha256[:12]}..., but {section.path} holds {str(sha256)[:12]}...: these are not "
            "the weights that this phase was to start from."
        )
    writer = _ExampleWriter(start_encoder(cfg, section), cfg)
    for name, samples in (("train", parts.train), ("eval", parts.eval)):
        write_examples(run.data / f"{name}.arrow", writer.rows(samples))
    writer.write_images(run.data / "images.arrow")
    start = {
        "sha256": sha256,
        "lineage": [vars(record) for record in lineage],
        "data_hashes": parts.hashes,
    }
    (run.data / "start.json").write_text(json.dumps(start, indent=2) + "\n", encoding="utf-8")
    run.update_manifest(
        data_hashes=parts.hashes,
        data={**parts.counts, "too_long": writer.too_long},
        phase=cfg.phase,
        input_sha256=sha256,
    )


class _ExampleWriter:
    """Encodes samples; each picture is kept once, however many samples show it."""

    def __init__(self, encoder: VisualEncoder, cfg: Config) -> None:
        self.encoder, self.limits = encoder, cfg.data.images.limits()
        self.too_long: list[str] = []
        self._places: dict[str, int] = {}
        self._contents: list[bytes] = []
        self._tokens: dict[str, int] = {}

    def rows(self, samples: Sequence[Sample]) -> Iterator[dict[str, Any]]:
        """Example rows; what does not fit is left out as a whole and its id is kept."""
        before = len(self.too_long)
        for sample in samples:
            tokens = self._image_tokens(sample)
            answers = [
                self.encoder.encode(sample.record.prompt, answer, image_tokens=tokens)
                for answer in sample.record.responses
            ]
            if not all(map(self.encoder.fits, answers)):
                self.too_long.append(sample.record.id)
                continue
            yield {
                "id": sample.record.id,
                "ids": [i for ids in answers for i in ids],
                "lengths": [len(ids) for ids in answers],
                "length": max(map(len, answers)),
                "image": self._place(sample),
            }
        if dropped := self.too_long[before:]:
            logger.warning(
                "Left out %d sample(s) longer than `max_length` %d tokens: %s%s.",
                len(dropped),
                self.encoder.max_length,
                ", ".join(dropped[:10]),
                ", ..." if len(dropped) > 10 else "",
            )

    def write_images(self, path: Path) -> None:
        """The files of all pictures, as they were."""
        if self._contents:
            write_examples(path, ({"content": content} for content in self._contents))

    def _image_tokens(self, sample: Sample) -> int | None:
        if sample.image is None or (name := sample.picture) is None:
            return None
        if name not in self._tokens:
            pixels = self.encoder.pixels(decode_image(sample.image, self.limits))
            self._tokens[name] = self.encoder.family.image_tokens(pixels)
        return self._tokens[name]

    def _place(self, sample: Sample) -> int:
        if sample.image is None or (name := sample.picture) is None:
            return -1
        if name not in self._places:
            self._places[name] = len(self._contents)
            self._contents.append(sample.image)
        return self._places[name]


def _record_trained(path: Path) -> None:
    """Copy the model's own lineage entry into the manifest, where `eagleray runs show` finds it."""
    run = RunFolder(path)
    settings = json.loads((run.model / "rovrm.json").read_text(encoding="utf-8"))
    last = settings["lineage"][-1]
    run.update_manifest(
        output_sha256=settings["weights_sha256"],
        trained_parameters=last["trained"],
        trained_count=last["trained_count"],
    )


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
