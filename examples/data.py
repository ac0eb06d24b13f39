"""Real images to work with: embedded digits, a folder of pictures, CIFAR-10's official archive."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def digits() -> Tensor:
    """Scikit-learn's handwritten digits, (1797, 1, 8, 8) in [-1, 1]."""
    from sklearn.datasets import load_digits

    return torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1


def tiles(folder: Path, side: int = 32) -> Tensor:
    """The pictures of a folder, shrunk to at most 4 tiles across and cut into tiles (N, 3, side, side) in [-1, 1]."""
    from PIL import Image, UnidentifiedImageError

    cut: list[Tensor] = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        try:
            picture = Image.open(path).convert("RGB")
        except UnidentifiedImageError:
            continue
        shrink = min(1.0, 4 * side / min(picture.size))
        width, height = (max(side, round(n * shrink)) for n in picture.size)
        x = torch.from_numpy(np.array(picture.resize((width, height), Image.Resampling.BOX)))
        x = x[: height - height % side, : width - width % side].permute(2, 0, 1) / 127.5 - 1
        cut.append(x.unfold(1, side, side).unfold(2, side, side).flatten(1, 2).transpose(0, 1))
    found = torch.cat(cut) if cut else torch.empty(0, 3, side, side)
    if len(found) < 100:
        raise SystemExit(f"{folder} gives {len(found)} tiles of {side}×{side}; at least 100 are needed")
    return found


def cifar10(folder: Path, *, train: bool, side: int = 32) -> Tensor:
    """CIFAR-10's binary version, (N, 3, side, side) in [-1, 1], averaged down to ``side``.

    Args:
        folder: The unpacked archive ``cifar-10-batches-bin``.
        train: The 50,000 training images, else the test images.
        side: 32 or a divisor of it.
    """
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if train else ["test_batch.bin"]
    records = []
    for name in names:
        raw = np.fromfile(folder / name, np.uint8)
        if not len(raw) or len(raw) % 3073:
            raise SystemExit(f"{folder / name} is no CIFAR-10 batch: {len(raw)} bytes are no multiple of 3073")
        records.append(raw.reshape(-1, 3073)[:, 1:])
    x = torch.from_numpy(np.concatenate(records)).reshape(-1, 3, 32, 32) / 127.5 - 1
    return torch.nn.functional.avg_pool2d(x, 32 // side)
