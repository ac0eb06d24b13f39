import gzip
import io
import lzma
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.helpers.images import records, write_cifar
from tests.helpers.scripts import script

data = script("data")
Bytes = npt.NDArray[np.uint8]


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_cifar10(tmp_path: Path, archive: bool, inside: bool, train: bool) -> None:
    where = write_cifar(tmp_path, archive=archive)
    found = data.cifar10(tmp_path if inside else where, train=train)
    seeds = range(5) if train else [5]
    pixels = np.concatenate([records(2, seed)[:, 1:] for seed in seeds]).reshape(-1, 3, 32, 32)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), pixels / 127.5 - 1, atol=1e-6)


def test_smaller_images_are_averages(tmp_path: Path) -> None:
    found = data.cifar10(write_cifar(tmp_path), train=False, side=8)
    pixels = records(2, 5)[:, 1:].reshape(2, 3, 8, 4, 8, 4) / 127.5 - 1
    np.testing.assert_allclose(found.numpy(), pixels.mean((3, 5)), atol=1e-6)


def spoil(where: Path, change: Callable[[bytes], bytes], name: str = "data_batch_3.bin") -> Path:
    path = where / name if where.is_dir() else where
    path.write_bytes(change(path.read_bytes()))
    return path


def test_a_truncated_batch(tmp_path: Path) -> None:
    path = spoil(write_cifar(tmp_path), lambda raw: raw[:-1])
    message = f"{path} is truncated or no CIFAR-10 batch: 6145 bytes are no multiple of 3073"
    with pytest.raises(ValueError, match=re.escape(message)):
        data.cifar10(tmp_path, train=True)
    assert len(data.cifar10(tmp_path, train=False)) == 2


def test_a_foreign_batch(tmp_path: Path) -> None:
    path = spoil(write_cifar(tmp_path), lambda raw: b"\x0b" + raw[1:])
    message = f"{path} is no CIFAR-10 batch: labels are 0 to 9, it has 11"
    with pytest.raises(ValueError, match=re.escape(message)):
        data.cifar10(tmp_path, train=True)


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.95])
def test_a_truncated_archive(tmp_path: Path, kept: float) -> None:
    path = spoil(write_cifar(tmp_path, archive=True), lambda raw: raw[: int(kept * len(raw))])
    with pytest.raises(ValueError, match=re.escape(str(path)) + " (is truncated or no tar archive|has no)"):
        data.cifar10(path, train=False)


def members(*infos: tuple[tarfile.TarInfo, bytes]) -> bytes:
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w") as tar:
        for info, content in infos:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize("train", [False, True])
def test_a_flipped_byte_in_an_archive(tmp_path: Path, train: bool) -> None:
    whole = bytearray(gzip.compress(gzip.decompress(write_cifar(tmp_path, archive=True).read_bytes()), 0))
    pixel = records(2, 5 if not train else 2)[0, 1:65].tobytes()
    at = whole.index(pixel)
    (path := tmp_path / "flipped.tar.gz").write_bytes(whole)
    assert len(data.cifar10(path, train=train)) == (10 if train else 2)
    whole[at] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=re.escape(f"{path} is truncated or no tar archive: CRC check failed")):
        data.cifar10(path, train=train)


def test_a_damaged_xz_archive(tmp_path: Path) -> None:
    whole = bytearray(lzma.compress(gzip.decompress(write_cifar(tmp_path, archive=True).read_bytes())))
    (path := tmp_path / "cifar.tar.xz").write_bytes(whole)
    assert len(data.cifar10(path, train=False)) == 2
    whole[len(whole) // 2] ^= 255
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=re.escape(f"{path} is truncated or no tar archive: ")):
        data.cifar10(path, train=False)


def test_a_dead_link_in_an_archive(tmp_path: Path) -> None:
    info = tarfile.TarInfo("test_batch.bin")
    info.type, info.linkname = tarfile.SYMTYPE, "nowhere"
    (path := tmp_path / "links.tar").write_bytes(members((info, b"")))
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*nowhere"):
        data.cifar10(path, train=False)


@pytest.mark.skipif(os.name == "nt", reason="makes symbolic links")
@pytest.mark.parametrize(
    "name", ["cifar-10-binary.tar.gz", "cifar-10-batches-bin", "cifar-10-batches-bin/test_batch.bin"]
)
def test_dead_links(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name} is a dead link")):
        data.cifar10(tmp_path, train=False)


def test_foreign_archives(tmp_path: Path) -> None:
    (path := tmp_path / "noise.tar.gz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=re.escape(f"{path} is truncated or no tar archive")):
        data.cifar10(path, train=True)
    (pickles := tmp_path / "cifar-10-batches-py").mkdir()
    (pickles / "data_batch_1").write_bytes(b"")
    with tarfile.open(path := tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(pickles, pickles.name)
    with pytest.raises(ValueError, match=re.escape(f"{path} has no data_batch_1.bin, it holds") + ".*binary version"):
        data.cifar10(path, train=True)
    with pytest.raises(ValueError, match="only the Python version, which is not read: CIFAR-10's binary version"):
        data.cifar10(pickles, train=True)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda folder: folder / "nowhere", {}, "nowhere does not exist"),
        (lambda folder: (folder / "test_batch.bin").unlink() or folder, {}, "has no test_batch.bin"),
        (lambda folder: folder, {"side": 5}, "side must be 32 or a divisor of it, got 5"),
        (lambda folder: folder, {"side": 0}, "side must be 32 or a divisor of it, got 0"),
    ],
)
def test_bad_sources(tmp_path: Path, change: Callable[[Path], Path], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        data.cifar10(change(write_cifar(tmp_path)), train=False, **options)
