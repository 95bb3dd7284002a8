"""The harness of the benchmarks, with sides that cost nothing."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import tiny_model

from benchmarks.gram_step import Size, step_flops
from benchmarks.harness import (
    MadeUpWords,
    Ratio,
    Side,
    SideError,
    finish,
    interleave,
    median_ratio,
)
from eagleray.models.gram.scoring import label_logits

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20


def build_block(*, mebibytes: int) -> Callable[[], int]:
    """Touches a block of memory and gives it back; returns the process id."""

    def touch() -> int:
        bytearray(b"x") * (mebibytes * MIB)
        return os.getpid()

    return touch


def build_threads() -> Callable[[], int]:
    return torch.get_num_threads


def build_failing() -> Callable[[], int]:
    def fail() -> int:
        raise ValueError("the bridge is out")

    return fail


def build_dying() -> Callable[[], int]:
    def die() -> int:
        os._exit(3)

    return die


def build_environment(*, name: str) -> Callable[[], str | None]:
    return lambda: os.environ.get(name)


def test_rounds_alternate_their_order() -> None:
    calls: list[str] = []
    results = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert results == {"a": [None] * 3, "b": [None] * 3}


def test_the_time_budget_ends_rounds_but_not_the_first_three() -> None:
    results = interleave({"a": lambda: 1}, rounds=10, seconds=0.0)
    assert results == {"a": [1, 1, 1]}


def test_the_ratio_is_taken_within_rounds() -> None:
    """The second round is ten times slower for both; the medians' ratio would be 30 / 20."""
    assert median_ratio([2.0, 30.0, 40.0], [1.0, 10.0, 20.0]) == 2.0


def test_targets_are_floors_or_ceilings() -> None:
    assert [Ratio("k", "", value, 1.5, "high").met for value in (1.4, 1.5, 1.6)] == [False, True, True]
    assert [Ratio("k", "", value, 0.7, "low").met for value in (0.6, 0.7, 0.8)] == [True, True, False]


def test_the_last_line_is_the_record(capsys: pytest.CaptureFixture[str]) -> None:
    ratios = [Ratio("speed", "a over b", 2.00004, 1.6, "high"), Ratio("memory", "a over b", 0.9, 0.7, "low")]
    finish("toy", ratios, machine={"cores": 2}, quick=False, rounds=3)
    *table, last = capsys.readouterr().out.splitlines()
    assert "met" in "\n".join(table) and "missed" in "\n".join(table)
    assert json.loads(last) == {
        "benchmark": "toy",
        "ratios": {"speed": 2.0, "memory": 0.9},
        "targets": {"speed": {"at least": 1.6}, "memory": {"at most": 0.7}},
        "quick": False,
        "rounds": 3,
        "machine": {"cores": 2},
    }


def test_resident_memory_counts_a_block() -> None:
    """In a process of its own: in this one the block may lie in memory that earlier tests gave back."""
    code = """
from benchmarks.harness import resident_bytes
before = resident_bytes()
block = bytearray(b"x") * (64 * 2**20)
print(resident_bytes() - before)
del block
print(resident_bytes("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    grown, peak = map(int, done.stdout.split())
    assert 60 * MIB < grown < 80 * MIB and peak >= 60 * MIB


def test_step_flops_by_hand() -> None:
    """Two layers of width 4 and MLP 8, two sequences of three tokens.

    First layer: weights 4 * 16 + 3 * 4 * 8 = 160, times 6 FLOPs times 6 positions = 5760; causal scores
    2 * (3 * 4 / 2) = 12, times 6 products of 2 * 4 FLOPs = 576. Last layer: keys and values 2 * 16 = 32, times 6 times 6
    positions = 1152; the other 128 weights times 6 times 2 label positions = 1536; scores 2 * 3 = 6, times 48 = 288.
    Two head rows at two positions, 6 * 2 * 4 * 2 = 96.
    """
    size = Size(width=4, layers=2, vocab_size=100, batch=2, tokens=3)
    assert step_flops(size, mlp_width=8) == 5760 + 576 + 1152 + 1536 + 288 + 96


def test_step_flops_agree_with_torch() -> None:
    """`FlopCounterMode` counts the attention in full, without the causal half, and no fused kernel of CPUs."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_model(num_key_value_heads=4, attn_implementation="eager").train()
    ids_BT = torch.randint(0, 512, (2, 16))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        label_logits(model, ids_BT, torch.ones_like(ids_BT), (5, 6)).sum().backward()
    size = Size(width=32, layers=2, vocab_size=512, batch=2, tokens=16)
    other_half = 6 * 2 * 32 * (2 * 16 * 15 / 2)  # of the first layer; the last one has a single query
    assert counter.get_total_flops() == step_flops(size, mlp_width=64) + other_half


def test_made_up_texts_have_their_length() -> None:
    words = MadeUpWords(vocab_size=2000)
    text = words.text(50, random.Random(0))
    assert len(words.tokenizer(text, add_special_tokens=False)["input_ids"]) == 50
    assert text != words.text(50, random.Random(1))


@pytest.mark.ray
def test_sides_are_fresh_processes_with_memory_of_their_own() -> None:
    with (
        Side(build_block, threads=1, exact_memory=True, mebibytes=40) as small,
        Side(build_block, threads=1, mebibytes=200) as large,
    ):
        assert len({small(), large(), os.getpid()}) == 3
        assert 38 * MIB < small.peak_memory() < 60 * MIB
        assert 198 * MIB < large.peak_memory() < 220 * MIB


@pytest.mark.ray
def test_the_allocator_is_told_for_one_side_only() -> None:
    name = "MALLOC_MMAP_THRESHOLD_"
    with Side(build_environment, threads=1, exact_memory=True, name=name) as exact:
        assert exact() == str(MIB)
    assert name not in os.environ


@pytest.mark.ray
def test_a_side_has_the_threads_it_was_given() -> None:
    with Side(build_threads, threads=2) as side:
        assert side() == 2


@pytest.mark.ray
def test_a_failing_side_tells_why() -> None:
    with Side(build_failing, threads=1) as side, pytest.raises(SideError, match="the bridge is out"):
        side()


@pytest.mark.ray
def test_a_dying_side_tells_its_exit_code() -> None:
    with Side(build_dying, threads=1) as side, pytest.raises(SideError, match="exit code 3"):
        side()


def _soak(name: str, *keys: str) -> Any:
    """A benchmark that starts many processes."""
    return pytest.param(name, {*keys}, marks=pytest.mark.soak)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        _soak("gram_step", "speedup", "memory", "mfu"),
        ("checkpoint_cost", {"share_of_step_time", "beside_over_between"}),
        _soak("gram_vs_trl", "tokens_per_s", "step_overhead"),
        _soak("gram_rank", "prefix_sharing", "served", "padding"),
        _soak("sweep_cost", "steps_asha_over_grid"),
        _soak("scaling", "speedup_2_over_1"),
    ],
)
def test_a_benchmark_runs(name: str, keys: set[str]) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["benchmark"] == name and record["quick"]
    assert record["ratios"].keys() == keys
    assert all(value > 0 for value in record["ratios"].values())
