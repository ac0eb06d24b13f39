"""What a refiner tells of its way: every iterate to a callback, a summary to the result."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from separable_hvae.functional import finest
from separable_hvae.refine.problem import Problem


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

    @classmethod
    def of(cls, problem: Problem, number: int, step: int, moving: Tensor, seconds: float, first: int) -> "Iterate":
        """The iterate at which a problem's gradient was taken last.

        Raises:
            RuntimeError: If it never was.
        """
        terms = problem.terms
        if terms is None:
            raise RuntimeError("a refiner's step must call problem.gradient at least once")
        return cls(number, step, problem.scales, problem.latents, terms.nll, terms.data, moving, seconds, first)


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


class Row(NamedTuple):
    """A step's sums over a chunk, for the history.

    Attributes:
        problem: Number of the problem.
        step: Number of the step within it.
        scale: The finest scale that moved.
        sums: Data term, ``−log p(z)``, samples that moved and samples: ``(4,)``.
    """

    problem: int
    step: int
    scale: int
    sums: Tensor

    @classmethod
    def of(cls, iterate: Iterate) -> "Row":
        """The sums of an iterate."""
        columns = [iterate.data, iterate.nll, iterate.moving, torch.ones_like(iterate.nll)]
        sums = torch.stack([finest(column) for column in columns]).sum(1)
        return cls(iterate.problem, iterate.step, max(iterate.scales), sums)


class Recorder:
    """Collect what happens, chunk by chunk, without waiting for the device at each step.

    Attributes:
        seconds: When each step of each problem was issued.
    """

    def __init__(self) -> None:
        self.seconds: dict[tuple[int, int], float] = {}
        self._rows: dict[tuple[int, int], Row] = {}
        self._rounding: list[Tensor] = []

    def add(self, rows: Sequence[Row], rounding: Tensor | None, now: float) -> None:
        """Take a chunk in.

        Args:
            rows: Its steps.
            rounding: Relative error of a reduced precision, ``(B,)``.
            now: Time of steps that were replayed, and not issued one by one.
        """
        for row in rows:
            key = row.problem, row.step
            known = self._rows.get(key)
            self._rows[key] = row if known is None else row._replace(sums=known.sums + row.sums)
            self.seconds.setdefault(key, now)
        if rounding is not None:
            self._rounding.append(rounding)

    def history(self) -> History:
        """Means over all samples."""
        history = History()
        if self._rounding:
            history.rounding = float(torch.cat(self._rounding).mean())
        if not self._rows:
            return history
        keys = sorted(self._rows)
        for key, sums in zip(keys, torch.stack([self._rows[key].sums for key in keys]).tolist(), strict=True):
            data, nll, moving, samples = sums
            history.problem.append(key[0])
            history.step.append(key[1])
            history.scale.append(self._rows[key].scale)
            history.data.append(data / samples)
            history.nll.append(nll / samples)
            history.objective.append((data + nll) / samples)
            history.moving.append(moving / samples)
            history.seconds.append(self.seconds[key])
        return history
