"""Pictures from bytes that nobody has checked: limits first, decoding after; and the folder or archive they lie in."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What is decoded, told by the content and not by the name: each decoder more is one more to attack."""


class ImageError(ValueError):
    """A picture that is not used; `reason` is the same for every picture with the same fault."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return self.reason + (f": {self.detail}" if self.detail else "")


@dataclass(frozen=True)
class ImageLimits:
    """What a picture may be."""

    max_bytes: int = 20 * 2**20
    """Largest file."""
    max_pixels: int = 2**25
    """Most pixels; read from the header, so that a small file that unfolds to gigabytes is never decoded."""
    min_side: int = 4
    """Shortest side in pixels; a picture of 1 x 1 shows nothing."""
    max_aspect: float = 20.0
    """Longer side over the shorter one; a very wide picture is squeezed to stripes."""


def decode_image(content: bytes, limits: ImageLimits = ImageLimits()) -> Image.Image:
    """A picture in RGB; transparent parts become white.

    Raises:
        ImageError: The bytes are no picture, a damaged one, an animation, or beyond the limits.
    """
    if len(content) > limits.max_bytes:
        raise ImageError("the picture's file is too large", f"{len(content)} bytes of {limits.max_bytes}")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            _check_size(opened.size, limits)
            if (frames := getattr(opened, "n_frames", 1)) > 1:
                raise ImageError("the picture is an animation", f"{frames} frames; give one")
            opened.load()
            return _in_rgb(opened)
    except UnidentifiedImageError:
        raise ImageError("not a picture", f"known are {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise ImageError("the picture has too many pixels", f"{limits.max_pixels} are allowed") from None
    except (OSError, SyntaxError, EOFError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError("the picture is damaged", str(error)) from None


class ImageStore:
    """The pictures of a data set: a folder, or a zip archive that is read without being unpacked."""

    def __init__(self, path: str | Path, limits: ImageLimits = ImageLimits()) -> None:
        self.path, self.limits = Path(path).expanduser(), limits
        self._archive: zipfile.ZipFile | None = None
        if self.path.is_file():
            try:
                self._archive = zipfile.ZipFile(self.path)
            except zipfile.BadZipFile:
                raise ImageError("`images` is a file but not a zip archive", str(path)) from None
        elif not self.path.is_dir():
            raise ImageError("`images` is no folder and no zip archive", str(path))

    def read(self, name: str) -> bytes:
        """The bytes of a picture.

        Raises:
            ImageError: It is missing, outside the folder, or larger than the limit.
        """
        return self._from_folder(name) if self._archive is None else self._from_archive(self._archive, name)

    def _from_folder(self, name: str) -> bytes:
        file, root = (self.path / name).resolve(), self.path.resolve()
        if not file.is_relative_to(root):
            raise ImageError("the name of the picture leads out of its folder", repr(name))
        if not file.is_file():
            raise ImageError("the picture is missing", f"{name} in {self.path}")
        self._check_bytes(file.stat().st_size, name)
        return file.read_bytes()

    def _from_archive(self, archive: zipfile.ZipFile, name: str) -> bytes:
        try:
            member = archive.getinfo(name)
        except KeyError:
            raise ImageError("the picture is missing", f"{name} in {self.path}") from None
        self._check_bytes(member.file_size, name)
        try:
            return archive.read(member)
        except (zipfile.BadZipFile, OSError, RuntimeError) as error:
            raise ImageError("the picture is damaged", f"{name} in {self.path}: {error}") from None

    def _check_bytes(self, size: int, name: str) -> None:
        if size > self.limits.max_bytes:
            raise ImageError(
                "the picture's file is too large", f"{name}: {size} bytes of {self.limits.max_bytes}"
            )


def _check_size(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    shown = f"{width} x {height}"
    if width * height > limits.max_pixels:
        raise ImageError("the picture has too many pixels", f"{shown}; {limits.max_pixels} are allowed")
    if min(size) < limits.min_side:
        raise ImageError("the picture is too small", f"{shown}; each side needs {limits.min_side} pixels")
    if max(size) > limits.max_aspect * min(size):
        raise ImageError(
            "the picture is too long and narrow", f"{shown}; at most {limits.max_aspect:g} to 1 is taken"
        )


def _in_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
