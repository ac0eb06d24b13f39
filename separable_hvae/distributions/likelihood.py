r"""Likelihoods: −log p(x | z) of signals given what latents decode to, in nats.

    Gaussian       N(x; x̂, σ² I)
    Laplace        Π_i exp(−√2 |x_i − x̂_i| / σ) / √2 σ                     of variance σ²
    discretized    Π_i F((x_i + Δ/2 − x̂_i) / c) − F((x_i − Δ/2 − x̂_i) / c)     F(t) = 1 / (1 + e⁻ᵗ),  c = √3 σ / π

x̂ is the mean, the decoded signal; complex numbers count as two real ones. In the last line Δ is the distance of
neighbouring values, and the first and the last value have the tails as well: the probabilities of all values sum to 1.

The Gaussian is the one that splits over orthonormal bands, ``‖x − x̂‖² = Σ_s ‖h_s − ĥ_s‖²``. Of any other, refinement
takes its exact density where the whole signal is decoded (the full objective, and the last band's own), and for a
band that finer ones follow a Gaussian of the same variance: many independent errors, seen through an orthonormal
transform, are nearly that.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from separable_hvae._validation import came, check_integer, check_number, constructor_arguments, is_number, shown
from separable_hvae.distributions.gaussian import (
    gaussian_energy,
    gaussian_log_partition,
    laplace_energy,
    laplace_log_partition,
)
from separable_hvae.functional import pack, unpack, widen

SIGMA_RANGE = (1e-4, 1e2)
_LOG_SIGMA_RANGE = (math.log(SIGMA_RANGE[0]), math.log(SIGMA_RANGE[1]))
_FIRST_SIGMA = 0.1
_FAR_ABOVE, _FAR_BELOW = 10.0, 200.0
_WORTH_LEARNING = 10.0  # Nats.


class Prediction(NamedTuple):
    """What latents decode to.

    Attributes:
        bands: Bands ``(B, *band_shape)``, coarse to fine.
        mean: Their sum, the decoded signal ``(B, C, *size)``.
        emitted: What a likelihood has emitted from the contexts; empty for those that emit nothing.
    """

    bands: Sequence[Tensor]
    mean: Tensor
    emitted: Sequence[Tensor] = ()


class Likelihood(nn.Module, ABC):
    """The density of a signal given what its latents decode to.

    A subclass gives :meth:`nll`, :meth:`sample` and :attr:`variance`; the defaults of the others are right for any.
    What it learns are parameters, which are trained, moved and saved with the model.
    """

    splits: ClassVar[bool] = False
    """Whether :meth:`nll`, up to a constant, is the sum of :meth:`band_energy` over orthonormal bands."""
    complex_signals: ClassVar[bool] = True
    """Whether signals may be complex."""
    bin_width: float | None = None
    """Distance of neighbouring values of discrete signals, whose probabilities it gives; ``None`` for a density."""

    @abstractmethod
    def nll(self, prediction: Prediction, x: Tensor) -> Tensor:
        """``−log p(x | z)`` of signals ``(B, C, *size)``, in nats: ``(B,)``."""

    @abstractmethod
    def sample(self, prediction: Prediction, generator: torch.Generator | None = None) -> Tensor:
        """Draw signals ``(B, C, *size)`` around the mean."""

    @property
    @abstractmethod
    def variance(self) -> Tensor:
        """Variance of each real number around the mean: a scalar. Measurements and known bands reckon with it."""

    @property
    def sigma(self) -> Tensor:
        """Standard deviation of each real number around the mean: a scalar."""
        return self.variance.sqrt()

    @property
    def sigma_bounds(self) -> tuple[float, float]:
        """The least and the greatest standard deviation that training can arrive at."""
        return (float(self.sigma.detach()),) * 2

    def energy(self, prediction: Prediction, x: Tensor) -> Tensor:
        """:meth:`nll` without what no latent changes, :meth:`log_partition`: the data term of refinement, ``(B,)``."""
        return self.nll(prediction, x) - self.log_partition(pack(x)[0].numel())

    def band_energy(self, error: Tensor, variance: Tensor) -> Tensor:
        """The part of one band, given its error ``(B, *band_shape)`` and the variance, in nats: ``(B,)``."""
        return gaussian_energy(error, variance)

    def log_partition(self, numel: int) -> Tensor:
        """What :meth:`nll` holds whatever latents are, for a signal of ``numel`` real numbers, in nats: a scalar."""
        return self.variance.new_zeros(())

    def config(self) -> dict[str, Any]:
        """Arguments that build this likelihood again: what JSON can hold.

        The default reads, for each argument of the constructor, the attribute of the same name from the instance
        itself. Override it where the two differ.

        Raises:
            TypeError: If an attribute is missing or JSON cannot hold it.
        """
        return constructor_arguments(self)


class _OneSigma(Likelihood):
    """A density of one shape around the mean, whose standard deviation is fixed or learned.

    Args:
        sigma: Standard deviation in the data's units, from 1e-4 to 100, or ``"learned"``, which starts at 0.1.

    Raises:
        TypeError: If it is neither a number nor a text.
        ValueError: If it is out of range or another text.
    """

    log_sigma: Tensor

    def __init__(self, sigma: float | Literal["learned"] = _FIRST_SIGMA) -> None:
        super().__init__()
        if isinstance(sigma, str):
            if sigma != "learned":
                raise ValueError(f"sigma must be a positive number or 'learned', got {sigma!r}")
            self.log_sigma = nn.Parameter(_exact(math.log(_FIRST_SIGMA)))
        elif not is_number(sigma):
            raise TypeError(f"sigma must be a positive number or 'learned', got {shown(sigma)}")
        else:
            sigma = check_number("sigma", sigma, "positive and finite")
            least, most = SIGMA_RANGE
            if not least <= sigma <= most:
                raise ValueError(f"sigma must be between {least:g} and {most:g}, got {sigma}: rescale the data")
            self.register_buffer("log_sigma", _exact(math.log(sigma)))
        self.given_sigma: float | Literal["learned"] = sigma

    @property
    def bounded_log_sigma(self) -> Tensor:
        """Logarithm of the standard deviation, within its range: a scalar."""
        return self.log_sigma.clamp(*_LOG_SIGMA_RANGE)

    @property
    @override
    def sigma(self) -> Tensor:
        return self.bounded_log_sigma.exp()

    @property
    @override
    def variance(self) -> Tensor:
        return self.sigma.square()

    @property
    @override
    def sigma_bounds(self) -> tuple[float, float]:
        return SIGMA_RANGE if isinstance(self.log_sigma, nn.Parameter) else super().sigma_bounds

    @override
    def config(self) -> dict[str, Any]:
        return {"sigma": self.given_sigma}

    @override
    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config().items())


class GaussianLikelihood(_OneSigma):
    """Gaussian of one standard deviation around the decoded signal; orthonormal bands split it exactly.

    Args:
        sigma: Standard deviation in the data's units, from 1e-4 to 100, or ``"learned"``, which starts at 0.1.

    Raises:
        TypeError: If it is neither a number nor a text.
        ValueError: If it is out of range or another text.

    >>> GaussianLikelihood(0.5).nll(Prediction([], torch.zeros(1, 1, 4)), torch.ones(1, 1, 4))
    tensor([8.9032])
    """

    splits: ClassVar[bool] = True

    @override
    def nll(self, prediction: Prediction, x: Tensor) -> Tensor:
        error = pack(prediction.mean) - pack(x)
        log_sigma = self.bounded_log_sigma
        return gaussian_energy(error, torch.exp(2 * log_sigma)) + self.log_partition(error[0].numel())

    @override
    def log_partition(self, numel: int) -> Tensor:
        return gaussian_log_partition(numel * self.bounded_log_sigma, numel)

    @override
    def sample(self, prediction: Prediction, generator: torch.Generator | None = None) -> Tensor:
        mean = pack(prediction.mean)
        device = mean.device if generator is None else generator.device
        noise = torch.randn(mean.shape, generator=generator, device=device, dtype=mean.dtype).to(mean.device)
        return unpack(mean + self.sigma * noise, is_complex=prediction.mean.is_complex())


class LaplaceLikelihood(_OneSigma):
    """Laplace density around the decoded signal, √2 times its scale being ``sigma``: heavy tails forgive outliers.

    Args:
        sigma: Standard deviation in the data's units, from 1e-4 to 100, or ``"learned"``, which starts at 0.1.

    Raises:
        TypeError: If it is neither a number nor a text.
        ValueError: If it is out of range or another text.
    """

    @override
    def nll(self, prediction: Prediction, x: Tensor) -> Tensor:
        return self.energy(prediction, x) + self.log_partition(pack(x)[0].numel())

    @override
    def energy(self, prediction: Prediction, x: Tensor) -> Tensor:
        return laplace_energy(pack(prediction.mean) - pack(x), self.variance)

    @override
    def log_partition(self, numel: int) -> Tensor:
        return laplace_log_partition(numel * self.bounded_log_sigma, numel)

    @override
    def sample(self, prediction: Prediction, generator: torch.Generator | None = None) -> Tensor:
        mean = pack(prediction.mean)
        # The difference of two exponential numbers.
        noise = _uniform(mean, generator).log() - _uniform(mean, generator).log()
        return unpack(mean + self.sigma / math.sqrt(2) * noise, is_complex=prediction.mean.is_complex())


class DiscretizedLikelihood(_OneSigma):
    """Probabilities of discrete values, such as 8-bit pixels: a logistic density, collected in bins.

    ``nll / (numel · ln 2)`` are bits per dimension, without noise added to the data. Values are ``levels`` numbers
    at equal distances; what lies between is taken for the nearest one, what lies outside for the first or the last.
    The decoded signal may run beyond them where a first or last value is certain: clamp it to look at it.

    Args:
        sigma: Standard deviation of the logistic density in the data's units, from 1e-4 to 100, or ``"learned"``,
            which starts at 0.1.
        levels: Number of values.
        range: The first and the last of them: 8-bit pixels scaled to [-1, 1] have ``levels=256, range=(-1, 1)``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If sigma is out of range, there are not two levels, or the range is empty.

    >>> likelihood = DiscretizedLikelihood(0.1, levels=3)
    >>> values = torch.tensor([-1.0, 0.0, 1.0]).reshape(3, 1, 1)
    >>> torch.exp(-likelihood.nll(Prediction([], torch.full((3, 1, 1), 0.4)), values)).sum()
    tensor(1.)
    """

    complex_signals: ClassVar[bool] = False

    def __init__(
        self,
        sigma: float | Literal["learned"] = _FIRST_SIGMA,
        *,
        levels: int = 256,
        range: tuple[float, float] = (-1.0, 1.0),
    ) -> None:
        super().__init__(sigma)
        self.levels = check_integer("levels", levels, 2)
        if not isinstance(range, (tuple, list)) or len(range) != 2 or not all(is_number(v) for v in range):
            raise TypeError(f"range must be two numbers, got {shown(range)}")
        low, high = map(float, range)
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"range must go from a finite number to a larger one, got {range}")
        self.range = (low, high)
        self.bin_width: float = (high - low) / (self.levels - 1)

    @override
    def nll(self, prediction: Prediction, x: Tensor) -> Tensor:
        index = ((x.detach() - self.range[0]) / self.bin_width).round().clamp(0, self.levels - 1)
        # Bins in units of the logistic density's scale, √3 σ / π.
        unit = math.sqrt(3) / math.pi * self.sigma
        error = self.range[0] + self.bin_width * index - prediction.mean
        half = 0.5 * self.bin_width / unit
        middle = error / unit
        # σ(a) − σ(b) = σ(a) σ(−b) (1 − e^{b−a}), where no factor is lost to rounding.
        below, above = F.softplus(-(middle + half)), F.softplus(middle - half)
        first, last = index == 0, index == self.levels - 1
        inside = torch.log(-torch.expm1(-2 * half))
        nats = torch.where(last, 0, below) + torch.where(first, 0, above) - torch.where(first | last, 0, inside)
        return nats.flatten(1).sum(1)

    @override
    def sample(self, prediction: Prediction, generator: torch.Generator | None = None) -> Tensor:
        mean = prediction.mean
        noise = math.sqrt(3) / math.pi * torch.logit(_uniform(mean, generator))
        index = ((mean + self.sigma * noise - self.range[0]) / self.bin_width).round().clamp(0, self.levels - 1)
        return self.range[0] + self.bin_width * index

    @override
    def config(self) -> dict[str, Any]:
        return {"sigma": self.given_sigma, "levels": self.levels, "range": list(self.range)}


LIKELIHOODS: dict[str, type[Likelihood]] = {
    kind.__name__: kind for kind in (GaussianLikelihood, LaplaceLikelihood, DiscretizedLikelihood)
}


def likelihood_of(sigma: float | Literal["learned"] | None, given: object, is_complex: bool) -> Likelihood:
    """The likelihood that was given, as a copy, or the Gaussian of a standard deviation.

    Raises:
        TypeError: If it is no likelihood, or sigma no number.
        ValueError: If both are given, sigma is out of range, or the likelihood is not for complex signals.
    """
    if given is None:
        return GaussianLikelihood() if sigma is None else GaussianLikelihood(sigma)
    if not isinstance(given, Likelihood):
        raise TypeError(f"likelihood must be a Likelihood, got {came(given)}")
    if sigma is not None:
        raise ValueError(
            "sigma is short for likelihood=GaussianLikelihood(sigma): give one of them, "
            f"got sigma={shown(sigma)} and a {type(given).__name__}"
        )
    if is_complex and not given.complex_signals:
        raise ValueError(f"{type(given).__name__} is for real signals, got a decomposition of complex ones")
    return deepcopy(given)


def warn_of_sigma(least: float, most: float, deviation: float, count: int) -> None:
    r"""Warn if the likelihood's deviation hides all that signals have to say, or hangs on their every trifle.

    Against the mean signal m, whatever latents say can raise log p(x | z) by no more than E ‖x − m‖² / 2σ² nats on
    average, which they have to pay for with their KL: where it is a few nats, none will be used. To hide what signals
    say, σ has to be ten times their own deviation, *and* leave less than ten nats for a whole signal: a few bright
    points on black, or one smooth offset, deviate little on average and can be learnt all the same. Below a
    two-hundredth of the signals' own, it is finer than half a grey level of most 8-bit images.

    Args:
        least: Least standard deviation of the likelihood: it may be learned.
        most: Greatest standard deviation of the likelihood.
        deviation: Root mean square of signals around their mean.
        count: Real numbers of a signal.
    """
    worth = 0.5 * count * (deviation / least) ** 2
    if 0 < _FAR_ABOVE * deviation < least and worth < _WORTH_LEARNING:
        warnings.warn(
            f"sigma is {least:.2g}, but the data deviate from their mean by only {deviation:.2g}: latents could tell "
            f"at most {worth:.2g} nats of a signal, so that next to nothing will be learnt; rescale the data to a "
            "deviation near 1, or pass a smaller sigma, a tenth of their deviation to begin with",
            stacklevel=4,
        )
    if most * _FAR_BELOW < deviation:
        warnings.warn(
            f"sigma is {most:.2g}, but the data deviate from their mean by {deviation:.2g}: errors of a tenth of that "
            f"cost {0.5 * (0.1 * deviation / most) ** 2:.2g} nats in each dimension, beside which the KL, and so the "
            "priors, hardly count; rescale the data to a deviation near 1, or pass a larger sigma, a tenth of their "
            "deviation to begin with",
            stacklevel=4,
        )


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers in (0, 1) like a tensor's."""
    device = like.device if generator is None else generator.device
    drawn = torch.rand(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)
    tiny = torch.finfo(like.dtype).eps / 2
    return drawn.clamp(tiny, 1 - tiny)


def _exact(number: float) -> Tensor:
    """A scalar of the default dtype, in float32 at least."""
    return torch.tensor(number, dtype=widen(torch.empty(0)).dtype)
