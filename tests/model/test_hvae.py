import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, cast

import numpy as np
import pytest
import pywt
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from separable_hvae import (
    HVAE,
    FFT1Complex,
    FFT1Real,
    FFT2Complex,
    FFT2Real,
    FFT3Complex,
    GaussianLikelihood,
    Identity,
    LaplaceLikelihood,
    Result,
    Wavelet1,
    Wavelet2,
)
from separable_hvae.distributions import Prediction
from separable_hvae.functional import resample
from tests.helpers.models import layer_passes, seeded, tiny, units
from tests.helpers.zoo import OWN, SMALL, Make, rings, signal


def nll(model: HVAE, mean: Tensor, x: Tensor) -> Tensor:
    """``−log p(x | z)`` where latents decode to a mean."""
    return model.likelihood.nll(Prediction([], mean), x)


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    two: Any = np.int64(2)
    numbers: dict[str, Any] = {"width": 4 * two, "bottleneck": 2 * two, "blocks": np.int8(0), "sigma": np.float32(0.25)}
    size, scales = (cast(Any, np.array(values)) for values in ([8, 8], [1, 4, 8]))
    decomp = FFT2Real(size, channels=two, scales=scales)
    stacks: list[tuple[Any, Any]] = [(two, 2), (np.array([1, 2, 1]), [1, 2, 1]), ([two, 1, 2], [2, 1, 2])]
    for layers, plain in stacks:
        model = HVAE(decomp, layers=layers, latent_channels=two, **numbers)
        assert (model.decomp.size, model.decomp.channels, model.scales) == ((8, 8), 2, (1, 4, 8))
        assert model.config["layers"] == plain
        assert all(type(v) in (int, float, bool, str, list, NoneType) for v in model.config.values())
        model.save_pretrained(tmp_path)
        assert HVAE.from_pretrained(tmp_path).config == model.config
    model = HVAE(decomp, scales=scales[1:], layers=1, **numbers)
    assert model.scales == (4, 8)
    drawn = model.sample(two, temperature=cast(Any, np.float32(0.5)))
    assert drawn.shape == (2, 2, 8, 8)
    assert len(model.decode(model.encode(drawn).latents, until=two * two).bands) == 1
    assert Identity(two, two).size == (2, 2)


ROOM: dict[str, tuple[Callable[[Tensor], Tensor], Any]] = {
    "images": (lambda x: 0.5 * x, 0.1),
    "large numbers": (lambda x: 100 * x, 1.0),
    "a tenth of sigma": (lambda x: 0.011 * x, 0.1),
    "one smooth offset": (lambda x: 0.02 * x[..., :1, :1].expand_as(x), 0.25),
    "a few bright points": (lambda x: 1.0 * (x > 3.4), 0.2),
    "one signal": (lambda x: x[:1], 0.1),
    "nothing but a mean": (lambda x: 0 * x + 3, 0.1),
    "learned": (lambda x: 1e-4 * x, "learned"),
}


@pytest.mark.parametrize(("make", "sigma"), ROOM.values(), ids=ROOM)
def test_ordinary_data_are_calibrated_without_a_word(make: Callable[[Tensor], Tensor], sigma: Any) -> None:
    model = tiny(FFT2Real(64, channels=1, scales=[4, 64]), sigma=sigma)
    model.calibrate(make(torch.randn(48, 1, 64, 64, generator=seeded())).split(20))


NO_ROOM: dict[str, tuple[Callable[[Tensor], Tensor], Any]] = {
    "raw magnetic resonance": (lambda x: 1e-5 * (x + 3), 0.1),
    "tiny": (lambda x: 1e-3 * x, 0.1),
    "a huge sigma": (lambda x: x, 100.0),
    "learned": (lambda x: 1e-6 * x, "learned"),
}


@pytest.mark.parametrize(("make", "sigma"), NO_ROOM.values(), ids=NO_ROOM)
@pytest.mark.parametrize("kind", [FFT2Real, FFT2Complex])
def test_a_sigma_far_above_the_data_is_named(kind: Any, make: Callable[[Tensor], Tensor], sigma: Any) -> None:
    parts = make(torch.randn(48, 2, 64, 64, generator=seeded()))
    is_complex = kind is FFT2Complex
    x = torch.complex(parts[:, :1], parts[:, 1:]) if is_complex else parts[:, :1]
    model = tiny(kind(64, channels=1, scales=[4, 64]), sigma=sigma)
    # As real numbers: the parts of complex ones deviate apart.
    offsets = torch.view_as_real(x - x.mean(0)) if is_complex else x - x.mean(0)
    numbers = 1e-4 if sigma == "learned" else sigma, float(offsets.double().square().mean().sqrt())
    named = "sigma is {:.2g}, but the data deviate from their mean by only {:.2g}: ".format(*numbers)
    with pytest.warns(UserWarning, match=re.escape(named) + ".*rescale the data .* or pass a smaller sigma") as warned:
        model.calibrate(x.split(20))
    assert [w.filename for w in warned] == [__file__]


@pytest.mark.parametrize("scale", [64.0, 6.0])
def test_a_sigma_far_below_the_data_is_named(scale: float) -> None:
    x = scale * torch.randn(48, 1, 8, generator=seeded()) + 2 * scale
    deviation = float((x - x.mean(0)).square().mean().sqrt())
    tiny(FFT1Real(8), sigma=0.1 if scale < 20 else "learned").calibrate(x)
    model = tiny(FFT1Real(8), sigma=0.1 * scale / 64)
    # What the model's own likelihood says of such an error.
    worth = float(nll(model, x + 0.1 * deviation, x).sub(nll(model, x, x)).mean()) / 8
    named = f"sigma is {0.1 * scale / 64:.2g}, but the data deviate from their mean by {deviation:.2g}: "
    with pytest.warns(UserWarning, match=f"{re.escape(named)}.* cost {re.escape(f'{worth:.2g}')} nats.* larger sigma"):
        model.calibrate(x)


def centres(model: HVAE) -> list[torch.Tensor]:
    """The mean of each band, coarse to fine."""
    return [subset.get_buffer("centre") for subset in model.subsets]


def spread(bands: "np.typing.NDArray[np.float64]") -> float:
    """Root mean square about the mean band."""
    return float(np.sqrt(np.square(bands - bands.mean(0)).mean()))


def real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


# Every decomposition, head and kind of evidence.


@pytest.mark.parametrize("band_input", [True, False])
@pytest.mark.parametrize("head", ["grid", "coefficient"])
@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_shapes_gradients_and_state(make: Make, head: str, band_input: bool) -> None:
    options: dict[str, Any] = {"head": head, "band_input": band_input, "sigma": "learned", "latent_channels": 2}
    model = tiny(make(), **options)
    decomp, x = model.decomp, signal(model.decomp, 3, torch.float32)
    result = model(x, seeded())
    assert result.reconstruction.shape == x.shape
    assert result.reconstruction.dtype == x.dtype
    assert [h.shape[1:] for h in result.bands] == list(decomp.band_shapes.values())
    assert model.depth == len(result.latents) == 2 * len(decomp.scales)
    assert [z.shape for z in result.latents] == [(3, 2, *decomp.grid(s)) for s in decomp.scales for _ in range(2)]
    assert [tuple(z.shape[1:]) for z in result.latents] == model.latent_shapes
    assert result.kl is not None
    assert result.data is not None
    assert result.kl.shape == (3, model.depth)
    assert bool((result.kl >= 0).all())
    assert result.nll.shape == result.data.shape == result.elbo.shape == (3,)
    assert result.history is None
    assert result.refused is None

    loss = model.loss(x, seeded())
    assert loss.shape == ()
    assert float(loss.detach()) == pytest.approx(float(-result.elbo.detach().mean()) / decomp.numel, rel=1e-5)
    loss.backward()
    # A constant picture holds nothing of a band without DC.
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name
        assert parameter.grad.any() or name.endswith("head.emit.bias"), name
    assert any(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if n.endswith("emit.bias"))

    other = tiny(make(), seed=1, **options)
    assert not torch.equal(other(x, seeded()).reconstruction, result.reconstruction)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x, seeded()).reconstruction, result.reconstruction, rtol=0, atol=0)


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_elbo_and_nll_against_torch_distributions(make: Make) -> None:
    model = tiny(make(), sigma=0.3).double()
    x = signal(model.decomp)
    results: list[Result] = []
    steps = layer_passes(model, lambda: results.append(model(x, seeded())))
    result = results[0]
    assert len(steps) == model.depth
    kl, nll = [], torch.zeros(2, dtype=torch.float64)
    for step, z in zip(steps, result.latents, strict=True):
        assert step.posterior is not None
        p = Normal(step.prior.mean, step.prior.log_sigma.exp())
        q = Normal(step.posterior.mean, step.posterior.log_sigma.exp())
        kl.append(kl_divergence(q, p).flatten(1).sum(1))
        nll -= p.log_prob(z).flatten(1).sum(1)
    likelihood = Normal(real(result.reconstruction), 0.3).log_prob(real(x)).flatten(1).sum(1)
    assert result.kl is not None
    assert result.data is not None
    torch.testing.assert_close(result.kl, torch.stack(kl, dim=1))
    torch.testing.assert_close(result.nll, nll)
    torch.testing.assert_close(result.data, -likelihood, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.elbo, likelihood - torch.stack(kl, dim=1).sum(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_decoding_the_latents_of_a_pass_gives_it_back(make: Make) -> None:
    model = tiny(make())
    x = signal(model.decomp, dtype=torch.float32)
    result = model(x, seeded())
    again = model.decode(result.latents)
    torch.testing.assert_close(again.reconstruction, result.reconstruction, rtol=0, atol=1e-6)
    torch.testing.assert_close(again.nll, result.nll)
    assert again.kl is None
    assert again.data is None
    for i, s in enumerate(model.decomp.band_scales):
        partial = model.decode(result.latents, until=s)
        assert len(partial.bands) == i + 1
        torch.testing.assert_close(partial.reconstruction, model.decomp.synthesis(result.bands[: i + 1]))
        assert len(partial.latents) == model.layer_scales.index(s) + 2
    alone = model.decode([z[1:] for z in result.latents])
    torch.testing.assert_close(alone.reconstruction, result.reconstruction[1:], rtol=1e-4, atol=1e-5)


def test_partial_decoding_is_a_low_pass() -> None:
    """Stopping at scale ``s`` leaves the rings up to ``s``, computed with numpy."""
    model = tiny(FFT2Real((9, 12), channels=2, scales=[1, 2, 6, 12]))
    latents = model(signal(model.decomp, dtype=torch.float32)).latents
    masks = rings((9, 12), [1, 2, 6, 12])
    spectrum = np.fft.fft2(model.decode(latents).reconstruction.detach().numpy())
    for s in (1, 2, 6):
        low = np.fft.ifft2(spectrum * sum(m for t, m in masks.items() if t <= s)).real
        np.testing.assert_allclose(model.decode(latents, until=s).reconstruction.detach(), low, atol=1e-5)


def test_partial_decoding_runs_nothing_finer() -> None:
    model = tiny(FFT2Real(8))
    latents = [z.detach().requires_grad_() for z in model(signal(model.decomp, dtype=torch.float32)).latents]
    model.decode(latents, until=4).reconstruction.square().sum().backward()
    reached = [any(p.grad is not None for p in subset.parameters()) for subset in model.subsets]
    assert reached == [True, True, True, False]
    assert [z.grad is not None for z in latents] == [s <= 4 for s in model.layer_scales]


# Where latents come from.


def test_missing_latents_come_from_the_prior() -> None:
    model = tiny(FFT2Real(8, channels=1))
    z = [torch.randn(3, *shape) for shape in model.latent_shapes]
    mixed: list[Tensor | None] = [z[0], None, z[2]]
    results: list[Result] = []
    steps = layer_passes(model, lambda: results.append(model.decode(mixed, generator=seeded(5))))
    noise, generator = [], seeded(5)
    for i, (step, used) in enumerate(zip(steps, results[0].latents, strict=True)):
        assert step.posterior is None
        if i in (0, 2):
            torch.testing.assert_close(used, z[i], rtol=0, atol=0)
        else:
            noise.append(torch.randn(step.prior.mean.shape, generator=generator))
            expected = step.prior.mean + step.prior.log_sigma.exp() * noise[-1]
            torch.testing.assert_close(used, expected)
    assert len(noise) == model.depth - 2
    means = model.decode(mixed, temperature=0)
    assert torch.equal(means.reconstruction, model.decode(mixed, temperature=0).reconstruction)
    assert not torch.equal(means.reconstruction, model.decode(mixed).reconstruction)
    torch.testing.assert_close(means.reconstruction, model.decode(means.latents).reconstruction)


def test_an_untrained_prior_draws_standard_normals() -> None:
    model = tiny(Wavelet1(4), perturbed=False)
    for z in model.decode([torch.zeros(4000, 1, 1)], generator=seeded()).latents[1:]:
        z = z.detach()
        assert float(z.mean()) == pytest.approx(0, abs=0.06)
        assert float(z.std()) == pytest.approx(1, abs=0.05)


def test_samples() -> None:
    model = tiny(FFT2Complex(6))
    state = torch.get_rng_state()
    a, b, c = (model.sample(3, generator=seeded(seed)) for seed in (1, 1, 2))
    assert a.shape == (3, 1, 6, 6)
    assert a.dtype == torch.complex64
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), state)
    assert not a.requires_grad
    mean = model.sample(2, temperature=0)
    torch.testing.assert_close(mean[0], mean[1])
    torch.testing.assert_close(mean, model.sample(2, temperature=0))


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_inference_repeats_with_a_generator(make: Make) -> None:
    model = tiny(make())
    x = signal(model.decomp, dtype=torch.float32)
    state = torch.get_rng_state()
    a, b, c = (model(x, seeded(seed)).reconstruction for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(model.encode(x).reconstruction, model.encode(x).reconstruction)
    assert torch.equal(model.encode(x, temperature=1.0, generator=seeded(1)).reconstruction, a)
    assert torch.equal(torch.get_rng_state(), state)


def test_encode_takes_posterior_means() -> None:
    model = tiny(FFT2Real(8))
    x = signal(model.decomp, dtype=torch.float32)
    results: list[Result] = []
    steps = layer_passes(model, lambda: results.append(model.encode(x)))
    for step, z in zip(steps, results[0].latents, strict=True):
        assert step.posterior is not None
        assert torch.equal(z, step.posterior.mean)


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    model = tiny(Wavelet2(8, "db2"))
    x = signal(model.decomp, 4, torch.float32)
    torch.testing.assert_close(
        model.encode(x).reconstruction[2:3], model.encode(x[2:3]).reconstruction, rtol=1e-4, atol=1e-5
    )


# The hierarchy.


def test_layers_by_scale() -> None:
    model = tiny(FFT2Real(8), scales=[1, 4, 8], layers=[1, 2, 3])
    assert model.layer_scales == [1, 4, 4, 8, 8, 8]
    assert model.depth == 6
    assert [subset.scales for subset in model.subsets] == [(1,), (4, 4), (8, 8, 8)]
    assert model.decomp.scales == model.scales == (1, 4, 8)


def test_the_model_keeps_its_own_decomposition() -> None:
    decomp = FFT2Real(8)
    model = tiny(decomp, scales=[2, 8])
    assert decomp.scales == (1, 2, 4, 8)
    assert model.decomp is not decomp
    assert model.decomp.scales == (2, 8)


def test_the_one_subset_of_identity_is_the_whole_hierarchy() -> None:
    model = tiny(Identity(8), layers=[1, 2, 1, 2])
    (subset,) = model.subsets
    assert model.layer_scales == [1, 2, 2, 4, 8, 8]
    assert subset.scales == (1, 2, 2, 4, 8, 8)
    assert len(model(signal(model.decomp, dtype=torch.float32)).bands) == 1


def test_layers_of_a_scale_without_a_band_join_the_next() -> None:
    model = tiny(FFT2Real(8, scales=[1, 2, 3, 8]))
    assert [subset.scales for subset in model.subsets] == [(1, 1), (2, 2), (3, 3, 8, 8)]
    assert len(model(signal(model.decomp, dtype=torch.float32)).bands) == 3


def test_residual_branches_start_at_one_over_root_depth() -> None:
    """Quadrupling the layers halves the last convolutions of every residual branch."""
    few, many = (tiny(Wavelet1(4), layers=n, width=32, bottleneck=32, perturbed=False) for n in (1, 4))
    for module in ("encoder.scales.2.0", "subsets.2.layers.0.block", "subsets.2.head.blocks.0"):
        a, b = (model.get_parameter(f"{module}.leave.weight").detach() for model in (few, many))
        assert float(b.std() / a.std()) == pytest.approx(0.5, rel=0.15)
        a, b = (model.get_parameter(f"{module}.enter.weight").detach() for model in (few, many))
        assert float(b.std() / a.std()) == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize("make", OWN.values(), ids=OWN)
def test_posteriors_see_what_is_left_to_say(make: Make) -> None:
    """The target band in its unit, less what the head reads in the context; a picture of it."""
    model = tiny(make()).double()
    x = signal(model.decomp)
    for i, subset in enumerate(model.subsets):
        subset.get_buffer("unit").fill_(i + 1)
    looked: list[list[Tensor]] = [[] for _ in model.subsets]
    for subset, seen in zip(model.subsets, looked, strict=True):
        for layer in subset.layers:
            if layer.residual_conv is not None:
                layer.residual_conv.register_forward_pre_hook(lambda _module, inputs, seen=seen: seen.append(inputs[0]))
    with torch.no_grad():
        passes = model.decoder([None] * model.depth, len(x), model.observe(x), generator=seeded())
    decomp, bands = model.decomp, [step.band for step in passes]
    for i, (s, subset, step) in enumerate(zip(decomp.band_scales, model.subsets, passes, strict=True)):
        target = decomp.project(s, x - decomp.synthesis(bands[:i]) if i else x)
        contexts = [c for c, scale in zip(step.contexts, subset.scales, strict=True) if scale == s]
        assert len(looked[i]) == len(contexts)
        for picture, context in zip(looked[i], contexts, strict=True):
            context = resample(context, decomp.grid(s))
            left = target - (i + 1) * subset.head.read(context)
            expected = resample(decomp.to_grid(s, left), decomp.grid(s)) / (i + 1)
            torch.testing.assert_close(picture, expected)


def test_gradients_of_the_signals_against_finite_differences() -> None:
    model = tiny(FFT1Real(4, channels=2)).double().eval()
    x = signal(model.decomp, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model.encode(x).reconstruction, x)


def test_coarser_bands_get_no_gradient_from_what_they_leave() -> None:
    model = tiny(FFT1Real(4))
    coarse = model.encode(signal(model.decomp, dtype=torch.float32)).bands[:1]
    assert not model.decoder.target_of(1, signal(model.decomp, dtype=torch.float32), coarse).requires_grad


# Units.


def test_calibrate_against_pywavelets() -> None:
    model = tiny(Wavelet1(8, "db2", channels=2))
    x = 3 + torch.randn(40, 2, 8, generator=seeded()) * torch.linspace(0.1, 4, 8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Level value of")
        expected = pywt.wavedec(x.double().numpy(), "db2", mode="periodization", level=3)
    for data in (x, x.split(7), (batch for batch in x.split(16))):
        fresh = tiny(model.decomp)
        fresh.calibrate(data)
        np.testing.assert_allclose(units(fresh), [spread(h) for h in expected], rtol=1e-5)
        for centre, h in zip(centres(fresh), expected, strict=True):
            np.testing.assert_allclose(centre, h.mean(0), rtol=1e-4, atol=1e-5)


def test_calibrate_fourier_and_identity() -> None:
    x = 2 + 3 * torch.randn(30, 1, 8, 8, generator=seeded())
    dc, rest = x.sum((2, 3)).numpy() / 8, x.numpy() - x.numpy().mean((2, 3), keepdims=True)
    fourier, identity = tiny(FFT2Real(8, channels=1, scales=[1, 8])), tiny(Identity(8, channels=1))
    fourier.calibrate(x)
    identity.calibrate(x)
    assert units(identity)[0] == pytest.approx(spread(x.double().numpy()), rel=1e-5)
    assert units(fourier)[0] == pytest.approx(float(dc.std()), rel=1e-5)
    # Parseval: the ring has 63 coefficients, and the mean signal's ring is their mean.
    rest = rest - rest.mean(0)
    assert units(fourier)[1] == pytest.approx(math.sqrt((rest**2).sum() / (30 * 63)), rel=1e-5)


def test_bands_are_predicted_in_their_units() -> None:
    model = tiny(Wavelet2(8))
    latents = model(signal(model.decomp, dtype=torch.float32)).latents
    before = model.decode(latents).bands
    model.calibrate(5 * signal(model.decomp, 64, torch.float32))
    after = model.decode(latents).bands
    for h, centre, unit, changed in zip(before, centres(model), units(model), after, strict=True):
        assert unit == pytest.approx(5, rel=0.3)
        torch.testing.assert_close(changed, centre + h * unit)


def test_units_follow_the_first_training_batches() -> None:
    model = tiny(Identity((6,), channels=1))
    generator, batches = seeded(), []
    model.eval()(torch.randn(4, 1, 6))
    assert units(model)[0] == 1
    model.train()
    for i in range(20):
        x = (1 + i) * torch.randn(4, 1, 6, generator=generator)
        model(x)
        batches.append(x.double().numpy())
        assert units(model)[0] == pytest.approx(spread(np.concatenate(batches[:16])), rel=1e-4)
    calibrated = tiny(Identity((6,), channels=1)).train()
    calibrated.calibrate(torch.randn(50, 1, 6))
    before = units(calibrated)[0]
    calibrated(10 * torch.randn(4, 1, 6))
    assert units(calibrated)[0] == before


def test_a_band_that_never_varies_keeps_a_unit_of_one() -> None:
    model = tiny(Wavelet2(8, channels=1)).train()
    model(torch.ones(3, 1, 8, 8))
    assert units(model) == [1, 1, 1, 1]


@pytest.mark.filterwarnings("ignore:sigma is")
@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_units_scale_with_the_data(factor: float) -> None:
    """Raw magnetic resonance data is of order 1e-6: it varies all the same."""
    model, x = tiny(FFT2Real(8, channels=1)), 1 + torch.randn(20, 1, 8, 8, generator=seeded())
    model.calibrate(x)
    expected = [factor * unit for unit in units(model)]
    model.calibrate(factor * x)
    assert units(model) == pytest.approx(expected, rel=1e-4)


# The likelihood's sigma.


def test_sigma_fixed_and_learned() -> None:
    fixed, learned = tiny(FFT2Real(8), sigma=0.25), tiny(FFT2Real(8), sigma="learned", perturbed=False).double()
    assert float(fixed.sigma) == pytest.approx(0.25)
    assert "log_sigma" not in dict(fixed.named_parameters())
    assert float(learned.sigma.detach()) == pytest.approx(0.1)
    x = signal(learned.decomp)
    result = learned(x, seeded())
    assert result.data is not None
    result.data.sum().backward()
    # d/d log σ of ½ SE/σ² + n log σ.
    squared = float((result.reconstruction.detach() - x).square().sum())
    assert learned.log_sigma.grad is not None
    assert float(learned.log_sigma.grad) == pytest.approx(2 * learned.decomp.numel - squared / 0.1**2, rel=1e-5)


def test_kl_weight() -> None:
    model = tiny(FFT2Real(8))
    x = signal(model.decomp, dtype=torch.float32)
    result = model(x, seeded())
    assert result.data is not None
    assert result.kl is not None
    for weight in (0.0, 0.5, 1.0):
        expected = (result.data + weight * result.kl.sum(1)).mean() / 192
        torch.testing.assert_close(model.loss(x, seeded(), kl_weight=weight), expected)


# Precision.


@pytest.mark.parametrize("wide", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "make", [lambda: FFT2Real(8), lambda: FFT2Complex(6), lambda: Wavelet2(8, "db2"), lambda: Identity(8)]
)
def test_the_output_has_the_inputs_dtype(make: Make, model_dtype: torch.dtype, wide: torch.dtype) -> None:
    model = tiny(make()).to(model_dtype)
    x = signal(model.decomp, dtype=torch.float32 if wide == torch.bfloat16 else wide)
    if not x.is_complex():
        x = x.to(wide)
    result = model(x, seeded())
    assert result.reconstruction.dtype == x.dtype
    assert all(h.dtype in (torch.float32, torch.float64) for h in result.bands)
    assert result.data is not None
    assert result.data.dtype in (torch.float32, torch.float64)
    assert bool(torch.isfinite(real(result.reconstruction).float()).all())
    assert math.isfinite(float(model.loss(x).detach()))
    assert bool(torch.isfinite(real(model.sample(2))).all())


@pytest.mark.parametrize("sigma", [0.0123, "learned"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_for_networks(dtype: torch.dtype, sigma: Any) -> None:
    """Means, deviations and σ keep their digits, so that likelihoods keep their constants."""
    model = tiny(Wavelet2(8), sigma=sigma)
    x = signal(model.decomp, 4, dtype=torch.float32)
    model.calibrate(x)
    kept = {k: v.clone() for k, v in model.state_dict().items() if k.split(".")[-1] in ("centre", "unit", "log_sigma")}
    likelihood = nll(model, 0.9 * x, x)
    assert model.to(dtype).start.dtype == dtype
    assert all(torch.equal(model.state_dict()[k], v) for k, v in kept.items())
    assert torch.equal(nll(model, 0.9 * x, x), likelihood)
    assert model.double().sigma.dtype == torch.float64


def test_autocast_trains_in_low_precision_and_transforms_in_full() -> None:
    model = tiny(FFT2Real(8)).train()
    x = signal(model.decomp, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result = model(x, seeded())
        loss = model.loss(x, seeded())
    loss.backward()
    assert {h.dtype for h in result.bands} == {torch.float32} == {result.reconstruction.dtype}
    torch.testing.assert_close(result.reconstruction, model.decomp.synthesis(result.bands), rtol=0, atol=1e-5)
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_inference_mode_then_training() -> None:
    model = tiny(Wavelet2(8, "db2")).train()
    x = signal(model.decomp, dtype=torch.float32)
    with torch.inference_mode():
        model(x)
        model.calibrate(x)
        model.sample(2)
    model.loss(x).backward()
    model.loss(x.requires_grad_(False)).backward()
    assert not x.requires_grad


@pytest.mark.parametrize("make", [lambda: FFT1Complex(5), lambda: FFT3Complex(3)])
def test_complex_signals(make: Make) -> None:
    model = tiny(make())
    x = signal(model.decomp, dtype=torch.float32)
    result = model(x)
    assert result.reconstruction.dtype == torch.complex64
    assert float(result.reconstruction.detach().imag.abs().max()) > 0


def test_the_papers_hierarchy_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = HVAE(decomp=FFT2Real(32), scales=[1, 2, 4, 8, 16, 32], width=4, bottleneck=2, blocks=0)
    assert model.depth == 30


# Bad input.

FIT: dict[str, Any] = {"layers": 1, "width": 2, "bottleneck": 2, "blocks": 0}
BUILDS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"decomp": "fft"}, TypeError, r"decomp must be a Decomposition, got str"),
    ({"scales": [1, 4]}, ValueError, r"scales must end in the signal's largest size, 8, got \[1, 4\]"),
    ({"scales": [4, 2, 8]}, ValueError, r"scales must increase, coarse to fine, got \[4, 2, 8\]"),
    ({"layers": 0}, ValueError, r"layers must be at least 1, got 0"),
    ({"layers": [1, 2]}, ValueError, r"layers must be one number or one for each of the 4 scales, got 2"),
    ({"layers": [1, 2, 0, 1]}, ValueError, r"layers must be at least 1, got 0"),
    ({"layers": [1, 2, 1.5, 1]}, TypeError, r"layers must be an integer, got 1\.5"),
    ({"layers": 2.5}, TypeError, r"layers must be .*, got 2\.5"),
    ({"layers": True}, TypeError, r"layers must be an integer, got True"),
    ({"width": 0}, ValueError, r"width must be at least 1, got 0"),
    ({"width": 4.0}, TypeError, r"width must be an integer, got 4\.0"),
    ({"bottleneck": -1}, ValueError, r"bottleneck must be at least 1, got -1"),
    ({"latent_channels": 0}, ValueError, r"latent_channels must be at least 1, got 0"),
    ({"blocks": -1}, ValueError, r"blocks must be at least 0, got -1"),
    (
        {"head": "conv"},
        ValueError,
        r"head must be one of \['coefficient', 'grid'\] or a ScaleHead subclass, got 'conv'",
    ),
    ({"head": torch.nn.Linear}, TypeError, r"head must be a name or a ScaleHead subclass, got <class .*Linear'>"),
    ({"sigma": 0.0}, ValueError, r"sigma must be positive and finite, got 0\.0"),
    ({"sigma": math.inf}, ValueError, r"sigma must be positive and finite, got inf"),
    ({"sigma": math.nan}, ValueError, r"sigma must be positive and finite, got nan"),
    ({"sigma": "free"}, ValueError, r"sigma must be a positive number or 'learned', got 'free'"),
    ({"sigma": [0.1]}, TypeError, r"sigma must be a positive number or 'learned', got \[0\.1\]"),
    (
        {"likelihood": GaussianLikelihood},
        TypeError,
        "likelihood must be a Likelihood, got the class GaussianLikelihood",
    ),
    (
        {"sigma": 0.1, "likelihood": LaplaceLikelihood(0.2)},
        ValueError,
        r"sigma is short for likelihood=GaussianLikelihood\(sigma\): give one of them, got sigma=0.1 and a LaplaceL",
    ),
    ({"depth": 3}, TypeError, r"unexpected keyword argument 'depth'"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BUILDS, ids=[str(b[0]) for b in BUILDS])
def test_bad_models(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        HVAE(**({"decomp": FFT2Real(8)} | FIT | options))


@pytest.fixture(scope="module")
def model() -> HVAE:
    return tiny(FFT2Real(8), **FIT)


X = torch.zeros(2, 3, 8, 8)
Z = torch.zeros(2, 1, 1, 1)
CALLS: dict[str, tuple[Callable[[HVAE], object], type[Exception], str]] = {
    "shape": (lambda m: m(X[..., 1:]), ValueError, r"x must have shape \(B, 3, 8, 8\), got \(2, 3, 8, 7\)"),
    "empty": (lambda m: m(X[:0]), ValueError, r"x must hold at least one signal, got shape \(0, 3, 8, 8\)"),
    "channels": (lambda m: m.loss(X[:, :1]), ValueError, r"x must have shape \(B, 3, 8, 8\), got \(2, 1, 8, 8\)"),
    "integers": (lambda m: m(X.byte()), TypeError, r"x must be real floating-point for FFT2Real, got torch\.uint8"),
    "complex": (
        lambda m: m.encode(X.to(torch.complex64)),
        TypeError,
        r"x must be real floating-point .*, got torch\.complex64",
    ),
    "numpy": (lambda m: m(X.numpy()), TypeError, r"x must be a torch\.Tensor, got ndarray"),
    "nan": (lambda m: m(X * math.nan), ValueError, r"x must be finite, got NaN or infinity"),
    "infinity": (lambda m: m(X + math.inf), ValueError, r"x must be finite, got NaN or infinity"),
    "device": (lambda m: m(X.to("meta")), ValueError, r"x is on meta, the model on cpu"),
    "temperature": (
        lambda m: m.encode(X, temperature=-1),
        ValueError,
        r"temperature must be at least 0 and finite, got -1",
    ),
    "cold sample": (lambda m: m.sample(1, temperature=math.nan), ValueError, r"temperature must be .*, got nan"),
    "warm decode": (lambda m: m.decode([Z], temperature=math.inf), ValueError, r"temperature must be .*, got inf"),
    "number": (lambda m: m.sample(-1), ValueError, r"n must be at least \d, got -1"),
    "no samples": (lambda m: m.sample(0), ValueError, r"n must be at least 1, got 0"),
    "fraction": (lambda m: m.sample(1.5), TypeError, r"n must be an integer, got 1\.5"),  # type: ignore[arg-type]
    "latent shape": (
        lambda m: m.decode([Z, Z]),
        ValueError,
        r"latents\[1\] must have shape \(2, 1, 2, 2\), got \(2, 1, 1, 1\)",
    ),
    "latent batch": (
        lambda m: m.decode([Z, torch.zeros(3, 1, 2, 2)]),
        ValueError,
        r"latents\[1\] must have shape \(2, 1, 2, 2\), got \(3, 1, 2, 2\)",
    ),
    "latent dtype": (
        lambda m: m.decode([Z.long()]),
        TypeError,
        r"latents\[0\] must be a real tensor or None, got torch\.int64",
    ),
    "latent type": (lambda m: m.decode([1.0]), TypeError, r"latents\[0\] must be .*, got float"),  # type: ignore[list-item]
    "one tensor": (lambda m: m.decode(Z), TypeError, r"latents must be a list .*, got Tensor"),  # type: ignore[arg-type]
    "many latents": (
        lambda m: m.decode([Z] * 5),
        ValueError,
        r"latents must have at most 4 entries, one for each layer, got 5",
    ),
    "no latents": (lambda m: m.decode([None]), ValueError, r"latents must hold at least one tensor; use sample\(n\)"),
    "until": (
        lambda m: m.decode([Z], until=3),
        ValueError,
        r"scale 3 emits no band; the scales that do are \[1, 2, 4, 8\]",
    ),
    "no data": (lambda m: m.calibrate([]), ValueError, r"data must hold at least one signal"),
    "empty data": (lambda m: m.calibrate(X[:0]), ValueError, r"data must hold at least one signal"),
    "data shape": (
        lambda m: m.calibrate(X[:, :1]),
        ValueError,
        r"data must have shape \(B, 3, 8, 8\), got \(2, 1, 8, 8\)",
    ),
    "data nan": (lambda m: m.calibrate(X * math.nan), ValueError, r"data must be finite, got NaN or infinity"),
    "data type": (lambda m: m.calibrate(X.numpy()), TypeError, r"data must be .*, got ndarray"),
    "elbo": (lambda m: m.decode([Z]).elbo, ValueError, r"elbo needs a pass that drew its latents from the posterior"),
}


@pytest.mark.parametrize(("call", "kind", "message"), CALLS.values(), ids=CALLS)
def test_bad_calls(model: HVAE, call: Callable[[HVAE], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call(model)


def test_losses_of_several_batches_share_a_backward() -> None:
    """Accumulating losses must work while units still follow the batches."""
    model = tiny(FFT2Real(8)).train()
    x = signal(model.decomp, dtype=torch.float32)
    (model.loss(x) + model.loss(2 * x)).backward()


def test_warm_up_batches_of_one_signal() -> None:
    torch.manual_seed(0)
    model, data = tiny(FFT1Real(4)).train(), 0.01 * torch.randn(16, 1, 4)
    for x in data:
        model(x[None])
    exact = [float(h.std(0, correction=0).square().mean().sqrt()) for h in model.decomp.analysis(data)]
    assert [float(s.unit) for s in model.subsets] == pytest.approx(exact, rel=0.5)


def test_lazily_conjugated_signals() -> None:
    model, x = tiny(FFT1Complex(4)), torch.randn(2, 1, 4, dtype=torch.complex64)
    torch.testing.assert_close(
        model.encode(x.conj()).reconstruction, model.encode(x.conj().resolve_conj()).reconstruction
    )


@pytest.mark.parametrize("make", [lambda: FFT2Complex(6), lambda: Wavelet2(8, "db2"), lambda: Identity((7,))])
def test_large_data_look_to_the_encoder_as_ordinary_ones_do(make: Make) -> None:
    model = tiny(make(), sigma="learned").double()
    x = signal(model.decomp, 20)
    seen = []
    for factor in (0.3, 1e2, 1e4):
        model.calibrate(factor * x)
        torch.testing.assert_close(
            model.standardization.magnitude, (factor * x).abs().square().sum().div(20 * model.decomp.numel).sqrt()
        )
        seen.append(model.observe(factor * x).activations)
    for scale in model.scales:
        torch.testing.assert_close(seen[1][scale], seen[2][scale])
        assert not torch.allclose(seen[0][scale], seen[1][scale])
