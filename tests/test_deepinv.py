"""A model and a refiner as a deepinv reconstructor, and deepinv's physics as operators."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from separable_hvae import HVAE, FFT2Complex, GaussianNoise, MAPRefiner, Measurement, PoissonNoise, Wavelet2
from separable_hvae.deepinv import reconstructor
from tests.helpers.deepinv import require_deepinv
from tests.helpers.zoo import signal

REFINER = MAPRefiner(3, schedule="joint")


def small(decomp: Any) -> HVAE:
    torch.manual_seed(0)
    model = HVAE(decomp, layers=1, width=6, bottleneck=4, blocks=0, latent_channels=4, sigma=0.2)
    model.calibrate(signal(decomp, 20, torch.float32, seed=5))
    return model


def test_without_deepinv_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("deepinv", "deepinv.models"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'pip install "separable-hvae\[deepinv\]"'):
        reconstructor(small(Wavelet2(8, "haar", 1)), REFINER)


def test_where_deepinv_does_not_import_the_error_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deepinv").mkdir()
    (tmp_path / "deepinv" / "__init__.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")')
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepinv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match=r"torchvision must be built for it .*torchvision::nms does not exist"):
        reconstructor(small(Wavelet2(8, "haar", 1)), REFINER)


@pytest.fixture(scope="module")
def deepinv() -> Any:
    return require_deepinv()


@pytest.mark.parametrize("kind", ["inpainting", "blur", "downsampling", "no adjoint"])
def test_a_real_physics_is_taken_as_it_is(deepinv: Any, kind: str) -> None:
    model = small(Wavelet2(8, "haar", 1))
    x = signal(model.decomp, 2, torch.float32)
    physics = {
        "inpainting": lambda: deepinv.physics.Inpainting((1, 8, 8), mask=0.5),
        "blur": lambda: deepinv.physics.Blur(torch.full((1, 1, 3, 3), 1 / 9), padding="circular"),
        "downsampling": lambda: deepinv.physics.Downsampling((1, 8, 8), factor=2, filter="gaussian"),
        "no adjoint": lambda: deepinv.physics.Physics(A=lambda x, **_: x[..., :4]),
    }[kind]()
    assert hasattr(physics, "A_adjoint") == (kind != "no adjoint")
    physics.noise_model = deepinv.physics.GaussianNoise(0.1)
    y = physics(x)
    term = Measurement(y, physics)
    assert isinstance(term.noise, GaussianNoise)
    assert term.noise.sigma == pytest.approx(0.1)
    solver = reconstructor(model, REFINER)
    assert isinstance(solver, deepinv.models.Reconstructor)
    found = solver(y, physics)
    wanted = term.correct(model, REFINER(model, term).reconstruction)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("coils", [0, 3])
def test_mri_speaks_real_and_imaginary_parts(deepinv: Any, coils: int) -> None:
    model = small(FFT2Complex(8))
    mask = (torch.arange(8) % 2 == 0).float().expand(8, 8)
    maps = torch.randn(coils, 8, 8, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    physics = deepinv.physics.MultiCoilMRI(mask=mask, coil_maps=maps / 2) if coils else deepinv.physics.MRI(mask=mask)
    physics.noise_model = deepinv.physics.GaussianNoise(0.05)
    x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    y = physics(x)
    found = reconstructor(model, REFINER)(y, physics)
    assert found.shape == x.shape
    assert not found.is_complex()
    before = (physics.A(torch.zeros_like(x)) - y).square().sum()
    assert (physics.A(found) - y).square().sum() < 0.2 * before
    with pytest.raises(TypeError, match="needs stacked=True"):
        Measurement(y, physics).guess(model)


def test_images_in_other_units(deepinv: Any) -> None:
    model = small(Wavelet2(8, "haar", 1))
    image = (signal(model.decomp, 2, torch.float32) / 8 + 0.5).clamp(0, 1)
    physics = deepinv.physics.Denoising(deepinv.physics.PoissonNoise(gain=0.05))
    y = physics(image)
    read = Measurement(y, physics).noise
    assert isinstance(read, PoissonNoise)
    assert read.gain == pytest.approx(0.05)
    found = reconstructor(model, MAPRefiner(10, schedule="joint"), factor=0.5, offset=0.5, noise=0.1)(y, physics)
    assert (found - image).square().mean() < (y - image).square().mean() + 0.01
    with pytest.raises(ValueError, match="factor must not be zero"):
        reconstructor(model, REFINER, factor=0.0)


def test_the_reconstructor_checks_what_it_is_made_of(deepinv: Any) -> None:
    with pytest.raises(TypeError, match="model must be an HVAE, got str"):
        reconstructor("model", REFINER)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="refiner must be a Refiner, got int"):
        reconstructor(small(Wavelet2(8, "haar", 1)), 3)  # type: ignore[arg-type]
