"""What a judge needs besides weights and tokenizer (`gram.json`), and loading its language model."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.hub import cached_file

from eagleray.models.gram.prompts import LABELS, JudgeTemplate
from eagleray.models.gram.tokenization import Overlong

SETTINGS_FILE = "gram.json"
SwapAverage = Literal["prob", "logit", "none"]


@dataclass(frozen=True)
class JudgeSettings:
    """How a model wants to be asked; saved beside it, so that it is always asked as it was trained."""

    template: JudgeTemplate = field(default_factory=lambda: JudgeTemplate.load("eagleray"))
    label_strings: tuple[str, str] = LABELS
    max_length: int = 2048
    overlong: Overlong = "shorten"
    swap_average: SwapAverage = "prob"
    label_smoothing: float | None = None
    """Smoothing the model was trained with: a record, not used for judging."""
    smoothing_convention: Literal["paper", "torch"] | None = None

    def save(self, folder: str | Path) -> None:
        """Write `gram.json` into a folder."""
        values = dataclasses.asdict(self)
        values["template"]["sha256"] = self.template.sha256
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        (Path(folder) / SETTINGS_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, *, revision: str | None = None) -> JudgeSettings | None:
        """Read `gram.json` of a model folder or hub name; None if it has none."""
        file = cached_file(
            str(path), SETTINGS_FILE, revision=revision, _raise_exceptions_for_missing_entries=False
        )
        if file is None:
            return None
        try:
            values = json.loads(Path(file).read_text(encoding="utf-8"))
            template = values.pop("template")
            sha256 = template.pop("sha256")
            settings = cls(template=JudgeTemplate(**template)).replaced(**values)
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: not the settings of a judge: {error!r}") from None
        if sha256 != settings.template.sha256:
            raise ValueError(
                f"{file}: the template text does not match its sha256; the file was edited. Restore it, or "
                "pass the new wording as `template` to judge with it knowingly."
            )
        return settings

    def replaced(self, **changes: Any) -> JudgeSettings:
        """A copy with some fields changed; `template` may also be a name or a file."""
        known = [f.name for f in dataclasses.fields(self)]
        if unknown := [name for name in changes if name not in known]:
            raise ValueError(f"Unknown judge setting {unknown[0]!r}; the settings are: {', '.join(known)}.")
        if isinstance(template := changes.get("template"), str | Path):
            changes["template"] = JudgeTemplate.load(template)
        if "label_strings" in changes:
            changes["label_strings"] = tuple(changes["label_strings"])
        return dataclasses.replace(self, **changes)


def load_language_model(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    auto_class: Any = AutoModelForCausalLM,
) -> PreTrainedModel:
    """A causal language model, or a peft adapter merged into its base model; from safetensors files only.

    Args:
        path: Folder or hub name.
        dtype: Default: as saved.
        revision: Hub revision of `path`.
        auto_class: Class of transformers that loads it, e.g. `AutoModel` for a model without its head.
    """
    options: dict[str, Any] = {"dtype": "auto" if dtype is None else dtype, "use_safetensors": True}
    if _find(path, "reward_model.json", revision) is not None:
        # Loading would succeed, with a random head.
        raise ValueError(
            f"{path} holds a reward model with a scalar head, no judge; use it as `discriminative`."
        )
    if _find(path, "adapter_config.json", revision) is None:
        return auto_class.from_pretrained(path, revision=revision, **options)
    if _find(path, "adapter_model.safetensors", revision) is None:
        raise ValueError(f"{path}: the adapter has no adapter_model.safetensors; save it with safetensors.")
    config = PeftConfig.from_pretrained(str(path), revision=revision)
    base = auto_class.from_pretrained(
        str(config.base_model_name_or_path), revision=config.revision, **options
    )
    return PeftModel.from_pretrained(base, str(path), revision=revision).merge_and_unload()


def _find(path: str | Path, name: str, revision: str | None) -> str | None:
    """A file of a model folder or hub repository, if it is there."""
    return cached_file(str(path), name, revision=revision, _raise_exceptions_for_missing_entries=False)
