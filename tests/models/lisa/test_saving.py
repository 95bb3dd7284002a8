"""Acceptance check 17: saving, loading, the delta file."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification

from eagleray.models.lisa.checksum import tensor_checksum
from eagleray.models.lisa.convert import Start, convert
from eagleray.models.lisa.delta import FILE, load_delta, save_delta
from eagleray.models.lisa.distill import is_lisa_parameter
from eagleray.models.lisa.model import ARCHITECTURES
from eagleray.models.lisa.spec import AlignSpec, LisaSpec

Make = Callable[..., Any]

_FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
import eagleray.models.lisa.model
from eagleray.models.lisa.checksum import tensor_checksum
for folder in sys.argv[1:]:
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    ids = torch.load(folder + "/ids.pt")
    torch.save(model(input_ids=ids, use_cache=False).logits.detach(), folder + "/logits.pt")
    print(tensor_checksum(model.state_dict().items()))
"""


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def test_loading_in_a_fresh_process(make_pair: Make, ids: Tensor, tmp_path: Path) -> None:
    """Check 17: bit-identical logits and weights, nothing missing or unexpected; all architectures, tied weights too."""
    folders, expected = [], []
    for architecture in ARCHITECTURES:
        _, student = make_pair(architecture, config={"tie_word_embeddings": architecture == "qwen3"})
        folder = tmp_path / architecture
        student.save_pretrained(folder)
        torch.save(ids, folder / "ids.pt")
        folders.append(folder)
        expected.append((logits(student, ids), tensor_checksum(student.state_dict().items())))
    run = subprocess.run(
        [sys.executable, "-c", _FRESH, *map(str, folders)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert run.returncode == 0, run.stderr
    for folder, checksum, (values, wanted) in zip(folders, run.stdout.split(), expected, strict=True):
        assert torch.equal(torch.load(folder / "logits.pt"), values)
        assert checksum == wanted


def test_delta_onto_the_base(make_pair: Make, make_teacher: Make, ids: Tensor, tmp_path: Path) -> None:
    """Check 17: the same logits, a fraction of the size; another base is refused."""
    _, student = make_pair()
    path = save_delta(student, tmp_path)
    loaded = load_delta(make_teacher(), tmp_path)
    assert torch.equal(logits(loaded, ids), logits(student, ids))
    assert all(is_lisa_parameter(name) for name in load_file(path))
    assert not loaded.training
    other = make_teacher()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-6
    with pytest.raises(ValueError, match="made from another base"):
        load_delta(other, tmp_path)
    with pytest.raises(ValueError, match="made from another base"):
        load_delta(make_teacher().float(), tmp_path)
    with pytest.raises(ValueError, match="belongs to a 'llama' model; the base is a 'qwen3'"):
        load_delta(make_teacher("qwen3"), tmp_path)


def test_delta_of_a_changed_base_is_not_written(make_pair: Make, tmp_path: Path) -> None:
    _, student = make_pair()
    with torch.no_grad():
        student.model.layers[3].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(ValueError, match="Save it whole"):
        save_delta(student, tmp_path)


def test_damaged_deltas_are_refused(make_pair: Make, make_teacher: Make, tmp_path: Path) -> None:
    _, student = make_pair()
    tensors = load_file(save_delta(student, tmp_path))
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(ValueError, match="no `lisa_attention` in its metadata"):
        load_delta(make_teacher(), tmp_path)
    save_delta(student, tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / FILE, framework="pt") as file:
        metadata = file.metadata()
    tensors.pop("model.layers.2.self_attn.align.m")
    save_file(tensors, tmp_path / FILE, metadata=metadata)
    with pytest.raises(ValueError, match=r"lacks or has too many .*layers.2.self_attn.align.m"):
        load_delta(make_teacher(), tmp_path)


def test_auto_classes(make_pair: Make, ids: Tensor, tmp_path: Path) -> None:
    """A reward model and a bare trunk come from the same folder."""
    _, student = make_pair()
    student.save_pretrained(tmp_path)
    trunk = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    states = trunk(input_ids=ids).last_hidden_state.detach()
    torch.testing.assert_close(student.lm_head(states), logits(student, ids), rtol=1e-9, atol=1e-9)
    classifier = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.float64, num_labels=1, pad_token_id=0
    )
    assert classifier(input_ids=ids).logits.shape == (2, 1)
    assert classifier.model.lisa == student.model.lisa


def test_random_weights_are_finite_and_start_near_direct_sharing(ids: Tensor) -> None:
    """From scratch: no uninitialised number anywhere, M = 1 and W2 = 0."""
    config_class, model_class = ARCHITECTURES["llama"]
    config = config_class(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=64,
        lisa_attention={"shared_layers": [2, 3], "rank": 4, "align": {"kind": "linear+ffn"}},
    )
    model = model_class(config)
    assert all(p.isfinite().all() and not p.is_meta for p in model.parameters())
    align: Any = model.model.layers[2].self_attn.align
    assert torch.equal(align.m, torch.eye(4)) and not align.w2.any() and align.w1.any()
    assert logits(model, ids).isfinite().all()


def test_what_cannot_be_converted_is_refused(make_teacher: Make, ids: Tensor) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    shared = LisaSpec(shared_layers=(2,), rank=4)
    with pytest.raises(ValueError, match="is a 'gpt2'; attention scores can be shared in llama"):
        convert(GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=16)), shared)
    with pytest.raises(ValueError, match="is a 'lisa_llama'"):
        convert(convert(make_teacher(), LisaSpec()), shared)
    quantised = make_teacher()
    quantised.is_quantized = True
    with pytest.raises(ValueError, match="is quantised"):
        convert(quantised, shared)
    with pytest.raises(ValueError, match="`texts` is empty"):
        convert(make_teacher(), shared)
    with pytest.raises(ValueError, match="one order for each shared layer"):
        convert(make_teacher(), shared, permutations={3: [0, 1, 2, 3]})
    with pytest.raises(ValueError, match="normalises queries and keys"):
        convert(make_teacher("qwen3"), shared, [ids], start=Start(low_rank="pairs"))
    with pytest.raises(ValueError, match="multiple of its 2 KV heads"):
        one = LisaSpec(shared_layers=(2,), rank=4, key_heads=1, align=AlignSpec(kind="linear"))
        convert(make_teacher(), one, [ids], start=Start(low_rank="pairs"))
    with pytest.raises(ValueError, match="must be one of ridge, identity, random"):
        Start(align="svd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="their masks differ"):
        mixed = make_teacher("qwen2", sliding_window=4, use_sliding_window=True, max_window_layers=2)
        convert(mixed, shared, [ids])
