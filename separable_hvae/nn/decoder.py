r"""The top-down pass: every subset, coarse to fine, with the context that flows from one to the next.

    p(z) = Π_l p(z_l | z_<l)                                   eq. 2
    q(z | x) = Π_l q(z_l | x, z_<l)                            eq. 3

One pass serves training, reconstruction, sampling, partial decoding and refinement: latents come as a list with one
entry for each layer, and ``None`` means "from the posterior" where signals were observed, else "from the prior".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from separable_hvae._validation import check_integer, listed, shown
from separable_hvae.decompositions import Decomposition
from separable_hvae.functional import per_sample
from separable_hvae.nn.conditions import ConditionFeatures
from separable_hvae.nn.heads import ScaleHead
from separable_hvae.nn.subset import Evidence, Subset, SubsetCondition, SubsetPass


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


class TopDown(nn.Module):
    """The subsets of a hierarchy, and the context that they begin with.

    Args:
        decomp: The bound decomposition.
        layers: Number of layers of each scale, coarse to fine.
        head: Builds the heads, see :class:`ScaleHead`.
        width: Channels of the context.
        **options: Of every :class:`Subset`.

    Attributes:
        start: The learned context ``(1, width, *grid)`` that flows into the first layer.
        subsets: One for each band, coarse to fine.
    """

    decomp: Decomposition
    subsets: Sequence[Subset]

    def __init__(
        self, decomp: Decomposition, layers: Sequence[int], head: type[ScaleHead], *, width: int, **options: Any
    ) -> None:
        super().__init__()
        # The model's, no submodule: it is moved with the model, and its state counts once.
        self.__dict__["decomp"] = decomp
        self.start = nn.Parameter(torch.zeros(1, width, *decomp.grid(decomp.scales[0])))
        decomp.to(self.start.device)
        gain = 1 / math.sqrt(sum(layers))
        subsets: list[Subset] = []
        pending: dict[int, int] = {}
        for scale, count in zip(decomp.scales, layers, strict=True):
            pending[scale] = count
            if scale in decomp.band_shapes:
                subsets.append(Subset(decomp, pending, head, width=width, gain=gain, **options))
                pending = {}
        self.subsets = cast(Sequence[Subset], nn.ModuleList(subsets))

    @override
    def forward(
        self,
        latents: Sequence[Tensor | None],
        batch: int,
        seen: Observation | None = None,
        conditions: Sequence[SubsetCondition] | None = None,
        *,
        until: int | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        posteriors: bool = False,
    ) -> list[SubsetPass]:
        """Run the subsets, coarse to fine, up to the band of scale ``until``.

        Args:
            latents: One entry for each layer: ``(B, latent_channels, *grid)`` or ``None``.
            batch: Number of samples.
            seen: Signals, where what is missing comes from the posterior.
            conditions: What each subset sees of the conditions, see :meth:`conditions`.
            until: Scale of the last band; ``None`` runs them all.
            temperature: Factor on the standard deviation of what is drawn; 0 gives means.
            generator: Random numbers for what is drawn.
            posteriors: Whether to ask for the posteriors of given latents too.
        """
        if until is not None:
            self.decomp.band_index(until)
        passes: list[SubsetPass] = []
        context, first = self.start.expand(batch, *self.start.shape[1:]), 0
        for i, subset in enumerate(self.subsets):
            last = first + len(subset.scales)
            given, evidence = latents[first:last], None
            condition = None if conditions is None else conditions[i]
            if seen is not None and (posteriors or any(z is None for z in given)):
                evidence = self.evidence(i, seen, [p.band for p in passes], condition)
            drawn: dict[str, Any] = {"temperature": temperature, "generator": generator, "posteriors": posteriors}
            step = subset(context, given, evidence, condition, **drawn)
            passes.append(step)
            context, first = step.context, last
            if until is not None and subset.scale >= until:
                break
        return passes

    def conditions(self, features: ConditionFeatures | None) -> list[SubsetCondition] | None:
        """What each subset sees of the conditions of a batch; ``None`` without conditions."""
        if features is None:
            return None
        activations = dict(zip(self.decomp.scales, features.activations, strict=True))
        centres: list[Tensor | None] = [None] * len(self.subsets)
        if features.mean is not None:
            bands = self.decomp.analysis(features.mean)
            centres = [
                band if features.known is None else torch.where(per_sample(features.known, band), band, subset.centre)
                for subset, band in zip(self.subsets, bands, strict=True)
            ]
        return [
            SubsetCondition([activations[s] for s in dict.fromkeys(subset.scales)], centre)
            for subset, centre in zip(self.subsets, centres, strict=True)
        ]

    def target_of(self, index: int, x: Tensor, coarser: Sequence[Tensor]) -> Tensor:
        """The band that coarser ones leave of signals ``x`` to subset ``index``, ``project(s, x − Σ_{s'<s} B h_{s'})``.

        No gradient goes to the coarser bands.
        """
        residual = x - self.decomp.synthesis([band.detach() for band in coarser]) if coarser else x
        return self.decomp.project(self.subsets[index].scale, residual)

    def evidence(
        self, index: int, seen: Observation, coarser: Sequence[Tensor], condition: SubsetCondition | None = None
    ) -> Evidence:
        """What the posteriors of subset ``index`` see, given the coarser bands."""
        target = self.target_of(index, seen.x, coarser) if seen.targets is None else seen.targets[index]
        return self.subsets[index].evidence(seen.activations, target, condition)


def layer_counts(layers: int | Sequence[int], scales: Sequence[int]) -> list[int]:
    """The number of layers of each scale, from one number for all or one for each.

    Raises:
        TypeError: If it is neither.
        ValueError: If a number is not positive, or there are more or fewer than scales.
    """
    layers = cast("int | Sequence[int]", listed(layers))
    if isinstance(layers, str) or not isinstance(layers, (Integral, Sequence)):
        raise TypeError(f"layers must be an integer or one for each scale, got {shown(layers)}")
    counts = list(layers) if isinstance(layers, Sequence) else [layers] * len(scales)
    if len(counts) != len(scales):
        raise ValueError(f"layers must be one number or one for each of the {len(scales)} scales, got {len(counts)}")
    return [check_integer("layers", count, 1) for count in counts]
