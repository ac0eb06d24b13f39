"""Ctrl-C and SIGTERM, noticed between two steps of a loop instead of in the middle of one.

A terminal sends Ctrl-C, and a scheduler its SIGTERM, to a whole group of processes: those that load data must
outlast it, since their loop ends with that of the process that started them.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Self

from torch.utils.data import DataLoader

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class GracefulStop:
    """Whether someone asked a loop to stop, while the context is open.

    The first Ctrl-C or SIGTERM sets :attr:`requested`; a second Ctrl-C raises ``KeyboardInterrupt`` at
    once. Python delivers signals to its main thread alone: in others nothing is ever requested.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # None stands for a handler that was not installed from Python, which cannot be put back.
            signal.signal(number, handler if callable(handler) or isinstance(handler, int) else signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


def iterate(loader: "DataLoader[Any]") -> Iterator[Any]:
    """Begin a pass of a loader whose worker processes outlast signals to their process group."""
    before = loader.worker_init_fn
    if not loader.num_workers:
        return iter(loader)
    loader.worker_init_fn = _Outlast(before)
    try:
        with _held_back():
            return iter(loader)
    finally:
        loader.worker_init_fn = before


@dataclass
class _Outlast:
    """What a worker does first: it ignores Ctrl-C, and SIGTERM of all but its parent; then what the loader says."""

    then: Callable[[int], None] | None

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if hasattr(signal, "sigwaitinfo"):
            # SIGTERM stays held back in every thread: this one takes it, and sees who sent it.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            threading.Thread(target=_heed_parent, args=(os.getppid(),), daemon=True).start()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        elif hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        if self.then is not None:
            self.then(worker)


def _heed_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


@contextmanager
def _held_back() -> Iterator[None]:
    """Signals wait until the end of the block, and in processes begun in it until these let them through."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
