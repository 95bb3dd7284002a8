"""A visual reward model on disk: strict loading, its settings, and the history of its phases.

A model folder holds `config.json` and weights, tokenizer, image processor, and `rovrm.json`: how to ask it, and one
entry a phase with the hash of the weights that went in. The hash of the folder's own weights is there too, so a file
that was exchanged or half copied is found when it is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer
from transformers.initialization import no_init_weights

import eagleray.models.rovrm.tower  # noqa: F401 - transformers then knows the configuration of small models
from eagleray.models.rovrm.encoding import VisualEncoder
from eagleray.models.rovrm.families import family_of
from eagleray.models.rovrm.model import VisualRewardModel
from eagleray.models.rovrm.templates import VisualTemplate

SETTINGS_FILE = "rovrm.json"
_SHOWN = 5


class CheckpointMismatch(ValueError):
    """Weights that are not those of the model, or not those that were written; the message lists what differs."""


@dataclass(frozen=True)
class PhaseRecord:
    """One phase in the history of a model."""

    phase: int
    """1, 2 or 3; 0 for the weights that everything starts from."""
    input_sha256: str | None
    """Hash of the weights the phase started from."""
    data_hashes: dict[str, str]
    trained: list[str]
    """Names of the parameters that were trained."""
    trained_count: int
    """How many numbers they hold."""


@dataclass(frozen=True)
class VisualSettings:
    """What a model folder says besides weights, tokenizer and image processor."""

    template: VisualTemplate
    max_length: int
    lineage: tuple[PhaseRecord, ...] = ()
    weights_sha256: str | None = None

    def save(self, folder: str | Path) -> None:
        """Write `rovrm.json`, with the hash of the weights that lie in the folder."""
        values = {**asdict(self), "weights_sha256": weights_sha256(folder)}
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        (Path(folder) / SETTINGS_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> VisualSettings:
        """Read `rovrm.json`.

        Raises:
            ValueError: The folder has none, or one that is damaged.
        """
        file = Path(folder) / SETTINGS_FILE
        if not file.is_file():
            raise ValueError(f"{folder} holds no {SETTINGS_FILE}; it is not a visual reward model.")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            template = VisualTemplate(**values.pop("template"))
            lineage = tuple(PhaseRecord(**record) for record in values.pop("lineage"))
            return cls(template=template, lineage=lineage, **values)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: not the settings of a visual reward model: {error!r}") from None


def is_reward_model(path: str | Path) -> bool:
    """Whether a folder holds a visual reward model of ours, and not just a body to start from."""
    return (Path(path) / SETTINGS_FILE).is_file()


def weights_sha256(folder: str | Path) -> str:
    """One hash of all weight files of a folder, by name and content.

    Raises:
        ValueError: The folder holds none.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors file.")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0")
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def load_reward_model(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    attention: str = "sdpa",
    expected_sha256: str | None = None,
) -> VisualRewardModel:
    """A reward model with exactly the weights of its folder.

    Args:
        folder: Written by `save_reward_model` or a training run.
        dtype: Arithmetic; default: as saved.
        attention: Attention kernel passed to transformers.
        expected_sha256: Hash that the weights must have, besides the one the folder itself records.

    Raises:
        CheckpointMismatch: Weights are missing, unexpected or of another shape, or the hash is another.
    """
    found = weights_sha256(folder)
    for recorded, who in (
        (VisualSettings.load(folder).weights_sha256, "rovrm.json"),
        (expected_sha256, "the run"),
    ):
        if recorded is not None and recorded != found:
            raise CheckpointMismatch(
                f"{folder}: the weights have the hash {found[:12]}..., {who} expects {recorded[:12]}...: they are not "
                "those that were written there. Copy the folder again, or start from another one."
            )
    config = AutoConfig.from_pretrained(folder)
    state = _read_weights(folder)
    with no_init_weights():
        model = VisualRewardModel(AutoModel.from_config(config, attn_implementation=attention))
    model.to(dtype or state["v_head.weight"].dtype if "v_head.weight" in state else torch.float32)
    load_strictly(model, state, str(folder))
    return model


def load_strictly(model: VisualRewardModel, state: dict[str, Tensor], where: str) -> None:
    """Load weights, all of them and no others.

    Raises:
        CheckpointMismatch: Names or shapes differ; the message lists the first few of each kind.
    """
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    reshaped = [
        f"{name} {list(state[name].shape)} for {list(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if own[name].shape != state[name].shape
    ]
    if missing or unexpected or reshaped:
        kinds = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
        listed = "; ".join(f"{len(names)} {kind}: {_some(names)}" for kind, names in kinds.items() if names)
        raise CheckpointMismatch(f"{where}: the weights do not fit the model. {listed}.")
    model.load_state_dict(state, strict=True)


def save_reward_model(
    model: VisualRewardModel,
    encoder: VisualEncoder,
    folder: str | Path,
    *,
    lineage: Sequence[PhaseRecord] = (),
) -> None:
    """Write a whole model folder."""
    model.save_pretrained(folder)
    save_companions(encoder, folder, lineage=lineage)


def save_companions(
    encoder: VisualEncoder, folder: str | Path, *, lineage: Sequence[PhaseRecord] = ()
) -> None:
    """Write what belongs beside the weights, which must lie in the folder already."""
    encoder.tokenizer.save_pretrained(folder)
    encoder.image_processor.save_pretrained(folder)
    VisualSettings(encoder.template, encoder.max_length, tuple(lineage)).save(folder)


def load_encoder(
    path: str | Path,
    *,
    template: VisualTemplate | None = None,
    max_length: int | None = None,
    revision: str | None = None,
) -> VisualEncoder:
    """The encoder of a model folder, or of a body to start from.

    Args:
        path: Folder or hub name.
        template: In place of the folder's own; a body without settings needs one.
        max_length: Likewise.
        revision: Hub revision of `path`.
    """
    settings = VisualSettings.load(path) if is_reward_model(path) else None
    if settings is None and (template is None or max_length is None):
        raise ValueError(f"{path} holds no {SETTINGS_FILE}; give `template` and `max_length`.")
    # One backend everywhere: torchvision resizes differently, and scores would depend on what is installed.
    processor = AutoImageProcessor.from_pretrained(path, revision=revision, backend="pil")
    return VisualEncoder(
        AutoTokenizer.from_pretrained(path, revision=revision),
        processor,
        family_of(AutoConfig.from_pretrained(path, revision=revision)),
        template or settings.template,  # type: ignore[union-attr]
        max_length=max_length or settings.max_length,  # type: ignore[union-attr]
    )


def _read_weights(folder: str | Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            state |= {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118 - no mapping
    return state


def _some(names: Sequence[Any]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(str, names[:_SHOWN])) + rest
