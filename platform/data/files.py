"""Local data files: which ones a path means, their bytes (gzip or not), and errors that name a place in them."""

from __future__ import annotations

import difflib
import glob
import gzip
import hashlib
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

_GZIP_MAGIC = b"\x1f\x8b"
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "dev": "validation",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}


class DataError(ValueError):
    """Data that cannot be used: `<file>:<line>: <reason>: <detail>`.

    `reason` is the same text for every row with the same fault, so that faults can be counted by it; what
    differs from row to row is in `detail`.
    """

    def __init__(self, where: str, reason: str, detail: str = "") -> None:
        super().__init__(where, reason, detail)  # all arguments, so that the error survives pickling
        self.where = where
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" + (f": {self.detail}" if self.detail else "")


def find_files(path: str, suffixes: Sequence[str], *, split: str | None = None) -> list[Path]:
    """Files that a path means: itself, the sorted matches of a pattern, or the files below a folder.

    Args:
        path: A file, a pattern (`*`, `?`, `[...]`, `**`) or a folder; `~` is the home folder.
        suffixes: Endings that count in a folder; a pattern prefers them and else takes all its matches.
        split: In a folder whose file names tell splits apart (`train.jsonl`, `eval/dev-0.parquet`), only the
            files of this split are taken; test data never slips in with the training data.

    Raises:
        DataError: Nothing is found; the message lists what is near.
    """
    given = Path(path).expanduser()
    if given.is_file():
        return [given]
    if given.is_dir():
        return _files_in_folder(given, suffixes, split)
    if is_pattern(path):
        matches = sorted(Path(match) for match in glob.glob(str(given), recursive=True))
        files = [match for match in matches if match.is_file()]
        if not files:
            raise DataError(path, "the pattern matches no file", _what_is_near(given))
        return [file for file in files if _has_suffix(file, suffixes)] or files
    raise DataError(path, "no such file or folder", _what_is_near(given))


def is_pattern(path: str) -> bool:
    """Whether a path that does not exist literally is to be read as a pattern."""
    return any(character in path for character in "*?[")


def absolute_path(path: str, base: str | Path) -> str:
    """A path or pattern as seen from the folder `base`, made absolute."""
    given = Path(path).expanduser()
    folder = Path(base).expanduser().absolute()
    if is_pattern(path) and not (folder / given).exists():
        folder = Path(glob.escape(str(folder)))
    return str(folder / given)


@contextmanager
def open_data(path: Path) -> Iterator[BinaryIO]:
    """Open a data file for reading bytes, unpacked if it is gzip (told by its first bytes, not its name).

    Raises:
        DataError: The file cannot be opened, or it breaks off or is damaged while it is read.
    """
    try:
        with path.open("rb") as plain:
            yield cast(BinaryIO, gzip.GzipFile(fileobj=plain)) if _begins_packed(plain) else plain
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(str(path), "the file cannot be read", str(error)) from error


def is_packed(path: Path) -> bool:
    """Whether a file is gzip, told by its first bytes.

    Raises:
        DataError: The file cannot be opened.
    """
    try:
        with path.open("rb") as stream:
            return _begins_packed(stream)
    except OSError as error:
        raise DataError(str(path), "the file cannot be read", str(error)) from error


def _begins_packed(stream: BinaryIO) -> bool:
    packed = stream.read(2) == _GZIP_MAGIC
    stream.seek(0)
    return packed


def decode_utf8(data: bytes, path: Path, *, line: int = 1) -> str:
    """Bytes that start at `line` of a file as text, without a byte-order mark at the file's start.

    Raises:
        DataError: The bytes are not UTF-8; the message names the line.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(path, line + data[: error.start].count(b"\n"), error) from None
    return text.removeprefix("\ufeff") if line == 1 else text


def not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> DataError:
    """The error for text in another encoding."""
    byte = error.object[error.start]
    return DataError(f"{path}:{line}", "not UTF-8 text", f"byte 0x{byte:02x}; convert the file to UTF-8")


def sha256_of_file(path: Path) -> str:
    """sha256 of the bytes as stored (packed, if the file is packed), as `sha256sum` prints it."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _files_in_folder(folder: Path, suffixes: Sequence[str], split: str | None) -> list[Path]:
    inside = sorted(file for file in folder.rglob("*") if file.is_file() and not _is_hidden(file, folder))
    files = [file for file in inside if _has_suffix(file, suffixes)]
    if not files:
        found = ", ".join(file.name for file in inside[:5]) or "nothing"
        raise DataError(str(folder), f"the folder holds no {' or '.join(suffixes)} file", f"it holds {found}")
    named = {file: _split_of(file.relative_to(folder)) for file in files}
    splits = sorted({name for name in named.values() if name is not None})
    if split is None or not splits:
        return files
    wanted = _SPLIT_WORDS.get(split.lower(), split)
    chosen = [file for file in files if named[file] == wanted]
    if not chosen:
        detail = f"its file names tell of {', '.join(splits)}; set `split`, or name the files with a pattern"
        raise DataError(str(folder), f"the folder holds no file of the split {split!r}", detail)
    return chosen


def _split_of(file: Path) -> str | None:
    words = reversed(re.split(r"[^a-z]+", str(file).lower()))  # the file's name counts more than its folders
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)


def _has_suffix(file: Path, suffixes: Sequence[str]) -> bool:
    return file.name.lower().endswith(tuple(suffixes))


def _what_is_near(missing: Path) -> str:
    folder, wanted = missing.absolute().parent, missing.name
    while not folder.is_dir():
        folder, wanted = folder.parent, folder.name
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5) or names[:5]
    return f"{folder} holds {', '.join(near) if near else 'nothing'}"
