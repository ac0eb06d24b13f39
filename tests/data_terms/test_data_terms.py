"""Data terms against dense linear algebra and the densities of torch.distributions."""

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Laplace, Normal, Poisson
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from separable_hvae import (
    HVAE,
    FFT1Real,
    FFT2Complex,
    FFT2Real,
    GaussianNoise,
    Identity,
    KnownBands,
    LaplaceNoise,
    Measurement,
    Noise,
    PoissonNoise,
    Signal,
    Wavelet1,
    Wavelet2,
    masks_of,
)
from separable_hvae.data_terms.gaussian_inference import covariance, white
from separable_hvae.data_terms.operator import Operator, condition, inner
from separable_hvae.data_terms.physics import noise_of
from separable_hvae.data_terms.signal import Distance, LossName
from separable_hvae.decompositions.base import Decomposition
from tests.helpers.zoo import Pyramid, random_bands, signal

Array = np.ndarray[Any, np.dtype[np.float64]]


def tiny(decomp: Decomposition, sigma: float = 0.3) -> HVAE:
    """A calibrated float64 model."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"layers": 1, "width": 4, "bottleneck": 2, "blocks": 0, "latent_channels": 4}
    model = HVAE(decomp, sigma=sigma, **options).double().eval()
    scales = torch.linspace(2, 0.5, math.prod(decomp.size), dtype=torch.float64).reshape(decomp.size)
    model.calibrate(scales * signal(decomp, 40, seed=7) + 0.5)
    return model


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64) / math.sqrt(columns)


def dense(a: Tensor) -> Callable[[Tensor], Tensor]:
    """The operator of a matrix on flattened signals."""
    return lambda x: x.flatten(1) @ a.T


# Noise.


@pytest.mark.parametrize(
    ("noise", "density"),
    [
        (GaussianNoise(0.7), lambda m: Normal(m, 0.7)),
        (LaplaceNoise(0.7), lambda m: Laplace(m, 0.7 / math.sqrt(2))),
        (PoissonNoise(1.0), lambda m: Poisson(m)),
    ],
    ids=["gaussian", "laplace", "poisson"],
)
def test_noise_is_a_log_density_up_to_constants(noise: Noise, density: Callable[[Tensor], Any]) -> None:
    y = torch.tensor([[0.0, 1.0, 5.0], [2.0, 3.0, 4.0]])
    one, other = torch.full_like(y, 0.8), torch.tensor([[0.3, 2.0, 6.0], [1.5, 3.0, 2.0]])
    spread = torch.zeros(())
    found = noise.misfit(one, y, spread) - noise.misfit(other, y, spread)
    wanted = (density(other).log_prob(y) - density(one).log_prob(y)).sum(1)
    torch.testing.assert_close(found, wanted)
    drawn = density(torch.full((200_000,), 2.0)).sample()
    torch.testing.assert_close(noise.variance(torch.tensor([2.0])).reshape(()), drawn.var(), rtol=0.02, atol=0)


def test_counts_scale_with_their_gain_and_stay_finite_below_zero() -> None:
    y, predicted = torch.tensor([[4.0, 0.0]]), torch.tensor([[2.0, 1.0]])
    torch.testing.assert_close(
        PoissonNoise(0.5).misfit(0.5 * predicted, 0.5 * y, torch.zeros(())),
        PoissonNoise(1.0).misfit(predicted, y, torch.zeros(())),
    )
    at = torch.tensor([[-3.0, -3.0]], requires_grad=True)
    misfit = PoissonNoise(1.0).misfit(at, y, torch.zeros(()))
    (slope,) = torch.autograd.grad(misfit.sum(), at)
    assert torch.isfinite(misfit).all()
    assert slope[0, 0] < 0


def test_spread_adds_to_the_variance() -> None:
    y, at = torch.zeros(1, 2), torch.ones(1, 2)
    spread = torch.tensor([[0.75, 0.0]])
    torch.testing.assert_close(GaussianNoise(0.5).misfit(at, y, spread), torch.tensor([0.5 / 1.0 + 0.5 / 0.25]))


@pytest.mark.parametrize("kind", [GaussianNoise, LaplaceNoise, PoissonNoise])
@pytest.mark.parametrize(("value", "error"), [(-1.0, ValueError), (math.inf, ValueError), ("loud", TypeError)])
def test_noise_refuses(kind: type[GaussianNoise], value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"sigma|gain"):
        kind(value)


def test_counts_are_real_and_not_negative() -> None:
    with pytest.raises(ValueError, match="must not be negative under PoissonNoise, got a least value of -1"):
        Measurement(torch.tensor([[-1.0]]), lambda x: x, PoissonNoise(1.0))
    with pytest.raises(TypeError, match=r"real measurements, got y of torch.complex64"):
        Measurement(torch.ones(1, 1, dtype=torch.complex64), lambda x: x, PoissonNoise(1.0))


# Operators.


def test_autograd_gives_the_adjoint() -> None:
    a, y = matrix(5, 12), matrix(3, 5, seed=1)
    like = torch.zeros(3, 2, 6, dtype=torch.float64)
    found = Operator(dense(a)).transposed(y, like, ())
    torch.testing.assert_close(found.flatten(1), y @ a)


def test_autograd_gives_the_adjoint_of_complex_and_of_stacked_operators() -> None:
    a = torch.complex(matrix(5, 6), matrix(5, 6, seed=2))
    y, like = torch.complex(matrix(2, 5), matrix(2, 5, seed=3)), torch.zeros(2, 1, 6, dtype=torch.complex128)
    found = Operator(dense(a)).transposed(y, like, ())
    torch.testing.assert_close(found.flatten(1), y @ a.conj())
    real = matrix(4, 12)
    stacked, z = Operator(dense(real), stacked=True), matrix(2, 4, seed=5)
    back = stacked.transposed(z, like, ())
    assert back.dtype == torch.complex128
    x = torch.complex(matrix(2, 6), matrix(2, 6, seed=4))[:, None]
    torch.testing.assert_close(inner(back, x), inner(z, stacked.predict(x, z, ())))


def test_a_wrong_adjoint_is_refused_with_the_mismatch() -> None:
    a, like, y = matrix(6, 6), torch.zeros(2, 1, 6, dtype=torch.float64), torch.zeros(2, 6, dtype=torch.float64)
    Operator(dense(a), lambda y: (y @ a)[:, None]).require_laws(like, y, ())
    with pytest.raises(ValueError, match=r"adjoint is not the operator's.* differ by \d\.\d+ of"):
        Operator(dense(a), lambda y: (y @ a.T)[:, None]).require_laws(like, y, ())


def test_an_operator_that_is_not_linear_is_refused_and_an_offset_is_not() -> None:
    like, y = torch.zeros(2, 1, 6, dtype=torch.float64), torch.zeros(2, 1, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"not linear: .* by \d.*start="):
        Operator(torch.square).require_laws(like, y, ())
    Operator(lambda x: 2 * x + 3).require_laws(like, y, ())


@pytest.mark.parametrize(
    ("forward", "adjoint", "error", "message"),
    [
        (lambda x: x[:, :, :3], None, ValueError, r"gives shape \(2, 1, 3\) for signals \(2, 1, 6\), but y has"),
        (lambda x: torch.fft.fft(x), None, TypeError, "gives torch.complex128 .* but y is torch.float64"),
        (lambda x: torch.ones(2, 5) @ x, None, TypeError, r"operator cannot take torch.float64 \(2, 1, 6\)"),
        (lambda x: x.tolist(), None, TypeError, "operator must give a tensor, got list"),
        (lambda x: x.detach(), None, TypeError, "not differentiable"),
        (lambda x: x, lambda y: y[:, 0], ValueError, r"adjoint must give signals of shape \(2, 1, 6\), got \(2, 6\)"),
        (lambda x: x, lambda y: y + 0j, TypeError, "adjoint must give torch.float64 signals, got torch.complex128"),
    ],
)
def test_operators_refuse(forward: Any, adjoint: Any, error: type[Exception], message: str) -> None:
    like, y = torch.zeros(2, 1, 6, dtype=torch.float64), torch.zeros(2, 1, 6, dtype=torch.float64)
    with pytest.raises(error, match=message):
        Operator(forward, adjoint).require_laws(like, y, ())


def test_gain_is_the_eigenvalue_of_averages() -> None:
    like, y = torch.zeros(2, 1, 8, dtype=torch.float64), torch.zeros(2, 1, 2, dtype=torch.float64)
    gain = Operator(lambda x: x.unflatten(2, (2, 4)).mean(3)).gain(like, y, ())
    torch.testing.assert_close(gain, torch.full((2, 1, 1), 0.25, dtype=torch.float64))


def test_conditioning_is_the_mean_of_a_conditional_gaussian() -> None:
    a, root, mean, y = matrix(4, 6), matrix(6, 6, seed=1), matrix(3, 6, seed=2), matrix(3, 4, seed=3)
    c = root @ root.T
    found = condition(
        mean[:, None],
        lambda x: x @ c,
        Operator(dense(a)),
        y,
        (),
        torch.tensor(0.2, dtype=torch.float64),
        tolerance=1e-10,
    )
    gain = c @ a.T @ torch.linalg.inv(a @ c @ a.T + 0.2 * torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(found[:, 0], mean + (y - mean @ a.T) @ gain.T)


# Known bands.


def test_known_coefficients_are_compared_and_the_rest_is_ignored() -> None:
    decomp = Wavelet1(8, "haar", 1)
    model, target, found = tiny(decomp), random_bands(decomp, seed=1), random_bands(decomp, seed=2)
    mask = torch.tensor([[True, False, True, True]])
    known = KnownBands([None, target[1], None, torch.where(mask, target[3], math.nan)], [None, None, None, mask], 0.4)
    bound = known.bind(model, model.observe(known.guess(model)))
    variance = 0.3**2 + 0.4**2
    kept = (found[1] - target[1]).square().flatten(1).sum(1) / (2 * variance)
    part = ((found[3] - target[3]) * mask).square().flatten(1).sum(1) / (2 * variance)
    parts = bound.misfit.total(found, bound.data)
    assert [scale for scale, _ in parts] == [2, 8]
    torch.testing.assert_close([d for _, d in parts], [kept, part])
    for i, wanted in enumerate([torch.zeros(2).double(), kept, torch.zeros(2).double(), part]):
        torch.testing.assert_close(bound.misfit.local(i, found[i], bound.target(i, [None] * 4)), wanted)


def test_known_bands_of_another_kind_are_another_misfit() -> None:
    x = torch.ones(2, 1, 8, dtype=torch.float64)
    misfits = []
    for name in ("haar", "haar", "db2"):
        model = tiny(Wavelet1(8, name, 1))
        known = KnownBands.of(x, model.decomp, until=4)
        misfits += [known.bind(model, model.observe(x)).misfit for _ in range(2)]
    assert misfits[::2] == misfits[1::2]
    assert len(set(misfits)) == 3


def test_the_encoder_sees_known_coefficients_and_means() -> None:
    model, x = tiny(FFT2Real(4, 1)), signal(FFT2Real(4, 1))
    guess = KnownBands.of(x, model.decomp, until=2).guess(model)
    bands, known = model.decomp.analysis(guess), model.decomp.analysis(x)
    torch.testing.assert_close(bands[:2], known[:2])
    torch.testing.assert_close(bands[2], model.subsets[2].centre.expand_as(bands[2]))


def test_a_k_space_mask_is_a_mask_of_fourier_bands_alone() -> None:
    columns = torch.tensor([1.0, 1, 0, 0, 1, 0, 1, 0], dtype=torch.float64)

    def project(x: Tensor) -> Tensor:
        kept: Tensor = torch.fft.ifft2(torch.fft.fft2(x) * columns)
        return kept

    decomp = FFT2Complex(8)
    masks = masks_of(decomp, project)
    x = signal(decomp)
    kept = [torch.where(m, h, 0) for m, h in zip(masks, decomp.analysis(x), strict=True)]
    torch.testing.assert_close(decomp.synthesis(kept), project(x))
    with pytest.raises(ValueError, match=r"Wavelet2: it mixes them, with a relative error of 0\.\d+; use Measurement"):
        masks_of(Wavelet2(8, "haar", 1, is_complex=True), project)


def test_exact_bands_are_put_back_and_noisy_ones_averaged() -> None:
    model, (x, decoded) = tiny(FFT1Real(8)), (signal(FFT1Real(8), seed=i) for i in (1, 2))
    exact = KnownBands.of(x, model.decomp, until=4)
    bands = model.decomp.analysis(exact.correct(model, decoded))
    torch.testing.assert_close(bands[:3], model.decomp.analysis(x)[:3])
    torch.testing.assert_close(bands[3], model.decomp.analysis(decoded)[3])
    noisy = KnownBands([model.decomp.analysis(x)[0]], sigma=0.3).correct(model, decoded)
    both = (model.decomp.analysis(x)[0] + model.decomp.analysis(decoded)[0]) / 2
    torch.testing.assert_close(model.decomp.analysis(noisy)[0], both)


@pytest.mark.parametrize(
    ("bands", "masks", "error", "message"),
    [
        ([None], None, ValueError, "nothing is known"),
        ([torch.ones(2, 1, 1), torch.ones(3, 1, 1)], None, ValueError, r"one batch size, got \[2, 3\]"),
        ([torch.ones(2, 1, 1)], [None, None], ValueError, "one entry for each of the 1 bands, got 2"),
        ([torch.ones(2, 1, 1)], [torch.ones(2)], TypeError, r"masks\[0\] must be a bool tensor, got torch.float32"),
        (
            [torch.ones(2, 1, 1)],
            [torch.ones(3, 1, 1) > 0],
            ValueError,
            r"masks\[0\] must broadcast to .* got \(3, 1, 1\)",
        ),
        (
            [None, torch.ones(2, 1, 1)],
            [torch.ones(1) > 0, None],
            ValueError,
            r"masks\[0\] is given for a band that is not",
        ),
    ],
)
def test_known_bands_refuse(bands: Any, masks: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        KnownBands(bands, masks)


def test_known_bands_need_a_model_they_fit() -> None:
    with pytest.raises(ValueError, match=r"Pyramid is not orthonormal.*use Measurement"):
        KnownBands([torch.ones(1, 1, 1)]).guess(tiny(Pyramid((4,), 1)))
    with pytest.raises(ValueError, match="the band at scale 1 must have shape"):
        KnownBands([torch.ones(1, 3)]).guess(tiny(FFT1Real(4)))
    with pytest.raises(ValueError, match="known of the band at scale 1 must be finite"):
        KnownBands([torch.full((1, 1, 1), math.nan)]).guess(tiny(FFT1Real(4)))


# Measurements.


def measured(decomp: Decomposition, rows: int = 5, sigma: float = 0.2) -> tuple[HVAE, Measurement, Tensor]:
    """A model, measurements by a matrix with orthonormal rows, and the matrix."""
    a = torch.linalg.qr(matrix(decomp.numel, rows))[0].T
    return tiny(decomp), Measurement(matrix(2, rows, seed=9), dense(a), sigma), a


def test_the_whole_misfit_is_the_likelihood_of_what_was_measured() -> None:
    model, term, a = measured(Wavelet1(8, "db2", 1))
    bands = random_bands(model.decomp)
    bound = term.bind(model, model.observe(term.guess(model)))
    ((scale, found),) = bound.misfit.total(bands, bound.data)
    predicted = model.decomp.synthesis(bands).flatten(1) @ a.T
    # The rows are orthonormal, so σ² A Aᵀ + σ_n² is a number.
    wanted = (predicted - term.y).square().sum(1) / (2 * (0.3**2 + 0.2**2))
    assert scale == 8
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("decomp", [FFT1Real(8), Pyramid((8,), 1)], ids=["fourier", "pyramid"])
def test_a_subset_sees_what_the_others_leave(decomp: Decomposition) -> None:
    model, term, _ = measured(decomp)
    bands = random_bands(model.decomp)
    bound = term.bind(model, model.observe(term.guess(model)))
    ((_, whole),) = bound.misfit.total(bands, bound.data)
    for i, band in enumerate(bands):
        torch.testing.assert_close(bound.misfit.local(i, band, bound.target(i, bands)), whole)


def test_unknown_bands_widen_the_variance() -> None:
    model, term, a = measured(FFT1Real(8), sigma=0.0)
    bands = random_bands(model.decomp)
    bound = term.bind(model, model.observe(term.guess(model)))
    others, y, spread = bound.target(1, [bands[0], None, None, None])
    means = [subset.centre.expand_as(h) for subset, h in zip(model.subsets, bands, strict=True)]
    filled = [bands[0], torch.zeros_like(bands[1]), *means[2:]]
    torch.testing.assert_close(others, model.decomp.synthesis(filled))
    torch.testing.assert_close(y, term.y)
    covariance = torch.zeros(8, 8, dtype=torch.float64)
    for i in (2, 3):
        alone: list[Tensor | None] = [None] * 4
        alone[i] = torch.eye(bands[i].shape[2], dtype=torch.float64)[:, None]
        basis = model.decomp.synthesis(alone).flatten(1)
        covariance += float(model.subsets[i].unit) ** 2 * basis.T @ basis
    wanted = 0.3**2 + (a @ covariance @ a.T).diagonal()
    # 32 draws know a variance to a quarter.
    assert ((spread[0] / wanted).log().abs() < 0.8).all()
    torch.testing.assert_close(spread[0], spread[1])


def test_the_encoder_sees_the_best_linear_estimate() -> None:
    model, term, a = measured(FFT1Real(8))
    eye = torch.eye(8, dtype=torch.float64)[:, None]
    bands = model.decomp.analysis(eye)
    units = [float(subset.unit) for subset in model.subsets]
    c = model.decomp.synthesis([u**2 * h for u, h in zip(units, bands, strict=True)]).flatten(1)
    mean = model.decomp.synthesis([s.centre[None] for s in model.subsets]).flatten(1)
    gain = c @ a.T @ torch.linalg.inv(a @ c @ a.T + 0.2**2 * torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(
        term.guess(model).flatten(1), mean + (term.y - mean @ a.T) @ gain.T, rtol=1e-3, atol=1e-3
    )


def test_the_encoder_may_see_the_pseudo_inverse() -> None:
    model, _, a = measured(FFT1Real(8))
    y = matrix(2, 5, seed=9)
    mean = model.decomp.synthesis([s.centre[None] for s in model.subsets]).flatten(1)
    found = Measurement(y, dense(a), 0.0, fill="mean").guess(model).flatten(1)
    torch.testing.assert_close(found, mean + (y - mean @ a.T) @ torch.linalg.pinv(a).T, rtol=1e-3, atol=1e-3)


def test_correction_is_the_mean_given_latents_and_draws_scatter_as_they_should() -> None:
    model, term, a = measured(FFT1Real(8))
    decoded = signal(model.decomp)
    v = 0.3**2
    gain = v * a.T @ torch.linalg.inv(v * a @ a.T + 0.2**2 * torch.eye(5, dtype=torch.float64))
    mean = decoded.flatten(1) + (term.y - decoded.flatten(1) @ a.T) @ gain.T
    torch.testing.assert_close(term.correct(model, decoded).flatten(1), mean, rtol=1e-3, atol=1e-3)
    index = torch.zeros(4000, dtype=torch.long)
    many = term.rows(index).correct(model, decoded[index], torch.Generator().manual_seed(0)).flatten(1)
    covariance = v * torch.eye(8, dtype=torch.float64) - gain @ a * v
    torch.testing.assert_close(many.mean(0), mean[0], atol=0.03, rtol=0)
    torch.testing.assert_close(torch.cov(many.T), covariance, atol=0.01, rtol=0)


def coils(x: Tensor, mask: Tensor, maps: Tensor) -> Tensor:
    y: Tensor = torch.fft.fft2(x * maps, norm="ortho") * mask
    return y


def test_several_coils_and_masks_that_differ_by_sample() -> None:
    decomp = FFT2Complex(6)
    model, x = tiny(decomp), signal(decomp, 3)
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(3, 1, 1, 6, generator=generator) < 0.5).double()
    maps = torch.randn(3, 4, 6, 6, generator=generator, dtype=torch.complex128)
    term = Measurement(coils(x, mask, maps), coils, 0.1, given=(mask, maps))
    guess = term.guess(model)
    bound = term.bind(model, model.observe(guess))
    ((_, exact),) = bound.misfit.total(decomp.analysis(x), bound.data)
    assert float(exact.max()) < 1e-9
    one = term.rows(torch.tensor([2]))
    torch.testing.assert_close(one.guess(model)[0], guess[2])
    bound_one = one.bind(model, model.observe(guess[2:]))
    bands = random_bands(decomp, 3)
    ((_, whole),), ((_, alone),) = (
        b.misfit.total([h[k:] for h in bands], b.data) for b, k in ((bound, 0), (bound_one, 2))
    )
    torch.testing.assert_close(alone[0], whole[2])


def test_misfits_with_equal_settings_are_equal() -> None:
    model, term, _ = measured(FFT1Real(8))
    seen = model.observe(term.guess(model))
    first, second = (term.rows(slice(0, n)).bind(model, seen).misfit for n in (2, 2))
    assert first == second
    assert hash(first) == hash(second)


def test_an_operator_that_is_not_linear_needs_a_start() -> None:
    y = torch.ones(2, 1, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="start must be given"):
        Measurement(y, torch.square, 0.1, linear=False)
    with pytest.raises(ValueError, match="positive standard deviation where the operator is not linear, got 0"):
        Measurement(y, torch.square, 0.0, linear=False, start=y)
    model, term = tiny(FFT1Real(4)), Measurement(y, torch.square, 0.5, linear=False, start=0.5 * y)
    torch.testing.assert_close(term.guess(model), 0.5 * y)
    bands = random_bands(model.decomp)
    bound = term.bind(model, model.observe(term.guess(model)))
    ((_, found),) = bound.misfit.total(bands, bound.data)
    # At 0.5 the derivative 2x is 1: the decoder's own σ adds its square.
    variance = 0.25 + float(model.sigma) ** 2
    wanted = (model.decomp.synthesis(bands).square() - y).square().flatten(1).sum(1) / (2 * variance)
    torch.testing.assert_close(found, wanted)
    with pytest.raises(ValueError, match="correct needs an operator that is linear"):
        term.correct(model, y)


def test_inference_mode_and_samples_of_which_nothing_is_known() -> None:
    model = tiny(FFT1Real(8))
    with torch.inference_mode():
        x, mask = signal(model.decomp), torch.tensor([1.0, 0.0]).double()[:, None, None].expand(2, 1, 8)
        term = Measurement(x * mask, lambda x, mask: x * mask, 0.0, given=[mask.clone()])
        guess, corrected = term.guess(model), term.correct(model, torch.zeros_like(x))
    torch.testing.assert_close(corrected, x * mask)
    mean = model.decomp.synthesis([subset.centre[None] for subset in model.subsets])
    torch.testing.assert_close(guess, torch.cat([x[:1], mean]))
    bound = term.bind(model, model.observe(guess.clone()))
    ((_, misfit),) = bound.misfit.total(model.decomp.analysis(guess), bound.data)
    torch.testing.assert_close(misfit, torch.zeros(2).double())


class Halves:
    """Blocks of two averaged: what is used of a deepinv physics, without deepinv."""

    def __init__(self, noise_model: object = None) -> None:
        self.noise_model = noise_model

    def A(self, x: Tensor) -> Tensor:  # noqa: N802
        y: Tensor = x.unflatten(2, (-1, 2)).mean(3)
        return y

    def A_adjoint(self, y: Tensor) -> Tensor:  # noqa: N802
        return y.repeat_interleave(2, 2) / 2


def noise_model(kind: str, **settings: object) -> object:
    return type(kind, (), settings)()


@pytest.mark.parametrize(
    ("model", "noise"),
    [
        (noise_model("ZeroNoise"), GaussianNoise(0.0)),
        (noise_model("GaussianNoise", sigma=torch.tensor([0.5])), GaussianNoise(0.5)),
        (noise_model("LaplaceNoise", b=0.5), LaplaceNoise(math.sqrt(0.5))),
        (noise_model("PoissonNoise", gain=torch.tensor(0.5), normalize=torch.tensor(True)), PoissonNoise(0.5)),
        (None, None),
    ],
)
def test_a_physics_brings_its_noise(model: object, noise: Noise | None) -> None:
    assert noise_of(Halves(model)) == noise


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (noise_model("GammaNoise"), "noise model GammaNoise that cannot be read"),
        (noise_model("PoissonNoise", gain=1.0, normalize=False), "PoissonNoise with normalize=True"),
        (
            noise_model("GaussianNoise", sigma=torch.tensor([0.5, 0.25])),
            r"one sigma for all samples, got \[0.5, 0.25\]",
        ),
    ],
)
def test_a_physics_with_other_noise_is_refused(model: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        noise_of(Halves(model))


def test_a_physics_is_an_operator() -> None:
    model, x = tiny(FFT1Real(8)), signal(FFT1Real(8))
    physics = Halves(noise_model("GaussianNoise", sigma=0.1))
    term, plain = Measurement(physics.A(x), physics), Measurement(physics.A(x), physics.A, 0.1)
    torch.testing.assert_close(term.guess(model), plain.guess(model))
    alone = Measurement(physics.A(x), SimpleNamespace(A=physics.A), 0.1)
    assert (term.operator.adjoint, alone.operator.adjoint) == (physics.A_adjoint, None)
    torch.testing.assert_close(alone.guess(model), plain.guess(model))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (
            (torch.ones(2, 3), torch.square, 0.1),
            {"fill": "nothing"},
            ValueError,
            r"fill must be one of .* got 'nothing'",
        ),
        (([1.0], torch.square, 0.1), {}, TypeError, "y must be a real or complex tensor, got list"),
        ((torch.ones(2, 3, dtype=torch.int64), torch.square, 0.1), {}, TypeError, "got torch.int64"),
        ((torch.ones(()), torch.square, 0.1), {}, ValueError, "at least one sample, batch first"),
        ((torch.tensor([[math.nan]]), torch.square, 0.1), {}, ValueError, "y must be finite"),
        ((torch.ones(2, 3), 5, 0.1), {}, TypeError, "operator must be a callable or have a method A, got int"),
        ((torch.ones(2, 3), torch.square), {}, TypeError, "noise must be a Noise or a standard deviation"),
        ((torch.ones(2, 3), torch.square, 0.1), {"given": (torch.ones(3),)}, ValueError, r"given\[0\] .* 2 samples"),
    ],
)
def test_measurements_refuse(
    arguments: Sequence[Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Measurement(*arguments, **options)


def test_measurements_need_a_model_they_fit() -> None:
    model, real = tiny(FFT2Complex(4)), torch.ones(1, 1, 2, 2, dtype=torch.float64)
    pooled = Measurement(real, lambda x: torch.nn.functional.avg_pool2d(x, 2), 0.1)
    with pytest.raises(TypeError, match=r"cannot take torch.complex128.*needs stacked=True"):
        pooled.guess(model)
    with pytest.raises(TypeError, match=r"gives torch.complex128 .* but y is torch.float64"):
        Measurement(torch.ones(1, 1, 4, 4), lambda x: 2 * x, 0.1).guess(model)
    with pytest.raises(ValueError, match=r"operator gives shape \(1, 1, 4\)"):
        Measurement(torch.ones(1, 1, 5), lambda x: x, 0.1).guess(tiny(FFT1Real(4)))
    with pytest.raises(ValueError, match="start must hold 1 signals"):
        Measurement(torch.ones(1, 1, 4), lambda x: x, 0.1, start=torch.ones(2, 1, 4)).guess(tiny(FFT1Real(4)))


def test_rows_of_signals() -> None:
    x = signal(Identity((4,), 1), 3)
    torch.testing.assert_close(Signal(x).rows(torch.tensor([2, 0])).x, x[[2, 0]])


class Louder(Identity):
    """The signal itself in another unit: a band that is not orthonormal."""

    orthonormal = False
    factor = 10.0

    @override
    def analysis(self, x: Tensor) -> list[Tensor]:
        return [self.factor * h for h in super().analysis(x)]

    @override
    def synthesis(self, bands: Sequence[Tensor | None]) -> Tensor:
        return super().synthesis([None if h is None else h / self.factor for h in bands])

    @override
    def project(self, scale: int, x: Tensor) -> Tensor:
        return self.analysis(x)[self.band_index(scale)]


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_the_unit_of_bands_changes_nothing(loss: LossName) -> None:
    loud, plain = (tiny(kind((8,), channels=2)).double() for kind in (Louder, Identity))
    x = 3 + 2 * signal(plain.decomp, 400)
    for model in (loud, plain):
        model.calibrate(x)
        centred = x - x.mean((0, 2), keepdim=True)
        torch.testing.assert_close(model.standardization.magnitude, centred.square().mean().sqrt())
    torch.testing.assert_close(white(loud, x[:3]), white(plain, x[:3]), rtol=0.3, atol=0)
    (target,), (band,) = plain.decomp.analysis(x[:3]), [torch.randn(3, 2, 8, dtype=torch.float64)]
    terms = [Signal(x[:3], loss).bind(model, model.observe(x[:3])) for model in (loud, plain)]
    local = [term.misfit.local(0, f * band, term.target(0, [])) for term, f in zip(terms, (10, 1), strict=True)]
    total = [term.misfit.total([f * band], term.data)[0][1] for term, f in zip(terms, (10, 1), strict=True)]
    for found in (*local, *total):
        torch.testing.assert_close(found, Distance(loss)(band, target, plain.sigma.square()))


class NoReading(TorchDispatchMode):
    """Numbers of tensors stay where they are: reading one waits for an accelerator."""

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_measurements_are_compared_without_reading_numbers() -> None:
    model = tiny(Wavelet1(8, "db2"))
    x = signal(model.decomp, 3)
    term = Measurement(x[..., ::2], lambda x: x[..., ::2], 0.1)
    seen = model.observe(x)
    with NoReading():  # type: ignore[no-untyped-call]
        covariance(model, x)
        white(model, x)
        bound = term.bind(model, seen)
        for index, band in enumerate(bands := model.decomp.analysis(x)):
            known = [*bands[:index], *[None] * (len(bands) - index)]
            bound.misfit.local(index, band, bound.targets(index, known, bound.data))
