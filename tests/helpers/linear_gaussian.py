r"""A separable model that is linear and Gaussian throughout, and what numpy alone knows about it.

    z_l = P_l c_l + p_l + s_l ε            prior
    c_{l+1} = A_l c_l + G_l z_l + a_l      context
    h_s = u_s (H_s c + o_s),   x = Σ_s B_s h_s + σ ε

Every context and band is affine in z, so that −log p(x, z) = ½‖Mz + m(x)‖² + constants: evidence, ELBO,
MAP and the optima of local problems are linear algebra.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence
from typing_extensions import override

from separable_hvae import HVAE, Decomposition, ScaleHead
from separable_hvae.distributions.gaussian import LOG_SIGMA_BOUND, Gaussian
from separable_hvae.functional import unpack
from separable_hvae.nn.stochastic_layer import LayerPass, PriorFeatures, StochasticLayer

Array = NDArray[np.float64]


@dataclass(frozen=True)
class FullGaussian(Gaussian):
    """Gaussian of covariance ``factor factorᵀ`` over the flattened latents."""

    factor: Tensor

    @override
    def log_prob(self, z: Tensor) -> Tensor:
        found: Tensor = MultivariateNormal(self.mean.flatten(1), scale_tril=self.factor).log_prob(z.flatten(1))
        return found

    @override
    def kl(self, prior: Gaussian) -> Tensor:
        q = MultivariateNormal(self.mean.flatten(1), scale_tril=self.factor)
        p = MultivariateNormal(prior.mean.flatten(1), scale_tril=torch.diag_embed(prior.sigma.flatten(1)))
        return kl_divergence(q, p)


class LinearLayer(nn.Module):
    """Stand-in for a stochastic layer; the evidence is the flattened signal."""

    factor: Tensor | None = None
    """Factor of the posterior's covariance, where it is not diagonal."""
    noise: Tensor | None = None
    """Noise ``(B, n)`` to draw with, instead of fresh one."""

    def __init__(self, layer: StochasticLayer, inputs: int, width: int, evidence: int) -> None:
        super().__init__()
        self.grid, self.latent_channels, self.width = layer.grid, layer.latent_channels, width
        self.shape = (self.latent_channels, *self.grid)
        n = math.prod(self.shape)
        self.outputs = width * math.prod(self.grid)
        self.prior = nn.Linear(inputs, n)
        self.posterior = nn.Linear(inputs + evidence, n)
        self.context = nn.Linear(inputs + n, self.outputs)
        self.log_sigma = nn.Parameter(0.3 * torch.randn(n) - 0.3)
        self.posterior_log_sigma = nn.Parameter(0.3 * torch.randn(n) - 0.6)

    def _gaussian(self, mean: Tensor, log_sigma: Tensor) -> Gaussian:
        return Gaussian(mean.unflatten(1, self.shape), log_sigma.expand_as(mean).unflatten(1, self.shape))

    def infer(self, context: Tensor, activation: Tensor, residual: Tensor | None = None) -> Gaussian:
        mean = self.posterior(torch.cat([context.flatten(1), activation], dim=1))
        posterior = self._gaussian(mean, self.posterior_log_sigma)
        return posterior if self.factor is None else FullGaussian(posterior.mean, posterior.log_sigma, self.factor)

    def prior_features(self, context: Tensor) -> PriorFeatures:
        # Undo the bound that Gaussian.from_params puts on log-sigmas.
        prior = self._gaussian(self.prior(context.flatten(1)), self.log_sigma)
        raw = LOG_SIGMA_BOUND * torch.atanh(prior.log_sigma / LOG_SIGMA_BOUND)
        return PriorFeatures(torch.cat([prior.mean, raw], dim=1), context)

    @override
    def forward(
        self,
        features: PriorFeatures,
        z: Tensor | None = None,
        posterior: Gaussian | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> LayerPass:
        c = features.context.flatten(1)
        if z is None:
            drawn = posterior or Gaussian.from_params(features.prior_params)
            if self.noise is None:
                z = drawn.sample(temperature, generator)
            else:
                spread = torch.diag(self.posterior_log_sigma.exp()) if self.factor is None else self.factor
                z = drawn.mean + (self.noise @ spread.T).unflatten(1, self.shape)
        c = self.context(torch.cat([c, z.flatten(1)], dim=1))
        return LayerPass(c.unflatten(1, (self.width, *self.grid)), z, features.prior_params, posterior)


class LinearHead(ScaleHead):
    """A head that is one affine map."""

    def __init__(self, decomp: Decomposition, scale: int, *, width: int, **options: Any) -> None:
        super().__init__(decomp, scale, width=width, **options)
        self.linear = nn.Linear(width * math.prod(self.grid), math.prod(self.shape))

    @override
    def forward(self, context: Tensor) -> Tensor:
        band: Tensor = self.linear(context.flatten(1))
        return band.reshape(-1, *self.shape)


class FlatEncoder(nn.Module):
    """Give every scale the flattened signal, in the data's unit and not that of the encoder's input."""

    def __init__(self, scales: int, unit: Callable[[], Tensor]) -> None:
        super().__init__()
        self.scales, self.unit = scales, unit

    @override
    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.unit() * x.flatten(1)] * self.scales


def linear_gaussian(decomp: Decomposition, *, layers: int = 2, seed: int = 0) -> HVAE:
    """A model in float64 whose every map is affine, with some diagonal affine posterior."""
    torch.manual_seed(seed)
    width = 2
    model = HVAE(
        decomp, layers=layers, width=width, bottleneck=1, blocks=0, head=LinearHead, sigma=0.6, band_input=False
    )
    model.encoder = cast(Any, FlatEncoder(len(decomp.scales), lambda: model.standardization.magnitude.clamp_min(1)))
    nn.init.normal_(model.start)
    inputs = model.start.numel()
    for i, subset in enumerate(model.subsets):
        stack: list[nn.Module] = []
        for layer in subset.layers:
            stack.append(linear := LinearLayer(layer, inputs, width, decomp.numel))
            inputs = linear.outputs
        subset.layers = cast(Sequence[StochasticLayer], nn.ModuleList(stack))
        subset.unit.fill_(1.0 + 0.25 * i)
        nn.init.normal_(subset.centre)
    return model.double().eval()


def flat(tensors: Sequence[Tensor]) -> Array:
    """Latents or bands of a batch as the rows of one matrix."""
    return np.asarray(torch.cat([t.detach().flatten(1) for t in tensors], dim=1).numpy(), dtype=np.float64)


@dataclass(frozen=True)
class Affine:
    """A map ``z ↦ matrix z + offset`` of all latents."""

    matrix: Array
    offset: Array

    def __call__(self, z: Array) -> Array:
        return np.asarray(self.matrix @ z + self.offset)

    def through(self, linear: nn.Linear) -> "Affine":
        weight, bias = (np.asarray(p.detach().numpy()) for p in (linear.weight, linear.bias))
        return Affine(weight @ self.matrix, weight @ self.offset + bias)

    def scaled(self, factor: float | Array) -> "Affine":
        column = np.asarray(factor)[..., None] if np.ndim(factor) else factor
        return Affine(column * self.matrix, factor * self.offset)

    def minus(self, other: "Affine | Array") -> "Affine":
        if isinstance(other, Affine):
            return Affine(self.matrix - other.matrix, self.offset - other.offset)
        return Affine(self.matrix, self.offset - other)


def stacked(parts: Sequence[Affine]) -> Affine:
    return Affine(np.concatenate([p.matrix for p in parts]), np.concatenate([p.offset for p in parts]))


class ClosedForm:
    """The algebra of a :func:`linear_gaussian` model; signals and latents of one sample are vectors."""

    def __init__(self, model: HVAE) -> None:
        self.orthonormal, self.scales, self.sigma = model.decomp.orthonormal, model.scales, float(model.sigma)
        self.band_scales = model.decomp.band_scales
        self.layers = [cast(LinearLayer, layer) for subset in model.subsets for layer in subset.layers]
        ends = np.cumsum([math.prod(layer.shape) for layer in self.layers])
        self.slots = [slice(int(b), int(e)) for b, e in zip([0, *ends[:-1]], ends, strict=True)]
        self.numel = int(ends[-1])
        self.subsets: list[list[int]] = []
        self.contexts: list[Affine] = []
        self.priors: list[Affine] = []  # Whitened: (z − μ_p) / σ_p.
        self.bands: list[Affine] = []
        start = np.asarray(model.start.detach().flatten().numpy())
        context = Affine(np.zeros((start.size, self.numel)), start)
        for subset in model.subsets:
            first = len(self.contexts)
            self.subsets.append(list(range(first, first + len(subset.layers))))
            for number in self.subsets[-1]:
                layer, pick = self.layers[number], np.eye(self.numel)[self.slots[number]]
                own = Affine(pick, np.zeros(len(pick)))
                self.contexts.append(context)
                deviation = own.minus(context.through(layer.prior))
                self.priors.append(deviation.scaled(np.exp(-self.log_sigmas(number))))
                context = stacked([context, own]).through(layer.context)
            band = context.through(cast(LinearHead, subset.head).linear).scaled(float(subset.unit))
            self.bands.append(band.minus(-np.asarray(subset.centre.flatten().numpy())))
        self.analysis, self.synthesis = _matrices(model.decomp)

    def log_sigmas(self, layer: int) -> Array:
        return np.asarray(self.layers[layer].log_sigma.detach().numpy())

    def target(self, index: int, x: Array, z: Array) -> Array:
        """What the coarser bands leave for the band of a subset."""
        pairs = zip(self.synthesis[:index], self.bands[:index], strict=True)
        return np.asarray(self.analysis[index] @ (x - sum((b @ h(z) for b, h in pairs), np.zeros_like(x))))

    def misfit(self, index: int, target: Array, beta: float) -> Affine:
        """Whitened error of a subset's band; where bands are not orthonormal, of what it adds to the signal."""
        error = self.bands[index].minus(target)
        if not self.orthonormal:
            error = Affine(self.synthesis[index] @ error.matrix, self.synthesis[index] @ error.offset)
        return error.scaled(math.sqrt(beta) / self.sigma)

    def whitened(self, x: Array, guidance: Mapping[int, float] | None = None) -> Affine:
        """``Mz + m``: all priors and the data."""
        beta = guidance or dict.fromkeys(self.scales, 1.0)
        if self.orthonormal:
            data = [self.misfit(i, self.analysis[i] @ x, beta[s]) for i, s in enumerate(self.band_scales)]
        else:
            parts = [Affine(b @ h.matrix, b @ h.offset) for b, h in zip(self.synthesis, self.bands, strict=True)]
            signal = Affine(np.sum([p.matrix for p in parts], 0), np.sum([p.offset for p in parts], 0))
            data = [signal.minus(x).scaled(math.sqrt(beta[self.scales[-1]]) / self.sigma)]
        return stacked([*self.priors, *data])

    # Optima.

    def solve(self, rows: Affine, z: Array, moving: Sequence[int]) -> Array:
        """``z`` with some layers moved to the least squares of the rows."""
        columns = np.concatenate([np.arange(self.numel)[self.slots[i]] for i in moving])
        moved = z.copy()
        moved[columns] -= np.linalg.lstsq(rows.matrix[:, columns], rows(z), rcond=None)[0]
        return moved

    def joint(self, x: Array, guidance: Mapping[int, float] | None = None) -> Array:
        """The full MAP."""
        return self.solve(self.whitened(x, guidance), np.zeros(self.numel), range(len(self.layers)))

    def scale(self, x: Array, guidance: Mapping[int, float] | None = None) -> Array:
        """Subset by subset, everything coarser fixed and everything finer ignored."""
        beta, z = guidance or dict.fromkeys(self.scales, 1.0), np.zeros(self.numel)
        for i, layers in enumerate(self.subsets):
            misfit = self.misfit(i, self.target(i, x, z), beta[self.band_scales[i]])
            z = self.solve(stacked([*(self.priors[m] for m in layers), misfit]), z, layers)
        return z

    def latent(
        self, x: Array, guidance: Mapping[int, float] | None = None, *, own_prior: bool = False, init: str = "posterior"
    ) -> Array:
        """Latent by latent, the later ones of a subset completed with means and held."""
        beta, z = guidance or dict.fromkeys(self.scales, 1.0), np.zeros(self.numel)
        for i, layers in enumerate(self.subsets):
            misfit = self.misfit(i, self.target(i, x, z), beta[self.band_scales[i]])
            for k, m in enumerate(layers):
                for later in layers[k:]:
                    z[self.slots[later]] = self.mean(later, z, x) if init == "posterior" else self.prior_mean(later, z)
                priors = [self.priors[m]] if own_prior else [self.priors[later] for later in layers[k:]]
                z = self.solve(stacked([*priors, misfit]), z, [m])
        return z

    def mean(self, layer: int, z: Array, x: Array) -> Array:
        """Mean of a layer's posterior."""
        weight, bias = (np.asarray(p.detach().numpy()) for p in self.layers[layer].posterior.parameters())
        return np.asarray(weight @ np.concatenate([self.contexts[layer](z), x]) + bias)

    def prior_mean(self, layer: int, z: Array) -> Array:
        return self.contexts[layer].through(self.layers[layer].prior)(z)

    # Densities, in nats.

    def log_joint(self, x: Array, z: Array) -> float:
        """``log p(x, z)``."""
        return -0.5 * float(np.square(self.whitened(x)(z)).sum()) - self._constants(x)

    def _constants(self, x: Array) -> float:
        scales = sum(float(self.log_sigmas(i).sum()) for i in range(len(self.layers)))
        return scales + x.size * math.log(self.sigma) + 0.5 * (self.numel + x.size) * math.log(2 * math.pi)

    def log_evidence(self, x: Array) -> float:
        """``log p(x)``, from the marginal's mean and covariance."""
        prior = stacked(self.priors)
        spread = np.linalg.inv(prior.matrix)
        basis = np.concatenate(self.synthesis, 1)
        band = stacked(self.bands)
        error = x - basis @ band(-spread @ prior.offset)
        root = basis @ band.matrix @ spread
        covariance = root @ root.T + self.sigma**2 * np.eye(x.size)
        _, log_det = np.linalg.slogdet(covariance)
        return -0.5 * float(error @ np.linalg.solve(covariance, error) + log_det + x.size * math.log(2 * math.pi))

    def elbo(self, x: Array) -> float:
        """``E_q[log p(x, z)] + H[q]`` of the model's posterior, whose draws are affine in their noise."""
        weights, offset, factor = np.zeros((self.numel, self.numel)), np.zeros(self.numel), np.zeros((self.numel,) * 2)
        for i, slot in enumerate(self.slots):
            offset[slot] = self.mean(i, np.zeros(self.numel), x)
            weights[slot] = np.stack([self.mean(i, e, x) - offset[slot] for e in np.eye(self.numel)], axis=1)
            layer = self.layers[i]
            own = torch.diag(layer.posterior_log_sigma.detach().exp()) if layer.factor is None else layer.factor
            factor[slot, slot] = own.numpy()
        through = np.linalg.inv(np.eye(self.numel) - weights)
        rows = self.whitened(x)
        squares = np.square(rows(through @ offset)).sum() + np.square(rows.matrix @ through @ factor).sum()
        entropy = 0.5 * self.numel * (1 + math.log(2 * math.pi)) + np.linalg.slogdet(factor)[1]
        return float(entropy - 0.5 * squares) - self._constants(x)

    def make_posterior_exact(self) -> None:
        """Set the layers' posteriors to ``p(z_l | z_<l, x)``, which sees z_<l through the context alone."""
        numel = self.analysis[0].shape[1]
        rows = self.whitened(np.zeros(numel))
        from_signal = np.stack([self.whitened(e).offset - rows.offset for e in np.eye(numel)], axis=1)
        precision = rows.matrix.T @ rows.matrix
        for i, slot in enumerate(self.slots):
            covariance = np.linalg.inv(precision[slot.start :, slot.start :])
            own = slice(0, slot.stop - slot.start)
            gain = -covariance[own]
            before = gain @ precision[slot.start :, : slot.start]
            seen = self.contexts[i]
            on_context = before @ np.linalg.pinv(seen.matrix[:, : slot.start])
            np.testing.assert_allclose(on_context @ seen.matrix[:, : slot.start], before, atol=1e-9)
            on_signal = gain @ rows.matrix.T[slot.start :] @ from_signal
            offset = gain @ rows.matrix.T[slot.start :] @ rows.offset - on_context @ seen.offset
            layer = self.layers[i]
            with torch.no_grad():
                layer.posterior.weight.copy_(torch.from_numpy(np.concatenate([on_context, on_signal], axis=1)))
                layer.posterior.bias.copy_(torch.from_numpy(offset))
            layer.factor = torch.linalg.cholesky(torch.from_numpy(covariance[own, own].copy()))


def _matrices(decomp: Decomposition) -> tuple[list[Array], list[Array]]:
    """Matrices of the analysis and of the synthesis of each band, over packed signals."""
    units = torch.eye(decomp.numel, dtype=torch.float64).reshape(-1, decomp.real_channels, *decomp.size)
    analysis = [flat([h]).T for h in decomp.analysis(unpack(units, is_complex=decomp.is_complex))]
    synthesis: list[Array] = []
    for i, shape in enumerate(decomp.band_shapes.values()):
        alone: list[Tensor | None] = [None] * len(decomp.band_shapes)
        alone[i] = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
        x = decomp.synthesis(alone)
        packed = torch.view_as_real(x).movedim(-1, 2).flatten(1) if x.is_complex() else x.flatten(1)
        synthesis.append(np.asarray(packed.numpy()).T)
    return analysis, synthesis
