"""An LRHP model folder: backbone or adapter, tokenizer with the token, row and head, and `lrhp.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from eagleray.models.gram.checkpoint import load_language_model
from eagleray.models.lrhp.model import HEAD_FILE, PairModel, Pool
from eagleray.models.lrhp.prompts import (
    PairTemplate,
    PreferenceEncoder,
    add_preference_token,
    preference_token_id,
)

SETTINGS_FILE = "lrhp.json"
VERSION = 1


@dataclass(frozen=True)
class PairSettings:
    """How pairs are put to the model, saved beside it so that they are always put as it was trained."""

    token_id: int
    template: PairTemplate = field(default_factory=PairTemplate)
    max_length: int = 2048
    pool: Pool = "at_token"

    def save(self, folder: str | Path) -> None:
        """Write `lrhp.json` into a folder."""
        values = {
            "version": VERSION,
            "template": self.template.text,
            "token_id": self.token_id,
            "max_length": self.max_length,
            "pool": self.pool,
        }
        (Path(folder) / SETTINGS_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> PairSettings:
        """Read `lrhp.json` of a model folder or hub name.

        Raises:
            ValueError: There is none, or one that this version does not know.
        """
        file = _find(path, SETTINGS_FILE)
        if file is None:
            raise ValueError(
                f"{path}: no {SETTINGS_FILE}, so this is no LRHP model. Train one with `eagleray train "
                "configs/lrhp/train_tiny.yaml`, or give the `model` folder of such a run."
            )
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            if values["version"] != VERSION:
                raise ValueError(
                    f"{file}: version {values['version']}, but this program reads version {VERSION} only."
                )
            return cls(
                values["token_id"], PairTemplate(values["template"]), values["max_length"], values["pool"]
            )
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file}: not the settings of an LRHP model: {error!r}") from None


def load_pair_model(
    path: str | Path, *, dtype: torch.dtype | None = None
) -> tuple[PairModel, PreferenceEncoder]:
    """Load a model folder or hub name; an adapter is merged into its base model. Safetensors only.

    Args:
        path: What `lrhp.train` left in `model/`.
        dtype: Of the backbone; default: as saved. Row and head are float32 in any case.

    Raises:
        ValueError: A part is missing, or the tokenizer lacks `<|PREFERENCE|>` or has it at another place.
    """
    settings = PairSettings.load(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    if (found := preference_token_id(tokenizer)) != settings.token_id:
        raise ValueError(
            f"{path}: the tokenizer has <|PREFERENCE|> at {found}, but the model was trained with it at "
            f"{settings.token_id}. Restore the tokenizer that was saved with the model."
        )
    backbone = load_language_model(path, dtype=dtype, auto_class=AutoModel)
    model = PairModel(backbone, token_id=settings.token_id, pool=settings.pool)
    if not load_row_and_head(model, path):
        raise ValueError(f"{path}: {HEAD_FILE} is missing: the row of <|PREFERENCE|> and the head are in it.")
    return model.eval(), PreferenceEncoder(tokenizer, settings.template, max_length=settings.max_length)


def load_row_and_head(model: PairModel, path: str | Path) -> bool:
    """Take the row of the token and the head from a folder or hub name; false if it has none."""
    file = _find(path, HEAD_FILE)
    if file is not None:
        model.load_state_dict(load_file(file), strict=False)
    return file is not None


def untrained_pair_model(
    path: str | Path, *, max_length: int = 2048, dtype: torch.dtype | None = None
) -> tuple[PairModel, PreferenceEncoder]:
    """A plain language model as a pair encoder, with the mean row and a head of zeros: the untrained baseline."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    known = len(tokenizer)
    backbone: Any = load_language_model(path, dtype=dtype, auto_class=AutoModel)
    model = PairModel(backbone, token_id=add_preference_token(tokenizer))
    model.start_row(min(known, len(backbone.get_input_embeddings().weight)))
    return model.eval(), PreferenceEncoder(tokenizer, max_length=max_length)


def save_tokenizer_and_settings(
    tokenizer: PreTrainedTokenizerBase, settings: PairSettings, path: Path
) -> None:
    """Write what a model folder needs besides weights."""
    tokenizer.save_pretrained(path)
    settings.save(path)


def _find(path: str | Path, name: str) -> Path | None:
    """A file of a model folder or hub repository, if it is there."""
    file = cached_file(str(path), name, _raise_exceptions_for_missing_entries=False)
    return None if file is None else Path(file)
