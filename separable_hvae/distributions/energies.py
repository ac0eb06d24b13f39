r"""Energies of the two densities that latents, likelihoods, losses and noise are made of, in nats.

    Gaussian    E = Σ e² / 2v               log Z = Σ log σ + n/2 · log 2π
    Laplace     E = √2 Σ |e| / √v           log Z = Σ log σ + n/2 · log 2         of variance v = σ²

−log p(e) = E + log Z for an error e of n numbers.
"""

import math

from torch import Tensor


def gaussian_energy(error: Tensor, variance: Tensor | None = None, *, axis: int = 1) -> Tensor:
    """``Σ e² / 2v``, summed over the axes from ``axis`` on: by default ``(B,)``.

    Args:
        error: Real errors ``(B, ...)``.
        variance: Their variance, broadcastable to them; ``None`` for errors in units of their deviation.
        axis: First axis to sum over.
    """
    return _summed(error.square(), variance, axis) / 2


def laplace_energy(error: Tensor, variance: Tensor, *, axis: int = 1) -> Tensor:
    """``√2 Σ |e| / √v``, of the variance ``v``; see :func:`gaussian_energy`."""
    return math.sqrt(2) * _summed(error.abs(), variance.sqrt(), axis)


def gaussian_log_partition(log_sigma: Tensor, count: int) -> Tensor:
    """``Σ log σ + n/2 · log 2π``, given the sum of ``log σ`` over ``count`` numbers."""
    return log_sigma + 0.5 * math.log(2 * math.pi) * count


def laplace_log_partition(log_sigma: Tensor, count: int) -> Tensor:
    """``Σ log σ + n/2 · log 2``, given the sum of ``log σ`` over ``count`` numbers."""
    return log_sigma + 0.5 * math.log(2) * count


def _summed(values: Tensor, unit: Tensor | None, axis: int) -> Tensor:
    """``Σ values / unit``, dividing once where there is one unit for all."""
    if unit is not None and unit.ndim:
        values, unit = values / unit, None
    total = values.flatten(axis).sum(axis)
    return total if unit is None else total / unit
