"""Settings that are one number or given by scale."""

from collections.abc import Mapping, Sequence
from typing import cast

from separable_hvae._validation import check_number, listed

ByScale = float | Mapping[int, float] | Sequence[float]
"""A number for every scale, a mapping from scale to number, or one number for each scale."""


def by_scale(name: str, value: ByScale, scales: Sequence[int]) -> dict[int, float]:
    """Read a setting that is one number or given by scale.

    Raises:
        TypeError: If an entry is no number.
        ValueError: If an entry is negative or not finite, a mapping names an unknown scale or
            leaves one out, or a sequence has another length than ``scales``.
    """
    value = cast(ByScale, listed(value))
    if isinstance(value, Mapping):
        if set(value) != set(scales):
            raise ValueError(f"{name} must have one entry for each scale {list(scales)}, got {list(value)}")
        values = [value[s] for s in scales]
    elif isinstance(value, Sequence) and not isinstance(value, str):
        values = list(value)
        if len(values) != len(scales):
            raise ValueError(f"{name} must have one entry for each of the {len(scales)} scales, got {len(values)}")
    else:
        values = [value] * len(scales)
    numbers = [check_number(name, v, "at least 0 and finite") for v in values]
    return dict(zip(scales, numbers, strict=True))


def check_by_scale(name: str, value: ByScale) -> None:
    """Check a setting's numbers as far as they can be checked without a model's scales."""
    value = cast(ByScale, listed(value))
    scales = (
        list(value) if isinstance(value, Mapping) else list(range(len(value))) if isinstance(value, Sequence) else [1]
    )
    checked = by_scale(name, value, scales)
    if name == "steps" and not all(isinstance(v, int) for v in checked.values()):
        raise TypeError(f"steps must be integers, got {value!r}")
