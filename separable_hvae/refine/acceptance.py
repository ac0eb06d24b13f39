"""Samples that are refined together: what goes in, what is looked at on the way, what comes out.

Everything that differs between two chunks of one size is a tensor of :class:`Chunk`, so that an inference
can be recorded with one chunk and replayed for another.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from separable_hvae.data_terms.base import BoundTerm
from separable_hvae.model.hvae import HVAE
from separable_hvae.model.result import Result
from separable_hvae.nn.decoder import Observation
from separable_hvae.nn.subset import SubsetPass
from separable_hvae.refine.budget import Clock
from separable_hvae.refine.history import Iterate, Recorder, Row
from separable_hvae.refine.problem import rows
from separable_hvae.refine.state import InferenceState, Init

_SLACK = 1e-5
_NAMED = 8


class Job(NamedTuple):
    """What is the same for all chunks of a call.

    Attributes:
        model: The model.
        steps: Steps by scale.
        guidance: β of each scale, coarse to fine.
        dtype: Dtype of the signals; ``None`` where something else is known.
        generator: Random numbers of a drawn start.
        never_worse: Whether a sample whose objective has risen comes back as it started.
    """

    model: HVAE
    steps: dict[int, int]
    guidance: tuple[float, ...]
    dtype: torch.dtype | None
    generator: torch.Generator | None
    never_worse: bool

    def result(self, passes: list[SubsetPass], x: Tensor, objective: Tensor) -> Result:
        """Decoded latents, with the likelihood of signals ``x`` where these are known."""
        known = None if self.dtype is None else x
        return replace(self.model.result(passes, self.dtype or x.dtype, known), objective=objective)


class Chunk(NamedTuple):
    """Samples that are refined together.

    Attributes:
        seen: What the encoder saw.
        term: What is known of them.
        init: Where they start.
    """

    seen: Observation
    term: BoundTerm
    init: Init | list[Tensor]

    @property
    def tensors(self) -> Any:
        """All that differs between chunks of one size, as a nested structure."""
        given = [] if isinstance(self.init, str) else self.init
        return self.seen.x, self.seen.activations, self.seen.targets or [], self.term.data, given

    def on(self, tensors: Any) -> "Chunk":
        """The same with other tensors."""
        x, activations, targets, data, given = tensors
        return Chunk(Observation(x, activations, targets or None), replace(self.term, data=data), given or self.init)


class Watch(NamedTuple):
    """Who looks at the steps of a chunk.

    Attributes:
        clock: Keeps to the budget.
        recorder: Takes the history.
        callback: The user's.
        first: Number of the chunk's first sample.
    """

    clock: Clock
    recorder: Recorder
    callback: Callable[[Iterate], None] | None
    first: int

    def see(self, iterate: Iterate) -> None:
        """Note when a step was issued, and show it."""
        self.recorder.seconds[iterate.problem, iterate.step] = iterate.seconds
        if self.callback is not None:
            self.callback(iterate)


class Reached(NamedTuple):
    """What the steps of a chunk lead to.

    Attributes:
        result: What a :class:`Result` of the latents holds.
        moved: Whether they are other than the start's.
        start: The latents that were started from.
        start_objective: Their full MAP objective, in nats: ``(B,)``.
        steps: Of each step, the number of its problem, its own number and its scale.
        sums: What to tell of each step, ``(steps, 4)``: one tensor, which a recording copies in one go.
        rounding: Relative error of a reduced precision, ``(B,)``.
    """

    result: dict[str, Any]
    moved: bool
    start: list[Tensor]
    start_objective: Tensor
    steps: list[tuple[int, int, int]]
    sums: Tensor
    rounding: Tensor | None

    @classmethod
    def of(cls, job: Job, run: InferenceState, taken: list[Row], rounding: Tensor | None) -> "Reached":
        """Decode what a run has reached."""
        before, moved = run.start_objective, run.passes is not run.origin
        after = run.objective.total(run.passes, run.term.data).objective if moved else before
        start = [z for step in run.origin for z in step.latents]
        steps = [(row.problem, row.step, row.scale) for row in taken]
        sums = torch.stack([row.sums for row in taken]) if taken else before.new_zeros(0, 4)
        return cls(vars(job.result(run.passes, run.seen.x, after)), moved, start, before, steps, sums, rounding)

    @property
    def rows(self) -> list[Row]:
        """What to tell of each step."""
        return [Row(*step, sums) for step, sums in zip(self.steps, self.sums, strict=True)]

    def kept(self, job: Job, x: Tensor, first: int) -> Result:
        """What was reached, and the start of each sample that got worse or, for a sampler, is not finite.

        Args:
            job: What was asked for.
            x: The signals, as the encoder saw them.
            first: Number of the chunk's first sample.

        Raises:
            FloatingPointError: If a start has no finite objective to compare with.
        """
        result, before = Result(**self.result), self.start_objective
        if not bool(before.isfinite().all()):
            raise FloatingPointError(self._failure(job, x, first))
        after, refused = self.result["objective"], torch.zeros_like(before, dtype=torch.bool)
        if self.moved:
            refused = ~(after <= before + _SLACK * (1 + before.abs())) if job.never_worse else ~after.isfinite()
            if bool(refused.any()):
                pairs = zip(result.latents, self.start, strict=True)
                latents = [torch.where(rows(refused, new), old, new) for new, old in pairs]
                result = job.result(job.model.decoder(latents, len(x)), x, torch.where(refused, before, after))
        return replace(result, refused=refused)

    def _failure(self, job: Job, x: Tensor, first: int) -> str:
        """Which samples have no finite objective at the start, and the likely cause."""
        wrong = (~self.start_objective.isfinite()).nonzero().flatten()
        numbers = ", ".join(str(first + int(i)) for i in wrong[:_NAMED]) + (", …" if len(wrong) > _NAMED else "")
        nll = job.model.result(job.model.decoder(self.start, len(x)), x.dtype).nll[wrong]
        cause = (
            "their data term is not. A loss or operator of your own may be undefined there; the noise level or sigma "
            "may be too small, guidance too large"
            if bool(nll.isfinite().all())
            else "their prior is not. The model's weights, or latents given as init, may be far too large"
        )
        return f"samples {numbers} have no objective that is finite at the start: {cause}"
