"""Writing files so that each holds its old content or its new one."""

import errno
import os
import stat
from pathlib import Path

import pytest

from separable_hvae.serialization import atomic


def test_files_are_replaced_together(tmp_path: Path) -> None:
    a, b = tmp_path / "deep" / "a", tmp_path / "deep" / "b.txt"
    atomic.write({a: b"1", b: b"2"})
    atomic.write({a: b"3"})
    assert (a.read_bytes(), b.read_bytes()) == (b"3", b"2")
    assert sorted(p.name for p in a.parent.iterdir()) == ["a", "b.txt"]


def test_what_cannot_be_written_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    atomic.write({a: b"1", b: b"2"})
    synced = 0

    def fsync(descriptor: int) -> None:
        nonlocal synced
        synced += 1
        if synced == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        atomic.write({a: b"3", b: b"4"})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a": b"1", "b": b"2"}


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_file_systems_that_cannot_sync_folders_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    refused = []

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refused.append(descriptor)
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    atomic.write({tmp_path / "a": b"1"})
    assert (tmp_path / "a").read_bytes() == b"1"
    assert refused or os.name != "posix"
