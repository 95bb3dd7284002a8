"""Prompts for a policy: rows of any file with a prompt, perhaps with a reference answer and a picture."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from eagleray.models.rovrm.images import ImageError, ImageStore, decode_image
from eagleray.platform.config import Config as Section
from eagleray.platform.data.sources import DataError, Row, SourceConfig, read_rows

Prompt = dict[str, str]
"""`request`, and `reference` and `picture` where the columns say so."""


class PromptColumns(Section):
    """What a row gives besides its prompt, and where."""

    column: str = "prompt"
    """Column of the prompt: text, or messages of which the last is the user's."""
    reference: str | None = None
    """Column of the reference answer, for what compares with one."""
    images: str | None = None
    """Folder or zip archive of pictures; every row then names one in the column `image`."""
    image: str = Field(default="image", min_length=1)
    """Column of the picture's name."""

    @field_validator("images")
    @classmethod
    def _images_are_absolute(cls, images: str | None) -> str | None:
        return None if images is None else str(Path(images).expanduser().absolute())


def load_prompts(
    sources: Sequence[SourceConfig],
    columns: PromptColumns,
    *,
    without: Collection[tuple[str, str]] = (),
    pictures: Path | None = None,
) -> dict[tuple[str, str], Prompt]:
    """Prompts in order by their key, prompt and picture; equal ones count once.

    Args:
        sources: Where rows come from.
        columns: What is read of them.
        without: Keys of prompts that are left out.
        pictures: Folder that pictures are copied to, under the hash of their content; needed with `columns.images`.

    Raises:
        DataError: A row has no prompt, or a picture that cannot be used; or no prompt is left.
    """
    store = _store(columns.images)
    found: dict[tuple[str, str], Prompt] = {}
    for source in sources:
        for row in read_rows(source):
            if isinstance(row, DataError):
                raise row
            prompt = _prompt(row, columns)
            if store is not None:
                assert pictures is not None
                prompt["picture"] = _copied(row, row.values.get(columns.image), store, pictures)
            key = (prompt["request"], prompt.get("picture", ""))
            if key not in without:
                found.setdefault(key, prompt)
    if not found:
        raise DataError(", ".join(source.path for source in sources), "no prompt is left", "all are held out")
    return found


def _prompt(row: Row, columns: PromptColumns) -> Prompt:
    request = row.values.get(columns.column)
    if isinstance(request, list) and request and isinstance(request[-1], dict):
        request = request[-1].get("content")
    texts: dict[str, tuple[str, Any]] = {"request": (columns.column, request)}
    if columns.reference is not None:
        texts["reference"] = (columns.reference, row.values.get(columns.reference))
    for column, text in texts.values():
        if not isinstance(text, str) or not text.strip():
            raise DataError(row.where, f"`{column}` is no text", f"the row has {', '.join(row.values)}")
    return {name: text for name, (_, text) in texts.items()}


def _store(images: str | None) -> ImageStore | None:
    try:
        return None if images is None else ImageStore(images)
    except ImageError as error:
        raise DataError(str(images), error.reason) from None


def _copied(row: Row, name: Any, store: ImageStore, folder: Path) -> str:
    """Path of the copy of a picture that has been decoded once, so that a broken one is found before training."""
    if not isinstance(name, str) or not name:
        raise DataError(
            row.where, "the row names no picture", f"`prompts.image` is its column, {name!r} is there"
        )
    try:
        content = store.read(name)
        decode_image(content)
    except ImageError as error:
        raise DataError(row.where, error.reason, error.detail or name) from None
    copy = folder / hashlib.sha256(content).hexdigest()
    if not copy.exists():
        folder.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(content)
    return str(copy)
