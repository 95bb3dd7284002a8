"""Check 6: what the order of the training rows teaches; check 19: representations find the planted type."""

from __future__ import annotations

from functools import lru_cache
from random import Random

import numpy as np
import pytest
import torch
from builders import tiny_model, tiny_tokenizer

from eagleray.models.gram.batching import pad_right
from eagleray.models.lrhp.losses import order_loss, symmetry_penalty
from eagleray.models.lrhp.metrics import order_metrics
from eagleray.models.lrhp.model import PairModel
from eagleray.models.lrhp.prompts import PreferenceEncoder, add_preference_token
from eagleray.models.lrhp.representer import Representer
from eagleray.models.lrhp.synthetic import make_typed_pairs
from eagleray.models.selection.choice import best_first
from eagleray.models.selection.cosine import cosine_scores
from eagleray.models.selection.rows import mean_row

NOUNS = ("river", "forest", "answer", "question", "word", "number", "sentence", "user")


def _pairs(offset: int) -> list[tuple[str, str, str]]:
    return [(f"{x} {offset}", f"useful {y}", f"short {y}") for x in NOUNS for y in NOUNS[:4]]


@lru_cache
def _trained(order: str, symmetry: float = 0.0) -> dict[str, float]:
    """Order figures on pairs with other prompts, after 60 steps on all rows."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model = PairModel(
        tiny_model(initializer_range=0.05).model,  # type: ignore[operator]
        token_id=add_preference_token(tokenizer),
    )
    model.start_row(len(tokenizer) - 1)
    encoder = PreferenceEncoder(tokenizer, max_length=128)
    forward, backward = zip(*(encoder.encode_orders(*pair) for pair in _pairs(1)), strict=True)
    rows = [*forward, *backward] if order == "both" else forward
    z_R = torch.tensor([1.0] * len(forward) + [0.0] * (len(rows) - len(forward)))
    batch = pad_right([row.ids for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(60):
        optimizer.zero_grad()
        _, u_R = model(*batch)
        loss = order_loss(u_R, z_R)
        if symmetry:
            loss = loss + symmetry * symmetry_penalty(*u_R.view(2, -1)) / len(forward)
        loss.backward()
        optimizer.step()
    _, u_N2, _ = Representer(model, encoder).both_orders(_pairs(2))
    return {**order_metrics(u_N2), "mean_sum": float(np.abs(u_N2.sum(1)).mean())}


def test_check_6_a_fixed_order_teaches_the_label_and_nothing_else() -> None:
    found = _trained("fixed")
    assert found["accuracy_chosen_first"] == 1.0
    assert found["accuracy_chosen_second"] <= 0.05  # u keeps its sign
    assert found["consistency"] <= 0.05


def test_check_6_both_orders_teach_the_preference() -> None:
    found = _trained("both")
    assert found["accuracy"] >= 0.95
    assert abs(found["accuracy_chosen_first"] - found["accuracy_chosen_second"]) < 0.05
    assert found["consistency"] >= 0.95


@pytest.mark.parametrize("symmetry", [1.0])
def test_the_symmetry_regulariser_brings_the_logits_of_the_orders_together(symmetry: float) -> None:
    plain, regularised = _trained("both"), _trained("both", symmetry)
    assert regularised["accuracy"] >= 0.95
    assert regularised["mean_sum"] < plain["mean_sum"]


def test_check_19_pairs_of_the_type_of_the_targets_are_found() -> None:
    """400 pairs of two types, an encoder after 15 steps on them, 20 targets of one type: 80 of the best 100 are of it.

    The encoder is not told types. Representations are the differences of both orders, less their mean; the threshold is
    the specification's (about 93 are found). Those of one order are less stable: after 80 steps they are the decision
    alone on this toy set, and the types fall together.
    """
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model = PairModel(
        tiny_model(initializer_range=0.05).model,  # type: ignore[operator]
        token_id=add_preference_token(tokenizer),
    )
    model.start_row(len(tokenizer) - 1)
    encoder = PreferenceEncoder(tokenizer, max_length=512)
    pool = make_typed_pairs(400, 0, split="pool")
    targets = [row for row in make_typed_pairs(40, 1, split="target") if row["tags"] == ["length"]]
    rows = [encoder.encode_orders(row["prompt"], row["chosen"], row["rejected"]) for row in pool]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    rng = Random(0)
    for _ in range(15):
        batch = pad_right([row.ids for i in rng.sample(range(400), 16) for row in rows[i]])
        optimizer.zero_grad()
        order_loss(model(*batch)[1], torch.tensor([1.0, 0.0] * 16)).backward()
        optimizer.step()
    representer = Representer(model, encoder)
    pool_ND, target_MD = (
        np.stack([found.h_D for found in representer.represent(triples, order="diff")])
        for triples in (
            [(row["prompt"], row["chosen"], row["rejected"]) for row in part] for part in (pool, targets)
        )
    )
    scores = cosine_scores(pool_ND, target_MD, centre_D=mean_row(pool_ND))
    best = best_first(scores, [row["id"] for row in pool], highest=True)[:100]
    assert len(targets) == 20 and sum(pool[i]["tags"] == ["length"] for i in best) >= 80
