"""What runs in each worker of a training run.

A module of its own, and light: Ray's controller imports it to pass the function on, and needs nothing it imports.
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import Any

from eagleray.platform.imports import imports


def train_worker(loop: dict[str, Any]) -> dict[str, float] | None:
    """Build the task and train it; `None` if the run was asked to stop.

    Args:
        loop: `task`, `config_class` ("module:name"), `config` (JSON), `run_dir` and `threads`.
    """
    with imports():
        import ray.train
        import torch
        import torch.distributed as dist
        from transformers.utils import logging as transformers_logging

        from eagleray.platform.config import validate_config
        from eagleray.platform.cpu import set_up_torch
        from eagleray.platform.remote import leads_node, open_folder
        from eagleray.platform.training import run_training

        if not torch.cuda.is_available():
            os.environ["DS_ACCELERATOR"] = "cpu"  # before anything imports DeepSpeed
        task_class, config_class = _load(loop["task"]), _load(loop["config_class"])

    # Ray would log every report of every worker; our own progress says what matters.
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("eagleray").setLevel(logging.INFO)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    set_up_torch(loop["threads"])
    cfg = validate_config(config_class, loop["config"], "worker")
    folder = open_folder(loop["run_dir"])
    if leads_node():
        folder.receive_data()
    dist.barrier()
    task = task_class(cfg, folder.path / "data")
    return run_training(task, cfg, folder, report=ray.train.report, evicted=_evicted)


def _evicted() -> bool:
    """Whether Ray has told this worker that a machine of the run will be taken away.

    `ray.train.get_preemption_info` says the same but makes all workers wait for one another through an actor,
    far too slow for every step; the loop agrees on the answer in a message of its own.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


def _load(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
