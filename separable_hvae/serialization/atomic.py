"""The one way that a file is written: beside the old one, synced, and renamed over it.

At any moment a path holds what it held before, or all of what is new. Of several files the renames come in
the order given, so that whoever reads them can tell a set that was cut off between two.
"""

import contextlib
import errno
import os
from collections.abc import Mapping
from pathlib import Path

_REFUSED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""What file systems say that cannot sync, such as shares (CIFS, FUSE) of a folder: there is nothing more to do."""


def beside(path: Path) -> Path:
    """Where the new content of a file is until it is complete."""
    return path.with_name(path.name + ".partial")


def write(files: Mapping[Path, bytes]) -> None:
    """Write files, each of which keeps its old content until all new ones are complete.

    Args:
        files: Content by path, all in one folder, which is made if it is missing.

    Raises:
        OSError: If one cannot be written, for example to a full disk; the old ones stay as they were.
    """
    folders = {path.parent for path in files}
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        for path, content in files.items():
            _write(beside(path), content)
        for folder in folders:
            _sync(folder)
    except BaseException:
        for path in files:
            with contextlib.suppress(OSError):
                beside(path).unlink(missing_ok=True)
        raise
    for path in files:
        beside(path).replace(path)
        _sync(path.parent)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        _fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make renames outlast a power cut, on systems that can open folders."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            _fsync(descriptor)
        finally:
            os.close(descriptor)


def _fsync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
