import os
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from tests.helpers.scripts import script

mri = script("mri")
Complex = npt.NDArray[np.complex64]


def noise(*shape: int, seed: int = 0) -> Complex:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64)


def smooth(n: int, bins: int = 6, seed: int = 0) -> Complex:
    """A sum of a few low frequencies of a square, at n×n points around its centre."""
    coefficients = noise(bins, bins, seed=seed)
    at = (np.arange(n) - n // 2) / n
    waves = np.exp(2j * np.pi * np.outer(at, np.arange(bins) - bins // 2))
    return np.asarray(waves @ coefficients @ waves.T, np.complex64)


def kspace(image: Complex) -> Complex:
    axes = (-2, -1)
    spectrum = np.fft.fft2(np.fft.ifftshift(image, axes=axes), norm="ortho")
    return np.fft.fftshift(spectrum, axes=axes).astype(np.complex64)


def write(path: Path, image: Complex, reconstruction: tuple[int, int] | None = None, **more: Any) -> Path:
    """A volume in fastMRI's layout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["kspace"] = kspace(image)
        if reconstruction is not None:
            file["reconstruction_esc"] = np.zeros((len(image), *reconstruction), np.float32)
        for name, value in more.items():
            file[name] = value
    return path


def normalised(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.asarray(x / np.sqrt((np.abs(x) ** 2).mean() / 2))


@pytest.mark.parametrize("size", [(8, 8), (7, 8), (5, 9)])
def test_fourier_transforms(size: tuple[int, int]) -> None:
    image = noise(2, *size)
    np.testing.assert_allclose(mri.to_image(torch.from_numpy(kspace(image))).numpy(), image, atol=1e-5)
    np.testing.assert_allclose(mri.to_kspace(torch.from_numpy(image)).numpy(), kspace(image), atol=1e-5)


@pytest.mark.parametrize(("n", "size"), [(32, 16), (40, 16), (33, 16), (32, 11), (15, 7), (16, 16)])
def test_resampling_keeps_smooth_images(n: int, size: int) -> None:
    found = mri.fourier_resample(torch.from_numpy(smooth(n)), size)
    np.testing.assert_allclose(found.numpy(), smooth(size), atol=1e-4)


def test_a_volume_is_cropped_resampled_and_normalised(tmp_path: Path) -> None:
    square = np.stack([smooth(24, seed=s) for s in range(3)])
    image = np.zeros((3, 40, 30), np.complex64)
    image[:, 8:32, 3:27] = square
    path = write(tmp_path / "a.h5", image, reconstruction=(24, 24))
    found = mri.volume(path, 12)
    expected = normalised(np.stack([smooth(12, seed=s) for s in range(3)]))
    assert found.dtype == torch.complex64
    np.testing.assert_allclose(found[:, 0].numpy(), expected, atol=1e-3)
    np.testing.assert_allclose(mri.volume(path, 12, crop=24).numpy(), found.numpy(), atol=1e-6)
    assert not np.allclose(mri.volume(path, 12, crop=30).numpy(), found.numpy(), atol=1e-1)


def test_without_a_reconstruction_the_largest_square_is_taken(tmp_path: Path) -> None:
    image = noise(2, 20, 16)
    found = mri.volume(write(tmp_path / "a.h5", image), 16)
    np.testing.assert_allclose(found[:, 0].numpy(), normalised(image[:, 2:18]), atol=1e-4)


def coil_images(image: Complex) -> tuple[Complex, npt.NDArray[Any]]:
    """An image seen by four coils of smooth sensitivities whose squares sum to one."""
    n = image.shape[-1]
    v, u = np.meshgrid(*(np.linspace(-1, 1, n),) * 2, indexing="ij")
    phase = np.exp(1j * (0.5 * u - 0.3 * v))
    maps = np.stack([np.exp(-((u - a) ** 2 + (v - b) ** 2) / 4) * phase for a in (-1, 1) for b in (-1, 1)])
    maps = maps / np.sqrt((np.abs(maps) ** 2).sum(0))
    return (maps * image[:, None]).astype(np.complex64), maps


def test_coils_weighted_by_their_sensitivity() -> None:
    n = 64
    v, u = np.meshgrid(*(np.linspace(-1, 1, n),) * 2, indexing="ij")
    magnitude = np.clip(3 * (0.8 - np.sqrt(u**2 + v**2)), 0, 1) * (1 + 0.2 * np.cos(20 * u))
    phase = np.exp(1j * (u + 0.5 * v))
    image = (magnitude * phase)[None].astype(np.complex64)
    coils, _ = coil_images(image)
    found = mri.combine_by_sensitivity(torch.from_numpy(coils)).numpy()
    inside = magnitude > 0.5
    np.testing.assert_allclose(np.abs(found[0])[inside], magnitude[inside], rtol=0.02)
    # The phase is the signal's own and the coils' common one, up to a constant.
    turned = (found[0] * (phase * np.exp(1j * (0.5 * u - 0.3 * v))).conj())[inside]
    assert np.abs(np.angle(turned * turned.mean().conj())).max() < 0.1


def test_coils_compressed_by_svd() -> None:
    weights, image = noise(4, seed=1), noise(3, 8, 8)
    coils = weights[:, None, None] * image[:, None]
    found = mri.combine_by_svd(torch.from_numpy(coils)).numpy()
    ratio = found / image
    np.testing.assert_allclose(np.abs(ratio), np.linalg.norm(weights), rtol=1e-3)
    np.testing.assert_allclose(ratio, ratio[0, 0, 0], rtol=1e-3)
    # The strongest direction of several, against numpy's singular value decomposition.
    coils = noise(3, 4, 8, 8, seed=2)
    found = mri.combine_by_svd(torch.from_numpy(coils)).numpy()
    strongest = np.linalg.svd(coils.transpose(1, 0, 2, 3).reshape(4, -1), compute_uv=False)[0]
    assert np.linalg.norm(found) == pytest.approx(strongest, rel=1e-4)


@pytest.mark.parametrize("coils", ["sensitivity", "svd"])
def test_multi_coil_volumes(tmp_path: Path, coils: str) -> None:
    image = np.stack([smooth(32, seed=s) for s in range(2)])
    path = write(tmp_path / "a.h5", coil_images(image)[0])
    found = mri.volume(path, 16, coils=coils)
    assert found.shape == (2, 1, 16, 16)
    assert torch.view_as_real(found).square().mean() == pytest.approx(1.0, rel=1e-4)


def test_a_set_of_volumes_of_different_sizes(tmp_path: Path) -> None:
    write(tmp_path / "singlecoil_train" / "b.h5", noise(2, 20, 16))
    write(tmp_path / "singlecoil_train" / "a.h5", noise(3, 18, 24))
    write(tmp_path / "multicoil_val" / "c.h5", noise(1, 2, 16, 16))
    found: Tensor = mri.fastmri(tmp_path, train=True, size=8)
    assert found.shape == (5, 1, 8, 8)
    assert torch.equal(found[:3], mri.volume(tmp_path / "singlecoil_train" / "a.h5", 8))
    assert mri.fastmri(tmp_path, train=False, size=8).shape == (1, 1, 8, 8)


def test_a_file_without_kspace(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["reconstruction_esc"] = np.zeros((1, 8, 8))
    message = f"{tmp_path / 'a.h5'} has no 'kspace', only ['reconstruction_esc']"
    with pytest.raises(ValueError, match=re.escape(message)):
        mri.volume(tmp_path / "a.h5")


@pytest.mark.parametrize("kept", [0, 100, -200])
def test_a_truncated_file(tmp_path: Path, kept: int) -> None:
    path = write(tmp_path / "a.h5", noise(2, 16, 16))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=re.escape(f"{path} is truncated or no HDF5 volume")):
        mri.volume(path, 8)


@pytest.mark.parametrize(
    ("image", "more", "options", "message"),
    [
        (noise(1, 20, 16), {}, {"crop": 18}, "slices of 20×16 are smaller than the crop, 18"),
        (noise(1, 20, 16), {"reconstruction": (24, 24)}, {}, "slices of 20×16 are smaller than the crop, 24"),
        (noise(1, 16, 16), {}, {"size": 32}, "images of 16×16 points cannot be resampled to 32×32"),
        (noise(1, 16, 16), {"mask": np.ones(16)}, {}, "has a 'mask': its k-space is undersampled"),
        (
            noise(16, 16),
            {},
            {},
            "kspace must be complex (slices, H, W) or (slices, coils, H, W), got complex64 of shape (16, 16)",
        ),
        (noise(0, 16, 16), {}, {}, "kspace must be complex (slices, H, W) or (slices, coils, H, W), got"),
        (noise(1, 16, 16) * 0, {}, {}, "kspace is zero everywhere"),
        (noise(1, 16, 16) * np.inf, {}, {}, "kspace must be finite, got NaN or infinity"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_volumes_that_cannot_be_used(
    tmp_path: Path, image: Complex, more: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "a.h5", image, **more)
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*" + re.escape(message)):
        mri.volume(path, **({"size": 8} | options))


def test_real_kspace_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["kspace"] = np.zeros((1, 8, 8), np.float32)
    with pytest.raises(ValueError, match=re.escape("kspace must be complex")):
        mri.volume(tmp_path / "a.h5", 8)


@pytest.mark.parametrize("dtype", ["<c8", ">c8", "<c16", ">c16"])
def test_byte_order_and_precision_of_kspace(tmp_path: Path, dtype: str) -> None:
    image = noise(2, 16, 16)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("kspace", data=kspace(image).astype(dtype), dtype=dtype)
    found = mri.volume(tmp_path / "a.h5", 16)
    assert found.dtype == torch.complex64
    np.testing.assert_allclose(found[:, 0].numpy(), normalised(image), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("reconstruction_esc", 3.0, "reconstruction_esc must be images (slices, H, W), got shape ()"),
        (
            "reconstruction_rss",
            np.zeros((2, 0, 0)),
            "reconstruction_rss must be images (slices, H, W), got shape (2, 0",
        ),
        ("reconstruction_esc", None, "reconstruction_esc must be images (slices, H, W), got a group"),
        ("kspace", None, "kspace must be complex (slices, H, W) or (slices, coils, H, W), got a group"),
        ("kspace", h5py.SoftLink("/nowhere"), "component not found"),
        ("kspace", h5py.ExternalLink("nowhere.h5", "/a"), ""),
        ("kspace", h5py.Empty("c8"), "kspace must be complex"),
        ("kspace", "text", "kspace must be complex"),
        ("kspace", np.zeros(3, [("real", "f4"), ("imag", "f4")]), "kspace must be complex"),
    ],
)
def test_volumes_of_another_layout(tmp_path: Path, name: str, value: Any, message: str) -> None:
    path = write(tmp_path / "a.h5", noise(2, 16, 16))
    with h5py.File(path, "a") as file:
        if name in file:
            del file[name]
        if value is None:
            file.create_group(name)
        else:
            file[name] = value
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*" + re.escape(message)):
        mri.volume(path, 8)
    if name != "kspace":
        assert mri.volume(path, 8, crop=16).shape == (2, 1, 8, 8)


@pytest.mark.skipif(os.name == "nt", reason="makes symbolic links")
def test_volumes_are_left_out_if_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "singlecoil_train"
    good = [write(folder / name, noise(2, 20, 16)) for name in ("a.h5", "d.h5")]
    (folder / "._a.h5").write_bytes(b"\0\5\26\7")  # What macOS leaves beside a file.
    expected = torch.cat([mri.volume(path, 8, crop=16) for path in good])
    assert torch.equal(mri.fastmri(tmp_path, train=True, size=8, crop=16), expected)
    narrow = write(folder / "b.h5", noise(2, 20, 12))
    (dead := folder / "c.h5").symlink_to(folder / "nowhere")
    with pytest.raises(ValueError, match=re.escape(f"{narrow}: slices of 20×12 are smaller than the crop, 16")):
        mri.fastmri(tmp_path, train=True, size=8, crop=16)
    with pytest.raises(ValueError, match=re.escape(f"{dead} is a dead link")):
        mri.fastmri(tmp_path, train=True, size=8, crop=12)
    assert torch.equal(mri.fastmri(tmp_path, train=True, size=8, crop=16, unusable="leave out"), expected)
    first, second, last = capsys.readouterr().err.splitlines()
    assert first.startswith(f"left out: {narrow}: slices of")
    assert second == f"left out: {dead} is a dead link"
    assert last == f"{tmp_path}: 2 volumes, 2 left out"
    for path in good:
        path.unlink()
    with pytest.raises(ValueError, match="has no volume that can be used: all 2 were left out"):
        mri.fastmri(tmp_path, train=True, size=8, crop=16, unusable="leave out")


def test_bad_sets(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} has no volumes: no *.h5 in singlecoil_train or")):
        mri.fastmri(tmp_path, train=True)
    with pytest.raises(ValueError, match=re.escape("unusable must be one of ('refuse', 'leave out'), got 'skip'")):
        mri.fastmri(tmp_path, train=True, unusable="skip")
    with pytest.raises(ValueError, match=re.escape("coils must be one of ['sensitivity', 'svd'], got 'rss'")):
        mri.fastmri(tmp_path, train=True, coils="rss")
