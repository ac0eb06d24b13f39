r"""Draws of signals given what is known, by refining several draws of the encoder at once.

    z ~ q(z | guess), refined;      x ~ p(x | z, known)

The refiner moves each draw towards a maximum, so draws lie closer together than those of the exact
posterior would; what they measure is how far apart the maxima are that the data leave open, and, by the
last step, the likelihood's own σ where nothing was measured. A refiner that samples is as good as its steps.
"""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from separable_hvae._validation import check_generator, check_instance, check_integer
from separable_hvae.data_terms.base import DataTerm
from separable_hvae.model.batches import map_tensors
from separable_hvae.model.hvae import HVAE
from separable_hvae.refine import Refiner


@runtime_checkable
class Correcting(Protocol):
    """What is known, as far as it says what signals are given their latents."""

    def correct(self, model: HVAE, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The signals given the latents that decode to ``x`` and what is known: their mean, or a draw."""


def posterior_draws(
    model: HVAE,
    known: DataTerm,
    refiner: Refiner,
    n: int,
    generator: torch.Generator | None = None,
    condition: Any = None,
) -> Tensor:
    """Draw signals given what is known: ``(n, B, C, *size)``.

    Args:
        model: The model.
        known: What is known of B signals: :class:`KnownBands`, a :class:`Measurement`, or a data term of your own
            that has their method ``correct``.
        refiner: A refiner that starts from a draw (``sample=True``), or one that samples (``never_worse`` is
            ``False``). From ``init="prior"`` draws scatter more where a whole stretch is unknown: the encoder is
            sure of whatever its first look fills in.
        n: Draws of each signal, all in one batch.
        generator: Random numbers.
        condition: What the model's condition takes, one for each signal.

    Raises:
        TypeError: If ``known`` is no data term or has no method ``correct``, or another argument has the wrong type.
        ValueError: If the refiner goes from a mean to a maximum, so that all draws would be the same, or starts from
            given latents, n is below 1, or the condition does not fit the model and the B signals.
    """
    check_instance("model", model, HVAE)
    check_instance("known", known, DataTerm)
    check_instance("refiner", refiner, Refiner)
    n = check_integer("n", n, 1)
    check_generator(generator)
    if not isinstance(refiner.init, str) or (refiner.never_worse and not refiner.sample):
        raise ValueError("refiner must start from draws: pass one with sample=True, from the posterior or the prior")
    numbers = torch.arange(len(known), device="cpu").repeat(n)
    many = known.rows(numbers)
    if not isinstance(many, Correcting):
        raise TypeError(
            f"known must have a method correct(model, x, generator), as KnownBands and Measurement do, "
            f"got {type(many).__name__}"
        )
    if model.condition is not None and condition is not None:
        model.condition.check(condition, len(known))
    repeated = map_tensors(lambda t: t[numbers.to(t.device)], condition)
    decoded = refiner(model, many, generator, condition=repeated).reconstruction
    if generator is None:
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, (), device="cpu")))
    drawn = many.correct(model, decoded, generator)
    return drawn.reshape(n, len(known), *drawn.shape[1:])
