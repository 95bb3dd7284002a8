"""Gold scores: how good an answer is by something that nobody is trained on or chooses by."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from eagleray.models.gram.checks import CHECKS
from eagleray.platform.config import Config as Section
from eagleray.platform.sections import ModelPath


class GoldSection(Section):
    """What says how good an answer is."""

    kind: Literal["judge", "discriminative", "last_number", "steps_in_order"]
    """A GRAM judge (the probability to beat a reference answer), a discriminative reward model, or a rule: the last number is
    that of the reference answer (as GSM8K is checked), or the rule of generated data."""
    path: ModelPath | None = None
    """Folder of the judge or model; none for a rule."""

    @model_validator(mode="after")
    def _models_have_a_path(self) -> GoldSection:
        if (self.kind in CHECKS) != (self.path is None):
            raise ValueError("`gold.path` belongs to kind judge or discriminative, and only there")
        return self
