r"""The decision that no sample comes back worse than it started.

    z ← z where J(z) ≤ J(z_0) + 10⁻⁵ (1 + |J(z_0)|), else z_0

A sampler may end higher: it keeps whatever is finite.
"""

from torch import Tensor

_SLACK = 1e-5
_NAMED = 8


def is_refused(before: Tensor, after: Tensor, never_worse: bool) -> Tensor:
    """Which samples return to their start: ``(B,)`` bool.

    Args:
        before: Objective of the start, in nats: ``(B,)``.
        after: Objective of what was found.
        never_worse: Whether a sample may not rise; otherwise it may not leave what is finite.
    """
    return ~(after <= before + _SLACK * (1 + before.abs())) if never_worse else ~after.isfinite()


def require_finite_start(objective: Tensor, nll: Tensor, first: int) -> None:
    """Raise a ``FloatingPointError`` if a start has no finite objective to compare with.

    Args:
        objective: Objective of the start, in nats: ``(B,)``.
        nll: Its ``−log p(z)``, which tells causes apart.
        first: Number of the first sample.
    """
    if bool(objective.isfinite().all()):
        return
    wrong = (~objective.isfinite()).nonzero().flatten()
    numbers = ", ".join(str(first + int(i)) for i in wrong[:_NAMED]) + (", …" if len(wrong) > _NAMED else "")
    cause = (
        "their data term is not. A loss or operator of your own may be undefined there; the noise level or sigma "
        "may be too small, guidance too large"
        if bool(nll[wrong].isfinite().all())
        else "their prior is not. The model's weights, or latents given as init, may be far too large"
    )
    raise FloatingPointError(f"samples {numbers} have no objective that is finite at the start: {cause}")
