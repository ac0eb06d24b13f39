"""Pictures as people have them: of 8 or 16 bit, grey, colour, palette or CMYK, with alpha, turned by the camera.

    v = 2 · sample / (2^depth − 1) − 1

Folders hold other things too. Whatever looks like a picture and cannot be read is named and left out.
"""

import mimetypes
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor


def read(path: Path) -> Image.Image:
    """A picture upright and opaque, of the first frame: "RGB", or "F" from 0 to 255 where greys are finer than 8 bit.

    What is transparent shows white behind it. Colours of 16 bit are read with 8, as Pillow does. Floats are
    greys from 0 to 1; signed integers have no black and white and are refused.

    Raises:
        ValueError: If the file is missing, damaged, no picture, larger than twice ``Image.MAX_IMAGE_PIXELS``, or its
            samples have no known range; the message names file and reason.
    """
    try:
        # Of a path, Pillow maps the file into memory, and turns some TIFFs wrongly.
        with path.open("rb") as file, warnings.catch_warnings(), Image.open(file) as picture:
            warnings.simplefilter("ignore")
            tags = getattr(picture, "tag_v2", {})
            upright = ImageOps.exif_transpose(picture)
            if upright.mode == "F" or upright.mode.startswith("I"):
                x = np.array(upright)
                bits, kind = tags.get(258, (16,))[0], tags.get(339, (1,))[0]  # BitsPerSample, SampleFormat: 1 unsigned
                if x.dtype.kind != "f" and kind != 1:
                    raise ValueError("its samples are signed integers, whose black and white nobody knows")
                unit = 1.0 if x.dtype.kind == "f" else 2.0**bits - 1
                grey = (x.astype(np.uint32) if bits == 32 and unit > 1 else x) / np.float64(unit)
                if not (grey.min() >= 0 and grey.max() <= 1):
                    raise ValueError(f"its samples go from {x.min():g} to {x.max():g}, allowed are 0 to {unit:g}")
                if tags.get(262) == 0:  # PhotometricInterpretation: 0 is white.
                    grey = 1 - grey
                return Image.fromarray((255 * grey).astype(np.float32))
            if upright.has_transparency_data:
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            return upright.convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is no picture that Pillow knows") from error
    except Exception as error:  # Decoders of damaged files raise anything.
        raise ValueError(f"{path} cannot be read: {error or type(error).__name__}") from error


def to_tensor(picture: Image.Image) -> Tensor:
    """What :func:`read` gave, also resized or cropped since, as ``(3, H, W)`` in [-1, 1]."""
    x = torch.from_numpy(np.array(picture)).float() / 127.5 - 1
    return x.movedim(-1, 0) if x.ndim == 3 else x.clamp(-1, 1).expand(3, -1, -1)


def looks_like_a_picture(path: Path) -> bool:
    """Whether a file's name ends as those of pictures do, of kinds too that Pillow does not know."""
    named, _ = mimetypes.guess_type(path.name.lower())
    return (named or "").startswith("image/") or Image.registered_extensions().get(path.suffix.lower()) in Image.OPEN


def pictures(folder: Path) -> Iterator[tuple[Path, Image.Image]]:
    """The pictures of a folder and its sub-folders, sorted; hidden files and what is no picture are passed over.

    Those that cannot be read are named on stderr, one a line, and counted at the end.

    Raises:
        ValueError: If there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    count = unreadable = 0
    for path in sorted(folder.rglob("*")):
        is_dead_link = path.is_symlink() and not path.exists()
        if path.name.startswith(".") or not (path.is_file() or is_dead_link):
            continue
        try:
            picture = read(path)
        except ValueError as error:
            if looks_like_a_picture(path):
                unreadable += 1
                print(f"left out: {error}", file=sys.stderr)
            continue
        count += 1
        yield path, picture
    if unreadable:
        print(f"{folder}: {count} pictures, {unreadable} left out", file=sys.stderr)
