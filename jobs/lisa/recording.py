"""The teacher's inputs to its layers, recorded once and read by every worker, or by all trials of a sweep.

A recording is a folder: `train.npy` and `eval.npy`, float16, [blocks, K, T, width], and `recording.json` with what
they are of. Reading it maps it into memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eagleray.jobs.lisa.sections import as_texts
from eagleray.models.lisa.distill import record_inputs
from eagleray.platform.config import ConfigError

_ABOUT = "recording.json"


class Recording:
    """The inputs to some layers, by part and block."""

    def __init__(self, folder: Path, layers: Sequence[int]) -> None:
        known = json.loads((folder / _ABOUT).read_text())["layers"]
        self._columns = [known.index(layer) for layer in layers]
        self._parts = {part: np.load(folder / f"{part}.npy", mmap_mode="r") for part in ("train", "eval")}

    def read(self, part: str, block: int) -> np.ndarray:
        """Inputs of one block to the layers, float32, [layers, T, width]."""
        return self._parts[part][block, self._columns].astype("float32")


def record(
    teacher: Any, blocks: Mapping[str, np.ndarray], layers: Sequence[int], folder: Path, *, model: str
) -> None:
    """Run the teacher over the blocks of each part and keep what goes into its layers.

    Args:
        teacher: The unconverted model.
        blocks: Part -> token ids [blocks, T].
        layers: Which layers; a reader may want fewer.
        folder: Where the recording goes.
        model: What the config calls the teacher.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _ABOUT).unlink(missing_ok=True)
    for part, ids in blocks.items():
        shape = (len(ids), len(layers), ids.shape[1], teacher.config.hidden_size)
        out = np.lib.format.open_memmap(folder / f"{part}.npy", mode="w+", dtype=np.float16, shape=shape)
        for i, text in enumerate(as_texts(ids, batch=1)):
            out[i] = record_inputs(teacher, text, layers=layers)[0].float().numpy()
        out.flush()
    # Last, so that a recording that was cut off is none.
    (folder / _ABOUT).write_text(json.dumps(_about(blocks, model) | {"layers": list(layers)}))


def is_recorded(folder: Path) -> bool:
    """Whether a folder holds a finished recording."""
    return (folder / _ABOUT).is_file()


def check_recording(
    folder: Path, blocks: Mapping[str, np.ndarray], layers: Sequence[int], *, model: str
) -> None:
    """Refuse a recording that is not of this model, text and these layers.

    Raises:
        ConfigError: It is of something else, or there is none.
    """
    if not is_recorded(folder):
        raise ConfigError(
            f"`recorded` is {folder}; it holds no finished recording. Leave it out to record anew."
        )
    found = json.loads((folder / _ABOUT).read_text())
    for key, wanted in _about(blocks, model).items():
        if found[key] != wanted:
            raise ConfigError(
                f"`recorded` is {folder}, which was recorded from another {key} than this run has. Leave `recorded` "
                "out, or give the model and data that it was made from."
            )
    missing = sorted(set(layers) - set(found["layers"]))
    if missing:
        raise ConfigError(
            f"`recorded` is {folder}, without the inputs of layers {missing}. Leave `recorded` out to record anew."
        )


def _about(blocks: Mapping[str, np.ndarray], model: str) -> dict[str, Any]:
    texts = {part: hashlib.sha256(ids.tobytes()).hexdigest() for part, ids in blocks.items()}
    return {"model": model, "text": texts}
