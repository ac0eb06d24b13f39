"""The laws of a decomposition, measured.

For random signals x, y and bands g, h, with relative errors throughout:

    reconstruction    synthesis(analysis(x)) = x
    linearity         f(a x + b y) = a f(x) + b f(y)     for analysis and synthesis
    partial sums      Σ_s synthesis(h_s alone) = synthesis(h)
    orthonormality    ‖analysis(x)‖ = ‖x‖ and ‖synthesis(h)‖ = ‖h‖, entries = degrees of freedom
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import override

from separable_hvae._validation import check_instance, check_number
from separable_hvae.decompositions.checks import wrong_bands
from separable_hvae.functional import device_of

if TYPE_CHECKING:
    from separable_hvae.decompositions.base import Decomposition

_MEASURABLE = 1024  # Entries of a band up to which its matrices are formed.


@dataclass(frozen=True)
class LawReport:
    """What :meth:`Decomposition.check` measured.

    Attributes:
        errors: Relative error of each law.
        to_grid_condition: For each scale, the condition number of ``to_grid``; ``inf`` if it is not
            injective, ``None`` where the band is too large to measure.
        from_grid_condition: The same for ``from_grid``; ``inf`` if it does not reach every band.
        remarks: What more there is to say of a law that is broken.
    """

    errors: dict[str, float]
    to_grid_condition: dict[int, float | None]
    from_grid_condition: dict[int, float | None]
    remarks: dict[str, str] = field(default_factory=dict)

    @override
    def __str__(self) -> str:
        lines = [f"{law:30} {error:.0e}" for law, error in self.errors.items()]
        for name, conditions in (("to_grid", self.to_grid_condition), ("from_grid", self.from_grid_condition)):
            numbers = (f"{s}: {'too large to measure' if c is None else f'{c:.1f}'}" for s, c in conditions.items())
            lines.append(f"{f'condition of {name}':30} {', '.join(numbers)}")
        return "\n".join(lines)

    def require(self, tolerance: float) -> None:
        """Raise a ``ValueError`` that names each law whose error exceeds ``tolerance``.

        A singular ``to_grid`` or ``from_grid`` loses part of a band on the way to or from the network
        but breaks nothing else: it is a warning.
        """
        failing = [f"{law} (error {e:.2g})" for law, e in self.errors.items() if not e <= tolerance]
        failing += [f"{law}: {remark}" for law, remark in self.remarks.items()]
        if failing:
            raise ValueError(
                f"the decomposition breaks {len(failing) - len(self.remarks)} law(s) at tolerance {tolerance:.1g}: "
                + "; ".join(failing)
            )
        for name, conditions in (("to_grid", self.to_grid_condition), ("from_grid", self.from_grid_condition)):
            singular = [s for s, c in conditions.items() if c == math.inf]
            if singular:
                warnings.warn(
                    f"{name} is singular at scales {singular}; override it to show the whole band", stacklevel=3
                )


def check(self: "Decomposition", *, tolerance: float | None = None, dtype: torch.dtype = torch.float64) -> LawReport:
    """Measure every law on random signals and bands.

    Args:
        self: The decomposition, whose method this is.
        tolerance: Largest relative error allowed; ``None`` takes 1e-10 in float64, 1e-4 in float32.
        dtype: Real dtype to measure in.

    Returns:
        The measured errors and, for each scale, the condition numbers of ``to_grid`` and ``from_grid``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a law does not hold; the message names each failing law and by how much.
    """
    check_instance("dtype", dtype, torch.dtype)
    if tolerance is not None:
        check_number("tolerance", tolerance, "at least 0 and finite")
    report = measure_laws(self, dtype)
    report.require(tolerance if tolerance is not None else (1e-10 if dtype == torch.float64 else 1e-4))
    return report


@torch.no_grad()
def measure_laws(decomp: "Decomposition", dtype: torch.dtype) -> LawReport:
    """Measure every law of ``decomp`` on random inputs of a real ``dtype``, on its own device."""
    device = device_of(decomp)
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float64).to(device, dtype)

    def signal() -> Tensor:
        shape = (3, decomp.channels, *decomp.size)
        return torch.complex(randn(*shape), randn(*shape)) if decomp.is_complex else randn(*shape)

    def bands() -> list[Tensor]:
        return [randn(3, *shape) for shape in decomp.band_shapes.values()]

    x, y, g, h = signal(), signal(), bands(), bands()
    analysed = decomp.analysis(x)
    wrong, remark = wrong_bands(decomp, analysed)
    errors = {"band shapes": float(wrong)}
    if wrong:
        return LawReport(errors, {}, {}, {"band shapes": remark})
    synthesised = decomp.synthesis(h)
    errors["reconstruction"] = _error(decomp.synthesis(analysed), x)
    errors["linearity of analysis"] = max(
        _error(f, 2 * a - 3 * b)
        for f, a, b in zip(decomp.analysis(2 * x - 3 * y), analysed, decomp.analysis(y), strict=True)
    )
    errors["linearity of synthesis"] = _error(
        decomp.synthesis([2 * a - 3 * b for a, b in zip(g, h, strict=True)]), 2 * decomp.synthesis(g) - 3 * synthesised
    )
    alone = [decomp.synthesis([None] * i + [band]) for i, band in enumerate(h)]
    errors["partial sums"] = _error(torch.stack(alone).sum(0), synthesised)
    if decomp.orthonormal:
        errors["degrees of freedom"] = (
            abs(sum(map(math.prod, decomp.band_shapes.values())) - decomp.numel) / decomp.numel
        )
        errors["orthonormality of analysis"] = _error(_norm(analysed), _norm([x]))
        errors["orthonormality of synthesis"] = _error(_norm([synthesised]), _norm(h))
    to_grid: dict[int, float | None] = {}
    from_grid: dict[int, float | None] = {}
    for s, shape in decomp.band_shapes.items():
        to_grid[s] = _condition(partial(decomp.to_grid, s), shape, math.prod(shape), dtype, device)
        picture = decomp.picture_shape(s)
        from_grid[s] = _condition(partial(decomp.from_grid, s), picture, math.prod(shape), dtype, device)
    return LawReport(errors, to_grid, from_grid)


def _error(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return math.inf
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b).clamp_min(1e-30))


def _norm(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([p.abs().square().flatten(1).sum(1) for p in parts]).sum(0).sqrt()


def _condition(
    f: Callable[[Tensor], Tensor], shape: Sequence[int], rank: int, dtype: torch.dtype, device: torch.device
) -> float | None:
    """Condition number of a linear map on its ``rank`` largest singular values."""
    n = math.prod(shape)
    if rank > _MEASURABLE or n > 4 * _MEASURABLE:
        return None
    matrix = f(torch.eye(n, dtype=dtype, device=device).reshape(n, *shape)).flatten(1)
    values = torch.linalg.svdvals(matrix)
    if len(values) < rank or values[rank - 1] <= values[0] * torch.finfo(dtype).eps * n:
        return math.inf
    return float(values[0] / values[rank - 1])
