"""The laws of every decomposition at random sizes, channels, scales and dtypes.

pytest tests/decompositions/test_laws.py --hypothesis-profile=full
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import pywt
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from separable_hvae import (
    Decomposition,
    FFT1Complex,
    FFT1Real,
    FFT2Complex,
    FFT2Real,
    FFT3Complex,
    FFT3Real,
    Identity,
    Wavelet1,
    Wavelet2,
    Wavelet3,
)
from tests.helpers.zoo import Pyramid, RingDCT, error

LARGEST = 64
MOST = 4096  # Entries of a signal.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}
# Published filters are orthogonal to so many digits; tests/decompositions/test_wavelet.py measures each one's defect.
EXACT = ["haar", "db2", "db4", "db7", "sym2", "sym4", "coif1", "coif3"]

Draw = Callable[..., Any]
Build = Callable[[Draw], Decomposition]


@st.composite
def sizes(draw: st.DrawFn, dims: int, *, even: bool = False) -> tuple[int, ...]:
    """Sizes with at most ``MOST`` points; ``even`` ones can be halved, or are a single point beside one that can."""
    size: list[int] = []
    for _ in range(dims):
        most = min(LARGEST, MOST // math.prod(size))
        size.append(2 * draw(st.integers(1, most // 2)) if even and most >= 2 else draw(st.integers(1, most)))
    return tuple(draw(st.permutations([1 if even and n % 2 else n for n in size])))


def channels(draw: Draw, size: tuple[int, ...]) -> int:
    count: int = draw(st.integers(1, max(1, min(3, MOST // math.prod(size)))))
    return count


def scales(draw: Draw, largest: int) -> list[int] | None:
    """``None``, or any increasing list that ends in the largest size."""
    below = draw(st.none() | st.sets(st.integers(1, max(largest - 1, 1)), max_size=6))
    return None if below is None else sorted({s for s in below if s < largest} | {largest})


def fourier(kind: Callable[..., Decomposition], dims: int) -> Build:
    def build(draw: Draw) -> Decomposition:
        size = draw(sizes(dims))
        chosen = scales(draw, max(size))
        if chosen is not None and 2 * (max(size) // 2) <= [-1, *chosen][-2]:
            with pytest.raises(ValueError, match="leave the last band empty"):
                kind(size, 1, chosen)
            chosen = None
        return kind(size, channels(draw, size), chosen)

    return build


def wavelets(kind: Callable[..., Decomposition], dims: int) -> Build:
    def build(draw: Draw) -> Decomposition:
        size = draw(sizes(dims, even=True))
        wavelet, is_complex = draw(st.sampled_from(EXACT)), draw(st.booleans())
        chosen = scales(draw, max(size))
        return kind(size, wavelet, channels(draw, size), chosen, is_complex)

    return build


def identities(draw: Draw) -> Decomposition:
    size = draw(sizes(draw(st.integers(1, 3))))
    return Identity(size, channels(draw, size), scales(draw, max(size)), draw(st.booleans()))


def own(kind: type[Decomposition]) -> Build:
    def build(draw: Draw) -> Decomposition:
        size = draw(sizes(2))
        return kind(size, channels(draw, size), scales(draw, max(size)))

    return build


KINDS: dict[str, Build] = {
    "FFT1Real": fourier(FFT1Real, 1),
    "FFT2Real": fourier(FFT2Real, 2),
    "FFT3Real": fourier(FFT3Real, 3),
    "FFT1Complex": fourier(FFT1Complex, 1),
    "FFT2Complex": fourier(FFT2Complex, 2),
    "FFT3Complex": fourier(FFT3Complex, 3),
    "Wavelet1": wavelets(Wavelet1, 1),
    "Wavelet2": wavelets(Wavelet2, 2),
    "Wavelet3": wavelets(Wavelet3, 3),
    "Identity": identities,
    "own, DCT": own(RingDCT),
    "own, pyramid": own(Pyramid),
}


def norm(parts: list[Tensor]) -> Tensor:
    """Norm of each sample over all parts, in float64."""
    return torch.stack([p.abs().double().square().flatten(1).sum(1) for p in parts]).sum(0).sqrt()


@pytest.mark.filterwarnings("ignore:scales .* emit no band:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_laws(kind: str, data: st.DataObject) -> None:
    decomp = KINDS[kind](data.draw)
    # Half precision is widened by the library's checks, which these two of a user's own do without.
    dtypes = list(TOLERANCE)[: 2 if kind.startswith("own") else None]
    dtype = data.draw(st.sampled_from(dtypes))
    check(decomp, dtype, data.draw(st.integers(0, 2**31)))


def check(decomp: Decomposition, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bound = TOLERANCE[dtype]
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def signal() -> Tensor:
        shape = (2, decomp.channels, *decomp.size)
        # Complex signals have no half precision that all of torch supports.
        return torch.complex(randn(*shape).to(wide), randn(*shape).to(wide)) if decomp.is_complex else randn(*shape)

    x, y = signal(), signal()
    bands = decomp.analysis(x)
    exact: Any = x if decomp.is_complex else x.to(wide)
    assert [tuple(h.shape) for h in bands] == [(2, *s) for s in decomp.band_shapes.values()]
    assert {h.dtype for h in bands} == {wide}

    back = decomp.synthesis(bands)
    assert error(back, exact) < bound

    both = decomp.analysis(2 * exact - 3 * y.to(exact.dtype))
    together = torch.cat([h.flatten(1) for h in both], dim=1)
    apart = torch.cat([(2 * a - 3 * b).flatten(1) for a, b in zip(bands, decomp.analysis(y), strict=True)], dim=1)
    assert error(together, apart) < bound

    g = [randn(2, *shape).to(wide) for shape in decomp.band_shapes.values()]
    alone = torch.stack([decomp.synthesis([*[None] * i, h]) for i, h in enumerate(g)]).sum(0)
    signal_of_g = decomp.synthesis(g)
    assert error(alone, signal_of_g) < bound

    for scale, h in zip(decomp.band_scales, g, strict=True):
        picture = decomp.to_grid(scale, h)
        assert picture.shape == (2, *decomp.picture_shape(scale))
        assert decomp.from_grid(scale, picture).shape == h.shape
    if decomp.orthonormal:
        assert sum(h[0].numel() for h in bands) == decomp.numel
        torch.testing.assert_close(norm(bands), norm([exact]), rtol=bound, atol=0)
        torch.testing.assert_close(norm([signal_of_g]), norm(g), rtol=bound, atol=0)


def test_wavelets_named_exact_are() -> None:
    for name in EXACT:
        low = torch.tensor(pywt.Wavelet(name).dec_lo, dtype=torch.float64)
        for k in range(0, len(low), 2):
            product = float((low[k:] * low[: len(low) - k]).sum())
            assert abs(product - (k == 0)) < 1e-12
