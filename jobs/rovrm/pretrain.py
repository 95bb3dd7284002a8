"""A small vision-language model learns to see: it describes pictures, from random weights or from an earlier run.

    python -m eagleray.jobs.rovrm.pretrain --config configs/rovrm/pretrain_tiny.yaml

The ranking loss tells a tower from random weights too little: one bit a pair, and none as long as the language model does
not look at pictures. A caption names everything that is in the picture. RoVRM assumes a model that sees; where no
pre-trained one is wanted, this makes one. The result is an ordinary LLaVA folder, which `rovrm.train` and
`rovrm.progressive` start from (`model.path`), and which can be a policy of `align.policy`.

Two runs make it as LLaVA was made: a language model that reads first (`scenes`), then tower and projector, which learn to
say what is in a picture to that language model as it is (`parts`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from pydantic import Field, model_validator
from torch import nn
from transformers import LlavaForConditionalGeneration

from eagleray.jobs.language_model import LanguageModelTask
from eagleray.jobs.rovrm.data import Sample, VisualData, load_parts
from eagleray.jobs.rovrm.start import LlavaSection, TemplateSection
from eagleray.models.rovrm.checkpoint import load_encoder
from eagleray.models.rovrm.encoding import VisualEncoder
from eagleray.models.rovrm.families import Part, Pixels, family_of, join_pixels
from eagleray.models.rovrm.images import decode_image
from eagleray.models.rovrm.records import caption_prompt
from eagleray.models.rovrm.scenes import NUMBERS_PROMPT, make_scenes
from eagleray.models.rovrm.scratch import build_captioner, llava_processor
from eagleray.platform.data.examples import write_examples
from eagleray.platform.data.sources import DataError
from eagleray.platform.launch import TrainedRun, train
from eagleray.platform.pretrained import load_pretrained
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import ModelSection, OptimSection, TrainingConfig
from eagleray.platform.task import Batch

JOB = "rovrm.pretrain"


class Config(TrainingConfig):
    """Config of `rovrm.pretrain`."""

    job: Literal["rovrm.pretrain"] = JOB
    scratch: LlavaSection | None = None
    """A small LLaVA from random weights."""
    model: ModelSection | None = None
    """Or a LLaVA folder, for example of an earlier run of this job."""
    parts: list[Literal["vision_tower", "projector", "language_model"]] = Field(
        default=["vision_tower", "projector", "language_model"], min_length=1
    )
    """What is trained; the rest stays as it is. LLaVA's first stage trains the projector alone, of a tower that sees."""
    system: str | None = None
    """System text of the layout `llava`. Default: ours."""
    max_length: int = Field(default=1024, ge=16)
    """Longest picture with its caption in tokens; longer ones are left out, never cut."""
    prompt: str = Field(default="Describe the picture.", min_length=1)
    """What a caption is the answer to."""
    data: VisualData
    """Rows with `image` and `caption`, in any layout; each picture is described once. The vocabulary
    of a model from random weights has the words of all rows."""
    scenes: int | None = Field(default=None, ge=1)
    """Describe and count this many scenes that are told in words, and no pictures: the captions of `data` and made-up ones in
    turn, in the words of NLVR (`models/rovrm/scenes.py`)."""
    cache_images: int = Field(default=512, ge=0)
    """Pictures that a worker keeps as tensors, so that they are decoded and resized once."""
    optim: OptimSection = OptimSection(lr=1e-3)

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if (self.model is None) == (self.scratch is None):
            raise ValueError(
                "give either `model.path` (a LLaVA folder) or `scratch` (one from random weights)"
            )
        if self.lora is not None:
            raise ValueError("`lora` is not available here; `parts` says what is trained")
        if self.scenes and "language_model" not in self.parts:
            raise ValueError("`scenes` are texts, which only the language model reads: put it into `parts`")
        return self


class Description(NamedTuple):
    """What is described, by a picture or by the words of `prompt`."""

    id: str
    prompt: str
    caption: str
    content: bytes | None = None


class CaptionTask(LanguageModelTask):
    """Next-token prediction of captions behind their pictures, or behind scenes in words."""

    def __init__(self, cfg: Config, data_dir: Path) -> None:
        super().__init__(cfg, data_dir)
        self.cfg, self.encoder = cfg, _encoder(cfg, data_dir)
        self.pixels = lru_cache(maxsize=cfg.cache_images)(self._pixels)

    def build_model(self) -> nn.Module:
        model: Any
        if self.cfg.model is not None:
            model = load_pretrained(LlavaForConditionalGeneration, self.cfg.model)
        else:
            model = build_captioner(self.encoder.family.config, seed=self.cfg.train.seed)
        family = family_of(model.config)
        parts: Sequence[Part] = self.cfg.parts
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(family.part_of(name.removeprefix("model.")) in parts)
        return model

    def collate(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """Adds the pictures, one a row, to `input_ids` and `target_mask`."""
        batch = super().collate(rows)
        if self.cfg.scenes:
            return batch
        pictures = join_pixels([self.pixels(row["content"]) for row in rows])
        return replace(batch, tensors=batch.tensors | pictures)

    def save_extras(self, path: Path) -> None:
        encoder = self.encoder
        images = encoder.image_processor
        images.save_pretrained(path)  # for those who ask for this part alone
        whole = llava_processor(encoder.family.config, encoder.tokenizer, images, encoder.template.chat)
        whole.save_pretrained(path)

    def _pixels(self, content: bytes) -> Pixels:
        return self.encoder.pixels(decode_image(content, self.cfg.data.images.limits()))


def main(cfg: Config, **options: Any) -> TrainedRun:
    """Encode the captions on the driver, then train."""
    return train(CaptionTask, cfg, job=JOB, prepare=lambda run: _prepare(cfg, run), **options)


def _encoder(cfg: Config, data: Path) -> VisualEncoder:
    start = cfg.model or ModelSection(path=str(data / "scratch"))
    template = TemplateSection(system=cfg.system).build()
    return load_encoder(start.path, template=template, max_length=cfg.max_length, revision=start.revision)


def _prepare(cfg: Config, run: RunFolder) -> None:
    parts = load_parts(cfg.data, seed=cfg.train.seed)
    described = _descriptions(cfg, parts.train, parts.eval)
    if cfg.scratch is not None:
        # The answers are read for the vocabulary: a reward model that starts from here will have to read them.
        records = [s.record for s in parts.train]
        texts = (text for r in records for text in (r.caption or "", r.prompt, *r.responses))
        words = (text for d in described["train"] for text in (d.prompt, d.caption) if cfg.scenes)
        template = TemplateSection(system=cfg.system).build()
        for part in cfg.scratch.parts([cfg.prompt, *texts, *words], template):
            part.save_pretrained(run.data / "scratch")
    encoder = _encoder(cfg, run.data)
    if encoder.family.config.model_type != "llava":
        raise ValueError(
            f"`model.path` holds a {encoder.family.config.model_type!r}; this job trains a LLaVA."
        )
    too_long: list[str] = []
    for name, some in described.items():
        write_examples(run.data / f"{name}.arrow", _rows(some, cfg, encoder, too_long))
    run.update_manifest(data_hashes=parts.hashes, data={**parts.counts, "too_long": too_long})


def _descriptions(
    cfg: Config, train: Sequence[Sample], held_out: Sequence[Sample]
) -> dict[str, list[Description]]:
    """What is described in either part: each picture that has a caption once, or scenes, and a fiftieth as many held out."""
    if cfg.scenes:
        captions = sorted({s.record.caption for s in train if s.record.caption})
        seed = cfg.train.seed
        try:
            scenes = {"train": make_scenes(cfg.scenes, seed, captions=captions)}
        except ValueError as error:
            raise DataError(
                "data.train",
                "`scenes` can't retell a caption",
                f"{error} Leave such rows out: scenes are made up then.",
            ) from None
        scenes["eval"] = make_scenes(max(16, cfg.scenes // 50), seed, split="eval")
        return {
            name: [
                Description(f"{s.id}-{kind}", caption_prompt(s.told, prompt), answer)
                for s in some
                for kind, prompt, answer in (
                    ("caption", cfg.prompt, s.caption),
                    ("numbers", NUMBERS_PROMPT, s.numbers),
                )
            ]
            for name, some in scenes.items()
        }
    described: dict[str, list[Description]] = {}
    for name, samples in (("train", train), ("eval", held_out)):
        by_picture = {s.picture: s for s in reversed(samples) if s.picture and s.record.caption}
        described[name] = [
            Description(s.record.id, cfg.prompt, cast(str, s.record.caption), s.image)
            for s in reversed(by_picture.values())
        ]
        if not described[name]:
            raise DataError(
                f"data.{name}", "no row has a picture and a caption", "`caption` says what is to be seen"
            )
    return described


def _rows(
    described: Iterable[Description], cfg: Config, encoder: VisualEncoder, too_long: list[str]
) -> Iterator[dict[str, Any]]:
    for name, prompt, caption, content in described:
        count = None
        if content is not None:
            pixels = encoder.pixels(decode_image(content, cfg.data.images.limits()))
            count = encoder.family.image_tokens(pixels)
        ids = encoder.encode(prompt, caption, image_tokens=count)
        if not encoder.fits(ids):
            too_long.append(name)
            continue
        # Where the caption starts: behind what an empty one has in common with it, up to its end token.
        empty = encoder.encode(prompt, "", image_tokens=count)[:-1]
        start = next((i for i, (a, b) in enumerate(zip(ids, empty, strict=False)) if a != b), len(empty))
        yield {
            "id": name,
            "input_ids": ids,
            "length": len(ids),
            "start": start,
            "content": content or b"",
        }


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
