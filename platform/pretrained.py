"""Models in and out of the Hugging Face format: loading, LoRA, export from every ZeRO stage."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eagleray.platform.sections import LoraSection, ModelSection


def load_pretrained(auto_class: Any, model: ModelSection, **options: Any) -> Any:
    """`auto_class.from_pretrained` of a config section, in fp32 and from safetensors only.

    Raises:
        ValueError: The folder or hub name holds no usable model.
    """
    path = Path(model.path).expanduser()
    if not path.exists() and (path.is_absolute() or model.path.startswith(".") or model.path.count("/") > 1):
        raise ValueError(
            f"`model.path` is {model.path!r}; no such folder. Give a model folder or a hub name."
        )
    try:
        return auto_class.from_pretrained(
            model.path,
            revision=model.revision,
            attn_implementation=model.attention,
            dtype=torch.float32,
            use_safetensors=True,
            **options,
        )
    except OSError as error:
        raise ValueError(f"`model.path` is {model.path!r}; it can't be loaded: {error}") from error


def load_tokenizer(model: ModelSection) -> Any:
    """The tokenizer of a model section."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model.path, revision=model.revision)


def add_lora(
    model: Any, lora: LoraSection | None, *, task_type: str, modules_to_save: list[str] | None = None
) -> Any:
    """Wrap a model in low-rank adapters; without a section it is returned as it is.

    Args:
        model: A transformers model.
        lora: The adapter's section of the config.
        task_type: peft's task type, e.g. `CAUSAL_LM` or `SEQ_CLS`; a wrong one loses heads on saving.
        modules_to_save: Modules trained in full and saved with the adapter, e.g. a new head.
    """
    if lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type=task_type,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=modules_to_save,
    )
    model.enable_input_require_grads()  # gradient checkpointing needs a graph below the frozen trunk
    return get_peft_model(model, config)


def export_model(model: Any, path: Path, *, save_extras: Callable[[Path], None]) -> None:
    """Write a model (or its adapter) in Hugging Face format; a collective call, right under every ZeRO stage.

    The folder appears by a rename: a reader sees the old model or the new one, never half of one.
    """
    state = gather_state(model)
    if dist.get_rank() == 0:
        partial, old = path.with_name(path.name + ".partial"), path.with_name(path.name + ".old")
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        model.save_pretrained(partial, state_dict=state)
        save_extras(partial)
        if path.exists():
            os.rename(path, old)
        os.rename(partial, path)
        shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


@contextmanager
def whole_parameters(module: nn.Module) -> Iterator[None]:
    """Inside, the module's parameters are whole on every worker, to be read; a collective call under ZeRO-3."""
    partitioned = [p for p in module.parameters() if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def gather_state(model: nn.Module) -> dict[str, Tensor] | None:
    """Whole weights on the CPU of worker 0, `None` elsewhere; a collective call under ZeRO-3."""
    partitioned = [name for name, p in model.named_parameters() if hasattr(p, "ds_id")]
    if not partitioned:
        return model.state_dict() if dist.get_rank() == 0 else None
    import deepspeed

    parameters = dict(model.named_parameters(remove_duplicate=False))
    state: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}  # tied weights stay tied
    for name, parameter in parameters.items():
        with deepspeed.zero.GatheredParameters([parameter]):
            if dist.get_rank() == 0:
                if id(parameter) not in copies:
                    copies[id(parameter)] = parameter.detach().cpu().clone()
                state[name] = copies[id(parameter)]
    if dist.get_rank() != 0:
        return None
    persistent = model.state_dict().keys()
    state |= {name: buffer.cpu() for name, buffer in model.named_buffers() if name in persistent}
    return state
