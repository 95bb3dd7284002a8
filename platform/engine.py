"""DeepSpeed behind the training loop: its JSON from our config, its engine, its numbers.

The loop sets the accumulation border itself (`managed_gradient_accumulation: false`): every `engine.step()`
is an optimiser step, and gradients are sums that the loop has already divided by the global weight.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eagleray.platform.sections import OptimSection, TrainingConfig


class Stepper(nn.Module):
    """Runs any function of the model inside one `forward`.

    DeepSpeed hooks the forward of the module it wraps. A task's loss may call the model several times or
    only parts of it; run through here, all of it happens inside the one forward that DeepSpeed sees.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self.model, *args)


def deepspeed_config(cfg: TrainingConfig) -> dict[str, Any]:
    """The DeepSpeed JSON of a run: everything it needs and nothing that the loop does itself."""
    ds = cfg.deepspeed
    zero: dict[str, Any] = {"stage": ds.zero_stage}
    if ds.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if ds.offload_params:
        zero["offload_param"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": cfg.train.micro_batch_size,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0 if _clips_in_hook(cfg) else cfg.optim.clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31 - 1,
    }
    if cfg.train.precision != "fp32":
        config[cfg.train.precision] = {"enabled": True}
    return config


def build_engine(model: nn.Module, cfg: TrainingConfig, *, total_steps: int) -> Any:
    """Wrap `model` in a DeepSpeed engine with AdamW and the schedule; the process group must exist.

    Returns:
        A `deepspeed.DeepSpeedEngine` over `Stepper(model)`; call it as `engine(function, *args)`.

    Raises:
        ValueError: fp16 was asked for without a GPU.
    """
    import deepspeed

    if cfg.train.precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("`train.precision` is fp16, which needs a GPU; use bf16 or fp32 on CPUs.")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # The table of ops that could be compiled here, asked for one of them only: for tensor-parallel inference on CPUs,
    # which would be compiled at every start. A worker killed just then leaves torch's lock on the build behind, and
    # every later start on the machine waits for it forever. Filling the table runs a C compiler, so it stays empty.
    deepspeed.ops.__compatible_ops__ = {}  # pyright: ignore[reportAttributeAccessIssue]
    optimizer = _build_optimizer(model, cfg.optim, offload=cfg.deepspeed.offload_optimizer)
    engine, *_ = deepspeed.initialize(
        model=Stepper(model),
        optimizer=optimizer,
        lr_scheduler=lambda wrapped: _schedule(wrapped, cfg.optim, total_steps),  # type: ignore[arg-type]
        config=deepspeed_config(cfg),
        dist_init_required=False,
    )
    if cfg.deepspeed.zero_stage == 0 and dist.get_world_size() == 1:
        # With nobody to share gradients with, DeepSpeed would still copy each of them into a buffer and back.
        engine.enable_backward_allreduce = False
    if _clips_in_hook(cfg):
        _clip_before_step(engine, optimizer, cfg.optim.clip_norm)
    return engine


@contextlib.contextmanager
def own_rates(engine: Any) -> Iterator[None]:
    """A checkpoint loaded inside the block brings weights, moments and step, but no hyper-parameters.

    DeepSpeed restores the optimiser's groups and the schedule as they were saved, peak rate included; after the
    block the engine has its own again, at the step of the checkpoint.
    """
    own = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
    peaks = list(engine.lr_scheduler.base_lrs)
    yield
    for group, values in zip(engine.optimizer.param_groups, own, strict=True):
        group.update(values)
    engine.lr_scheduler.base_lrs = peaks
    engine.lr_scheduler.last_epoch -= 1
    engine.lr_scheduler.step()  # to where the checkpoint was, with the own peak


@contextlib.contextmanager
def sharded_loading(cfg: TrainingConfig) -> Iterator[None]:
    """While open, transformers' `from_pretrained` partitions weights as it reads them under ZeRO-3.

    No worker then ever holds the whole model. Other stages load as usual.
    """
    if cfg.deepspeed.zero_stage != 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    keep_alive = HfDeepSpeedConfig(deepspeed_config(cfg))  # transformers holds only a weak reference
    try:
        yield
    finally:
        del keep_alive
        unset_hf_deepspeed_config()


def _schedule(optimizer: Any, optim: OptimSection, total_steps: int) -> Any:
    from transformers import get_scheduler

    name = "constant_with_warmup" if optim.schedule == "constant" else optim.schedule
    warmup = round(optim.warmup_ratio * total_steps)
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)


def _build_optimizer(model: nn.Module, optim: OptimSection, *, offload: bool) -> torch.optim.Optimizer:
    trainable = [p for p in model.parameters() if p.requires_grad]
    # Under ZeRO-3 a partitioned parameter is empty; DeepSpeed keeps the true shape in `ds_shape`.
    dims = [len(getattr(p, "ds_shape", p.shape)) for p in trainable]
    groups = [
        {
            "params": [p for p, d in zip(trainable, dims, strict=True) if d >= 2],
            "weight_decay": optim.weight_decay,
        },
        {"params": [p for p, d in zip(trainable, dims, strict=True) if d < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, adamw_mode=True)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def _clips_in_hook(cfg: TrainingConfig) -> bool:
    # In fp32 without ZeRO the engine clips but never reports the gradient norm, so we do both.
    return cfg.deepspeed.zero_stage == 0 and cfg.train.precision == "fp32"


def _clip_before_step(engine: Any, optimizer: torch.optim.Optimizer, clip_norm: float) -> None:
    parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]

    def clip(*_: Any) -> None:
        norm = nn.utils.clip_grad_norm_(parameters, clip_norm or float("inf"))
        engine._global_grad_norm = norm.item()  # what `engine.get_global_grad_norm()` returns

    optimizer.register_step_pre_hook(clip)
