"""A budget of seconds, shared among chunks and problems."""

import time

import torch


class Clock:
    """Share a budget of seconds among chunks and problems.

    Args:
        budget: Seconds from now on; ``None`` never runs out.
        device: Device whose work is waited for before looking at the time.
    """

    def __init__(self, budget: float | None, device: torch.device) -> None:
        self.budget, self.device = budget, device
        self._begin = time.perf_counter()
        self._start = self._end = self._limit = self._latest = self._longest = 0.0

    def seconds(self) -> float:
        """Time since the beginning."""
        return time.perf_counter() - self._begin

    def share(self, samples: int, left: int) -> None:
        """Begin with a chunk of ``samples`` of those that are left."""
        self._start = self._now()
        if self.budget is not None:
            self._end = self._start + (self.budget - self._start) * samples / max(left, 1)

    def reserve(self) -> None:
        """Keep as much time for the last pass as the first one has taken; what is between is the problems'."""
        now = self._now()
        self._end -= now - self._start
        self._start = now

    def enter(self, until: float) -> None:
        """Begin with a problem, which ends when this share of the problems' time has passed."""
        self._latest = self._now()
        self._limit = self._start + (self._end - self._start) * until
        self._longest = 0.0

    def is_over(self) -> bool:
        """Whether one more step, as long as the longest so far, would exceed the problem's time."""
        if self.budget is None:
            return False
        now = self._now()
        self._longest = max(self._longest, now - self._latest)
        self._latest = now
        return now + self._longest > self._limit

    def _now(self) -> float:
        if self.budget is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.seconds()
