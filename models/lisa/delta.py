"""The added weights in a file of their own: under two per cent of a model, to be put onto the public base again.

lisa.safetensors    the added weights; its metadata holds the specification with the checksum of the base
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from eagleray.models.lisa.checksum import base_checksum
from eagleray.models.lisa.convert import Start, convert
from eagleray.models.lisa.distill import is_lisa_parameter
from eagleray.models.lisa.spec import LisaSpec

FILE = "lisa.safetensors"


def save_delta(model: Any, folder: str | Path) -> Path:
    """Write the added weights of a converted model.

    Raises:
        ValueError: Training changed weights of the base too, which the file would not hold.
    """
    spec: LisaSpec = model.base_model.lisa
    if spec.base_checksum != base_checksum(model):
        raise ValueError(
            "The weights of the base are not those that were converted, so the added weights alone do not make up this "
            "model. Save it whole with `save_pretrained`."
        )
    tensors = {n: p.detach().contiguous() for n, p in model.named_parameters() if is_lisa_parameter(n)}
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"lisa_attention": json.dumps(spec.to_dict()), "model_type": model.config.model_type}
    save_file(tensors, path, metadata=metadata)
    return path


def load_delta(base: Any, folder: str | Path) -> Any:
    """The model that `save_delta` wrote, on its base.

    Args:
        base: The unconverted causal language model; its tensors are used, not copied.
        folder: Where the file lies.

    Raises:
        ValueError: The base is another one, or the file is not whole.
    """
    path = Path(folder) / FILE
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    if "lisa_attention" not in metadata:
        raise ValueError(f"{path} has no `lisa_attention` in its metadata; `save_delta` did not write it.")
    if metadata["model_type"] != f"lisa_{base.config.model_type}":
        raise ValueError(
            f"{path} belongs to a {metadata['model_type'].removeprefix('lisa_')!r} model; the base is a {base.config.model_type!r}."
        )
    spec = LisaSpec.from_dict(json.loads(metadata["lisa_attention"]))
    model = convert(base, spec, start=Start(align="identity"))
    found = model.base_model.lisa.base_checksum
    if found != spec.base_checksum:
        raise ValueError(
            f"{path} was made from another base: the checksum of its weights is {spec.base_checksum}, that of the given "
            f"one {found}. Load exactly the model and revision (and the precision) that was converted."
        )
    added = {n: p for n, p in model.named_parameters() if is_lisa_parameter(n)}
    if set(added) != set(tensors):
        raise ValueError(
            f"{path} lacks or has too many of the added weights: {sorted(set(added) ^ set(tensors))[:3]}."
        )
    with torch.no_grad():
        for name, parameter in added.items():
            parameter.data = tensors[name].to(parameter.device)
    return model
