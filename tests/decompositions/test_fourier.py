"""Fourier bands against numpy's FFT, with the rings computed from their definition."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from separable_hvae import FFT1Complex, FFT1Real, FFT2Complex, FFT2Real, FFT3Complex, FFT3Real
from separable_hvae.decompositions.fourier import _Fourier
from tests.helpers.zoo import FOURIER, Make, error, random_bands, rings, signal

REAL = {1: FFT1Real, 2: FFT2Real, 3: FFT3Real}
COMPLEX = {1: FFT1Complex, 2: FFT2Complex, 3: FFT3Complex}


def packed(spectrum: NDArray[Any], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """What a ring's packed coefficients must be, up to order and to which of a pair stands for it."""
    values = []
    for k in np.argwhere(mask):
        partner = tuple(-k % spectrum.shape)
        x = spectrum[tuple(k)]
        if tuple(k) == partner:
            values.append(x.real)
        elif tuple(k) < partner:
            values += [math.sqrt(2) * x.real, math.sqrt(2) * x.imag]
    return np.sort(np.abs(values))


@pytest.mark.parametrize("make", FOURIER.values(), ids=FOURIER)
def test_bands_against_numpy(make: Make) -> None:
    decomp = make()
    expected = rings(decomp.size, decomp.scales)
    assert decomp.band_scales == tuple(expected)
    axes = tuple(range(2, 2 + decomp.dims))
    x = signal(decomp, 1)
    spectrum = np.fft.fftn(x.numpy(), axes=axes, norm="ortho")
    for i, (h, mask) in enumerate(zip(decomp.analysis(x), expected.values(), strict=True)):
        part: NDArray[Any] = np.fft.ifftn(spectrum * mask, axes=axes, norm="ortho")
        if not decomp.is_complex:
            assert np.abs(part.imag).max() < 1e-12
            part = part.real
        np.testing.assert_allclose(decomp.synthesis([*[None] * i, h]), part, atol=1e-12)
        if decomp.is_complex:
            values = spectrum[..., mask]
            both = np.sort(np.concatenate([values.real, values.imag], axis=-1))
            np.testing.assert_allclose(np.sort(h.numpy()), both, atol=1e-12)
        elif mask.size <= 4096:
            rows = np.stack([packed(channel, mask) for channel in spectrum[0]])
            np.testing.assert_allclose(np.sort(np.abs(h[0].numpy())), rows, atol=1e-12)


@pytest.mark.parametrize("k", [0, 1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_cosine_lies_in_one_ring(k: int, axis: int) -> None:
    decomp = FFT2Real((16, 20), channels=1, scales=[1, 2, 4, 8, 16, 20])
    wave = 3 * torch.cos(2 * math.pi * k * torch.arange(decomp.size[axis], dtype=torch.float64) / decomp.size[axis])
    x = (wave[:, None] if axis == 0 else wave[None]).expand(1, 1, 16, 20)
    home = next(s for s in decomp.scales if 2 * k <= s)
    for s, h in zip(decomp.band_scales, decomp.analysis(x), strict=True):
        energy = float(x.square().sum()) if s == home else 0.0
        assert float(h.square().sum()) == pytest.approx(energy, abs=1e-12)


def test_a_diagonal_wave_counts_by_its_larger_frequency() -> None:
    decomp = FFT2Real(16, channels=1)
    i = torch.arange(16, dtype=torch.float64)
    x = torch.cos(2 * math.pi * (i[:, None] + 3 * i[None]) / 16)[None, None]
    energy = [float(h.square().sum()) for h in decomp.analysis(x)]
    assert energy == pytest.approx([0, 0, 0, 128, 0], abs=1e-12)


def test_a_picture_is_the_wave_on_fewer_points() -> None:
    """On ``2s`` points the same cosine, with the amplitude that keeps its norm."""
    decomp = FFT1Real(32)
    n, k, s = 32, 3, 8
    wave = torch.cos(2 * math.pi * k * torch.arange(n, dtype=torch.float64) / n)[None, None]
    fewer = torch.cos(2 * math.pi * k * torch.arange(2 * s, dtype=torch.float64) / (2 * s))[None, None]
    torch.testing.assert_close(decomp.to_grid(s, decomp.project(s, wave)), math.sqrt(n / (2 * s)) * fewer)


@pytest.mark.parametrize("size", [3, 5, 9, 17, (9, 4)])
def test_odd_sizes_and_their_default_scales(size: int | tuple[int, int]) -> None:
    decomp = FFT2Real(size, channels=1)
    assert error(decomp.synthesis(random_bands(decomp)).norm(), torch.cat(random_bands(decomp), 2).norm()) < 1e-12


@pytest.mark.parametrize(("size", "scales"), [(9, [1, 2, 4, 8, 9]), (3, [1, 2, 3]), ((9, 2), [8, 9])])
@pytest.mark.parametrize("kind", [FFT2Real, FFT2Complex])
def test_an_empty_last_band_is_an_error(
    kind: type[FFT2Real] | type[FFT2Complex], size: int | tuple[int, int], scales: list[int]
) -> None:
    with pytest.raises(ValueError, match=r"leave the last band empty"):
        kind(size, scales=scales)


@st.composite
def fourier_arguments(draw: st.DrawFn) -> tuple[bool, tuple[int, ...], int, list[int]]:
    dims = draw(st.integers(1, 3))
    size = tuple(draw(st.lists(st.integers(1, 24 if dims < 3 else 9), min_size=dims, max_size=dims)))
    below = draw(st.sets(st.integers(1, max(max(size) - 1, 1)), max_size=6))
    return draw(st.booleans()), size, draw(st.integers(1, 3)), sorted(below | {max(size)})


@settings(max_examples=80, deadline=None, derandomize=True)
@given(arguments=fourier_arguments(), seed=st.integers(0, 1000))
def test_laws_at_random_sizes_and_scales(arguments: tuple[bool, tuple[int, ...], int, list[int]], seed: int) -> None:
    is_complex, size, channels, scales = arguments
    kind: type[_Fourier] = (COMPLEX if is_complex else REAL)[len(size)]
    expected = rings(size, scales)
    if scales[-1] not in expected:
        with pytest.raises(ValueError, match="leave the last band empty"):
            kind(size, channels, scales)
        return
    decomp = kind(size, channels, scales)
    counts = {s: int(m.sum()) * (2 if is_complex else 1) for s, m in expected.items()}
    assert decomp.band_shapes == {s: (channels, n) for s, n in counts.items()}
    x, h = signal(decomp, seed=seed), random_bands(decomp, seed=seed)
    assert error(decomp.synthesis(decomp.analysis(x)), x) < 1e-12
    for got, band in zip(decomp.analysis(decomp.synthesis(h)), h, strict=True):
        torch.testing.assert_close(got, band, rtol=0, atol=1e-12)
    combined = decomp.synthesis([2 * a - 3 * b for a, b in zip(decomp.analysis(x), h, strict=True)])
    torch.testing.assert_close(combined, 2 * x - 3 * decomp.synthesis(h), rtol=0, atol=1e-11)
