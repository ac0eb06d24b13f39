"""What one top-down pass gives."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from separable_hvae.decompositions import Decomposition
from separable_hvae.distributions import Likelihood, Prediction
from separable_hvae.nn import SubsetPass


@dataclass(frozen=True, repr=False)
class Result:
    """What one top-down pass gives.

    Attributes:
        reconstruction: Signals ``(B, C, *size)``, in the input's dtype.
        bands: Bands ``(B, *band_shape)``, coarse to fine.
        latents: L tensors ``(B, latent_channels, *grid)``, coarse to fine.
        nll: ``−log p(z)`` of the latents, in nats: ``(B,)``.
        kl: ``KL(q_l ‖ p_l)`` of each layer, in nats: ``(B, L)``; ``None`` without an encoder pass.
        data: ``−log p(x | z)``, in nats: ``(B,)``; ``None`` without data.
        objective: Full MAP objective of refined latents, in nats: ``(B,)``; ``None`` on other results.
        history: What a refiner recorded at each step; ``None`` on other results.
        refused: Where a refiner returned its start because it found nothing better, or a sampler nothing
            finite: ``(B,)`` bool; ``None`` on other results.
    """

    reconstruction: Tensor
    bands: list[Tensor]
    latents: list[Tensor]
    nll: Tensor
    kl: Tensor | None = None
    data: Tensor | None = None
    objective: Tensor | None = None
    history: Any = None
    refused: Tensor | None = None

    @override
    def __repr__(self) -> str:
        dtype = str(self.reconstruction.dtype).removeprefix("torch.")
        grids = Counter(map(_shape, self.latents))
        lines = [
            f"reconstruction {_shape(self.reconstruction)} {dtype}",
            f"bands          {', '.join(map(_shape, self.bands))}",
            f"latents        {', '.join(f'{n} × {shape}' for shape, n in grids.items())}",
        ]
        kl = None if self.kl is None else self.kl.sum(1)
        for name, nats in {"nll": self.nll, "kl": kl, "data": self.data, "objective": self.objective}.items():
            if nats is not None:
                lines.append(f"{name:14} {float(nats.detach().mean()):.4g} nats on average")
        if self.refused is not None:
            lines.append(f"refused        {int(self.refused.sum())} of {len(self.refused)}")
        return "\n".join([f"{type(self).__name__}:", *(f"  {line}" for line in lines)])

    @property
    def elbo(self) -> Tensor:
        """Evidence lower bound in nats: ``(B,)``.

        Raises:
            ValueError: If the pass had no data or took latents as given.
        """
        if self.kl is None or self.data is None:
            raise ValueError(
                "elbo needs a pass that drew its latents from the posterior: use model(x) or model.encode(x)"
            )
        return -(self.data + self.kl.sum(1))


def _shape(x: Tensor) -> str:
    return f"({', '.join(map(str, x.shape))})"


def gather(
    passes: Sequence[SubsetPass],
    decomp: Decomposition,
    likelihood: Likelihood,
    dtype: torch.dtype,
    x: Tensor | None = None,
) -> Result:
    """What a top-down pass gives.

    Args:
        passes: The pass of each subset, coarse to fine.
        decomp: What makes signals of their bands.
        likelihood: The density of signals given these.
        dtype: Of the reconstruction.
        x: Signals ``(B, C, *size)`` to compare with.
    """
    bands = [p.band for p in passes]
    reconstruction = decomp.synthesis(bands)
    posteriors = [q for p in passes for q in p.posteriors]
    kl = None
    if all(q is not None for q in posteriors):
        priors = [prior for p in passes for prior in p.priors]
        kl = torch.stack([q.kl(p) for q, p in zip(posteriors, priors, strict=True) if q is not None], dim=1)
    return Result(
        reconstruction=reconstruction.to(dtype),
        bands=bands,
        latents=[z for p in passes for z in p.latents],
        nll=-torch.cat([p.log_prior() for p in passes], dim=1).sum(1),
        kl=kl,
        data=None if x is None else likelihood.nll(Prediction(bands, reconstruction), x),
    )
