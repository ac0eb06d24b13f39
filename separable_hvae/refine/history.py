"""What a refiner tells of its way: every iterate to a callback, a summary to the result."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from separable_hvae.functional import finest


@dataclass(frozen=True)
class Iterate:
    """What a callback sees at each step, before the latents move.

    Attributes:
        problem: Number of the problem, counted from 0 in the order of the schedule.
        step: Number of the step within it.
        scales: The scale of each latent that moves.
        latents: These latents.
        nll: ``−log p(z)`` of the latents in the problem's objective, in nats: ``(B,)``.
        data: Its data term, guidance included, in nats: ``(B,)``.
        moving: Which samples still move: ``(B,)`` bool; all of them without a tolerance.
        seconds: Time since the refiner was called. On a GPU, when the step was issued.
        first: Number of the first sample, where the batch is cut into chunks.
    """

    problem: int
    step: int
    scales: list[int]
    latents: list[Tensor]
    nll: Tensor
    data: Tensor
    moving: Tensor
    seconds: float
    first: int = 0

    @property
    def objective(self) -> Tensor:
        """``nll + data``: ``(B,)``."""
        return self.nll + self.data

    def sums(self) -> Tensor:
        """Sums over the samples, for the history: data term, ``−log p(z)``, samples that move and samples, ``(4,)``."""
        return finest(torch.stack([self.data, self.nll, self.moving, torch.ones_like(self.nll)])).sum(1)


@dataclass
class History:
    """What happened step by step; each list has one entry for each step of each problem.

    Attributes:
        problem: Number of the problem.
        step: Number of the step within it.
        scale: The finest scale that moved.
        objective: Batch mean of the problem's objective before the step, in nats.
        data: Batch mean of its data term.
        nll: Batch mean of its ``−log p(z)``.
        moving: Share of the samples that still moved.
        seconds: Time since the refiner was called.
        rounding: Mean of ``|J' − J| / (1 + |J|)`` at the start, J' being the full objective in the reduced
            precision of the steps; ``None`` in full precision.
    """

    problem: list[int] = field(default_factory=list)
    step: list[int] = field(default_factory=list)
    scale: list[int] = field(default_factory=list)
    objective: list[float] = field(default_factory=list)
    data: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    moving: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    rounding: float | None = None


Step = tuple[int, int, int]
"""Number of a step's problem, its own number within it, and the finest scale that moved."""


class Recorder:
    """Collect what happens, chunk by chunk, without waiting for the device at each step.

    Attributes:
        seconds: When each step of each problem was issued.
    """

    def __init__(self) -> None:
        self.seconds: dict[tuple[int, int], float] = {}
        self._sums: dict[tuple[int, int], Tensor] = {}
        self._scales: dict[tuple[int, int], int] = {}
        self._rounding: list[Tensor] = []

    def add(self, steps: Sequence[Step], sums: Tensor, rounding: Tensor | None, now: float) -> None:
        """Take a chunk in.

        Args:
            steps: Its steps.
            sums: What :meth:`Iterate.sums` says of each, ``(steps, 4)``.
            rounding: Relative error of a reduced precision, ``(B,)``.
            now: Time of steps that were replayed, and not issued one by one.
        """
        for (problem, step, scale), row in zip(steps, sums, strict=True):
            key = problem, step
            self._sums[key] = self._sums[key] + row if key in self._sums else row
            self._scales[key] = scale
            self.seconds.setdefault(key, now)
        if rounding is not None:
            self._rounding.append(rounding)

    def history(self) -> History:
        """Means over all samples."""
        history = History()
        if self._rounding:
            history.rounding = float(torch.cat(self._rounding).mean())
        if not self._sums:
            return history
        keys = sorted(self._sums)
        for key, sums in zip(keys, torch.stack([self._sums[key] for key in keys]).tolist(), strict=True):
            data, nll, moving, samples = sums
            history.problem.append(key[0])
            history.step.append(key[1])
            history.scale.append(self._scales[key])
            history.data.append(data / samples)
            history.nll.append(nll / samples)
            history.objective.append((data + nll) / samples)
            history.moving.append(moving / samples)
            history.seconds.append(self.seconds[key])
        return history
