"""A small vision-language model learns to see: it describes pictures, from random weights.

    python -m eagleray.jobs.rovrm.pretrain --config configs/rovrm/pretrain_tiny.yaml

The ranking loss tells a tower from random weights too little: one bit a pair, and none as long as the language model does
not look at pictures. A caption names everything that is in the picture. RoVRM assumes a model that sees; where no
pre-trained one is wanted, this makes one. The result is an ordinary LLaVA folder, which `rovrm.train` and
`rovrm.progressive` start from (`model.path`), and which can be a policy of `align.policy`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field
from torch import nn
from transformers import LlavaConfig

from eagleray.jobs.language_model import LanguageModelTask
from eagleray.jobs.rovrm.data import Sample, VisualData, load_parts
from eagleray.jobs.rovrm.start import LlavaSection, TemplateSection
from eagleray.models.rovrm.checkpoint import load_encoder
from eagleray.models.rovrm.encoding import VisualEncoder
from eagleray.models.rovrm.families import Pixels, join_pixels
from eagleray.models.rovrm.images import decode_image
from eagleray.models.rovrm.scratch import build_captioner, llava_processor
from eagleray.platform.data.examples import write_examples
from eagleray.platform.data.sources import DataError
from eagleray.platform.launch import TrainedRun, train
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import OptimSection, TrainingConfig
from eagleray.platform.task import Batch

JOB = "rovrm.pretrain"


class Config(TrainingConfig):
    """Config of `rovrm.pretrain`."""

    job: Literal["rovrm.pretrain"] = JOB
    scratch: LlavaSection = LlavaSection()
    system: str | None = None
    """System text of the layout `llava`. Default: ours."""
    max_length: int = Field(default=1024, ge=16)
    """Longest picture with its caption in tokens; longer ones are left out, never cut."""
    prompt: str = Field(default="Describe the picture.", min_length=1)
    """What a caption is the answer to."""
    data: VisualData
    """Rows with `image` and `caption`, in any layout; each picture is described once."""
    cache_images: int = Field(default=512, ge=0)
    """Pictures that a worker keeps as tensors, so that they are decoded and resized once."""
    optim: OptimSection = OptimSection(lr=1e-3)


class CaptionTask(LanguageModelTask):
    """Next-token prediction of captions behind their pictures."""

    def __init__(self, cfg: Config, data_dir: Path) -> None:
        super().__init__(cfg, data_dir)
        self.cfg, self.folder = cfg, data_dir / "scratch"
        self.encoder = _encoder(cfg, self.folder)
        self.pixels = lru_cache(maxsize=cfg.cache_images)(self._pixels)

    def build_model(self) -> nn.Module:
        config = cast(LlavaConfig, LlavaConfig.from_pretrained(self.folder))
        return build_captioner(config, seed=self.cfg.train.seed)

    def collate(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """Adds the pictures, one a row, to `input_ids` and `target_mask`."""
        batch = super().collate(rows)
        pictures = join_pixels([self.pixels(row["content"]) for row in rows])
        return replace(batch, tensors=batch.tensors | pictures)

    def save_extras(self, path: Path) -> None:
        config = cast(LlavaConfig, LlavaConfig.from_pretrained(self.folder))
        tokenizer, images = self.encoder.tokenizer, self.encoder.image_processor
        images.save_pretrained(path)  # for those who ask for this part alone
        llava_processor(config, tokenizer, images, self.encoder.template.chat).save_pretrained(path)

    def _pixels(self, content: bytes) -> Pixels:
        return self.encoder.pixels(decode_image(content, self.cfg.data.images.limits()))


def main(cfg: Config, **options: Any) -> TrainedRun:
    """Encode the captions on the driver, then train."""
    return train(CaptionTask, cfg, job=JOB, prepare=lambda run: _prepare(cfg, run), **options)


def _encoder(cfg: Config, folder: Path) -> VisualEncoder:
    template = TemplateSection(system=cfg.system).build()
    return load_encoder(folder, template=template, max_length=cfg.max_length)


def _prepare(cfg: Config, run: RunFolder) -> None:
    parts = load_parts(cfg.data, seed=cfg.train.seed)
    described = {
        name: _described(samples) for name, samples in (("train", parts.train), ("eval", parts.eval))
    }
    for name, samples in described.items():
        if not samples:
            raise DataError(
                f"data.{name}", "no row has a picture and a caption", "`caption` says what is to be seen"
            )
    # The answers are read for the vocabulary: a reward model that starts from here will have to read them.
    texts = (
        text for s in parts.train for text in (s.record.caption or "", s.record.prompt, *s.record.responses)
    )
    template = TemplateSection(system=cfg.system).build()
    for part in cfg.scratch.parts([cfg.prompt, *texts], template):
        part.save_pretrained(run.data / "scratch")
    encoder = _encoder(cfg, run.data / "scratch")
    too_long: list[str] = []
    for name, samples in described.items():
        write_examples(run.data / f"{name}.arrow", _rows(samples, cfg, encoder, too_long))
    run.update_manifest(data_hashes=parts.hashes, data={**parts.counts, "too_long": too_long})


def _described(samples: Sequence[Sample]) -> list[Sample]:
    """The first sample of each picture that has a caption."""
    return list({s.picture: s for s in reversed(samples) if s.picture and s.record.caption}.values())[::-1]


def _rows(
    samples: Sequence[Sample], cfg: Config, encoder: VisualEncoder, too_long: list[str]
) -> Iterator[dict[str, Any]]:
    for sample in samples:
        content, caption = cast(bytes, sample.image), cast(str, sample.record.caption)
        count = encoder.family.image_tokens(encoder.pixels(decode_image(content, cfg.data.images.limits())))
        ids = encoder.encode(cfg.prompt, caption, image_tokens=count)
        if not encoder.fits(ids):
            too_long.append(sample.record.id)
            continue
        # Where the caption starts: behind what an empty one has in common with it, up to its end token.
        empty = encoder.encode(cfg.prompt, "", image_tokens=count)[:-1]
        start = next((i for i, (a, b) in enumerate(zip(ids, empty, strict=False)) if a != b), len(empty))
        yield {
            "id": sample.record.id,
            "input_ids": ids,
            "length": len(ids),
            "start": start,
            "content": content,
        }


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
