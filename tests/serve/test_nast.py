"""Speech translation over HTTP on a fake model: audio of every kind in, long audio cut, refusals, limits. No Ray."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from fastapi.testclient import TestClient
from torch import Tensor

from eagleray.models.nast.translator import Translation
from eagleray.serve.nast import Args, LoadedModel, NastService, nast_app


class CountingSpeech:
    """Says how many frames of 10 ms a piece has, and fails on a piece that is loud throughout."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.open = threading.Event()
        self.open.set()

    def features(self, waveform_N: np.ndarray) -> Tensor:
        return torch.from_numpy(waveform_N[: len(waveform_N) // 160 * 160].reshape(-1, 160))

    def translate(self, features: Sequence[Tensor]) -> list[Translation]:
        assert self.open.wait(10)
        self.batches.append(len(features))
        if any(len(f) and float(f.abs().min()) > 0.9 for f in features):
            raise RuntimeError("too loud")
        return [Translation(text=f"T{len(f)}", transcript=f"S{len(f)}", score=0.0) for f in features]


def audio(seconds: float, rate: int = 16_000, *, kind: str = "WAV", channels: int = 1) -> bytes:
    samples = np.random.default_rng(0).normal(0, 0.1, (int(seconds * rate), channels))
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind)
    return file.getvalue()


def make_client(speech: CountingSpeech, **limits: Any) -> TestClient:
    args = Args(model="unused", **limits)
    return TestClient(nast_app(NastService(LoadedModel(speech, "tiny", "r1"), args), args))


@pytest.fixture
def client() -> Iterator[TestClient]:
    with make_client(CountingSpeech(), max_seconds=10, piece_seconds=2, max_body_bytes=200_000) as client:
        yield client


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (48_000, 2)])
def test_every_format_is_taken(client: TestClient, kind: str, rate: int, channels: int) -> None:
    answer = client.post("/translate", content=audio(0.5, rate, kind=kind, channels=channels))
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["seconds"] == pytest.approx(0.5, abs=0.001)
    assert body["text"] in ("T49", "T50") and body["transcript"] in ("S49", "S50")
    assert (body["model"], body["revision"], len(body["pieces"])) == ("tiny", "r1", 1)


def test_a_long_recording_is_cut_and_its_texts_are_joined(client: TestClient) -> None:
    body = client.post("/translate", content=audio(5, 8_000)).json()
    pieces = body["pieces"]
    assert len(pieces) == 3 or len(pieces) == 4
    assert pieces[0]["start"] == 0 and pieces[-1]["end"] == body["seconds"] == 5
    assert all(a["end"] == b["start"] for a, b in pairwise(pieces))
    assert body["text"] == " ".join(piece["text"] for piece in pieces)
    assert sum(int(piece["text"][1:]) for piece in pieces) == pytest.approx(500, abs=4)


def _two_hours() -> bytes:
    """A header that tells of two hours, and nothing behind it."""
    data = bytearray(audio(0.1))
    data[40:44] = (2 * 3600 * 16_000 * 2).to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 422, r"`body` cannot be used: the audio is empty \(the file has no byte\)"),
        (b"This is text.", 422, "`body` cannot be used: not a readable audio file"),
        (audio(0.5)[:3000], 422, "the audio is cut off"),
        (_two_hours(), 422, "the audio is cut off"),
        (audio(0), 422, r"the audio is empty \(it has no sample\)"),
        (audio(12, 4_000), 422, r"the audio is too long \(12\.0 s, at most 10 s are taken\)"),
        (audio(0.05, channels=33), 422, "too many channels"),
        (audio(10, 16_000), 413, "The body is larger than 200000 bytes"),
    ],
    ids=["empty", "text", "truncated", "two hours", "no sample", "long", "channels", "large"],
)
def test_refusals(client: TestClient, body: bytes, status: int, message: str) -> None:
    answer = client.post("/translate", content=body)
    assert answer.status_code == status
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(answer.json()["error"]["message"])


def test_one_frame_silence_and_clipping_are_answered(client: TestClient) -> None:
    for samples in (np.zeros(160), np.zeros(8_000), np.sign(np.sin(np.arange(8_000.0)))):
        file = io.BytesIO()
        soundfile.write(file, samples * 0.5, 16_000, format="WAV")
        assert client.post("/translate", content=file.getvalue()).status_code == 200


def test_a_failing_piece_does_not_fail_other_requests() -> None:
    speech = CountingSpeech()
    loud = io.BytesIO()
    soundfile.write(loud, np.ones(16_000), 16_000, format="WAV")
    with make_client(speech, max_wait_s=0.2) as client, ThreadPoolExecutor(2) as pool:
        bodies = [loud.getvalue(), audio(0.5)]
        answers = list(pool.map(lambda body: client.post("/translate", content=body), bodies))
    assert [answer.status_code for answer in answers] == [500, 200]
    assert speech.batches[0] == 2  # they had shared a batch


def test_overload_is_429() -> None:
    speech = CountingSpeech()
    speech.open.clear()
    with make_client(speech, max_pending=1) as client, ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.post, "/translate", content=audio(0.2))
        while not client.get("/healthz").json()["pending_pieces"]:
            pass
        refused = client.post("/translate", content=audio(0.2))
        speech.open.set()
        assert first.result().status_code == 200
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1


def test_the_document_tells_what_to_send(client: TestClient) -> None:
    operation = client.get("/openapi.json").json()["paths"]["/translate"]["post"]
    assert list(operation["requestBody"]["content"]) == ["audio/*"]
    assert {"200", "413", "422", "429"} <= operation["responses"].keys()
