"""Going on with another number of workers: DeepSpeed's universal checkpoints.

Under ZeRO each worker's file holds a slice of one long vector that is cut by the number of workers. The
universal form has a folder of its own for every parameter (fp32 weights and both moments of AdamW, whole), from
which any number of workers takes its slices.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor


def write_universal(source: Path, target: Path) -> None:
    """Convert the state that DeepSpeed saved in `source`; one process does it, for ZeRO stages 1 to 3.

    Args:
        source: Folder with DeepSpeed's shards.
        target: Folder to make; what is there already is replaced.
    """
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    options = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,  # no processes of its own: in a Ray worker they would outlive a kill
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # model-parallel layouts, of which we have none
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(options)


def load_universal(engine: Any, folder: Path, *, tag: str) -> None:
    """Load a converted state into a fresh engine; all workers call this."""
    kept = [_settings(group) for group in engine.optimizer.optimizer.param_groups]
    messages = logging.getLogger("DeepSpeed")
    level = messages.level
    messages.setLevel(logging.ERROR)  # that it assumes no tensor parallelism, once for each worker
    engine._config.load_universal_checkpoint = True
    try:
        engine.load_checkpoint(str(folder), tag=tag)
    finally:
        engine._config.load_universal_checkpoint = False
        messages.setLevel(level)
    # Two faults of stage 3 in DeepSpeed 0.19: all groups get the settings of the first (so that biases decay like
    # matrices), and all share one step counter (so that it counts once for each group).
    optimizer = engine.optimizer.optimizer
    for group, settings in zip(optimizer.param_groups, kept, strict=True):
        group.update(settings)
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """What the config gives a group of parameters; the rate comes from the checkpoint."""
    return {name: value for name, value in group.items() if name not in ("params", "lr")}
