r"""fastMRI's HDF5 volumes as complex images of one size.

    image = crop(F⁻¹ k)                        orthonormal, centred
    small = F_m⁻¹ cut_m(F_n image) · m/n       the central m×m bins of n×n, so that values keep their height

Several coils y_c = S_c x become one, either weighted by their sensitivities (estimated from the centre of
k-space), x̂ = Σ_c S̄_c y_c, or as the strongest singular direction of all coils' samples (SVD compression).
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

CENTRE = 24  # Bins on an axis from which sensitivities are estimated.


def to_image(kspace: Tensor) -> Tensor:
    """Centred orthonormal inverse Fourier transform of the last two axes."""
    shifted = torch.fft.ifftshift(kspace, dim=(-2, -1))
    return torch.fft.fftshift(torch.fft.ifft2(shifted, norm="ortho"), dim=(-2, -1))


def to_kspace(image: Tensor) -> Tensor:
    """Inverse of :func:`to_image`."""
    shifted = torch.fft.ifftshift(image, dim=(-2, -1))
    return torch.fft.fftshift(torch.fft.fft2(shifted, norm="ortho"), dim=(-2, -1))


def centre(x: Tensor, size: Sequence[int]) -> Tensor:
    """The central ``size`` of the last two axes; the bin of frequency zero stays in the centre."""
    (h, w), (a, b) = x.shape[-2:], size
    top, left = h // 2 - a // 2, w // 2 - b // 2
    return x[..., top : top + a, left : left + b]


def fourier_resample(image: Tensor, size: int) -> Tensor:
    """Resample square images ``(..., n, n)`` to ``(..., size, size)`` by cutting their spectrum."""
    n = image.shape[-1]
    if size > n:
        raise ValueError(f"images of {n}×{n} points cannot be resampled to {size}×{size}: no bins to fill in")
    return to_image(centre(to_kspace(image), (size, size))) * (size / n)


def combine_by_sensitivity(coils: Tensor) -> Tensor:
    """Emulate a single coil, ``(slices, coils, H, W)`` to ``(slices, H, W)``, weighted by sensitivities.

    Sensitivities are the coils' images at low resolution over their root sum of squares, which has the phase
    of the strongest singular direction: the signal's own phase is to stay.
    """
    kspace = to_kspace(coils)
    window = torch.ones(())
    for axis in (-2, -1):
        n = coils.shape[axis]
        width = min(CENTRE, n)
        taper = torch.zeros(n)
        taper[n // 2 - width // 2 :][:width] = torch.hann_window(width + 1)[1:]
        window = window * taper.reshape(-1, *[1] * (-1 - axis))
    low = to_image(kspace * window)
    phase = combine_by_svd(low)[:, None].sgn()
    total = low.abs().square().sum(1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    weights = low / total * phase.conj()
    return (weights.conj() * coils).sum(1)


def combine_by_svd(coils: Tensor) -> Tensor:
    """Emulate a single coil, ``(slices, coils, H, W)`` to ``(slices, H, W)``, by the strongest singular direction."""
    samples = coils.movedim(1, 0).flatten(1).to(torch.complex128)
    _, vectors = torch.linalg.eigh(samples @ samples.mH)
    return torch.einsum("c,schw->shw", vectors[:, -1].conj().to(coils.dtype), coils)


UNUSABLE = ("refuse", "leave out")
COMBINE = {"sensitivity": combine_by_sensitivity, "svd": combine_by_svd}


def volume(
    path: Path, size: int = 128, crop: int | None = None, coils: Literal["sensitivity", "svd"] = "sensitivity"
) -> Tensor:
    """One volume's slices, complex ``(slices, 1, size, size)``, with a mean square of one per real number.

    Args:
        path: An HDF5 file with ``kspace``, complex ``(slices, H, W)`` or ``(slices, coils, H, W)``.
        size: Points on each axis of the result.
        crop: Points on each axis of the square that is cut from the image before it is resampled; ``None``
            takes that of the file's own reconstruction, or the largest square where there is none.
        coils: How several coils become one.

    Raises:
        ValueError: If the file is missing, truncated, foreign, undersampled, empty, not finite or smaller than
            the crop; the message names file and reason.
    """
    if not path.exists():
        raise ValueError(f"{path} {'is a dead link' if path.is_symlink() else 'does not exist'}")
    try:
        with h5py.File(path) as file:
            if "kspace" not in file:
                raise ValueError(f"{path} has no 'kspace', only {sorted(file)}")
            if "mask" in file:
                raise ValueError(f"{path} has a 'mask': its k-space is undersampled and gives no images to learn from")
            samples = _read(file["kspace"])
            names = [k for k in ("reconstruction_esc", "reconstruction_rss") if k in file and not crop]
            own = [(k, getattr(file[k], "shape", None)) for k in names[:1]]
    except (OSError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} is truncated or no HDF5 volume: {error}") from error
    if samples is None or samples.dtype.kind != "c" or samples.ndim not in (3, 4) or not samples.size:
        got = "a group" if samples is None else f"{samples.dtype} of shape {samples.shape}"
        raise ValueError(f"{path}: kspace must be complex (slices, H, W) or (slices, coils, H, W), got {got}")
    for name, shape in own:
        if shape is None or len(shape) < 2 or min(shape[-2:]) < 1:
            got = "a group" if shape is None else f"shape {shape}"
            raise ValueError(f"{path}: {name} must be images (slices, H, W), got {got}; or say what to crop")
    kspace = torch.from_numpy(samples.astype(np.complex64))
    if not bool(torch.isfinite(torch.view_as_real(kspace)).all()):
        raise ValueError(f"{path}: kspace must be finite, got NaN or infinity")
    image = to_image(kspace)
    side = crop or min(own[0][1][-2:] if own else image.shape[-2:])
    if min(image.shape[-2:]) < side:
        raise ValueError(f"{path}: slices of {image.shape[-2]}×{image.shape[-1]} are smaller than the crop, {side}")
    if image.ndim == 4:
        image = COMBINE[coils](image)
    try:
        image = fourier_resample(centre(image, (side, side)), size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    unit = torch.view_as_real(image).double().square().mean().sqrt()
    if not unit > 0:
        raise ValueError(f"{path}: kspace is zero everywhere")
    return (image / unit.to(torch.float32))[:, None]


def _read(dataset: Any) -> npt.NDArray[Any] | None:
    """All samples of a dataset; ``None`` of a group."""
    return np.asarray(dataset[()]) if isinstance(dataset, h5py.Dataset) else None


def fastmri(
    root: Path,
    *,
    train: bool,
    size: int = 128,
    crop: int | None = None,
    coils: str = "sensitivity",
    unusable: str = "refuse",
) -> Tensor:
    """All slices of a set, complex ``(N, 1, size, size)``, each volume with a mean square of one per real number.

    Args:
        root: Folder with ``singlecoil_train`` and ``singlecoil_val``, or ``multicoil_train`` and ``multicoil_val``.
        train: The training volumes, else the validation volumes.
        size: See :func:`volume`.
        crop: See :func:`volume`.
        coils: See :func:`volume`.
        unusable: ``"refuse"`` raises at the first volume that cannot be used, ``"leave out"`` names each on stderr
            and goes on without it.

    Raises:
        ValueError: If there are no volumes, or one cannot be used; the message names file and reason.
    """
    if unusable not in UNUSABLE:
        raise ValueError(f"unusable must be one of {UNUSABLE}, got {unusable!r}")
    if coils not in COMBINE:
        raise ValueError(f"coils must be one of {sorted(COMBINE)}, got {coils!r}")
    part = "train" if train else "val"
    folders = [root / f"{kind}_{part}" for kind in ("singlecoil", "multicoil")]
    files = [p for folder in folders if folder.is_dir() for p in sorted(folder.glob("[!.]*.h5"))]
    if not files:
        raise ValueError(f"{root} has no volumes: no *.h5 in {' or '.join(f.name for f in folders)}")
    volumes: list[Tensor] = []
    for path in files:
        try:
            volumes.append(volume(path, size, crop, coils))  # type: ignore[arg-type]
        except ValueError as error:
            if unusable == "refuse":
                raise
            print(f"left out: {error}", file=sys.stderr)
    if not volumes:
        raise ValueError(f"{root} has no volume that can be used: all {len(files)} were left out")
    if len(volumes) < len(files):
        print(f"{root}: {len(volumes)} volumes, {len(files) - len(volumes)} left out", file=sys.stderr)
    return torch.cat(volumes)
