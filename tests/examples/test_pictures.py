"""Pictures of every kind that people have, against the arrays that they were made of."""

import io
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from PIL import Image

from tests.helpers.pages import ROOT
from tests.helpers.scripts import EXAMPLES, script

pictures, data = script("pictures"), script("data")
Array = npt.NDArray[Any]

GREY8 = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
GREY16 = (np.arange(24, dtype=np.uint16) * 2849).reshape(4, 6)  # 0 to 65527
COLOUR = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
ALPHA = np.random.default_rng(1).integers(0, 256, (4, 6, 1), dtype=np.uint8)
COLOUR16 = np.random.default_rng(2).integers(0, 65536, (4, 6, 3), dtype=np.uint16)
FLOATS = np.random.default_rng(3).random((4, 6)).astype(np.float32)


def grey(x: Array, top: float) -> Array:
    """What a grey array is as (3, H, W) in [-1, 1]."""
    return np.broadcast_to(2 * (x.astype(np.float64) / top) - 1, (3, *x.shape))


def colour(x: Array) -> Array:
    return np.moveaxis(x / 127.5 - 1, -1, 0)


def found(path: Path) -> Array:
    return np.asarray(pictures.to_tensor(pictures.read(path)))


def pillow(x: Array, **options: Any) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(x).save(path, **options)


def tiff(x: Array, **options: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        tifffile.imwrite(path, x, **options)

    return write


def portable(x: Array, top: int) -> Callable[[Path], None]:
    header = f"P5\n{x.shape[1]} {x.shape[0]}\n{top}\n".encode()

    def write(path: Path) -> None:
        path.write_bytes(header + x.astype(">u2").tobytes())

    return write


def over_white(x: Array, alpha: Array) -> Array:
    return x * (alpha / 255) + 255 * (1 - alpha / 255)


def inks(path: Path) -> None:
    """Cyan, magenta and yellow alike, no black."""
    Image.merge("CMYK", [Image.fromarray(GREY8)] * 3 + [Image.new("L", (6, 4))]).save(path)


KINDS: dict[str, tuple[str, Callable[[Path], None], Array, float]] = {
    "8 bit grey": ("a.png", pillow(GREY8), grey(GREY8, 255), 1e-6),
    "8 bit colour": ("a.PNG", pillow(COLOUR), colour(COLOUR), 1e-6),
    "16 bit grey": ("a.png", pillow(GREY16), grey(GREY16, 65535), 1e-6),
    "16 bit grey, JPEG 2000": ("a.jp2", pillow(GREY16, irreversible=False), grey(GREY16, 65535), 1e-6),
    "16 bit grey, one tone transparent": ("a.png", pillow(GREY16, transparency=2849), grey(GREY16, 65535), 1e-6),
    "16 bit TIFF": ("a.tif", tiff(GREY16, compression="zlib"), grey(GREY16, 65535), 1e-6),
    "16 bit TIFF, big-endian": ("a.tiff", tiff(GREY16, byteorder=">"), grey(GREY16, 65535), 1e-6),
    "16 bit TIFF, 0 is white": ("a.tif", tiff(GREY16, photometric="miniswhite"), -grey(GREY16, 65535), 1e-6),
    "8 bit TIFF, 0 is white": ("a.tif", tiff(GREY8, photometric="miniswhite"), -grey(GREY8, 255), 1e-6),
    "16 bit TIFF, the first of two": ("a.tif", tiff(np.stack([GREY16, 0 * GREY16])), grey(GREY16, 65535), 1e-6),
    "16 bit colour, read with 8": ("a.tif", tiff(COLOUR16, photometric="rgb"), colour(COLOUR16 // 256), 1e-6),
    "32 bit": ("a.tif", tiff(GREY16.astype(np.uint32) * 65537), grey(GREY16, 65535), 1e-6),
    "10 bit": ("a.pgm", portable(GREY16 // 64, 1023), grey(GREY16 // 64, 1023), 2e-3),
    "float": ("a.tif", tiff(FLOATS), grey(FLOATS, 1), 1e-6),
    "1 bit": ("a.png", pillow(GREY8 > 99), grey(GREY8 > 99, 1), 1e-6),
    "grey with alpha": (
        "a.png",
        pillow(np.dstack([GREY8, ALPHA])),
        grey(over_white(GREY8, ALPHA[..., 0]), 255),
        2 / 255,
    ),
    "colour with alpha": (
        "a.webp",
        pillow(np.dstack([COLOUR, ALPHA]), lossless=True, exact=True),
        colour(over_white(COLOUR, ALPHA)),
        2 / 255,
    ),
    "palette": ("a.gif", lambda path: Image.fromarray(COLOUR).quantize(24).save(path), colour(COLOUR), 1e-6),
    "palette, colour 0 transparent": (
        "a.png",
        lambda path: Image.fromarray(GREY8 // 200).convert("P").save(path, transparency=0),
        grey(np.where(GREY8 < 200, 255, 1), 255),
        1e-6,
    ),
    "CMYK": ("a.tif", inks, -grey(GREY8, 255), 1e-6),
}


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_mapped_by_their_depth(tmp_path: Path, kind: str) -> None:
    name, write, expected, tolerance = KINDS[kind]
    write(tmp_path / name)
    result = found(tmp_path / name)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, atol=tolerance)


@pytest.mark.parametrize(
    ("extension", "deep"), [("png", True), ("png", False), ("tif", True), ("tif", False), ("jpg", False)]
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(tmp_path: Path, extension: str, deep: bool, orientation: int) -> None:
    x = (np.arange(1, 7, dtype=np.uint16).reshape(2, 3) * 10000).repeat(8, 0).repeat(8, 1)
    ways = [x, x[:, ::-1], x[::-1, ::-1], x[::-1], x.T, np.rot90(x, -1), x[::-1, ::-1].T, np.rot90(x)]
    upright = ways[orientation - 1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{extension}"
    Image.fromarray(x if deep else (x // 257).astype(np.uint8)).save(path, exif=exif)
    np.testing.assert_allclose(found(path), grey(upright, 65535), atol=0.03)


def test_resized_pictures_are_mapped_alike(tmp_path: Path) -> None:
    pillow(GREY16)(tmp_path / "a.png")
    small = pictures.read(tmp_path / "a.png").resize((3, 2), Image.Resampling.BOX)
    expected = GREY16.astype(np.float64).reshape(2, 2, 3, 2).mean((1, 3))
    np.testing.assert_allclose(pictures.to_tensor(small), grey(expected, 65535), atol=1e-5)


def encoded(x: Array, kind: str) -> bytes:
    Image.fromarray(x).save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG that claims 60,000×60,000 pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


NOISE = np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8)
BROKEN: dict[str, tuple[bytes, str]] = {
    "truncated.jpg": (encoded(NOISE, "JPEG")[:5000], "cannot be read: image file is truncated"),
    "truncated.PNG": (encoded(NOISE, "PNG")[:5000], "cannot be read: "),
    "flipped.png": (encoded(NOISE, "PNG").replace(b"IDAT", b"IDAT\xff", 1), "cannot be read: "),
    "bomb.png": (bomb(), "cannot be read: Image size (3600000000 pixels) exceeds limit"),
    "empty.png": (b"", "is no picture that Pillow knows"),
    "text.jpeg": (b"hello", "is no picture that Pillow knows"),
    "drawing.SVG": (b"<svg/>", "is no picture that Pillow knows"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_unreadable_pictures_are_named(tmp_path: Path, name: str) -> None:
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name} {message}")):
        pictures.read(tmp_path / name)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.array([[-3, 5]], np.int16), "signed integers"),
        (np.array([[-3, 5]], np.int32), "signed integers"),
        (np.array([[0, 300]], np.float32), "its samples go from 0 to 300, allowed are 0 to 1"),
        (np.array([[0, np.nan]], np.float32), "its samples go from nan to nan, allowed are 0 to 1"),
    ],
)
def test_samples_without_a_range_are_refused(tmp_path: Path, x: Array, message: str) -> None:
    tifffile.imwrite(tmp_path / "a.tif", x)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'a.tif'} cannot be read: ") + ".*" + message):
        pictures.read(tmp_path / "a.tif")


@pytest.mark.skipif(os.name == "nt", reason="makes symbolic links")
def test_a_folder_with_all_sorts_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    pillow(COLOUR)(tmp_path / "a" / "b" / "DSC1.JPG")
    pillow(COLOUR)(tmp_path / "1.png")
    (tmp_path / "no extension").write_bytes((tmp_path / "1.png").read_bytes())
    (tmp_path / "folder.png").mkdir()
    for name, content in {"notes.txt": b"hello", ".DS_Store": b"\0\0\0\1Bud1", "._1.png": b"\0\5\26\7"}.items():
        (tmp_path / name).write_bytes(content)
    for name, (content, _) in BROKEN.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "dead.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path)
    names = [path.relative_to(tmp_path).as_posix() for path, _ in pictures.pictures(tmp_path)]
    assert names == ["1.png", "a/b/DSC1.JPG", "no extension"]
    *lines, last = capsys.readouterr().err.splitlines()
    assert len(lines) == len(BROKEN) + 1
    for name in [*BROKEN, "dead.png"]:
        assert sum(line.startswith(f"left out: {tmp_path / name} ") for line in lines) == 1
    assert last == f"{tmp_path}: 3 pictures, {len(lines)} left out"
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'nowhere'} is no folder")):
        next(pictures.pictures(tmp_path / "nowhere"))


def test_tiles(tmp_path: Path) -> None:
    x = (np.arange(128 * 160, dtype=np.uint16) * 3).reshape(128, 160)
    for i in range(5):
        pillow(x)(tmp_path / f"{i}.png")
    tiles = np.asarray(data.tiles(tmp_path))
    assert tiles.shape == (100, 3, 32, 32)
    np.testing.assert_allclose(tiles[0], grey(x[:32, :32], 65535), atol=1e-6)
    np.testing.assert_allclose(tiles[6], grey(x[32:64, 32:64], 65535), atol=1e-6)
    (tmp_path / "0.png").unlink()
    with pytest.raises(SystemExit, match=re.escape(f"{tmp_path} gives 80 tiles of 32×32; at least 100 are needed")):
        data.tiles(tmp_path)


def test_the_tutorial_has_the_same_loader() -> None:
    source = (EXAMPLES / "pictures.py").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "tutorials" / "data.md").read_text(encoding="utf-8")
    for name in ("read", "to_tensor"):
        match = re.search(rf"(?ms)^def {name}\(.*?(?=^def )", source)
        assert match is not None
        assert match[0].strip() in page
