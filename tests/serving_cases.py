"""Fake models behind a real gateway on a real port, without Ray: for clients that insist on HTTP."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import uvicorn
from builders import tiny_model, tiny_tokenizer
from fastapi import FastAPI
from torch import Tensor

from eagleray.models.gram.judge import Comparison, Pair, read_out
from eagleray.models.gram.prompts import JudgeEncoder, JudgeTemplate
from eagleray.models.nast.translator import Translation
from eagleray.serve import gram, lisa, nast
from eagleray.serve.replica import Served


def compare_lengths(pairs: Sequence[Pair]) -> list[Comparison]:
    """Prefers the longer answer."""
    return [read_out(len(a) - len(b), len(b) - len(a)) for _, a, b in pairs]


def judge(
    name: str = "gram",
    compare: Callable[[Sequence[Pair]], Sequence[Comparison]] = compare_lengths,
    *,
    scorer: Any = None,
    **limits: Any,
) -> Served:
    """A judge, with the prompts and labels of a real one unless it has a scorer."""
    args = gram.Args(model="unused", **limits)
    template = JudgeTemplate.load("eagleray")
    encoder = JudgeEncoder(tiny_tokenizer(), template, max_length=512) if scorer is None else None
    model = gram.LoadedModel(
        compare, lambda pairs: [7] * len(pairs), name, f"r-{name}", encoder=encoder, scorer=scorer
    )
    service = gram.GramService(model, args)
    return Served(
        "gram", name, model.revision, args, args.max_body_bytes, gram.gram_app(service, args), service.health
    )


def language_model(name: str = "lisa", **limits: Any) -> Served:
    """A tiny random language model."""
    args = lisa.Args(model="unused", **{"max_new_tokens": 24, **limits})
    model = lisa.LoadedModel(tiny_model(max_position_embeddings=128), tiny_tokenizer(chat=True), name, "r")
    service = lisa.LisaService(model, args)
    return Served("lisa", name, "r", args, args.max_body_bytes, lisa.lisa_app(service, args), service.health)


class CountingSpeech:
    """Says how many frames of 10 ms a piece has."""

    def features(self, waveform_N: np.ndarray) -> Tensor:
        return torch.from_numpy(waveform_N[: len(waveform_N) // 160 * 160].reshape(-1, 160))

    def translate(self, features: Sequence[Tensor]) -> list[Translation]:
        return [Translation(text=f"T{len(f)}", transcript=f"S{len(f)}", score=0.0) for f in features]


def translator(name: str = "nast", **limits: Any) -> Served:
    """A fake translator."""
    args = nast.Args(model="unused", **limits)
    service = nast.NastService(nast.LoadedModel(CountingSpeech(), name, "r"), args)
    return Served("nast", name, "r", args, args.max_body_bytes, nast.nast_app(service, args), service.health)


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The application on a free port of this machine; yields its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    started = threading.Event()

    async def run() -> None:
        task = asyncio.create_task(server.serve())
        while not server.started and not task.done():
            await asyncio.sleep(0.01)
        started.set()
        await task

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert started.wait(30) and server.started
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
