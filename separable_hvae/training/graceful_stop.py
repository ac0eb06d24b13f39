"""Ctrl-C and SIGTERM, noticed between two steps of a loop instead of in the middle of one."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self


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
            self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
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
