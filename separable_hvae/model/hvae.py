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
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
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
    shown,
)
from separable_hvae.decompositions.base import Decomposition
from separable_hvae.functional import check_finite, pack, widen
from separable_hvae.model.latents import complete, require_all
from separable_hvae.model.result import Result
from separable_hvae.model.standardization import Standardization, moments_of, warn_of_sigma
from separable_hvae.nn import Condition, Encoder, Observation, ScaleHead, Subset, SubsetCondition, SubsetPass, TopDown
from separable_hvae.nn.conditions import check_absent, check_condition
from separable_hvae.nn.decoder import layer_counts
from separable_hvae.nn.heads import head_class
from separable_hvae.serialization import load, push, save

_SIGMA_RANGE = (1e-4, 1e2)
_LOG_SIGMA_RANGE = (math.log(_SIGMA_RANGE[0]), math.log(_SIGMA_RANGE[1]))


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
        sigma: Standard deviation of the likelihood in the data's units, from 1e-4 to 100, or ``"learned"``.
        band_input: Whether posteriors see what is missing of their target band (the paper: ``False``).
        condition: What priors and posteriors see beside their context, such as ``ClassCondition(10)``; the model
            keeps a copy. ``None`` is a model without conditions.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is not positive, ``sigma`` is out of range, ``layers`` has another length
            than ``scales``, or a name is unknown.
    """

    log_sigma: Tensor

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
        condition: Condition | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(decomp, Decomposition):
            raise TypeError(f"decomp must be a Decomposition, got {type(decomp).__name__}")
        self.decomp = decomp.bind(decomp.scales if scales is None else scales)
        width, bottleneck = check_integer("width", width, 1), check_integer("bottleneck", bottleneck, 1)
        latent_channels = check_integer("latent_channels", latent_channels, 1)
        blocks = check_integer("blocks", blocks, 0)
        check_flag("band_input", band_input)
        check_condition(condition)
        counts = layer_counts(layers, self.scales)
        self.depth = sum(counts)
        gain = 1 / math.sqrt(self.depth)
        sizes = {"width": width, "bottleneck": bottleneck, "blocks": blocks}
        grids = [self.decomp.grid(s) for s in self.scales]
        self.encoder = Encoder(self.decomp.real_channels, width, bottleneck, grids, blocks, gain=gain)
        self.decoder = TopDown(
            self.decomp, counts, head_class(head), latent_channels=latent_channels, band_input=band_input, **sizes
        )
        self.condition = deepcopy(condition)
        if self.condition is not None:
            self.condition.build(self.decomp, gain=gain, **sizes)
            self.condition.build_unknown(self.decomp, width)
        self.standardization = Standardization(self.decomp.real_channels)
        sigma = self._set_sigma(sigma)
        self.config: dict[str, Any] = {
            "layers": counts[0] if is_integer(layers) else counts,
            "width": width,
            "bottleneck": bottleneck,
            "latent_channels": latent_channels,
            "blocks": blocks,
            "head": head,
            "sigma": sigma,
            "band_input": band_input,
            "condition": condition,
        }

    def _set_sigma(self, sigma: float | Literal["learned"]) -> float | Literal["learned"]:
        if isinstance(sigma, str):
            if sigma != "learned":
                raise ValueError(f"sigma must be a positive number or 'learned', got {sigma!r}")
            self.log_sigma = nn.Parameter(torch.tensor(math.log(0.1), dtype=widen(torch.empty(0)).dtype))
            return sigma
        if not is_number(sigma):
            raise TypeError(f"sigma must be a positive number or 'learned', got {shown(sigma)}")
        sigma = check_number("sigma", sigma, "positive and finite")
        least, most = _SIGMA_RANGE
        if not least <= sigma <= most:
            raise ValueError(f"sigma must be between {least:g} and {most:g}, got {sigma}: rescale the data")
        self.register_buffer("log_sigma", torch.tensor(math.log(sigma), dtype=widen(torch.empty(0)).dtype))
        return sigma

    @property
    def start(self) -> nn.Parameter:
        """The context that flows into the first layer, ``(1, width, *grid)``."""
        return self.decoder.start

    @property
    def subsets(self) -> Sequence[Subset]:
        """The layers and the head of each band, coarse to fine."""
        return self.decoder.subsets

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
    def real_dtype(self) -> torch.dtype:
        """The real dtype of everything outside the networks: float32, or float64 in a float64 model."""
        return torch.float64 if self.start.dtype == torch.float64 else torch.float32

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep the decomposition and the units of the data in float32 at least: half precision is for networks."""
        kept: list[nn.Module] = [self, self.standardization, *self.subsets, *self.decomp.modules()]
        owners = [(m, n) for m in kept for n in (*m._parameters, *m._buffers) if getattr(m, n) is not None]
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
        return self.standardization.is_settled

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
        x = x.to(self._signal_dtype(self.real_dtype))
        activations = self.encoder(self.standardization.scaled(pack(x)).to(self.start.dtype))
        targets = None
        if self.decomp.orthonormal:
            with full_precision(x.device):
                targets = self.decomp.checked_analysis(x)
        return Observation(x, dict(zip(self.scales, activations, strict=True)), targets)

    def _bands(self, seen: Observation) -> list[Tensor]:
        if seen.targets is not None:
            return seen.targets
        with full_precision(seen.x.device):
            return self.decomp.checked_analysis(seen.x)

    def conditions(
        self, condition: Any, batch: int, generator: torch.Generator | None = None
    ) -> list[SubsetCondition] | None:
        """What each subset sees of the condition of ``batch`` samples; ``None`` for a model without conditions.

        Raises:
            TypeError: If the condition has the wrong type.
            ValueError: If it is missing, or given to a model without conditions, or does not fit.
        """
        if self.condition is None:
            check_absent(condition)
            return None
        return self.decoder.conditions(self.condition.embed(condition, batch, generator))

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
    def forward(self, x: Tensor, generator: torch.Generator | None = None, condition: Any = None) -> Result:
        """Reconstruct signals from posterior samples.

        Args:
            x: Signals ``(B, C, *size)``.
            generator: Random numbers of the posterior samples.
            condition: What the model's condition takes, one for each sample.

        Returns:
            The pass, with ``kl``, ``data`` and ``elbo``.
        """
        return self._encode(x, 1.0, generator, condition)

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
        """
        temperature = _check_draws(temperature, generator)
        with self._graph(with_grad, x, condition):
            return self._encode(x, temperature, generator, condition)

    def _encode(self, x: Tensor, temperature: float, generator: torch.Generator | None, condition: Any) -> Result:
        seen = self.observe(x)
        conditions = self.conditions(condition, len(x), generator)
        if self.training and not self.is_calibrated:
            self.standardization.follow(self.subsets, self._bands(seen), seen.x)
        draws: dict[str, Any] = {"temperature": temperature, "generator": generator}
        passes = self.decoder([None] * self.depth, len(x), seen, conditions, **draws)
        return self.result(passes, x.dtype, seen.x)

    def loss(
        self,
        x: Tensor,
        generator: torch.Generator | None = None,
        *,
        kl_weight: float = 1.0,
        condition: Any = None,
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
        """Decode latents, drawing what is missing from the prior.

        A graph for gradients is kept in training mode, where an entry requires a gradient, or by ``with_grad``.

        Args:
            latents: One entry for each layer, coarse to fine: ``(B, latent_channels, *grid)`` or
                ``None`` for a draw from the prior; missing entries at the end count as ``None``. At
                least one is a tensor.
            until: Stop after the band of this scale, the reconstruction being the sum up to it.
            temperature: Factor on the priors' standard deviation; 0 takes their means.
            generator: Random numbers of the draws.
            condition: What the model's condition takes, one for each sample.
            with_grad: Whether to keep a graph in evaluation mode too, for gradients of parameters.

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
        draws: dict[str, Any] = {"temperature": temperature, "generator": generator}
        with self._graph(with_grad, *full, condition):
            passes = self.decoder(full, len(given), None, self.conditions(condition, len(given)), until=until, **draws)
            return self.result(passes, self._signal_dtype(given.dtype))

    def _graph(self, with_grad: bool, *given: Any) -> AbstractContextManager[Any]:
        """Context in which autograd keeps a graph, if it is on and something asks for one."""
        check_flag("with_grad", with_grad)
        asked = with_grad or self.training or any(isinstance(t, Tensor) and t.requires_grad for t in given)
        return nullcontext() if asked else torch.no_grad()

    @torch.no_grad()
    def sample(
        self, n: int, temperature: float = 1.0, generator: torch.Generator | None = None, condition: Any = None
    ) -> Tensor:
        """Draw ``n`` signals ``(n, C, *size)`` from the model (the likelihood's mean, without its noise)."""
        n, temperature = check_integer("n", n, 1), _check_draws(temperature, generator)
        conditions, draws = self.conditions(condition, n), {"temperature": temperature, "generator": generator}
        passes = self.decoder([None] * self.depth, n, None, conditions, **draws)
        return self.result(passes, self._signal_dtype(passes[0].band.dtype)).reconstruction

    @torch.no_grad()
    def calibrate(self, data: Tensor | Iterable[Tensor]) -> None:
        """Standardise bands by their mean and deviation over ``data``, signals or batches of them.

        Warns if ``sigma`` is so far above the data's own deviation that there is nothing to learn, or so far
        below it that nothing but the error counts.

        Raises:
            ValueError: If the model was built under ``torch.inference_mode``.
        """
        self.require_autograd()
        moments = moments_of(data, self.decomp, self.device)
        self.standardization.calibrate(self.subsets, moments)
        is_learned = isinstance(self.log_sigma, nn.Parameter)
        warn_of_sigma(*(_SIGMA_RANGE if is_learned else (float(self.sigma),) * 2), moments[-1])

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json``, ``model.safetensors`` and a model card ``README.md``.

        A model that is there already is replaced, all at once; a ``README.md`` is left as it is. Where
        several processes train, one of them saves.

        Args:
            folder: Where to write; made if it is missing.

        Raises:
            TypeError: If something cannot be saved: what a decomposition of your own was built with
                (see :meth:`Decomposition.config`), an option of a subclass that is not in its ``config``,
                or state that is no tensor of a usual dtype.
            ValueError: If ``folder`` is a file.
        """
        save(self, folder)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        classes: Sequence[type[nn.Module]] = (),
        trust_import_paths: bool = False,
        device: str | torch.device = "cpu",
        revision: str | None = None,
    ) -> Self:
        """Load what :meth:`save_pretrained` wrote, in eval mode.

        Args:
            source: A folder, or the id ``"owner/name"`` of a model on the Hugging Face hub.
            classes: Decompositions and heads of your own that the model is made of.
            trust_import_paths: Whether to import classes of your own from the modules that the file
                names. Importing a module runs it: only for files whose origin you trust.
            device: Where the model goes.
            revision: Branch, tag or commit on the hub.

        Raises:
            TypeError: If ``classes`` holds anything but decompositions and heads, or another argument has
                the wrong type.
            ValueError: If a file is missing, truncated, altered or of a newer format, or does not fit
                the model, a class is unknown, or there is no such device; the message names the file and
                the reason.
            ImportError: If ``source`` is a hub id and the extra ``hub`` is not installed.
        """
        trust: dict[str, Any] = {"classes": classes, "trust_import_paths": trust_import_paths}
        return load(cls, source, device=device, revision=revision, **trust)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        commit_message: str = "Upload model",
    ) -> str:
        """Upload the model to the Hugging Face hub; a model card that is there already is kept.

        Args:
            repo_id: Repository ``"owner/name"``, made if it is missing.
            private: Whether a new repository is private; ``None`` takes the owner's default.
            token: Access token; ``None`` takes the one of the login.
            branch: Branch to upload to, made if it is missing; ``None`` is the main one.
            commit_message: Message of the commit, whose address is returned.

        Raises:
            ImportError: If the extra ``hub`` is not installed.
        """
        return push(self, repo_id, private=private, token=token, branch=branch, commit_message=commit_message)

    def require_latents(self, latents: Sequence[Tensor], batch: int, name: str = "latents") -> list[Tensor]:
        """Return the latents of every layer for a batch, in the model's precision and on its device.

        Raises:
            TypeError: If an entry is no tensor.
            ValueError: If one is missing or has the wrong shape.
        """
        full = require_all(name, latents, self.latent_shapes, batch)
        return [z.detach().to(self.device, self.real_dtype) for z in full]

    def _signal_dtype(self, real: torch.dtype) -> torch.dtype:
        if not self.decomp.is_complex:
            return real
        return torch.complex128 if real == torch.float64 else torch.complex64


def _check_draws(temperature: float, generator: torch.Generator | None) -> float:
    check_generator(generator)
    return check_number("temperature", temperature, "at least 0 and finite")
