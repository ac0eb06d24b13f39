"""Real images to work with: embedded digits, a folder of pictures, CIFAR-10's official archive."""

import lzma
import tarfile
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def digits() -> Tensor:
    """Scikit-learn's handwritten digits, (1797, 1, 8, 8) in [-1, 1]."""
    from sklearn.datasets import load_digits

    return torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1


def tiles(folder: Path, side: int = 32) -> Tensor:
    """The pictures of a folder, shrunk to at most 4 tiles across and cut into tiles (N, 3, side, side) in [-1, 1].

    Raises:
        ValueError: If there is no such folder.
        SystemExit: If it gives fewer than 100 tiles.
    """
    from pictures import pictures, to_tensor
    from PIL import Image

    cut: list[Tensor] = []
    for _, picture in pictures(folder):
        shrink = min(1.0, 4 * side / min(picture.size))
        width, height = (max(side, round(n * shrink)) for n in picture.size)
        x = to_tensor(picture.resize((width, height), Image.Resampling.BOX))
        x = x[:, : height - height % side, : width - width % side]
        cut.append(x.unfold(1, side, side).unfold(2, side, side).flatten(1, 2).transpose(0, 1))
    found = torch.cat(cut) if cut else torch.empty(0, 3, side, side)
    if len(found) < 100:
        raise SystemExit(f"{folder} gives {len(found)} tiles of {side}×{side}; at least 100 are needed")
    return found


CIFAR_FOLDER, CIFAR_ARCHIVE = "cifar-10-batches-bin", "cifar-10-binary.tar.gz"
RECORD = 1 + 3 * 32 * 32  # A label and the pixels of one image, in bytes.


def cifar10(source: Path, *, train: bool, side: int = 32) -> Tensor:
    """CIFAR-10's binary version, (N, 3, side, side) in [-1, 1], averaged down to ``side``.

    Args:
        source: The official archive ``cifar-10-binary.tar.gz``, the folder ``cifar-10-batches-bin`` that
            it unpacks to, or a folder that holds one of them.
        train: The 50,000 training images, else the test images.
        side: 32 or a divisor of it.

    Raises:
        ValueError: If the files are missing, truncated or not CIFAR-10's; the message names file and reason.
    """
    if side < 1 or 32 % side:
        raise ValueError(f"side must be 32 or a divisor of it, got {side}")
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if train else ["test_batch.bin"]
    inside = [p for p in (source / CIFAR_FOLDER, source / CIFAR_ARCHIVE) if p.exists() or p.is_symlink()]
    where = inside[0] if inside else source
    if not where.exists():
        missing = "is a dead link" if where.is_symlink() else "does not exist"
        raise ValueError(f"{where} {missing}; it should be CIFAR-10's {CIFAR_ARCHIVE} or its folder")
    batches = _unpacked(where, names) if where.is_dir() else _archived(where, names)
    records = np.concatenate([_records(where / name, batches[name]) for name in names])
    x = torch.from_numpy(records[:, 1:]).reshape(-1, 3, 32, 32) / 127.5 - 1
    return torch.nn.functional.avg_pool2d(x, 32 // side)


def _unpacked(folder: Path, names: list[str]) -> dict[str, bytes]:
    for name in names:
        if (folder / name).is_symlink() and not (folder / name).exists():
            raise ValueError(f"{folder / name} is a dead link")
        if not (folder / name).is_file():
            pickles = ", only the Python version, which is not read" if (folder / "data_batch_1").exists() else ""
            raise ValueError(f"{folder} has no {name}{pickles}: CIFAR-10's binary version is needed")
    return {name: (folder / name).read_bytes() for name in names}


def _archived(archive: Path, names: list[str]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    others: list[str] = []
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = Path(member.name).name
                file = tar.extractfile(member) if name in names else None
                if file is not None:
                    found[name] = file.read()
                else:
                    others.append(name)
            # The checksum of the whole is at its end.
            while tar.fileobj.read(2**20):  # type: ignore[union-attr]
                pass
    except (tarfile.TarError, EOFError, KeyError, zlib.error, lzma.LZMAError, OSError) as error:
        raise ValueError(f"{archive} is truncated or no tar archive: {error}") from error
    if missing := [name for name in names if name not in found]:
        held = f"it holds {', '.join(others[:5])}" if others else "it is empty"
        raise ValueError(f"{archive} has no {missing[0]}, {held}: CIFAR-10's binary version is needed")
    return found


def _records(path: Path, raw: bytes) -> npt.NDArray[np.uint8]:
    if not raw or len(raw) % RECORD:
        raise ValueError(f"{path} is truncated or no CIFAR-10 batch: {len(raw)} bytes are no multiple of {RECORD}")
    records = np.frombuffer(raw, np.uint8).reshape(-1, RECORD)
    if (highest := records[:, 0].max()) > 9:
        raise ValueError(f"{path} is no CIFAR-10 batch: labels are 0 to 9, it has {highest}")
    return records
