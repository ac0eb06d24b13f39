r"""How good reconstructions are, and how much a model's bound on log p(x) gives.

    importance-weighted bound   log p(x) ≥ E log (1/K) Σ_k p(x, z_k) / q(z_k | x),   z_k ~ q;  K = 1 is the ELBO

FID compares features of two sets of images; the extractor is the user's, by file or by module, or a small
network of fixed random weights, whose numbers compare with nothing but themselves.
"""

import importlib
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance

from separable_hvae import HVAE
from separable_hvae.functional import pack


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of each signal over its real numbers, in the data's units: ``(B,)``."""
    return (pack(a) - pack(b)).square().flatten(1).mean(1)


def pictures(x: Tensor, originals: Tensor) -> Tensor:
    """Signals as pictures in [0, 1], ``(B, C, H, W)``: real ones from [-1, 1], complex ones as magnitudes.

    A magnitude of one is the largest of the same signal's original.
    """
    if x.is_complex():
        return x.abs() / originals.abs().amax((1, 2, 3), keepdim=True)
    return (x + 1) / 2


def psnr(picture: Tensor, original: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture of range 1, in dB: ``(B,)``."""
    return -10 * torch.log10((picture - original).square().flatten(1).mean(1))


def ssim(picture: Tensor, original: Tensor) -> Tensor:
    """Structural similarity of each picture of range 1, Gaussian window of 11 points, mirrored borders: ``(B,)``."""
    found = structural_similarity_index_measure(picture, original, data_range=1.0, reduction="none")
    assert isinstance(found, Tensor)
    return found.reshape(-1)


@torch.no_grad()
def importance_bound(model: HVAE, x: Tensor, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The ELBO and the importance-weighted bound of each signal, in nats: ``(B,)`` each."""
    seen = model.observe(x)
    weights: list[Tensor] = []
    for _ in range(samples):
        passes = model.decoder([None] * model.depth, len(x), seen, generator=generator)
        result = model.result(passes, x.dtype, seen.x)
        posteriors = [q for step in passes for q in step.posteriors if q is not None]
        log_q = torch.stack([q.log_prob(z) for q, z in zip(posteriors, result.latents, strict=True)]).sum(0)
        assert result.data is not None
        weights.append((-result.data - result.nll - log_q).double())
    stacked = torch.stack(weights)
    return stacked.mean(0), stacked.logsumexp(0) - math.log(samples)


class RandomFeatures(nn.Module):
    """A small convolutional network of fixed random weights: pictures ``(B, 3, H, W)`` to ``(B, 64)``."""

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        generator, channels, layers = torch.Generator().manual_seed(0), 3, list[nn.Module]()
        for wider in (16, 32, self.num_features):
            layer = nn.Conv2d(channels, wider, 3, stride=2, padding=1)
            with torch.no_grad():
                layer.weight.normal_(0, math.sqrt(2 / (9 * channels)), generator=generator)
                nn.init.zeros_(layer.bias)
            layers += [layer, nn.ReLU()]
            channels = wider
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Average the last layer over the picture."""
        return self.layers(2 * x - 1).mean((2, 3))


def extractor(source: str | None) -> tuple[str, nn.Module]:
    """A feature extractor and its name; it maps pictures ``(B, 3, H, W)`` in [0, 1] to features ``(B, D)``.

    Args:
        source: A ``.pt2`` file that ``torch.export`` saved, or ``module:name`` of something that makes the
            extractor when it is called without arguments; ``None`` takes :class:`RandomFeatures`.

    Raises:
        ValueError: If there is no such file or name, or it is no extractor.
    """
    if source is None:
        return "random conv, 64", RandomFeatures().eval()
    if Path(source).is_file():
        try:
            return Path(source).stem, torch.export.load(source).module()
        except Exception as error:
            raise ValueError(f"{source} is no module saved by torch.export: {error}") from error
    module, _, name = source.partition(":")
    try:
        made = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{source} is neither a file nor 'module:name' of a feature extractor: {error}") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"{source} makes a {type(made).__name__}, not a torch.nn.Module")
    return name, made.eval()


@torch.no_grad()
def fid(features: nn.Module, real: Tensor, fake: Tensor, batch: int = 64) -> float:
    """Fréchet distance between the features of two sets of pictures ``(N, C, H, W)`` in [0, 1], C being 1 or 3."""
    seen = [
        torch.cat([features(part.expand(-1, 3, -1, -1)).flatten(1) for part in images.float().clamp(0, 1).split(batch)])
        for images in (real, fake)
    ]
    # The mathematics alone: features go in as they are.
    identity = nn.Identity()
    identity.num_features = seen[0].shape[1]
    metric = FrechetInceptionDistance(identity).to(real.device)
    for values, is_real in zip(seen, (True, False), strict=True):
        metric.update(values.double(), real=is_real)
    return float(metric.compute())
