"""Plain text for language modelling: files to documents or paragraphs, and token ids to full blocks."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from eagleray.platform.config import Config
from eagleray.platform.data.files import (
    DataError,
    absolute_path,
    decode_utf8,
    find_files,
    open_data,
    sha256_of_file,
)

_SUFFIXES = (".txt", ".txt.gz")
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n\s*")


class TextData(Config):
    """Text files, each cut once into a training part and a development part at its end."""

    paths: list[str] = Field(min_length=1)
    """Files, patterns (`corpus/*.txt.gz`) or folders of `.txt` and `.txt.gz` files."""
    unit: Literal["document", "paragraph"] = "document"
    """What counts as one text: a file's whole part, or what stands between blank lines."""
    dev_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of the characters, at the end of each file, that is kept for development; 0 keeps none."""

    def resolved(self, base: str | Path) -> TextData:
        """The same data with paths made absolute as seen from `base`; they must exist."""
        resolved = self.model_copy(update={"paths": [absolute_path(path, base) for path in self.paths]})
        _files(resolved)
        return resolved


def iter_texts(data: TextData, part: Literal["train", "dev"]) -> Iterator[str]:
    """The texts of one part, file after file in a fixed order, with one file in memory at a time.

    Raises:
        DataError: A file is missing, empty, damaged or not UTF-8.
    """
    for file in _files(data):
        train, dev = split_text(_read(file), dev_fraction=data.dev_fraction)
        text = train if part == "train" else dev
        units = [text] if data.unit == "document" else _BLANK_LINE.split(text)
        yield from (unit for unit in units if unit.strip())


def text_hashes(data: TextData) -> dict[str, str]:
    """sha256 of every file, by its path."""
    return {str(file): sha256_of_file(file) for file in _files(data)}


def split_text(text: str, *, dev_fraction: float) -> tuple[str, str]:
    """Cut off about the last `dev_fraction` of a text, at the end of a paragraph, line or word if one is near.

    >>> split_text("one two\\n\\nthree four\\n\\nfive", dev_fraction=0.2)
    ('one two\\n\\nthree four\\n\\n', 'five')
    """
    if dev_fraction == 0:
        return text, ""
    target = round(len(text) * (1 - dev_fraction))
    reach = round(len(text) * min(dev_fraction, 1 - dev_fraction) / 2)
    window = text[target - reach : target + reach]
    for border in (_BLANK_LINE, re.compile(r"\n"), re.compile(r"\s+")):
        cuts = [target - reach + match.end() for match in border.finditer(window)]
        cuts = [cut for cut in cuts if text[cut:].strip()]
        if cuts:
            cut = min(cuts, key=lambda cut: abs(cut - target))
            return text[:cut], text[cut:]
    return text[:target], text[target:]


def pack_tokens(documents: Iterable[Sequence[int]], *, block_length: int, eos_id: int) -> np.ndarray:
    """Documents one after the other, each closed by `eos_id`, cut into blocks: int32, [blocks, block_length].

    Tokens at the end that do not fill a block are left out, so that no block holds padding.

    >>> pack_tokens([[5, 6], [], [7, 8, 9]], block_length=3, eos_id=0).tolist()
    [[5, 6, 0], [7, 8, 9]]

    Raises:
        ValueError: There is not one full block.
    """
    if block_length < 2:
        raise ValueError(
            f"`block_length` is {block_length}; it must be at least 2: a token and the next one."
        )
    stream = array("i")
    for document in documents:
        if len(document):
            stream.extend(document)
            stream.append(eos_id)
    blocks = len(stream) // block_length
    if blocks == 0:
        raise ValueError(
            f"The text has {len(stream)} tokens, less than one block of `block_length` {block_length}. "
            "Give more text or a smaller block length."
        )
    return np.array(stream[: blocks * block_length], dtype=np.int32).reshape(blocks, block_length)


def _files(data: TextData) -> list[Path]:
    files = [file for path in data.paths for file in find_files(path, _SUFFIXES)]
    return list(dict.fromkeys(files))  # a file that two patterns match is read once


def _read(file: Path) -> str:
    with open_data(file) as stream:
        text = decode_utf8(stream.read(), file).replace("\r\n", "\n")
    if not text.strip():
        raise DataError(f"{file}:1", "the file is empty")
    return text
