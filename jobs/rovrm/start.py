"""Where a phase starts: an earlier phase's model, a vision-language model of the hub, or a small one made here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from transformers import AutoModel, LlavaConfig

from eagleray.jobs.backbone.start import BackboneSection
from eagleray.models.backbone.tokenizer import train_tokenizer
from eagleray.models.rovrm.checkpoint import (
    PhaseRecord,
    VisualSettings,
    is_reward_model,
    load_encoder,
    load_reward_model,
    save_reward_model,
    weights_sha256,
)
from eagleray.models.rovrm.encoding import VisualEncoder
from eagleray.models.rovrm.model import VisualRewardModel
from eagleray.models.rovrm.scratch import Tower, add_image_token, build_llava, image_processor, llava_config
from eagleray.models.rovrm.templates import VisualTemplate
from eagleray.platform.config import Config as Section
from eagleray.platform.pretrained import load_pretrained
from eagleray.platform.sections import ModelSection


class TemplateSection(Section):
    """How a sample is laid out; saved with the model and taken over by the next phase."""

    name: Literal["llava", "chatml"] = "llava"
    """`llava` for LLaVA-1.5 and models made here, `chatml` for Qwen2-VL and Qwen2.5-VL."""
    system: str | None = None
    """System text; released checkpoints want the one they were trained with. Default: one of ours."""

    def build(self) -> VisualTemplate:
        """The template."""
        return VisualTemplate.named(self.name, system=self.system)


class LlavaSection(BackboneSection):
    """Size of a small LLaVA with random weights: the language model's keys, and those of the vision tower."""

    tower: Tower = "conv"
    """`conv`: convolutions, which learn to see from a few thousand pictures; `clip`: a transformer over patches, as
    pre-trained towers are, which did not (docs/rovrm.md)."""
    image_size: int = Field(default=64, ge=16)
    """Height in pixels that every picture is resized to."""
    image_width: int | None = Field(default=None, ge=16)
    """Width in pixels; default: as `image_size`. Choose the shape that the pictures have."""
    patch_size: int = Field(default=16, ge=4)
    """Side of what becomes one token; a power of two for `conv`."""
    vision_width: int = Field(default=128, ge=16)
    """Hidden size of the tower; for `conv` a multiple of 4 · `patch_size`."""
    vision_layers: int = Field(default=4, ge=1)
    """Blocks of a `clip` tower."""
    vision_heads: int = Field(default=4, ge=1)
    """Attention heads of a `clip` tower; must divide `vision_width`."""

    def parts(self, texts: Iterable[str], template: VisualTemplate) -> tuple[LlavaConfig, Any, Any]:
        """Configuration, tokenizer (trained on `texts`) and image processor of the model."""
        words = [*texts, template.system, "USER: ASSISTANT: Image description: Question: "]
        tokenizer: Any = train_tokenizer(words, vocab_size=self.vocab_size, max_length=self.max_length)
        image_id = add_image_token(tokenizer)
        config = llava_config(
            self.config_for(tokenizer),
            image_token_id=image_id,
            tower=self.tower,
            image_size=self.image_size,
            image_width=self.image_width,
            patch_size=self.patch_size,
            width=self.vision_width,
            layers=self.vision_layers,
            heads=self.vision_heads,
        )
        return config, tokenizer, image_processor(self.image_size, self.image_width)

    def write(
        self, folder: Path, texts: Iterable[str], template: VisualTemplate, *, seed: int, max_length: int
    ) -> None:
        """A whole reward model."""
        config, tokenizer, processor = self.parts(texts, template)
        model = build_llava(config, seed=seed)
        encoder = VisualEncoder(tokenizer, processor, model.family, template, max_length=max_length)
        save_reward_model(model, encoder, folder, lineage=[PhaseRecord(0, None, {}, [], 0)])


class StartSection(Section):
    """The keys of a config that say where training starts; exactly one of `model` and `scratch`."""

    model: ModelSection | None = None
    scratch: LlavaSection | None = None
    template: TemplateSection | None = None
    """Layout of a sample. Default: that of the model folder; a new one for a model that has none."""
    max_length: int | None = Field(default=None, ge=16)
    """Longest sample in tokens, picture included; longer ones are left out, never cut. Default: as `template`, or 1024."""

    @model_validator(mode="after")
    def _one_start(self) -> StartSection:
        if (self.model is None) == (self.scratch is None):
            raise ValueError(
                "give either `model.path` (a visual model) or `scratch` (a small one made from random weights)"
            )
        return self


def prepare_start(start: Any, folder: Path, texts: Iterable[str], *, seed: int) -> ModelSection:
    """Write the model of `scratch` into `folder`; the model section to start from."""
    if start.scratch is None:
        return start.model
    template = (start.template or TemplateSection()).build()
    start.scratch.write(folder, texts, template, seed=seed, max_length=start.max_length or 1024)
    return ModelSection(path=str(folder))


def start_encoder(start: Any, model: ModelSection) -> VisualEncoder:
    """The encoder of the model that a phase starts from."""
    known = is_reward_model(model.path)
    template = start.template or (None if known else TemplateSection())
    return load_encoder(
        model.path,
        template=None if template is None else template.build(),
        max_length=start.max_length or (None if known else 1024),
        revision=model.revision,
    )


def start_model(model: ModelSection, *, seed: int, expected_sha256: str | None) -> VisualRewardModel:
    """The model that a phase starts from: all weights of an earlier phase, or a body with a new head.

    Raises:
        CheckpointMismatch: The folder does not hold exactly the weights that are expected.
    """
    if is_reward_model(model.path):
        return load_reward_model(
            model.path, attention=model.attention, expected_sha256=expected_sha256
        ).float()
    return VisualRewardModel(load_pretrained(AutoModel, model), seed=seed)


def start_history(model: ModelSection) -> tuple[str | None, tuple[PhaseRecord, ...]]:
    """Hash of the weights in a local folder (None for a model of the hub), and the phases they have been through."""
    if not Path(model.path).is_dir():
        return None, ()
    lineage = VisualSettings.load(model.path).lineage if is_reward_model(model.path) else ()
    return weights_sha256(model.path), lineage
