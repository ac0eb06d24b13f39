"""What ties the library to deepinv: a model and a refiner as one of its reconstructors.

    image = factor · signal + offset

maps the model's signals to the images that a physics measures, for a model trained on [-1, 1] and a
physics of images in [0, 1] with factor = offset = 0.5. A physics alone needs none of this: pass it to
:class:`separable_hvae.Measurement`.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from separable_hvae.data_terms.measurement import Measurement
from separable_hvae.data_terms.physics import Physics, noise_of
from separable_hvae.distributions.noise import Noise
from separable_hvae.functional import pack
from separable_hvae.model.hvae import HVAE
from separable_hvae.refine import Refiner


@dataclass(frozen=True)
class _Forward:
    physics: Physics
    factor: float
    offset: float

    def __call__(self, x: Tensor) -> Tensor:
        return self.physics.A(self.factor * x + self.offset)


@dataclass(frozen=True)
class _Adjoint:
    physics: Physics
    factor: float

    def __call__(self, y: Tensor) -> Tensor:
        return self.factor * self.physics.A_adjoint(y)  # type: ignore[attr-defined, no-any-return]


def reconstructor(
    model: HVAE,
    refiner: Refiner,
    *,
    noise: Noise | float | None = None,
    factor: float = 1.0,
    offset: float = 0.0,
    correct: bool = True,
) -> nn.Module:
    """A ``deepinv.models.Reconstructor``, to be called as ``(y, physics)``.

    It takes any linear physics with one image and one tensor of measurements. A complex model speaks
    deepinv's language: real and imaginary part as channels, as its MRI has them.

    Args:
        model: The model.
        refiner: What refines its latents.
        noise: Noise of the measurements; ``None`` reads the physics' own.
        factor: Of the signals, see the module.
        offset: Added to them.
        correct: Whether to end with the mean of the signals given latents and measurements, see
            :meth:`Measurement.correct`.

    Raises:
        ImportError: If deepinv is not installed, it comes with the extra ``deepinv``; or if its torchvision is
            built for another torch.
        TypeError: If the model is no HVAE or the refiner no Refiner.
        ValueError: If factor is zero.
    """
    try:
        from deepinv.models import Reconstructor
    except ImportError as error:
        raise ImportError(f'reconstructor needs deepinv: pip install "separable-hvae[deepinv]" ({error})') from error
    except RuntimeError as error:
        raise ImportError(
            f"deepinv does not import beside this torch, torchvision must be built for it ({error})"
        ) from error
    if not isinstance(model, HVAE):
        raise TypeError(f"model must be an HVAE, got {type(model).__name__}")
    if not isinstance(refiner, Refiner):
        raise TypeError(f"refiner must be a Refiner, got {type(refiner).__name__}")
    if not factor:
        raise ValueError("factor must not be zero")

    class HVAEReconstructor(Reconstructor):  # type: ignore[misc]
        """A separable HVAE and a refiner."""

        def __init__(self) -> None:
            super().__init__()
            self.model, self.refiner = model, refiner

        def forward(self, y: Tensor, physics: Physics, **kwargs: Any) -> Tensor:
            """Images ``(B, C, H, W)`` from measurements ``y``."""
            term = Measurement(
                y,
                _Forward(physics, factor, offset),
                noise_of(physics) if noise is None else noise,
                adjoint=_Adjoint(physics, factor) if hasattr(physics, "A_adjoint") else None,
                stacked=self.model.decomp.is_complex,
            )
            x = self.refiner(self.model, term).reconstruction
            if correct:
                x = term.correct(self.model, x)
            return factor * pack(x) + offset

    return HVAEReconstructor()
