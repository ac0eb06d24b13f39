"""Files of images."""

import io
import tarfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
NAMES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


def records(n: int, seed: int) -> Bytes:
    """Labels and pixels as the binary version holds them."""
    rng = np.random.default_rng(seed)
    return np.concatenate(
        [rng.integers(0, 10, (n, 1), np.uint8), rng.integers(0, 256, (n, 3072), np.uint8, endpoint=False)], axis=1
    )


def write_cifar(root: Path, n: int = 2, *, archive: bool = False) -> Path:
    """The official layout, ``n`` images a batch, unpacked or as an archive; returns where it is."""
    folder = root / "cifar-10-batches-bin"
    root.mkdir(parents=True, exist_ok=True)
    contents = {name: records(n, seed).tobytes() for seed, name in enumerate(NAMES)}
    contents["batches.meta.txt"] = b"airplane\n"
    if archive:
        with tarfile.open(root / "cifar-10-binary.tar.gz", "w:gz") as tar:
            for name, content in contents.items():
                info = tarfile.TarInfo(f"{folder.name}/{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return root / "cifar-10-binary.tar.gz"
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder
