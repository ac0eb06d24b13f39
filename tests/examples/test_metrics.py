"""The measures of examples/metrics.py against numpy, scipy and torch.distributions."""

import math
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.distributions import Normal

from separable_hvae import FFT1Complex, FFT1Real
from tests.helpers import zoo
from tests.helpers.models import seeded, tiny
from tests.helpers.scripts import script

metrics = script("metrics")


def images(n: int, *, channels: int = 3, size: int = 12, seed: int = 0) -> Tensor:
    return torch.rand(n, channels, size, size, generator=seeded(seed))


def test_squared_error_of_complex_signals() -> None:
    a, b = (torch.randn(3, 1, 4, 4, dtype=torch.complex64, generator=seeded(s)) for s in (0, 1))
    expected = (np.abs(a.numpy() - b.numpy()) ** 2).mean((1, 2, 3)) / 2
    np.testing.assert_allclose(metrics.squared_error(a, b).numpy(), expected, rtol=1e-5)


def test_pictures() -> None:
    x = torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 1, 1, 3)
    assert metrics.pictures(x, x).flatten().tolist() == [0.0, 0.5, 1.0]
    original = torch.tensor([3.0 + 4.0j, 1.0j]).reshape(1, 1, 1, 2)
    assert metrics.pictures(2 * original, original).flatten().tolist() == pytest.approx([2.0, 0.4])


def test_psnr() -> None:
    a, b = images(3), images(3, seed=1)
    expected = [-10 * math.log10(float(((x - y) ** 2).mean())) for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    assert metrics.psnr(a, b).tolist() == pytest.approx(expected, rel=1e-4)


def test_ssim_against_scipy() -> None:
    a, b = images(2, size=20), images(2, size=20, seed=1)
    b = 0.7 * a + 0.3 * b

    def blur(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.asarray(gaussian_filter(x, 1.5, truncate=5 / 1.5, axes=(-2, -1), mode="mirror"))

    x, y = a.double().numpy(), b.double().numpy()
    mx, my = blur(x), blur(y)
    vx, vy, vxy = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    whole = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    np.testing.assert_allclose(metrics.ssim(b, a).numpy(), whole.mean((1, 2, 3)), atol=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_fid_against_scipy(channels: int) -> None:
    _, features = metrics.extractor(None)
    real, fake = images(200, channels=channels), images(150, channels=channels, seed=1) ** 1.5
    a, b = (features(x.expand(-1, 3, -1, -1)).detach().double().numpy() for x in (real, fake))
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum()
    expected = distance + np.trace(ca + cb - 2 * np.real(sqrtm(ca @ cb)))
    assert metrics.fid(features, real, fake, batch=64) == pytest.approx(expected, rel=1e-3)
    assert metrics.fid(features, real, real) == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("is_complex", [False, True])
def test_importance_weighted_bound(is_complex: bool) -> None:
    model = tiny((FFT1Complex if is_complex else FFT1Real)(4, scales=[1, 4]), sigma=0.3).double()
    x, generator, weights = zoo.signal(model.decomp, 3), seeded(5), []
    with torch.no_grad():
        for _ in range(4):
            passes = model.decoder([None] * model.depth, len(x), model.observe(x), generator=generator)
            log_p = log_q = torch.zeros(len(x), dtype=torch.float64)
            for step in passes:
                for z, p, q in zip(step.latents, step.priors, step.posteriors, strict=True):
                    assert q is not None
                    log_p = log_p + Normal(p.mean, p.sigma).log_prob(z).flatten(1).sum(1)
                    log_q = log_q + Normal(q.mean, q.sigma).log_prob(z).flatten(1).sum(1)
            decoded = model.decomp.synthesis([step.band for step in passes])
            pairs = [(decoded.real, x.real), (decoded.imag, x.imag)] if is_complex else [(decoded, x)]
            likelihood = sum(Normal(a, 0.3).log_prob(b).flatten(1).sum(1) for a, b in pairs)
            weights.append(likelihood + log_p - log_q)
    stacked = torch.stack([torch.as_tensor(w) for w in weights])
    elbo, bound = metrics.importance_bound(model, x, 4, seeded(5))
    torch.testing.assert_close(elbo, stacked.mean(0))
    torch.testing.assert_close(bound, stacked.exp().mean(0).log())
    one = metrics.importance_bound(model, x, 1, seeded(5))
    torch.testing.assert_close(*one)


# Feature extractors.


def test_the_name_says_which_extractor() -> None:
    name, features = metrics.extractor("metrics:RandomFeatures")
    assert name == "RandomFeatures"
    default_name, default = metrics.extractor(None)
    assert default_name == "random conv, 64"
    torch.testing.assert_close(features(images(2)), default(images(2)))


def test_an_exported_extractor(tmp_path: Path) -> None:
    path, features = tmp_path / "inception.pt2", metrics.RandomFeatures().eval()
    shapes = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(features, (images(4),), dynamic_shapes=shapes), path)
    name, loaded = metrics.extractor(str(path))
    assert name == "inception"
    torch.testing.assert_close(loaded(images(7)), features(images(7)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.pt2", "nowhere.pt2 is neither a file nor 'module:name' of a feature extractor"),
        ("metrics:Inception", "metrics:Inception is neither a file nor 'module:name'"),
        ("collections:OrderedDict", "collections:OrderedDict makes a OrderedDict, not a torch.nn.Module"),
    ],
)
def test_bad_extractors(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        metrics.extractor(source)


def test_a_foreign_file_is_no_extractor(tmp_path: Path) -> None:
    path = tmp_path / "inception.pt2"
    path.write_bytes(b"no module")
    with pytest.raises(ValueError, match=re.escape(f"{path} is no module saved by torch.export")):
        metrics.extractor(str(path))
