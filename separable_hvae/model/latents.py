"""The latents of a hierarchy: a list with one entry for each layer, coarse to fine."""

from collections.abc import Sequence

import torch
from torch import Tensor

from separable_hvae._validation import came_as


def complete(
    name: str,
    latents: Sequence[Tensor | None],
    shapes: Sequence[tuple[int, ...]],
    device: torch.device | None = None,
) -> list[Tensor | None]:
    """Return one entry for each layer, ``None`` for those that are missing at the end.

    Args:
        name: What the latents are called.
        latents: Tensors ``(B, *shape)`` or ``None``.
        shapes: Shape of one sample's latents, for each layer.
        device: Where they have to be; ``None`` allows any.

    Raises:
        TypeError: If they come in no sequence, or an entry is neither a real tensor nor ``None``.
        ValueError: If there are too many, one has the wrong shape, or they hold no sample.
    """
    if isinstance(latents, Tensor) or not isinstance(latents, Sequence):
        raise TypeError(f"{name} must be a list with one entry for each layer, got {type(latents).__name__}")
    if len(latents) > len(shapes):
        raise ValueError(f"{name} must have at most {len(shapes)} entries, one for each layer, got {len(latents)}")
    batch = next((z.shape[0] for z in latents if isinstance(z, Tensor) and z.ndim), 0)
    for i, (z, shape) in enumerate(zip(latents, shapes, strict=False)):
        if z is None:
            continue
        if not isinstance(z, Tensor) or not z.is_floating_point():
            raise TypeError(f"{name}[{i}] must be a real tensor or None, got {came_as(z)}")
        if tuple(z.shape) != (batch, *shape):
            raise ValueError(f"{name}[{i}] must have shape {(batch, *shape)}, got {tuple(z.shape)}")
        if device is not None and z.device != device:
            raise ValueError(f"{name}[{i}] is on {z.device}, the model on {device}")
        if not batch:
            raise ValueError(f"{name}[{i}] must hold at least one sample, got shape {tuple(z.shape)}")
    return [*latents, *[None] * (len(shapes) - len(latents))]


def require_all(
    name: str, latents: Sequence[Tensor | None], shapes: Sequence[tuple[int, ...]], batch: int
) -> list[Tensor]:
    """Return the latents ``(batch, *shape)`` of every layer, see :func:`complete`.

    Raises:
        ValueError: If one is missing, too.
    """
    full = complete(name, latents, shapes)
    given = [z for z in full if z is not None]
    if len(given) < len(full) or len(given[0]) != batch:
        got = f"{len(given)} for {len(given[0])} signals" if given else "none"
        raise ValueError(f"{name} must hold {len(full)} tensors, one for each layer, for {batch} signals, got {got}")
    return given


def decodable(
    latents: Sequence[Tensor | None], shapes: Sequence[tuple[int, ...]], device: torch.device
) -> tuple[list[Tensor | None], Tensor]:
    """Return one entry for each layer, see :func:`complete`, and the first tensor among them.

    Raises:
        ValueError: If there is none, too.
    """
    full = complete("latents", latents, shapes, device)
    given = next((z for z in full if z is not None), None)
    if given is None:
        raise ValueError("latents must hold at least one tensor; use sample(n) to draw all of them")
    return full, given
