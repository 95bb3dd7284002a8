"""What `eagleray plan` does: memory, time and volumes of a training run on a cluster, and the setting that fits.

    eagleray plan configs/gram/finetune_tiny.yaml --nodes 2 --gpus-per-node 8 --gpu h100 train.precision=bf16

Nothing is loaded or started; of a hub model only its `config.json` is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from eagleray.jobs.registry import job_name, load_job
from eagleray.platform.config import ConfigError, load_config
from eagleray.platform.plan import (
    GPUS,
    Hardware,
    Memory,
    ModelShape,
    Setting,
    Times,
    Work,
    cheapest_setting,
    estimate_memory,
    estimate_times,
)
from eagleray.platform.sections import TrainingConfig

_GIB = 2**30


def make_plan(
    config: Path, overrides: Sequence[str], *, nodes: int, gpus_per_node: int, gpu: str, utilisation: float
) -> tuple[Work, Setting, Hardware]:
    """The work of a step of the config's run, the setting that the config has, and the cluster.

    Raises:
        ConfigError: The job does not train, its model's config cannot be read, or the sizes do not fit together.
    """
    if gpu not in GPUS:
        raise ConfigError(f"`--gpu` is {gpu!r}; it must be one of {', '.join(GPUS)}.")
    job = job_name(config)
    cfg = load_config(load_job(job).Config, config, [*overrides, f"ray.num_workers={nodes * gpus_per_node}"])
    if not isinstance(cfg, TrainingConfig):
        raise ConfigError(f"{config}: `{job}` does not train a model, so there is nothing to plan.")
    train, zero = cfg.train, cfg.deepspeed
    shape, eager = _shape(cfg)
    tokens = _tokens(cfg)
    work = Work(
        shape=shape,
        tokens=tokens,
        batch_size=train.batch_size,
        logits=_logit_positions(cfg, tokens),
        precision=train.precision,
        lora=cfg.lora,
        eager_attention=eager,
    )
    setting = Setting(
        zero.zero_stage,
        zero.offload_optimizer,
        zero.offload_params,
        train.gradient_checkpointing,
        train.micro_batch_size,
    )
    hardware = Hardware(nodes, gpus_per_node, GPUS[gpu], utilisation=utilisation)
    return work, setting, hardware


def print_plan(work: Work, setting: Setting, hardware: Hardware, console: Console) -> None:
    """The config's setting beside the cheapest one that fits."""
    best = cheapest_setting(work, hardware)
    columns = {"config": setting} | ({"proposed": best} if best else {})
    found = {
        name: (estimate_memory(work, chosen, hardware.gpus), estimate_times(work, chosen, hardware))
        for name, chosen in columns.items()
    }
    console.print(
        f"{work.shape.parameters / 1e9:.3g} billion weights, {work.trained / 1e9:.3g} billion trained; "
        f"{work.batch_size} examples of up to {work.tokens} tokens a step; {hardware.gpus} GPU(s) with "
        f"{hardware.gpu.memory / _GIB:.0f} GiB, {hardware.utilisation:.0%} of their peak FLOP/s."
    )
    table = Table(title="Per GPU", title_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")
    for label, values in _rows(columns, found, hardware):
        table.add_row(label, *values)
    console.print(table)
    if best is None:
        console.print("No setting fits. Use more or larger GPUs, LoRA, bf16 or shorter examples.")
        return
    console.print(f"Proposed: {' '.join(_overrides(best))}", soft_wrap=True)


def _rows(
    columns: dict[str, Setting], found: dict[str, tuple[Memory, Times]], hardware: Hardware
) -> list[tuple[str, list[str]]]:
    memories = [memory for memory, _ in found.values()]
    times = [time for _, time in found.values()]
    short = {name: [text.split(".")[1] for text in _overrides(chosen)] for name, chosen in columns.items()}
    rows = [("setting", ["\n".join(texts) for texts in short.values()])]
    for part in ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "peak"):
        rows.append((part, [f"{getattr(memory, part) / _GIB:.2f} GiB" for memory in memories]))
    rows.append(("fits", ["yes" if memory.fits(hardware.gpu) else "no" for memory in memories]))
    rows.append(
        ("node memory", [f"{memory.host * hardware.gpus_per_node / _GIB:.1f} GiB" for memory in memories])
    )
    rows.append(("step", [f"{time.step_s:.3g} s" for time in times]))
    rows.append(("  computing", [f"{time.compute_s:.3g} s" for time in times]))
    rows.append(
        ("  network", [f"{time.network_s:.3g} s, {time.network_bytes / _GIB:.3g} GiB" for time in times])
    )
    rows.append(("  offload", [f"{time.offload_s:.3g} s" for time in times]))
    checkpoint = [f"{time.checkpoint_bytes / _GIB:.3g} GiB, {time.checkpoint_s:.3g} s" for time in times]
    rows.append(("checkpoint (whole run)", checkpoint))
    return rows


def _overrides(setting: Setting) -> list[str]:
    return [
        f"deepspeed.zero_stage={setting.zero_stage}",
        f"deepspeed.offload_optimizer={str(setting.offload_optimizer).lower()}",
        f"deepspeed.offload_params={str(setting.offload_params).lower()}",
        f"train.gradient_checkpointing={str(setting.gradient_checkpointing).lower()}",
        f"train.micro_batch_size={setting.micro_batch}",
    ]


def _shape(cfg: Any) -> tuple[ModelShape, bool]:
    """The model's shape, and whether its attention makes the whole matrix of scores."""
    from eagleray.models.backbone.model import llama_config

    small = getattr(cfg, "scratch", None) or getattr(cfg, "backbone", None)
    if small is not None:
        sizes = small.model_dump(include={"vocab_size", "width", "layers", "heads", "kv_heads"})
        return ModelShape.from_config(llama_config(**sizes)), False
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(cfg.model.path, revision=cfg.model.revision)
        return ModelShape.from_config(config), cfg.model.attention == "eager"
    except (OSError, AttributeError) as error:
        raise ConfigError(f"`model.path` is {cfg.model.path!r}; its sizes cannot be read: {error}") from error


def _tokens(cfg: Any) -> int:
    """Tokens of the longest example."""
    judge = getattr(cfg, "judge", None)
    for found in (getattr(judge, "max_length", None), getattr(cfg, "max_length", None)):
        if found is not None:
            return found
    return cfg.block_length


def _logit_positions(cfg: Any, tokens: int) -> int:
    """Target positions whose logits over the whole vocabulary a job makes, of one example."""
    if cfg.job in ("backbone.pretrain", "gram.pretrain"):
        return tokens
    return 1 if getattr(cfg.loss, "label_space", None) == "full_vocab" else 0
