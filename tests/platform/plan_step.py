"""A process of its own for tests/platform/test_plan.py: peak memory of real training steps, in bytes, one line a case.

    python plan_step.py '[{"width": 256, ..., "rank": 8, "checkpointing": false}, ...]'

A case is a model on CPU in fp32, its loss, backward pass and fused AdamW, three steps. Measured is resident memory at
the peak, minus that before the model was made. The parent has glibc return freed blocks at once
(`MALLOC_MMAP_THRESHOLD_`), so that the peak is that of living tensors, without holes in the heap.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from eagleray.models.backbone.losses import token_losses
from eagleray.models.backbone.model import build_llama, llama_config
from eagleray.platform.pretrained import add_lora
from eagleray.platform.sections import LoraSection


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def train(case: dict[str, Any]) -> None:
    sizes = {key: case[key] for key in ("width", "layers", "heads", "kv_heads", "vocab_size")}
    model: Any = build_llama(llama_config(**sizes), seed=0).train()
    lora = LoraSection(rank=case["rank"]) if case["rank"] else None
    model = add_lora(model, lora, task_type="CAUSAL_LM")
    if case["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    ids_BT = torch.randint(0, case["vocab_size"], (case["batch"], case["tokens"]))
    mask_BT = torch.arange(case["tokens"]).expand_as(ids_BT) > 0
    for _ in range(3):
        token_losses(model, input_ids=ids_BT, target_mask=mask_BT).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def main() -> None:
    torch.set_num_threads(1)
    small = {"width": 16, "layers": 1, "heads": 1, "kv_heads": 1, "vocab_size": 300, "batch": 2, "tokens": 8}
    cases = json.loads(sys.argv[1])
    for case in cases:
        train({**case, **small})  # what libraries load and allocate at first use
    for case in cases:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = resident("VmRSS")
        train(case)
        print(resident("VmHWM") - before, flush=True)


if __name__ == "__main__":
    main()
