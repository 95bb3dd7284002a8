"""The mean of several models of one run, computed in fp32 from their safetensors files.

Each weight is the mean over the models; integers (such as the counters of batch norm) are floor-divided, as the
averaging script of the NAST release does. Nothing is unpickled, and memory holds one file of each model at a time.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def average_models(folders: Sequence[Path], path: Path) -> None:
    """Write the mean of models to `path`; what is not a weight is taken from the first folder.

    The folder appears by a rename, as an exported model does.

    Args:
        folders: Model folders of one architecture, written by `save_pretrained`.
        path: The folder to write; an older one there is replaced.

    Raises:
        ValueError: There is no folder, or the models differ in their files, names or shapes.
    """
    if not folders:
        raise ValueError("`folders` is empty: there is no model to average.")
    partial, old = path.with_name(path.name + ".partial"), path.with_name(path.name + ".old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(folders[0], partial)
    files = sorted(file.name for file in folders[0].glob("*.safetensors"))
    for folder in folders:
        found = sorted(file.name for file in folder.glob("*.safetensors"))
        if not files or found != files:
            raise ValueError(
                f"{folder} holds {found or 'no weights'}, {folders[0]} holds {files or 'no weights'}."
            )
    for name in files:
        save_file(_mean([folder / name for folder in folders]), partial / name, metadata={"format": "pt"})
    if path.exists():
        os.rename(path, old)
    os.rename(partial, path)
    shutil.rmtree(old, ignore_errors=True)


def _mean(files: Sequence[Path]) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    types: dict[str, torch.dtype] = {}
    for number, file in enumerate(files):
        with safe_open(file, framework="pt") as weights:
            names = list(weights.keys())
            if number and set(names) != sums.keys():
                raise ValueError(f"{file} has other weights than {files[0]}; average models of one run.")
            for name in names:
                weight = weights.get_tensor(name)
                if not number:
                    types[name] = weight.dtype
                    sums[name] = weight.clone().to(
                        torch.float32 if weight.is_floating_point() else weight.dtype
                    )
                elif sums[name].shape != weight.shape:
                    raise ValueError(f"{file}: `{name}` has another shape than in {files[0]}.")
                else:
                    sums[name] += weight
    return {
        name: (total / len(files) if total.is_floating_point() else total // len(files)).to(types[name])
        for name, total in sums.items()
    }
