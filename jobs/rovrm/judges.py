"""Judges of answers: an endpoint that speaks the chat API of OpenAI, replies that were recorded, or a rule for tests."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import httpx
from pydantic import Field, model_validator

from eagleray.platform.config import Config as Section
from eagleray.platform.data.files import DataError

logger = logging.getLogger(__name__)

Ask = Callable[[str, str], str]
"""Id and prompt of a question to the reply."""


class JudgeSection(Section):
    """Who judges."""

    kind: Literal["endpoint", "replies", "overlap"]
    """`endpoint`: a server with the chat API of OpenAI; `replies`: a file of replies from before; `overlap`: share of the
    answer's words that the references hold, a stand-in without a model that says nothing about quality."""
    url: str = "https://api.openai.com/v1"
    """Base of the endpoint's address."""
    model: str | None = None
    """Name of the endpoint's model; of recorded replies, the model they are from."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the endpoint's key; the key itself never goes into a config or a run folder."""
    path: str | None = None
    """Of `replies`: JSONL with `id` and `reply`, or the JSON list of chat completions that the official program of
    MMHal-Bench writes, in the order of the answers."""
    template: str | None = None
    """File with another prompt; it has the same names in braces as ours. A benchmark's official one gives comparable
    ratings."""
    timeout_s: float = Field(default=120, gt=0)
    """Longest wait for a reply."""
    retries: int = Field(default=4, ge=0)
    """Further tries of a connection that could not be made."""

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> JudgeSection:
        if self.kind == "endpoint" and self.model is None:
            raise ValueError("a judge of kind `endpoint` needs `model`")
        if (self.kind == "replies") != (self.path is not None):
            raise ValueError("a judge of kind `replies` needs `path`, and only that kind takes it")
        return self

    def prompt(self, default: str) -> str:
        """The template that prompts are made from."""
        return (
            default if self.template is None else Path(self.template).expanduser().read_text(encoding="utf-8")
        )

    def about(self, template: str) -> dict[str, Any]:
        """What the report says of the judge: a figure without it cannot be compared with another."""
        return {
            "kind": self.kind,
            "model": self.model,
            "prompt_sha256": hashlib.sha256(template.encode()).hexdigest(),
            "date": datetime.now(UTC).date().isoformat(),
        }

    def open(self, ids: list[str], references: Mapping[str, str]) -> Ask:
        """A function that asks.

        Args:
            ids: Of all answers, in their order.
            references: What is known of each answer's picture, and the answer, as one text each; for `overlap`.
        """
        if self.kind == "endpoint":
            return self._endpoint()
        if self.kind == "replies":
            return self._recorded(ids)
        return lambda identity, _: _overlap(*references[identity].split("\0"))

    def _endpoint(self) -> Ask:
        key = os.environ.get(self.key_variable)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        client = httpx.Client(
            base_url=self.url.rstrip("/"),
            headers=headers,
            timeout=self.timeout_s,
            transport=httpx.HTTPTransport(retries=self.retries),
        )

        def ask(identity: str, prompt: str) -> str:
            body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
            reply = client.post("/chat/completions", json=body)
            if reply.is_error:
                raise ValueError(
                    f"The judge at {self.url} answered {reply.status_code} to {identity}: {reply.text[:200]}. Replies so "
                    "far are kept; run again with the same `run.dir` to go on."
                )
            return _content(reply.json())

        return ask

    def _recorded(self, ids: list[str]) -> Ask:
        assert self.path is not None
        found = read_replies(Path(self.path).expanduser(), ids)
        missing = [name for name in ids if name not in found]
        if missing:
            raise DataError(
                self.path, f"{len(missing)} of {len(ids)} answers have no reply", ", ".join(missing[:5])
            )
        return lambda identity, _: found[identity]


def read_replies(path: Path, ids: list[str]) -> dict[str, str]:
    """Replies by id from a file; see `JudgeSection.path`.

    Raises:
        DataError: The file is neither of the two.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            values = json.loads(text)
            if len(values) != len(ids):
                raise DataError(
                    str(path), f"{len(values)} replies to {len(ids)} answers", "give one for each"
                )
            return dict(zip(ids, map(_content, values), strict=True))
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        return {str(row["id"]): str(row["reply"]) for row in rows}
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise DataError(str(path), "not a file of replies", repr(error)) from error


def _content(completion: Any) -> str:
    if isinstance(completion, str):
        return completion
    return str(completion["choices"][0]["message"]["content"])


def _overlap(known: str, answer: str) -> str:
    words, shown = (set(re.findall(r"\w+", text.lower())) for text in (answer, known))
    share = len(words & shown) / len(words) if words else 0.0
    return f"Rating: {round(6 * share)}"
