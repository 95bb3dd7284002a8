"""Continuous batching gives what `generate` gives for each prompt alone, whoever joins and leaves meanwhile."""

from __future__ import annotations

import pytest
import torch
from builders import tiny_model, tiny_tokenizer

from eagleray.models.backbone.decoding import Continuation, ContinuousDecoder
from eagleray.models.backbone.streaming import TextStream
from eagleray.models.lisa.convert import Start, convert
from eagleray.models.lisa.spec import LisaSpec

PROMPTS = [[5, 9, 11, 40, 8], [7], [30, 31, 32, 33, 34, 35, 36, 37, 38], [12, 12, 90]]


def lisa_model() -> torch.nn.Module:
    """Shared layers with a key head of their own; what was added is random."""
    spec = LisaSpec(shared_layers=(2, 3), rank=4)
    model = convert(tiny_model(num_hidden_layers=4), spec, start=Start(align="identity")).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_lr." in name or ".align." in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def alone(model: torch.nn.Module, prompt: list[int], tokens: int) -> list[int]:
    """Greedy decoding without a cache, in the plainest way there is."""
    ids = list(prompt)
    for _ in range(tokens):
        with torch.inference_mode():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "lisa"])
def test_rows_that_join_and_leave_do_not_touch_each_other(architecture: str) -> None:
    model = lisa_model() if architecture == "lisa" else tiny_model(architecture)  # type: ignore[arg-type]
    lengths = [12, 3, 9, 6]
    rows = [Continuation(prompt, max_tokens=n) for prompt, n in zip(PROMPTS, lengths, strict=True)]
    decoder = ContinuousDecoder(model, end_ids=[])
    decoder.add(rows[:2])  # the second ends first
    for _ in range(3):
        decoder.step()
    decoder.add([rows[2]])  # longer than the batch
    decoder.step()
    decoder.add([rows[3]])  # shorter
    while decoder.active:
        decoder.step()
    for row, prompt, n in zip(rows, PROMPTS, lengths, strict=True):
        assert row.tokens == alone(model, prompt, n)
        assert row.finished == "length"


def test_an_end_token_ends_and_is_not_part_of_the_text() -> None:
    model = tiny_model()
    expected = alone(model, PROMPTS[0], 6)
    first = expected.index(expected[3])
    row = Continuation(PROMPTS[0], max_tokens=6)
    decoder = ContinuousDecoder(model, end_ids=[expected[3]])
    decoder.add([row])
    while decoder.active:
        decoder.step()
    assert row.tokens == expected[:first] and row.finished == "stop"


def test_columns_nobody_uses_are_cut_off() -> None:
    decoder = ContinuousDecoder(tiny_model(), end_ids=[])
    long, short = Continuation(list(range(10, 40)), max_tokens=2), Continuation([7], max_tokens=9)
    decoder.add([long, short])
    assert decoder.columns == 30
    decoder.step()
    assert decoder.active == [short] and decoder.columns == 2
    decoder.drop([short])
    assert decoder.active == [] and decoder.columns == 0
    decoder.step()  # an empty batch is no error
    decoder.add([again := Continuation([7], max_tokens=1)])
    assert again.tokens == short.tokens[:1] and decoder.active == []


def test_draws_depend_on_the_seed_and_on_no_batch_mate() -> None:
    model = tiny_model()

    def draw(seed: int, *others: Continuation, **settings: float) -> list[int]:
        row = Continuation(PROMPTS[0], max_tokens=12, seed=seed, **{"temperature": 1.0, **settings})  # type: ignore[arg-type]
        decoder = ContinuousDecoder(model, end_ids=[])
        decoder.add([*others, row])
        while decoder.active:
            decoder.step()
        return row.tokens

    company = Continuation(PROMPTS[2], max_tokens=5, temperature=2.0, seed=3)
    assert draw(1) == draw(1, company)
    assert draw(1) != draw(2)
    assert draw(1, top_p=1e-6) == draw(1, temperature=0.0) == alone(model, PROMPTS[0], 12)


def test_frequencies_follow_the_truncated_distribution() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0])
    row = Continuation([1], max_tokens=10**9, temperature=1.0, top_p=0.85)
    counts = torch.bincount(torch.tensor([row.take(logits, ()) for _ in range(4000)]), minlength=4) / 4000
    # Probabilities 0.087, 0.644, 0.237, 0.032: the first two reach 0.881.
    torch.testing.assert_close(counts, torch.tensor([0.0, 0.731, 0.269, 0.0]), atol=0.03, rtol=0)


def test_models_with_sliding_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="see a sliding window"):
        ContinuousDecoder(tiny_model("mistral", sliding_window=16), end_ids=[])


def test_empty_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="no token"):
        ContinuousDecoder(tiny_model(), end_ids=[]).add([Continuation([], max_tokens=1)])


@pytest.mark.parametrize("text", ["Grüße, 世界! 😀🎉 fine.", "a  b\n\n c", "x"])
def test_streamed_text_is_the_whole_text(text: str) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer)
    pieces = [stream.feed(ids[: n + 1]) for n in range(len(ids))]
    assert "".join(pieces) + stream.close(ids) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_stop_texts_are_never_shown() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("one, two. STOP three", add_special_tokens=False)["input_ids"]
    stream, shown = TextStream(tokenizer, stop=["STOP", "never"]), ""
    for n in range(len(ids)):
        shown += stream.feed(ids[: n + 1])
        assert "ST" not in shown
        if stream.stopped:
            break
    assert stream.stopped and shown == "one, two. "
    unfinished = TextStream(tokenizer, stop=["three times"])
    assert "".join(unfinished.feed(ids[: n + 1]) for n in range(len(ids))) == "one, two. STOP "
    assert unfinished.close(ids) == "three"
