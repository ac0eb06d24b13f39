"""When to stop: each sample once its objective no longer falls, all of them when time is up."""

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
