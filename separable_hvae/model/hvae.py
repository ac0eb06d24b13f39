r"""Hierarchical VAE whose decoder is a sum of linear pieces.

p(z) = Π_l p(z_l | z_<l)                                   eq. 2
q(z | x) = Π_l q(z_l | x, z_<l)                            eq. 3
p(x | z) = p(x | Σ_s B_s h_s(z))                           by default N(x; Σ_s B_s h_s, σ² I)
−ELBO = −log p(x | z) + Σ_l KL(q_l ‖ p_l)                  nats
"""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from typing_extensions import Unpack, override

from separable_hvae._validation import (
    check_flag,
    check_generator,
    check_instance,
    check_integer,
    check_number,
    is_integer,
)
from separable_hvae.decompositions import Decomposition
from separable_hvae.distributions import Likelihood, likelihood_of, warn_of_sigma
from separable_hvae.functional import cast_exactly, check_finite, graph_for, pack, require_autograd, signal_dtype
from separable_hvae.model import importance
from separable_hvae.model.batches import Batch
from separable_hvae.model.latents import decodable, require_all
from separable_hvae.model.result import Result, gather
from separable_hvae.model.standardization import AT_MOST, Standardization, moments_of
from separable_hvae.nn import Condition, Encoder, Observation, ScaleHead, Subset, SubsetCondition, SubsetPass, TopDown
from separable_hvae.nn.conditions import built, embedded
from separable_hvae.nn.decoder import layer_counts
from separable_hvae.nn.heads import head_class
from separable_hvae.serialization import LoadOptions, PushOptions, load, push, save


class HVAE(nn.Module):
    """Top-down hierarchical VAE with a linearly separable decoder.

    Args:
        decomp: How signals split into bands. The model keeps a bound copy as ``model.decomp``.
        scales: Resolutions of the hierarchy, coarse to fine; ``None`` takes the decomposition's own.
        layers: Stochastic layers of each scale, one number for all or one for each scale.
        width: Channels of the context.
        bottleneck: Channels inside residual blocks.
        latent_channels: Channels of each latent.
        blocks: Residual blocks of each scale in the encoder, and of each head.
        head: ``"grid"`` (a small signal, then its band), ``"coefficient"`` (the paper's), or a
            :class:`ScaleHead` subclass.
        sigma: Short for ``likelihood=GaussianLikelihood(sigma)``: its standard deviation in the data's units, from
            1e-4 to 100, or ``"learned"``; ``None`` takes 0.1 where no likelihood is given.
        band_input: Whether posteriors see what is missing of their target band (the paper: ``False``).
        likelihood: The density of a signal given what its latents decode to; the model keeps a copy.
        condition: What priors and posteriors see beside their context, such as ``ClassCondition(10)``; the model
            keeps a copy. ``None`` is a model without conditions.

    Attributes:
        scales: Resolutions of the hierarchy, coarse to fine.
        layer_scales: The scale of each of the L layers, coarse to fine.
        latent_shapes: Shape ``(latent_channels, *grid)`` of one sample's latents, for each of the L layers.
        depth: Number L of layers.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is not positive, ``sigma`` is out of range or given beside a likelihood, ``layers``
            has another length than ``scales``, or a name is unknown.

    >>> from separable_hvae import HVAE, Identity
    >>> HVAE(Identity(8, channels=1), layers=1, width=8, bottleneck=4).sample(2).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        decomp: Decomposition,
        scales: Sequence[int] | None = None,
        *,
        layers: int | Sequence[int] = 5,
        width: int = 128,
        bottleneck: int = 64,
        latent_channels: int = 1,
        blocks: int = 3,
        head: str | type[ScaleHead] = "grid",
        sigma: float | Literal["learned"] | None = None,
        band_input: bool = True,
        likelihood: Likelihood | None = None,
        condition: Condition | None = None,
    ) -> None:
        super().__init__()
        check_instance("decomp", decomp, Decomposition)
        self.decomp = decomp.bind(decomp.scales if scales is None else scales)
        self.scales = self.decomp.scales
        given = {"width": (width, 1), "bottleneck": (bottleneck, 1), "blocks": (blocks, 0)}
        sizes = {name: check_integer(name, value, least) for name, (value, least) in given.items()}
        latent_channels = check_integer("latent_channels", latent_channels, 1)
        check_flag("band_input", band_input)
        counts = layer_counts(layers, self.scales)
        self.depth = sum(counts)
        gain = 1 / math.sqrt(self.depth)
        self.encoder = Encoder(self.decomp.real_channels, list(map(self.decomp.grid, self.scales)), gain=gain, **sizes)
        options = {"latent_channels": latent_channels, "band_input": band_input, **sizes}
        self.decoder = TopDown(self.decomp, counts, head_class(head), **options)
        self.layer_scales = [s for subset in self.subsets for s in subset.scales]
        self.latent_shapes = [(layer.latent_channels, *layer.grid) for s in self.subsets for layer in s.layers]
        self.condition = built(condition, self.decomp, gain=gain, **sizes)
        self.standardization = Standardization(self.decomp.real_channels)
        self.likelihood = likelihood_of(sigma, likelihood, self.decomp.is_complex).to(self.device)
        shorthand = self.likelihood.config()["sigma"] if likelihood is None else None
        self.config: dict[str, Any] = {"layers": counts[0] if is_integer(layers) else counts, "head": head, **options}
        self.config |= {"sigma": shorthand, "likelihood": likelihood, "condition": condition}

    @property
    def subsets(self) -> Sequence[Subset]:
        """The layers and the head of each band, coarse to fine."""
        return self.decoder.subsets

    @property
    def start(self) -> nn.Parameter:
        """The context that flows into the first layer, ``(1, width, *grid)``."""
        return self.decoder.start

    @property
    def device(self) -> torch.device:
        """Where the model is, and signals and latents have to be."""
        return self.start.device

    @property
    def real_dtype(self) -> torch.dtype:
        """The real dtype of everything outside the networks: float32, or float64 in a float64 model."""
        return torch.float64 if self.start.dtype == torch.float64 else torch.float32

    @property
    def sigma(self) -> Tensor:
        """Standard deviation of the likelihood, in the data's units: a scalar."""
        return self.likelihood.sigma

    @property
    def log_sigma(self) -> Tensor:
        """Its logarithm, a scalar: the likelihood's own tensor, which may be a parameter, where it has one."""
        return cast(Tensor, getattr(self.likelihood, "log_sigma", None) or self.sigma.log())

    @property
    def is_calibrated(self) -> bool:
        """Whether the bands' means and standard deviations are settled, by :meth:`calibrate` or by training."""
        return self.standardization.is_settled

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep the decomposition and the units of the data in float32 at least: half precision is for networks."""
        kept = [self.standardization, *self.likelihood.modules(), *self.subsets, *self.decomp.modules()]
        cast_exactly(kept, lambda: super(HVAE, self)._apply(fn, recurse))  # type: ignore[no-untyped-call]
        return self

    def observe(self, x: Tensor) -> Observation:
        """Run the encoder and split signals ``(B, C, *size)`` into target bands; errors are those of :meth:`encode`."""
        x = self.decomp.check_signal(x)
        if x.device != self.device:
            raise ValueError(f"x is on {x.device}, the model on {self.device}")
        check_finite("x", x)
        x = x.to(signal_dtype(self.real_dtype, self.decomp.is_complex))
        activations = self.encoder(self.standardization.scaled(pack(x)).to(self.start.dtype))
        targets = self.decomp.checked_analysis(x) if self.decomp.orthonormal else None
        return Observation(x, dict(zip(self.scales, activations, strict=True)), targets)

    def conditions(
        self, condition: Any, batch: int, generator: torch.Generator | None = None
    ) -> list[SubsetCondition] | None:
        """What each subset sees of the condition of ``batch`` samples; ``None`` for a model without conditions."""
        return self.decoder.conditions(embedded(self.condition, condition, batch, generator))

    def result(self, passes: Sequence[SubsetPass], dtype: torch.dtype, x: Tensor | None = None) -> Result:
        """Gather a pass, with the reconstruction in ``dtype`` and, given signals ``x``, their likelihood."""
        return gather(passes, self.decomp, self.likelihood, dtype, x)

    @override
    def forward(self, x: Tensor, generator: torch.Generator | None = None, condition: Any = None) -> Result:
        """Reconstruct signals ``(B, C, *size)`` from posterior samples, with ``kl``, ``data`` and ``elbo``."""
        return self.encode(x, temperature=1.0, generator=generator, condition=condition, with_grad=True)

    def encode(
        self,
        x: Tensor,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        condition: Any = None,
        with_grad: bool = False,
    ) -> Result:
        """Amortized inference: reconstruct signals from posterior means, or at a temperature.

        A graph for gradients is kept in training mode, where ``x`` requires a gradient, or by ``with_grad``. Where
        bands are not orthonormal, no gradient goes through what coarser bands leave to the targets of finer ones.

        Args:
            x: Signals ``(B, C, *size)``.
            temperature: Factor on the posteriors' standard deviation; 0 takes their means, 1 samples.
            generator: Random numbers of the samples.
            condition: What the model's condition takes, one for each sample.
            with_grad: Whether to keep a graph in evaluation mode too, for gradients of parameters.

        Raises:
            TypeError: If an argument has the wrong type, or the dtype does not fit the decomposition.
            ValueError: If signals or conditions do not fit the model, or are not finite.
        """
        draws = _draws(temperature, generator)
        with graph_for(with_grad or self.training, x, condition):
            seen = self.observe(x)
            if self.training and not self.is_calibrated:
                self.standardization.follow(self.decoder, seen)
            conditions = self.conditions(condition, x.shape[0], generator)
            passes = self.decoder([None] * self.depth, x.shape[0], seen, conditions, **draws)
            return self.result(passes, x.dtype, seen.x)

    def loss(
        self, x: Tensor, generator: torch.Generator | None = None, *, kl_weight: float = 1.0, condition: Any = None
    ) -> Tensor:
        """Negative ELBO to minimise, averaged over the batch, in nats per data dimension: a scalar.

        Args:
            x: Signals ``(B, C, *size)``.
            generator: Random numbers of the posterior samples.
            kl_weight: Factor on the KL terms, for a warm-up.
            condition: What the model's condition takes, one for each sample.
        """
        kl_weight = check_number("kl_weight", kl_weight, "at least 0 and finite")
        result = self(x, generator, condition)
        loss: Tensor = ((result.data + kl_weight * result.kl.sum(1)) / self.decomp.numel).mean()
        return loss

    def log_likelihood(
        self, x: Tensor, samples: int = 1, generator: torch.Generator | None = None, condition: Any = None
    ) -> Tensor:
        """Importance-weighted bound of ``log p(x)``, in nats: ``(B,)``, see :mod:`separable_hvae.model.importance`.

        Args:
            x: Signals ``(B, C, *size)``.
            samples: Posterior samples K of each signal: one estimates the ELBO, more are tighter in expectation.
            generator: Random numbers of the samples.
            condition: What the model's condition takes, one for each sample.
        """
        return importance.log_likelihood(self, x, samples, generator, condition)

    def log_posterior(self, x: Tensor, latents: Sequence[Tensor], condition: Any = None) -> Tensor:
        """``log q(z | x)`` of L latents ``(B, latent_channels, *grid)``, in nats: ``(B,)``."""
        latents = require_all("latents", latents, self.latent_shapes, len(x))
        passes = self.decoder(latents, len(x), self.observe(x), self.conditions(condition, len(x)), posteriors=True)
        return importance.log_posterior(passes)

    def decode(
        self,
        latents: Sequence[Tensor | None],
        until: int | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        condition: Any = None,
        with_grad: bool = False,
    ) -> Result:
        """Decode latents, drawing what is missing from the prior. For graphs, see :meth:`encode`.

        Args:
            latents: One entry for each layer, coarse to fine: ``(B, latent_channels, *grid)`` or ``None`` for a draw
                from the prior; missing entries at the end count as ``None``. At least one is a tensor.
            until: Stop after the band of this scale, the reconstruction being the sum up to it.
            temperature: Factor on the priors' standard deviation; 0 takes their means.
            generator: Random numbers of the draws.
            condition: What the model's condition takes, one for each sample.
            with_grad: Whether to keep a graph in evaluation mode too, for gradients of parameters.

        Raises:
            TypeError: If an entry is neither a tensor nor ``None``.
            ValueError: If there are too many entries, none is a tensor, or one has the wrong shape or device.
        """
        draws, (full, given) = _draws(temperature, generator), decodable(latents, self.latent_shapes, self.device)
        with graph_for(with_grad or self.training, *full, condition):
            conditions = self.conditions(condition, given.shape[0], generator)
            passes = self.decoder(full, given.shape[0], None, conditions, until=until, **draws)
            return self.result(passes, signal_dtype(given.dtype, self.decomp.is_complex))

    @torch.no_grad()
    def sample(
        self, n: int, temperature: float = 1.0, generator: torch.Generator | None = None, condition: Any = None
    ) -> Tensor:
        """Draw ``n`` signals ``(n, C, *size)`` from the model (the likelihood's mean, without its noise)."""
        n, draws = check_integer("n", n, 1), _draws(temperature, generator)
        passes = self.decoder([None] * self.depth, n, None, self.conditions(condition, n, generator), **draws)
        return self.result(passes, signal_dtype(passes[0].band.dtype, self.decomp.is_complex)).reconstruction

    @torch.no_grad()
    def calibrate(self, data: Batch | Iterable[Any], *, at_most: int = AT_MOST) -> None:
        """Standardise bands by their mean and standard deviation over signals ``(N, C, *size)`` or batches of them.

        Tensors and lists are read whole, any other iterable of batches up to ``at_most`` signals. Warns if ``sigma``
        is so far above the data's own that there is nothing to learn, or so far below that only the error counts.

        Raises:
            ValueError: If the model was built under ``torch.inference_mode``, or the data do not fit it.
        """
        require_autograd(self)
        *bands, signals = moments_of(data, self.decomp, self.device, check_integer("at_most", at_most, 1))
        self.standardization.calibrate(self.subsets, bands, signals)
        warn_of_sigma(*self.likelihood.sigma_bounds, signals.std, signals.mean.numel())

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json``, ``model.safetensors`` and ``README.md``, see :func:`serialization.save`."""
        save(self, folder)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **options: Unpack[LoadOptions]) -> Self:
        """Load what :meth:`save_pretrained` wrote, in eval mode, see :func:`serialization.load`."""
        return load(cls, source, **options)

    def push_to_hub(self, repo_id: str, **options: Unpack[PushOptions]) -> str:
        """Upload the model to the Hugging Face hub, see :func:`serialization.push`; returns the commit's address."""
        return push(self, repo_id, **options)


def _draws(temperature: float, generator: torch.Generator | None) -> dict[str, Any]:
    check_generator(generator)
    return {"temperature": check_number("temperature", temperature, "at least 0 and finite"), "generator": generator}
