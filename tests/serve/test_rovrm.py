"""`POST /score` without Ray: pictures in every form, equal to the offline scores, and what is refused.

The same over real Ray Serve is at the end of tests/jobs/rovrm/test_train.py.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from rovrm_cases import BLUE, RED, png, tiny_llava

from eagleray.models.rovrm.checkpoint import save_reward_model
from eagleray.models.rovrm.scoring import VisualScorer
from eagleray.serve.multipart import MultipartError, Part, parse_multipart
from eagleray.serve.rovrm import Args, LoadedModel, RovrmService, load_model, rovrm_app

PROMPT, ANSWERS = "Is there a circle?", ["Yes, a red one.", "No.", "Perhaps two."]
LIMITS: dict[str, Any] = {"max_responses": 4, "max_body_bytes": 20_000, "max_image_pixels": 10_000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "tiny-rovrm"
    save_reward_model(*tiny_llava(max_length=200), path)
    return path


@pytest.fixture(scope="module")
def scorer(folder: Path) -> VisualScorer:
    return VisualScorer.from_pretrained(folder, device="cpu")


@lru_cache
def _loaded(args: Args) -> LoadedModel:
    return load_model(args, device="cpu")


@asynccontextmanager
async def _client(folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    args = Args(model=str(folder), **LIMITS)
    app = rovrm_app(RovrmService(_loaded(args), args), args)
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        yield client


def _post(folder: Path, **request: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        async with _client(folder) as client:
            return await client.post("/score", **request)

    return asyncio.run(send())


def _json(image: str | None = None, **further: Any) -> dict[str, Any]:
    return {"json": {"prompt": PROMPT, "responses": ANSWERS, "image": image} | further}


def test_every_form_of_a_picture_gives_the_offline_scores(folder: Path, scorer: VisualScorer) -> None:
    offline, text_only = scorer.score(PROMPT, ANSWERS, RED), scorer.score(PROMPT, ANSWERS)
    encoded = base64.b64encode(RED).decode()
    form = {"data": {"prompt": PROMPT, "responses": ANSWERS}}

    async def send() -> list[httpx.Response]:
        requests: list[dict[str, Any]] = [
            _json(encoded),
            _json(f"data:image/png;base64,{encoded}"),
            form | {"files": {"image": ("a.png", RED, "image/png")}},
        ]
        async with _client(folder) as client:
            replies = await asyncio.gather(*(client.post("/score", **request) for request in requests))
            return [*replies, await client.post("/score", **_json()), await client.get("/healthz")]

    *pictures, text, health = asyncio.run(send())
    for reply in pictures:
        body = reply.json()
        assert body["scores"] == pytest.approx(offline, abs=1e-6) and body["image_size"] == [48, 24]
        assert body["best"] == offline.index(max(offline)) and body["model"] == "tiny-rovrm"
    assert text.json()["scores"] == pytest.approx(text_only, abs=1e-6) and text.json()["image_size"] is None
    assert health.json()["pending_answers"] == 0 and health.json()["revision"] == text.json()["revision"]


def test_requests_that_share_a_batch_do_not_change_each_other(folder: Path, scorer: VisualScorer) -> None:
    asked = [(f"Question {i}?", (RED, BLUE, None)[i % 3]) for i in range(12)]
    expected = [scorer.score(prompt, ANSWERS, image) for prompt, image in asked]

    async def send() -> list[Any]:
        async with _client(folder) as client:
            requests = [
                _json(None if image is None else base64.b64encode(image).decode(), prompt=prompt)
                for prompt, image in asked
            ]
            replies = await asyncio.gather(*(client.post("/score", **request) for request in requests))
            return [reply.json()["scores"] for reply in replies]

    for served, offline in zip(asyncio.run(send()), expected, strict=True):
        assert served == pytest.approx(offline, abs=1e-5)


@pytest.mark.parametrize(
    ("request_", "field", "problem"),
    [
        (_json("http://example.org/a.png"), "image", "is an address; nothing is fetched"),
        (_json("file:///etc/hostname"), "image", "is an address"),
        (_json("/etc/hostname.png"), "image", "is not base64|cannot be used"),
        (_json("../a.png"), "image", "is not base64"),
        (_json(base64.b64encode(b"text").decode()), "image", "cannot be used: not a picture"),
        (_json(base64.b64encode(png((1, 1))).decode()), "image", "too small: 1 x 1"),
        (_json(base64.b64encode(png((300, 300))).decode()), "image", "too many pixels: 300 x 300; 10000"),
        (_json(responses=["a"] * 5), "responses", "has 5 items; at most 4"),
        (_json(responses=[]), "responses", "at least 1"),
        (_json(responses=["word " * 200]), "responses", "do not fit: .* the model takes 200"),
        (_json(prompt="  "), "prompt", "empty or only white space"),
        (_json(path="/a.png"), "path", "is not a known field"),
        (
            {"content": b"{", "headers": {"content-type": "application/json"}},
            "body",
            "is not valid JSON|Invalid JSON",
        ),
        (
            {"content": b"x", "headers": {"content-type": "image/png"}},
            "body",
            "must be sent as application/json",
        ),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, "body", "names no boundary"),
        ({"data": {"prompt": PROMPT}, "files": {"image": ("a", RED)}}, "responses", "at least 1"),
        (
            {
                "data": {"prompt": PROMPT, "responses": ANSWERS},
                "files": [("image", ("a", RED)), ("image", ("b", RED))],
            },
            "image",
            "is given 2 times",
        ),
    ],
)
def test_refusals(folder: Path, request_: dict[str, Any], field: str, problem: str) -> None:
    import re

    reply = _post(folder, **request_)
    assert reply.status_code == 422, reply.text
    [found] = reply.json()["error"]["problems"]
    assert found["field"] == field and re.search(problem, found["problem"]), found


def test_a_large_body_is_413(folder: Path) -> None:
    reply = _post(folder, **_json("A" * 30_000))
    assert reply.status_code == 413 and reply.json()["error"]["code"] == "body_too_large"


def test_forms_keep_every_byte() -> None:
    content = bytes(range(256)) + b"\r\n--almost\r\n\r\n"
    body = (
        b'--xYz\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
        + content
        + b'\r\n--xYz\r\ncontent-disposition: form-data; name="prompt"\r\n\r\nWhat?\r\n--xYz--\r\n'
    )
    parts = parse_multipart('multipart/form-data; boundary="xYz"', body)
    assert parts == [Part("image", content), Part("prompt", b"What?")]
    for broken, message in (
        (body[:-9], "does not end"),
        (b"--xYz\r\nnothing\r\n--xYz--", "no header"),
        (b"--xYz\r\nA: b\r\n\r\nx\r\n--xYz--", "no name"),
    ):
        with pytest.raises(MultipartError, match=message):
            parse_multipart("multipart/form-data; boundary=xYz", broken)
