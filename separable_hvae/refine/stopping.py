"""When to stop: each sample once its objective no longer falls, all of them when time is up."""

import time

import torch
from torch import Tensor

from separable_hvae.functional import per_sample

_PATIENCE = 3


class Stopping:
    """Hold samples whose objective no longer falls; each is judged alone.

    Args:
        tolerance: A sample stops once three steps have not lowered its objective by more than
            ``tolerance · (1 + |J|)``; ``None`` stops none.
        batch: Number of samples.
        device: Their device.
    """

    def __init__(self, tolerance: float | None, batch: int, device: torch.device) -> None:
        self.tolerance = tolerance
        self.moving = torch.ones(batch, dtype=torch.bool, device=device)
        self._best: Tensor | None = None
        self._idle = torch.zeros(batch, dtype=torch.int64, device=device)

    def is_over(self) -> bool:
        """Whether no sample moves any more."""
        return self.tolerance is not None and not bool(self.moving.any())

    def hold(self, objective: Tensor, before: list[Tensor], after: list[Tensor]) -> list[Tensor]:
        """Let the samples that still move go from ``before``, where they had this objective, to ``after``."""
        if self.tolerance is None:
            return after
        if self._best is None:
            self._best = objective
        else:
            fell = objective < self._best - self.tolerance * (1 + self._best.abs())
            self._idle = torch.where(fell, 0, self._idle + 1)
            self._best = torch.minimum(self._best, objective)
        self.moving = self.moving & (self._idle < _PATIENCE)
        return [torch.where(per_sample(self.moving, new), new, old) for old, new in zip(before, after, strict=True)]


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
