"""Pictures that nobody has checked: what is taken, what is refused, and from where they are read."""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path

import pytest
from rovrm_cases import png

from eagleray.models.rovrm.images import ImageError, ImageLimits, ImageStore, decode_image


def _bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that claims to be huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 99))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_formats_are_told_by_content(kind: str) -> None:
    image = decode_image(png((8, 6), "white", kind=kind))
    assert (image.mode, image.size) == ("RGB", (8, 6))


def test_transparent_parts_are_white() -> None:
    assert decode_image(png((4, 4), (0, 0, 0, 0), mode="RGBA")).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(png((4, 4), (9, 9, 9, 255), mode="RGBA")).getpixel((0, 0)) == (9, 9, 9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a picture"),
        (b"just text", "not a picture: known are PNG"),
        (b"%PDF-1.4", "not a picture"),
        (png((64, 64), "red", kind="JPEG")[:-200], "the picture is damaged"),
        (png((64, 64))[:60], "the picture is damaged"),
        (png((1, 1)), "the picture is too small: 1 x 1; each side needs 4"),
        (png((400, 5)), "the picture is too long and narrow: 400 x 5; at most 20 to 1"),
        (_bomb(8000, 8000), "too many pixels: 8000 x 8000; 33554432 are allowed"),
        (_bomb(60000, 60000), "too many pixels"),
    ],
)
@pytest.mark.filterwarnings("ignore:Image size")
def test_refusals(content: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        decode_image(content)


def test_an_animation_is_refused() -> None:
    import io

    from PIL import Image

    with io.BytesIO() as file:
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
        frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:])
        with pytest.raises(ImageError, match="an animation: 2 frames"):
            decode_image(file.getvalue())


def test_limits_on_the_file() -> None:
    with pytest.raises(ImageError, match=r"too large: .* bytes of 10"):
        decode_image(png((8, 8)), ImageLimits(max_bytes=10))


@pytest.fixture(params=["folder", "zip"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ImageStore:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.png").write_bytes(png((8, 8)))
    (tmp_path / "secret.png").write_bytes(png((8, 8)))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    if request.param == "folder":
        return ImageStore(folder)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(folder / "sub" / "a.png", "sub/a.png")
    return ImageStore(tmp_path / "images.zip")


def test_reading_from_a_folder_or_an_archive(store: ImageStore) -> None:
    assert store.read("sub/a.png") == png((8, 8))
    with pytest.raises(ImageError, match=r"missing: b\.png in "):
        store.read("b.png")
    for name in ("../secret.png", "link.png"):
        with pytest.raises(ImageError, match=r"leads out of its folder|missing"):
            store.read(name)
    with pytest.raises(ImageError, match="too large"):
        ImageStore(store.path, ImageLimits(max_bytes=10)).read("sub/a.png")


def test_what_is_neither_folder_nor_archive(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no folder and no zip archive"):
        ImageStore(tmp_path / "nothing")
    (tmp_path / "a.zip").write_bytes(b"text")
    with pytest.raises(ImageError, match="a file but not a zip archive"):
        ImageStore(tmp_path / "a.zip")
