r"""Draws of signals given what is known, by refining several draws of the encoder at once.

    z ~ q(z | guess), refined;      x ~ p(x | z, known)

The refiner moves each draw towards a maximum, so draws lie closer together than those of the exact
posterior would; what they measure is how far apart the maxima are that the data leave open, and, by the
last step, the likelihood's own σ where nothing was measured.
"""

import torch
from torch import Tensor

from separable_hvae.checks import check_generator, check_instance, check_integer
from separable_hvae.hvae import HVAE
from separable_hvae.known import KnownBands
from separable_hvae.measurement import Measurement
from separable_hvae.refine import Refiner


def posterior_draws(
    model: HVAE,
    known: KnownBands | Measurement,
    refiner: Refiner,
    n: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw signals given what is known: ``(n, B, C, *size)``.

    Args:
        model: The model.
        known: What is known of B signals.
        refiner: A refiner that starts from a draw (``sample=True``). From ``init="prior"`` draws scatter more
            where a whole stretch is unknown: the encoder is sure of whatever its first look fills in.
        n: Draws of each signal, all in one batch.
        generator: Random numbers.

    Raises:
        TypeError: If nothing says that a part is known, or another argument has the wrong type.
        ValueError: If the refiner starts from a mean or from given latents, so that all draws would be the same,
            or n is below 2.
    """
    check_instance("model", model, HVAE)
    if not isinstance(known, (KnownBands, Measurement)):
        raise TypeError(f"known must be KnownBands or a Measurement, got {type(known).__name__}")
    check_instance("refiner", refiner, Refiner)
    n = check_integer("n", n, 2)
    check_generator(generator)
    if not refiner.sample or not isinstance(refiner.init, str):
        raise ValueError("refiner must start from draws: pass one with sample=True, from the posterior or the prior")
    many = known.rows(torch.arange(len(known), device="cpu").repeat(n))
    decoded = refiner(model, many, generator).reconstruction
    if generator is None:
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, (), device="cpu")))
    drawn = many.correct(model, decoded, generator)
    return drawn.reshape(n, len(known), *drawn.shape[1:])
