"""Images with the models that solve their problems: runs of examples/train.py, files, or small ones trained here."""

from dataclasses import dataclass
from pathlib import Path

import torch
from data import digits
from evaluate import load
from mri import fastmri
from setups import flip, phase
from torch import Tensor

from separable_hvae import HVAE, Identity, Wavelet2, fit


@dataclass(frozen=True)
class Subject:
    """Images, and models of them.

    Attributes:
        label: What to call the images.
        train: Training images ``(N, C, H, W)``, of which some choose the baselines' weights.
        held: Images that no model has seen, ``(N, C, H, W)``.
        model: The separable model.
        vanilla: An Identity model of the same size.
    """

    label: str
    train: Tensor
    held: Tensor
    model: HVAE
    vanilla: HVAE | None = None


def of_runs(run: Path, vanilla: Path | None, source: Path) -> Subject:
    """The models of examples/train.py's runs, with the images of their setup.

    Raises:
        ValueError: If a folder holds no finished run, the runs have different images, or these cannot be read.
    """
    model, setup = load(run, "cpu")
    other, its = load(vanilla, "cpu") if vanilla else (None, setup)
    if (its.dataset, its.data["size"]) != (setup.dataset, setup.data["size"]):
        raise ValueError(f"{vanilla} was trained on other data than {run}")
    train, held = (setup.load(source, train=part) for part in (True, False))
    return Subject(f"{setup.dataset}, {setup.data['size']}×{setup.data['size']}", train, held, model, other)


def of_files(folder: Path, vanilla: Path | None, images: Path) -> Subject:
    """Models that ``save_pretrained`` wrote, with a torch file of images.

    Raises:
        ValueError: If the file has not the two tensors, or a model's files are damaged.
    """
    parts = torch.load(images, weights_only=True)
    if not isinstance(parts, dict) or set(parts) != {"train", "held"}:
        got = sorted(parts) if isinstance(parts, dict) else type(parts).__name__
        raise ValueError(f"{images} must hold a dictionary of 'train' and 'held', got {got}")
    other = HVAE.from_pretrained(vanilla) if vanilla else None
    return Subject(images.stem, parts["train"], parts["held"], HVAE.from_pretrained(folder), other)


def of_digits(folder: Path, steps: int) -> Subject:
    """Scikit-learn's handwritten digits in [-1, 1], with models that are trained unless the folder has them."""
    x = digits()
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    return Subject("digits, 8×8", x[300:], x[:300], *trained(x[300:], folder, steps))


def of_volumes(source: Path, folder: Path, steps: int, side: int = 32) -> Subject:
    """Slices of fastMRI's volumes, their parts' mean square one, with models that are trained as those of digits.

    Raises:
        ValueError: If the volumes cannot be read.
    """
    train, held = (fastmri(source, train=part, size=side) for part in (True, False))
    return Subject(f"fastMRI, {side}×{side}", train, held, *trained(train, folder, steps))


def trained(images: Tensor, folder: Path, steps: int) -> tuple[HVAE, HVAE]:
    """The separable and the vanilla model of one size, trained alike, for as many steps."""
    models: list[HVAE] = []
    side, is_complex = images.shape[-1], images.is_complex()
    scales = [1, 2, 4, 8] if side == 8 else [2, 4, 8, 16, 32]
    size = {"layers": 2, "latent_channels": 2, "sigma": 0.15} if is_complex else {"layers": 3, "sigma": 0.1}
    haar = Wavelet2(side, "haar", images.shape[1], scales, is_complex=is_complex)
    for name, decomp in {"separable": haar, "vanilla": Identity(side, images.shape[1], scales, is_complex)}.items():
        if not (folder / name).exists():
            torch.manual_seed(0)
            model = HVAE(decomp, width=32, bottleneck=16, blocks=1, **size)  # type: ignore[arg-type]
            fit(
                model.to(memory_format=torch.channels_last),
                images,
                steps=steps,
                batch_size=16 if is_complex else 32,
                learning_rate=4e-3 if is_complex else 8e-3,
                augment=vary if is_complex else None,
            )
            model.save_pretrained(folder / name)
        models.append(HVAE.from_pretrained(folder / name))
    return models[0], models[1]


def vary(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of complex images and turn the phase of each."""
    return phase(flip(x, generator), generator)
