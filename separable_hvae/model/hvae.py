r"""Hierarchical VAE whose decoder is a sum of linear pieces.

    p(z) = Π_l p(z_l | z_<l)                                   eq. 2
    q(z | x) = Π_l q(z_l | x, z_<l)                            eq. 3
    p(x | z) = N(x; Σ_s B_s h_s(z), σ² I)
    −ELBO = −log p(x | z) + Σ_l KL(q_l ‖ p_l)                  nats

One top-down pass serves training, reconstruction, sampling, partial decoding and refinement: latents
come as a list with one entry for each layer, and ``None`` means "from the posterior" where there is an
encoder pass, else "from the prior".
"""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from separable_hvae._float32 import full_precision
from separable_hvae._validation import (
    check_flag,
    check_generator,
    check_integer,
    check_number,
    is_integer,
    is_number,
    listed,
    shown,
)
from separable_hvae.decompositions.base import Decomposition
from separable_hvae.functional import check_finite, pack, widen
from separable_hvae.model.batches import Batch
from separable_hvae.model.latents import complete, require_all
from separable_hvae.model.result import Result
from separable_hvae.model.standardization import AT_MOST, BandMoments, moments_of, units, warn_of_sigma
from separable_hvae.nn.encoder import Encoder
from separable_hvae.nn.heads import HEADS, ScaleHead
from separable_hvae.nn.subset import Evidence, Subset, SubsetPass
from separable_hvae.serialization.save import Pretrained

__all__ = ["HVAE", "Observation", "Result"]

_SIGMA_RANGE = (1e-4, 1e2)
_LOG_SIGMA_RANGE = (math.log(_SIGMA_RANGE[0]), math.log(_SIGMA_RANGE[1]))
_WARM_UP_BATCHES = 16


@dataclass(frozen=True)
class Observation:
    """Signals as an encoder pass sees them.

    Attributes:
        x: Signals in the model's precision.
        activations: The encoder's activation for each scale.
        targets: The target band of each subset where bands are orthonormal; otherwise targets follow
            from the coarser bands during the pass, and this is ``None``.
    """

    x: Tensor
    activations: dict[int, Tensor]
    targets: list[Tensor] | None


class HVAE(Pretrained, nn.Module):
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
        sigma: Standard deviation of the likelihood in the data's units, from 1e-4 to 100, or ``"learned"``.
        band_input: Whether posteriors see what is missing of their target band (the paper: ``False``).

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is not positive, ``sigma`` is out of range, ``layers`` has another length
            than ``scales``, or a name is unknown.
    """

    log_sigma: Tensor
    calibrated: Tensor
    magnitude: Tensor
    """Root mean square of the data that the model was calibrated with: a scalar.

    The encoder sees signals in this unit where it exceeds one: it learns badly from large numbers, and
    well from small ones.
    """
    subsets: Sequence[Subset]

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
        sigma: float | Literal["learned"] = 0.1,
        band_input: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(decomp, Decomposition):
            raise TypeError(f"decomp must be a Decomposition, got {type(decomp).__name__}")
        self.decomp = decomp.bind(decomp.scales if scales is None else scales)
        width, bottleneck = check_integer("width", width, 1), check_integer("bottleneck", bottleneck, 1)
        latent_channels = check_integer("latent_channels", latent_channels, 1)
        blocks = check_integer("blocks", blocks, 0)
        check_flag("band_input", band_input)
        counts = self._layers_by_scale(layers)
        self.depth = sum(counts)
        gain = 1 / math.sqrt(self.depth)
        self.encoder = Encoder(
            self.decomp.real_channels,
            width,
            bottleneck,
            [self.decomp.grid(s) for s in self.scales],
            blocks,
            gain=gain,
        )
        self.start = nn.Parameter(torch.zeros(1, width, *self.decomp.grid(self.scales[0])))
        self.decomp.to(self.start.device)
        make_head = _head_class(head)
        subsets: list[Subset] = []
        pending: dict[int, int] = {}
        for scale, count in zip(self.scales, counts, strict=True):
            pending[scale] = count
            if scale in self.decomp.band_shapes:
                subsets.append(
                    Subset(
                        self.decomp,
                        pending,
                        make_head,
                        width=width,
                        bottleneck=bottleneck,
                        latent_channels=latent_channels,
                        blocks=blocks,
                        band_input=band_input,
                        gain=gain,
                    )
                )
                self._warn_of_few_latents(pending, latent_channels)
                pending = {}
        self.subsets = cast(Sequence[Subset], nn.ModuleList(subsets))
        sigma = self._set_sigma(sigma)
        self._moments: list[BandMoments] | None = None
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.int64))
        self.register_buffer("magnitude", torch.ones(()))
        self.config: dict[str, Any] = {
            "layers": counts[0] if is_integer(layers) else counts,
            "width": width,
            "bottleneck": bottleneck,
            "latent_channels": latent_channels,
            "blocks": blocks,
            "head": head,
            "sigma": sigma,
            "band_input": band_input,
        }

    def _layers_by_scale(self, layers: int | Sequence[int]) -> list[int]:
        layers = cast("int | Sequence[int]", listed(layers))
        if isinstance(layers, str) or not isinstance(layers, (Integral, Sequence)):
            raise TypeError(f"layers must be an integer or one for each scale, got {shown(layers)}")
        counts = list(layers) if isinstance(layers, Sequence) else [layers] * len(self.scales)
        if len(counts) != len(self.scales):
            raise ValueError(
                f"layers must be one number or one for each of the {len(self.scales)} scales, got {len(counts)}"
            )
        return [check_integer("layers", count, 1) for count in counts]

    def _warn_of_few_latents(self, layers: dict[int, int], channels: int) -> None:
        scale = max(layers)
        latents = sum(count * channels * math.prod(self.decomp.grid(s)) for s, count in layers.items())
        coefficients = math.prod(self.decomp.band_shapes[scale])
        if latents < coefficients:
            warnings.warn(
                f"scale {scale} has {latents} latents for the {coefficients} coefficients of its band: "
                "its band cannot be coded freely; more layers or latent_channels would",
                stacklevel=3,
            )

    def _set_sigma(self, sigma: float | Literal["learned"]) -> float | Literal["learned"]:
        if isinstance(sigma, str):
            if sigma != "learned":
                raise ValueError(f"sigma must be a positive number or 'learned', got {sigma!r}")
            self.log_sigma = nn.Parameter(torch.tensor(math.log(0.1)))
            return sigma
        if not is_number(sigma):
            raise TypeError(f"sigma must be a positive number or 'learned', got {shown(sigma)}")
        sigma = check_number("sigma", sigma, "positive and finite")
        least, most = _SIGMA_RANGE
        if not least <= sigma <= most:
            raise ValueError(f"sigma must be between {least:g} and {most:g}, got {sigma}: rescale the data")
        self.register_buffer("log_sigma", torch.tensor(math.log(sigma)))
        return sigma

    @property
    def scales(self) -> tuple[int, ...]:
        """Resolutions of the hierarchy, coarse to fine."""
        return self.decomp.scales

    @property
    def layer_scales(self) -> list[int]:
        """The scale of each of the L layers, coarse to fine."""
        return [s for subset in self.subsets for s in subset.scales]

    @property
    def latent_shapes(self) -> list[tuple[int, ...]]:
        """Shape of one sample's latents, for each of the L layers."""
        return [(layer.latent_channels, *layer.grid) for subset in self.subsets for layer in subset.layers]

    @property
    def device(self) -> torch.device:
        """Where the model is, and signals and latents have to be."""
        return self.start.device

    @property
    def precision(self) -> torch.dtype:
        """The real dtype of everything outside the networks: float32, or float64 in a float64 model."""
        return torch.float64 if self.start.dtype == torch.float64 else torch.float32

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep the decomposition and the units of the data in float32 at least: half precision is for networks."""
        owners: list[tuple[nn.Module, str]] = [(self, "log_sigma"), (self, "magnitude")]
        owners += [(subset, name) for subset in self.subsets for name in ("centre", "unit")]
        for module in self.decomp.modules():
            owners += [(module, name) for name, _ in module.named_parameters(recurse=False)]
            owners += [(module, name) for name, _ in module.named_buffers(recurse=False)]
        before = [cast(Tensor, getattr(owner, name)).detach() for owner, name in owners]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for (owner, name), exact in zip(owners, before, strict=True):
            now = cast(Tensor, getattr(owner, name))
            if widen(now).dtype != now.dtype:
                now.data = exact.to(now.device)
        return self

    def require_autograd(self) -> None:
        """Raise a ``ValueError`` if tensors of the model are of inference mode, which autograd cannot use."""
        if any(t.is_inference() for t in [*self.parameters(), *self.buffers()]):
            raise ValueError("model must be built outside torch.inference_mode to be trained, calibrated or refined")

    @property
    def sigma(self) -> Tensor:
        """Standard deviation of the likelihood, in the data's units: a scalar."""
        return self.log_sigma.clamp(*_LOG_SIGMA_RANGE).exp()

    @property
    def is_calibrated(self) -> bool:
        """Whether the bands' means and deviations are settled, by :meth:`calibrate` or by training."""
        return int(self.calibrated) >= _WARM_UP_BATCHES

    # The top-down pass.

    def observe(self, x: Tensor) -> Observation:
        """Run the encoder and split the signals into target bands.

        Raises:
            TypeError: If ``x`` is no tensor or its dtype does not fit the decomposition.
            ValueError: If its shape does not fit, it is on another device, or it is not finite.
        """
        x = self.decomp.check_signal(x)
        if x.device != self.device:
            raise ValueError(f"x is on {x.device}, the model on {self.device}")
        check_finite("x", x)
        x = x.to(self._signal_dtype(self.precision))
        activations = self.encoder((pack(x) / self.magnitude.clamp_min(1)).to(self.start.dtype))
        targets = None
        if self.decomp.orthonormal:
            with full_precision(x.device):
                targets = self.decomp.checked_analysis(x)
        return Observation(x, dict(zip(self.scales, activations, strict=True)), targets)

    def left(self, index: int, x: Tensor, coarser: Sequence[Tensor]) -> Tensor:
        """The band that coarser ones leave of signals ``x`` to subset ``index``, ``project(s, x − Σ_{s'<s} B h_{s'})``.

        No gradient goes to the coarser bands.
        """
        with full_precision(x.device):
            residual = x - self.decomp.synthesis([band.detach() for band in coarser]) if coarser else x
            return self.decomp.project(self.subsets[index].scale, residual)

    def evidence(self, index: int, seen: Observation, coarser: Sequence[Tensor]) -> Evidence:
        """What the posteriors of subset ``index`` see, given the coarser bands."""
        target = self.left(index, seen.x, coarser) if seen.targets is None else seen.targets[index]
        return self.subsets[index].evidence(seen.activations, target)

    def top_down(
        self,
        latents: Sequence[Tensor | None],
        batch: int,
        seen: Observation | None = None,
        *,
        until: int | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> list[SubsetPass]:
        """Run the subsets, coarse to fine, up to the band of scale ``until``."""
        passes: list[SubsetPass] = []
        context, first = self.start.expand(batch, *self.start.shape[1:]), 0
        for i, subset in enumerate(self.subsets):
            last = first + len(subset.layers)
            given, evidence = latents[first:last], None
            if seen is not None and any(z is None for z in given):
                evidence = self.evidence(i, seen, [p.band for p in passes])
            step = subset(context, given, evidence, temperature=temperature, generator=generator)
            passes.append(step)
            context, first = step.context, last
            if until is not None and subset.scale >= until:
                break
        return passes

    def result(self, passes: Sequence[SubsetPass], dtype: torch.dtype, x: Tensor | None = None) -> Result:
        """Gather a pass, with the reconstruction in ``dtype`` and, given data, its likelihood."""
        bands = [p.band for p in passes]
        with full_precision(bands[0].device):
            reconstruction = self.decomp.synthesis(bands)
        posteriors = [q for p in passes for q in p.posteriors]
        priors = [q for p in passes for q in p.priors]
        kl = None
        if all(q is not None for q in posteriors):
            kl = torch.stack([q.kl(p) for q, p in zip(posteriors, priors, strict=True) if q is not None], dim=1)
        return Result(
            reconstruction=reconstruction.to(dtype),
            bands=bands,
            latents=[z for p in passes for z in p.latents],
            nll=-torch.cat([p.log_prior() for p in passes], dim=1).sum(1),
            kl=kl,
            data=None if x is None else self.data_nll(reconstruction, x),
        )

    def data_nll(self, reconstruction: Tensor, x: Tensor) -> Tensor:
        """``−log N(x; reconstruction, σ² I)`` over real dimensions, in nats: ``(B,)``."""
        error = (pack(reconstruction) - pack(x)).square().flatten(1).sum(1)
        log_sigma = self.log_sigma.clamp(*_LOG_SIGMA_RANGE)
        return 0.5 * error * torch.exp(-2 * log_sigma) + self.decomp.numel * (log_sigma + 0.5 * math.log(2 * math.pi))

    # What users call.

    @override
    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Result:
        """Reconstruct signals from posterior samples.

        Args:
            x: Signals ``(B, C, *size)``.
            generator: Random numbers of the posterior samples.

        Returns:
            The pass, with ``kl``, ``data`` and ``elbo``.
        """
        return self.encode(x, temperature=1.0, generator=generator)

    def encode(self, x: Tensor, *, temperature: float = 0.0, generator: torch.Generator | None = None) -> Result:
        """Amortized inference: reconstruct signals from posterior means, or at a temperature.

        Differentiable: call it under ``torch.no_grad()`` for numbers and pictures. Where bands are not
        orthonormal, no gradient goes through what coarser bands leave to the targets of finer ones.

        Args:
            x: Signals ``(B, C, *size)``.
            temperature: Factor on the posteriors' standard deviation; 0 takes their means, 1 samples.
            generator: Random numbers of the samples.
        """
        temperature = _check_draws(temperature, generator)
        seen = self.observe(x)
        if self.training:
            self._observe_bands(seen)
        passes = self.top_down([None] * self.depth, len(x), seen, temperature=temperature, generator=generator)
        return self.result(passes, x.dtype, seen.x)

    def loss(self, x: Tensor, generator: torch.Generator | None = None, *, kl_weight: float = 1.0) -> Tensor:
        """Negative ELBO to minimise, averaged over the batch, in nats per data dimension: a scalar.

        Args:
            x: Signals ``(B, C, *size)``.
            generator: Random numbers of the posterior samples.
            kl_weight: Factor on the KL terms, for a warm-up.
        """
        kl_weight = check_number("kl_weight", kl_weight, "at least 0 and finite")
        result = self(x, generator)
        loss: Tensor = ((result.data + kl_weight * result.kl.sum(1)) / self.decomp.numel).mean()
        return loss

    def decode(
        self,
        latents: Sequence[Tensor | None],
        until: int | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Result:
        """Decode latents, drawing what is missing from the prior.

        Differentiable: call it under ``torch.no_grad()`` for numbers and pictures.

        Args:
            latents: One entry for each layer, coarse to fine: ``(B, latent_channels, *grid)`` or
                ``None`` for a draw from the prior; missing entries at the end count as ``None``. At
                least one is a tensor.
            until: Stop after the band of this scale, the reconstruction being the sum up to it.
            temperature: Factor on the priors' standard deviation; 0 takes their means.
            generator: Random numbers of the draws.

        Raises:
            TypeError: If an entry is neither a tensor nor ``None``.
            ValueError: If there are too many entries, none is a tensor, or one has the wrong shape or is on
                another device than the model.
        """
        temperature = _check_draws(temperature, generator)
        full = complete("latents", latents, self.latent_shapes)
        if until is not None:
            self.decomp.band_index(until)
        given = next((z for z in full if z is not None), None)
        if given is None:
            raise ValueError("latents must hold at least one tensor; use sample(n) to draw all of them")
        for i, z in enumerate(full):
            if z is not None and z.device != self.device:
                raise ValueError(f"latents[{i}] is on {z.device}, the model on {self.device}")
        passes = self.top_down(full, len(given), until=until, temperature=temperature, generator=generator)
        return self.result(passes, self._signal_dtype(given.dtype))

    @torch.no_grad()
    def sample(self, n: int, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` signals ``(n, C, *size)`` from the model (the likelihood's mean, without its noise)."""
        n, temperature = check_integer("n", n, 1), _check_draws(temperature, generator)
        passes = self.top_down([None] * self.depth, n, temperature=temperature, generator=generator)
        return self.result(passes, self._signal_dtype(passes[0].band.dtype)).reconstruction

    @torch.no_grad()
    def calibrate(self, data: Batch | Iterable[Any], *, at_most: int = AT_MOST) -> None:
        """Standardise bands by their mean and deviation over ``data``, signals or batches of them.

        Args:
            data: Signals ``(N, C, *size)``, a list of batches, or any iterable of batches, such as a ``DataLoader``
                or a generator without end. Conditions that come with them, in pairs, are left out.
            at_most: Signals after which an iterable is not read on; tensors and lists are read whole.

        Warns if ``sigma`` is so far above the data's own deviation that there is nothing to learn, or so far
        below it that nothing but the error counts.

        Raises:
            ValueError: If the model was built under ``torch.inference_mode``.
        """
        self.require_autograd()
        at_most = check_integer("at_most", at_most, 1)
        moments = moments_of(data, self.decomp, self.device, at_most)
        self._standardise(moments)
        self.calibrated.fill_(_WARM_UP_BATCHES)
        is_learned = isinstance(self.log_sigma, nn.Parameter)
        warn_of_sigma(*(_SIGMA_RANGE if is_learned else (float(self.sigma),) * 2), moments[-1])

    @torch.no_grad()
    def _observe_bands(self, seen: Observation) -> None:
        """Until calibrated, follow the bands' moments over the first training batches."""
        if (batches := int(self.calibrated)) >= _WARM_UP_BATCHES or torch._C._current_graph_task_id() != -1:
            return  # In a backward pass, gradient checkpointing runs a batch that has been counted again.
        with full_precision(seen.x.device):
            bands = seen.targets if seen.targets is not None else self.decomp.checked_analysis(seen.x)
        moments = [BandMoments.of(part) for part in (*bands, pack(seen.x))]
        if batches and self._moments is not None:
            moments = [a + b for a, b in zip(self._moments, moments, strict=True)]
        self._moments = moments if batches + 1 < _WARM_UP_BATCHES else None
        self._standardise(moments)
        self.calibrated.fill_(batches + 1)

    def _standardise(self, moments: Sequence[BandMoments]) -> None:
        """Take over moments of the bands and, last, of the signals, see :func:`moments_of`."""
        *bands, signals = moments
        # New tensors: an earlier pass may still need the old ones for its gradients, and a later one
        # could not use tensors made in inference mode.
        with torch.inference_mode(False):
            self.magnitude = torch.full_like(self.magnitude, math.sqrt(signals.square) or 1.0)
            for subset, moment, unit in zip(self.subsets, bands, units(bands), strict=True):
                subset.centre = moment.mean.to(subset.centre, copy=True)
                subset.unit = torch.full_like(subset.unit, unit)

    def require_latents(self, latents: Sequence[Tensor], batch: int, name: str = "latents") -> list[Tensor]:
        """Return the latents of every layer for a batch, in the model's precision and on its device.

        Raises:
            TypeError: If an entry is no tensor.
            ValueError: If one is missing or has the wrong shape.
        """
        full = require_all(name, latents, self.latent_shapes, batch)
        return [z.detach().to(self.device, self.precision) for z in full]

    def _signal_dtype(self, real: torch.dtype) -> torch.dtype:
        if not self.decomp.is_complex:
            return real
        return torch.complex128 if real == torch.float64 else torch.complex64


def _head_class(head: str | type[ScaleHead]) -> Callable[..., ScaleHead]:
    if isinstance(head, str):
        if head not in HEADS:
            raise ValueError(f"head must be one of {sorted(HEADS)} or a ScaleHead subclass, got {head!r}")
        return HEADS[head]
    if not (isinstance(head, type) and issubclass(head, ScaleHead)):
        raise TypeError(f"head must be a name or a ScaleHead subclass, got {head!r}")
    return head


def _check_draws(temperature: float, generator: torch.Generator | None) -> float:
    check_generator(generator)
    return check_number("temperature", temperature, "at least 0 and finite")
