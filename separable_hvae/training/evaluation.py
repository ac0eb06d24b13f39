r"""Measure a model on held-out signals: the terms of −ELBO, errors, and where the bits go.

Of discrete signals, whose values are a bin's width Δ apart, a density p gives each bin the mass P ≈ p Δ, so that

    bits per dimension      (loss − ln Δ) / ln 2,        loss = −ELBO / dim x in nats.

With uniform noise of width Δ added to the signals this is an upper bound of −log₂ P, by Jensen's inequality. A
likelihood that gives probabilities needs neither: bits per dimension are then ``loss / ln 2``.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from separable_hvae._contexts import eval_mode
from separable_hvae._validation import came, check_instance, check_integer, check_number, check_seed
from separable_hvae.functional import finest, pack
from separable_hvae.model.batches import Batch, checked_batches
from separable_hvae.model.hvae import HVAE

_ACTIVE_NATS = 0.01


@torch.no_grad()
def evaluate(
    model: HVAE,
    data: Batch | Iterable[Any],
    *,
    batch_size: int = 256,
    seed: int = 0,
    bin_width: float | None = None,
    importance: int | None = None,
) -> dict[str, Any]:
    """Measure a model on held-out signals, with posterior samples.

    Args:
        model: The model; its mode, and that of each of its modules, is left as it was.
        data: Signals ``(N, C, *size)``, a tuple of such and their condition, or batches (or pairs) such as those of a
            ``DataLoader``.
        batch_size: Signals in each pass, where ``data`` are one tensor.
        seed: Seed of the posterior samples.
        bin_width: Distance of neighbouring values of discrete signals, in the data's units: of 8-bit pixels
            scaled to [-1, 1], 2/255. A discretized likelihood has its own.
        importance: Posterior samples of each signal for the importance-weighted bound; ``None`` leaves it out.

    Returns:
        ``objective`` (KL and the data term without constants, of a Gaussian likelihood ½·SE/σ²) and ``loss`` (−ELBO),
        both in nats/dim; ``mse`` of the posterior
        sample and ``mse_mean`` of the posterior mean, in the data's units; ``kl`` per layer in nats;
        ``active_units``, the number of latents whose mean KL exceeds 0.01 nats, and ``units``; ``residual``,
        the root mean square error of each band of the posterior sample, in the data's units. With
        ``bin_width`` also ``bits``, (loss − ln bin_width) / ln 2 for each dimension: a bound where ``data``
        carry uniform noise of a bin's width, else an approximation that is good where ``sigma`` is well above it.
        With a discretized likelihood always ``bits``, loss / ln 2. With ``importance`` also ``importance``, minus
        the importance-weighted bound in nats/dim, which compares with ``loss``, and, where there are ``bits``, its
        ``importance_bits``.

    Raises:
        TypeError: If an argument has the wrong type, or the data's dtype does not fit the model.
        ValueError: If the data do not fit the model, are none or not finite, a number is out of range, or
            ``bin_width`` is given for a discretized likelihood.

    >>> import torch
    >>> from separable_hvae import HVAE, FFT1Real, evaluate
    >>> model = HVAE(FFT1Real(8, scales=[2, 8]), layers=4, width=8, bottleneck=4, blocks=0, sigma=1.0)
    >>> measured = evaluate(model, torch.randn(20, 1, 8))
    >>> len(measured["kl"]), len(measured["residual"]), measured["units"]
    (8, 2, 40)
    """
    check_model(model)
    batch_size, seed = check_integer("batch_size", batch_size, 1), check_seed("seed", seed)
    if bin_width is not None:
        bin_width = check_number("bin_width", bin_width, "positive and finite")
        if model.likelihood.bin_width is not None:
            raise ValueError(
                f"bin_width is for densities: {type(model.likelihood).__name__} gives probabilities, and bits as well"
            )
    if importance is not None:
        importance = check_integer("importance", importance, 1)
    batches = checked_batches(data, model.decomp, model.device, batch_size)
    with eval_mode(model):
        found = _measure(model, batches, seed, importance)
    if bin_width is not None or model.likelihood.bin_width is not None:
        log_width = 0.0 if bin_width is None else math.log(bin_width)
        for name, nats in {"bits": "loss", "importance_bits": "importance"}.items():
            if nats in found:
                found[name] = (found[nats] - log_width) / math.log(2)
    return found


def check_model(model: object) -> None:
    """Raise a ``TypeError`` unless it is an :class:`HVAE`; what is wrapped around one is told to go."""
    for name in ("module", "_orig_mod"):
        if not isinstance(model, HVAE) and isinstance(getattr(model, name, None), HVAE):
            raise TypeError(
                f"model must be an HVAE, got {came(model)} around one: pass its .{name}. Instead of DataParallel, "
                "several processes of `accelerate launch` train with DistributedDataParallel, which fit sees to"
            )
    check_instance("model", model, HVAE)


def require_condition(model: HVAE, condition: Any, name: str) -> None:
    """Raise a ``TypeError`` if data come with a condition, and the model takes none."""
    if condition is not None and model.condition is None:
        raise TypeError(
            f"{name} gives pairs (signals, condition), but the model takes no condition: keep the signals alone, "
            "item[0], or build it with HVAE(condition=…)"
        )


def _measure(model: HVAE, batches: Iterable[tuple[Tensor, Any]], seed: int, importance: int | None) -> dict[str, Any]:
    generator, other = (torch.Generator(model.device).manual_seed(seed) for _ in range(2))
    n, loss, bound, mse, mse_mean, cpu = 0, 0.0, 0.0, 0.0, 0.0, torch.device("cpu")
    layers = torch.zeros(model.depth, dtype=torch.float64, device=cpu)
    residuals = torch.zeros(len(model.subsets), dtype=torch.float64, device=cpu)
    units: list[Tensor] = []
    for x, condition in batches:
        require_condition(model, condition, "data")
        n += len(x)
        seen, conditions = model.observe(x), model.conditions(condition, len(x))
        passes = model.decoder([None] * model.depth, len(x), seen, conditions, generator=generator)
        result = model.result(passes, x.dtype, seen.x)
        assert result.kl is not None
        loss -= float(finest(result.elbo).sum())
        if importance is not None:
            bound += float(finest(model.log_likelihood(x, importance, other, condition)).sum())
        layers += finest(result.kl).sum(0).cpu()
        mse += float(_squares(result.reconstruction, x))
        residual = residuals.new_tensor(band_residuals(model, result.reconstruction - x))
        residuals += len(x) * residual.square()
        means = model.decoder([None] * model.depth, len(x), seen, conditions, temperature=0.0)
        mse_mean += float(_squares(model.result(means, x.dtype).reconstruction, x))
        pairs = [(q, p) for step in passes for q, p in zip(step.posteriors, step.priors, strict=True) if q is not None]
        batch_units = [q.kl_elements(p).sum(0).flatten() for q, p in pairs]
        units = [u + b for u, b in zip(units, batch_units, strict=True)] if units else batch_units
    numel = model.decomp.numel
    constants = float(model.likelihood.log_partition(numel)) / numel
    found = {
        "objective": loss / n / numel - constants,
        "loss": loss / n / numel,
        "mse": mse / n,
        "mse_mean": mse_mean / n,
        "kl": (layers / n).tolist(),
        "active_units": int(sum(int((u / n > _ACTIVE_NATS).sum()) for u in units)),
        "units": sum(u.numel() for u in units),
        "residual": (residuals / n).sqrt().tolist(),
    }
    return found if importance is None else found | {"importance": -bound / n / numel}


def _squares(a: Tensor, b: Tensor) -> Tensor:
    return (pack(a) - pack(b)).square().flatten(1).mean(1).sum()


@torch.no_grad()
def band_residuals(model: HVAE, error: Tensor) -> list[float]:
    """Root mean square of each band of an error ``(B, C, *size)``, coarse to fine, in the data's units."""
    return [float(band.square().mean().sqrt()) for band in model.decomp.analysis(error)]
