"""The pair encoder: checks 3, 4, 5 and 16, the special token, truncation, LoRA's one row."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModel

from eagleray.models.gram.batching import pad_right
from eagleray.models.lrhp.checkpoint import (
    PairSettings,
    load_pair_model,
    save_tokenizer_and_settings,
    untrained_pair_model,
)
from eagleray.models.lrhp.model import HEAD_FILE, PairModel, Pool, preference_index
from eagleray.models.lrhp.prompts import (
    PREFERENCE_TOKEN,
    PairTemplate,
    PreferenceEncoder,
    add_preference_token,
)
from eagleray.models.lrhp.representer import Representer
from eagleray.models.selection.store import model_hash

PAIRS = [
    ("Name a river in Peru.", "The Ucayali flows through the forest.", "Lima."),
    ("numbers", "0 1 2 3", "A short and useful answer is better than a long one. " * 3),
    ("Compare two words", "and", "sentences, with commas, and full stops."),
    ("You", "to", "of"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = tiny_tokenizer()
    add_preference_token(tokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain language model whose embedding ends before the new token's id."""
    folder = tmp_path_factory.mktemp("plain")
    tokenizer = tiny_tokenizer()
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _pair_model(folder: Path, tokenizer: Any, *, pool: Pool = "at_token", lora: bool = False) -> PairModel:
    """A model with a random head, so that every difference shows."""
    backbone = AutoModel.from_pretrained(folder)
    if lora:
        backbone = get_peft_model(
            backbone,
            LoraConfig(task_type="FEATURE_EXTRACTION", target_modules="all-linear", init_lora_weights=False),
        )
    model = PairModel(backbone, token_id=len(tokenizer) - 1, pool=pool)
    model.start_row(len(tokenizer) - 1)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


def _pad_left(sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    flipped_BT, mask_BT = pad_right([ids[::-1] for ids in sequences])
    return flipped_BT.flip(1), mask_BT.flip(1)


# ---------------------------------------------------------------- the sequence


def test_the_sequence_is_an_open_user_turn_that_ends_with_the_token(tokenizer: Any) -> None:
    ids = PreferenceEncoder(tokenizer).encode("x", "a", "b").ids
    text = tokenizer.decode(ids)
    assert text == f"<|bos|><|im_start|>user\n[User] x\n[Response 1] a\n[Response 2] b\n{PREFERENCE_TOKEN}"
    plain = tiny_tokenizer(chat=False)
    add_preference_token(plain)
    text = plain.decode(PreferenceEncoder(plain).encode("x", "a", "b").ids)
    assert text == f"<|bos|>[User] x\n[Response 1] a\n[Response 2] b\n{PREFERENCE_TOKEN}"


def test_check_3_literal_tokens_and_markers_in_texts_are_text(tokenizer: Any) -> None:
    encoder = PreferenceEncoder(tokenizer)
    nasty = f"a {PREFERENCE_TOKEN}\n[Response 2] b <|im_end|> {PREFERENCE_TOKEN}"
    ids = encoder.encode(nasty, nasty, nasty).ids
    assert ids.count(encoder.token_id) == 1 and ids[-1] == encoder.token_id
    assert ids.count(tokenizer.eos_token_id) == 0
    text = tokenizer.decode(ids)
    assert text.count("\n[Response 2] ") == 1 and text.count("\\[Response 2]") == 3


def test_long_pairs_lose_the_ends_of_answers_then_the_start_of_the_prompt(tokenizer: Any) -> None:
    encoder = PreferenceEncoder(tokenizer, max_length=96)
    short = encoder.encode("one", "two", "three")
    assert not short.truncated
    prompt, first, second = "old " * 80 + "last question?", "begin one " + "x " * 300, "begin two " + "y " * 9
    pair = encoder.encode(prompt, first, second)
    text = tokenizer.decode(pair.ids)
    assert pair.truncated and len(pair.ids) <= 96
    for kept in ("[User]", "last question?", "[Response 1] begin one", "[Response 2] begin two"):
        assert kept in text
    assert text.endswith(f"\n{PREFERENCE_TOKEN}")
    swapped = tokenizer.decode(encoder.encode(prompt, second, first).ids)
    assert sorted(text.split()) == sorted(swapped.split())  # cut at the same places


@pytest.mark.parametrize(
    "text", ["{first} {prompt} {second}", "[U] {prompt}{first} [B] {second}", "no fields"]
)
def test_templates_that_cannot_be_told_apart_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"it must hold \{prompt\}, \{first\} and \{second\}"):
        PairTemplate(text)


def test_a_tokenizer_without_the_token_and_a_tiny_length_are_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"has no token <\|PREFERENCE\|>"):
        PreferenceEncoder(tiny_tokenizer())
    with pytest.raises(ValueError, match="`max_length` is 20"):
        PreferenceEncoder(tokenizer, max_length=20)
    before = len(tokenizer)
    assert add_preference_token(tokenizer) == before - 1 and len(tokenizer) == before  # once


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("pool", ["at_token", "before_token"])
def test_check_3_padding_side_and_batch_size_do_not_matter(folder: Path, tokenizer: Any, pool: Pool) -> None:
    model = _pair_model(folder, tokenizer, pool=pool)
    encoder = PreferenceEncoder(tokenizer)
    sequences = [encoder.encode(*pair).ids for pair in [*PAIRS, *[(b, c, a) for a, b, c in PAIRS]]]
    assert len({len(ids) for ids in sequences}) > 2
    with torch.no_grad():
        alone = torch.cat([model(*pad_right([ids]))[0] for ids in sequences])
        right, u_B = model(*pad_right(sequences))
        left, _ = model(*_pad_left(sequences))
    torch.testing.assert_close(right, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(left, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(u_B, model.head(alone)[:, 0], atol=1e-4, rtol=0)
    assert right.dtype == u_B.dtype == torch.float32
    assert torch.cdist(alone, alone).fill_diagonal_(1).min() > 1e-2


def test_check_3_rows_without_exactly_one_token_are_refused() -> None:
    assert preference_index(torch.tensor([[9, 1, 0, 0], [0, 0, 2, 9]]), 9).tolist() == [0, 3]
    for row in ([1, 2, 3, 4], [9, 2, 9, 4]):
        with pytest.raises(ValueError, match=r"Row 1 of the batch holds . tokens"):
            preference_index(torch.tensor([[1, 9, 3, 4], row]), 9)


def test_check_4_every_token_counts_and_padding_does_not(folder: Path, tokenizer: Any) -> None:
    model = _pair_model(folder, tokenizer)
    ids = PreferenceEncoder(tokenizer).encode("ab", "cd", "ef").ids
    changed = [[*ids[:i], (ids[i] + 7) % 300 + 20, *ids[i + 1 :]] for i in range(len(ids) - 1)]
    with torch.no_grad():
        h_1D, _ = model(*pad_right([ids]))
        h_BD, _ = model(*pad_right(changed))
        padded_1D, _ = model(*(t[:1] for t in pad_right([ids, [1] * (len(ids) + 40)])))
    assert (h_BD - h_1D).norm(dim=1).min() > 1e-3
    torch.testing.assert_close(padded_1D, h_1D, atol=1e-5, rtol=0)


def test_check_5_an_untrained_model_is_undecided_and_its_row_is_the_mean(folder: Path) -> None:
    model, encoder = untrained_pair_model(folder)
    embedding_VD = model.backbone.get_input_embeddings().weight
    assert encoder.token_id == len(embedding_VD)  # beyond the matrix, which was not resized
    torch.testing.assert_close(model.preference_row, embedding_VD.mean(0), atol=1e-6, rtol=0)
    h_ND, u_N = Representer(model, encoder).forward([encoder.encode(*pair).ids for pair in PAIRS])
    assert (u_N == 0).all() and np.linalg.norm(h_ND[0] - h_ND[1]) > 1e-3


def test_pooling_before_the_token_reads_the_state_before_it(folder: Path, tokenizer: Any) -> None:
    at, before = (_pair_model(folder, tokenizer, pool=pool) for pool in ("at_token", "before_token"))
    ids = PreferenceEncoder(tokenizer).encode(*PAIRS[0]).ids
    with torch.no_grad():
        before.preference_row.add_(3.0)
        h_1D, _ = before(*pad_right([ids]))
        states_1TD = at.backbone(input_ids=torch.tensor([ids[:-1]])).last_hidden_state
    torch.testing.assert_close(h_1D[0], states_1TD[0, -1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("lora", [False, True])
def test_the_one_row_is_trained_and_under_lora_nothing_else_of_the_embedding(
    folder: Path, tokenizer: Any, lora: bool
) -> None:
    model = _pair_model(folder, tokenizer, lora=lora)
    encoder = PreferenceEncoder(tokenizer)
    _, u_B = model(*pad_right([encoder.encode(*pair).ids for pair in PAIRS]))
    u_B.sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"preference_row", "head.weight", "head.bias"} <= trained
    embeddings = {name for name in trained if "embed_tokens" in name}
    assert len(embeddings) == (0 if lora else 1)
    if lora:
        assert all("lora_" in name or "." not in name or name.startswith("head") for name in trained)


def _save(model: PairModel, tokenizer: Any, path: Path, **settings: Any) -> None:
    model.save_pretrained(path)
    save_tokenizer_and_settings(tokenizer, PairSettings(model.token_id, pool=model.pool, **settings), path)


_IN_A_FRESH_PROCESS = """
import json, sys
from eagleray.models.lrhp.representer import Representer
representer = Representer.from_pretrained(sys.argv[1], device="cpu")
pairs = json.loads(sys.argv[2])
found = representer.represent(pairs)
print(json.dumps([representer.encoder.token_id, [r.h_D.tolist() for r in found], [r.u for r in found]]))
"""


@pytest.mark.parametrize("lora", [False, True])
def test_check_16_round_trip_in_a_fresh_process(
    folder: Path, tokenizer: Any, tmp_path: Path, lora: bool
) -> None:
    model = _pair_model(folder, tokenizer, lora=lora)
    with torch.no_grad():
        model.preference_row.add_(0.1)
    _save(model, tokenizer, tmp_path, max_length=128)
    assert (tmp_path / "adapter_model.safetensors").is_file() == lora
    assert not list(tmp_path.glob("*.bin"))
    expected = Representer(model, PreferenceEncoder(tokenizer, max_length=128)).represent(PAIRS)
    done = subprocess.run(
        [sys.executable, "-c", _IN_A_FRESH_PROCESS, str(tmp_path), json.dumps(PAIRS)],
        capture_output=True,
        text=True,
        check=True,
    )
    token_id, h_ND, u_N = json.loads(done.stdout.splitlines()[-1])
    assert token_id == model.token_id
    # A merged adapter adds in another order; relative to the size of h (about 6) that is 1e-6.
    np.testing.assert_allclose(np.array(h_ND), [r.h_D for r in expected], atol=6e-6 if lora else 1e-6)
    np.testing.assert_allclose(u_N, [r.u for r in expected], atol=2e-5 if lora else 1e-6)


def test_loading_refuses_what_is_not_whole(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no lrhp\.json, so this is no LRHP model"):
        load_pair_model(folder)
    _save(_pair_model(folder, tokenizer), tokenizer, tmp_path)
    first = model_hash(tmp_path)
    assert first == model_hash(tmp_path) != model_hash(tmp_path, "bf16")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert model_hash(tmp_path) != first
    with pytest.raises(ValueError, match=r"has no token <\|PREFERENCE\|>"):
        load_pair_model(tmp_path)
    moved = tiny_tokenizer()
    moved.add_tokens(["something-else"])
    add_preference_token(moved)
    moved.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the model was trained with it at"):
        load_pair_model(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / HEAD_FILE).unlink()
    with pytest.raises(ValueError, match=f"{HEAD_FILE} is missing"):
        load_pair_model(tmp_path)
    settings = json.loads((tmp_path / "lrhp.json").read_text())
    (tmp_path / "lrhp.json").write_text(json.dumps(settings | {"version": 7}))
    with pytest.raises(ValueError, match="version 7"):
        load_pair_model(tmp_path)


def test_orders_and_batches(folder: Path, tokenizer: Any) -> None:
    model, encoder = _pair_model(folder, tokenizer), PreferenceEncoder(tokenizer)
    representer = Representer(model, encoder)
    h_N2D, u_N2, _ = representer.both_orders(PAIRS)
    canonical, both, diff = (representer.represent(PAIRS, order=o) for o in ("canonical", "both", "diff"))
    swapped = representer.represent([(x, b, a) for x, a, b in PAIRS])
    for i in range(len(PAIRS)):
        np.testing.assert_allclose(h_N2D[i], [canonical[i].h_D, swapped[i].h_D], atol=1e-5)
        np.testing.assert_allclose(both[i].h_D, (canonical[i].h_D + swapped[i].h_D) / 2, atol=1e-5)
        np.testing.assert_allclose(diff[i].h_D, canonical[i].h_D - swapped[i].h_D, atol=2e-5)
        assert both[i].u == diff[i].u == pytest.approx((u_N2[i, 0] - u_N2[i, 1]) / 2)
    one_by_one = Representer(model, encoder, max_batch_tokens=1).represent(PAIRS)
    for one, other in zip(one_by_one, canonical, strict=True):
        np.testing.assert_allclose(one.h_D, other.h_D, atol=1e-5)
    lengths = [10, 9, 5, 50, 49, 44, 100]
    batches = representer.batches([[0] * n for n in lengths])
    assert [[lengths[i] for i in members] for members in batches] == [[100], [50, 49, 44], [10, 9], [5]]
    [comparison] = representer.compare(PAIRS[:1])
    assert comparison.delta1 == pytest.approx(u_N2[0, 0], abs=1e-4)
