r"""Which bands serve which problem: how far measurements couple bands.

    share = Σ_{s≠s'} ‖B_sᵀ Aᵀ A B_s'‖²_F / ‖Aᵀ A‖²_F

is 0 where what was measured splits into targets of single bands, so that subsets need not wait for each other.

    python examples/inverse/locality.py
"""

import math
import sys
from pathlib import Path

import torch

from separable_hvae import Decomposition, FFT2Complex, FFT2Real, Wavelet2

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # Before installed packages: one is called evaluate.
from console import arguments
from problems import Case, cases


def coupling(decomp: Decomposition, case: Case) -> float:
    """The share of ``Aᵀ A`` that couples different bands, for the first sample's operator."""
    parts, owners = list[torch.Tensor](), list[int]()
    for i, shape in enumerate(decomp.band_shapes.values()):
        alone: list[torch.Tensor | None] = [None] * len(decomp.band_shapes)
        alone[i] = torch.eye(math.prod(shape)).reshape(-1, *shape)
        parts.append(decomp.synthesis(alone))
        owners += [i] * math.prod(shape)
    basis, term = torch.cat(parts), case.measurement
    y = term.operator.forward(basis, *(t[:1].expand(len(basis), *t.shape[1:]) for t in term.given)).flatten(1)
    real = (torch.view_as_real(y).flatten(1) if y.is_complex() else y).double()
    gram, owner = real @ real.T, torch.tensor(owners)
    apart = owner[:, None] != owner[None]
    return float(gram[apart].square().sum() / gram.square().sum())


def main() -> None:
    """Print a table for images of 16×16 points."""
    arguments(__doc__).parse_args()
    names = ["FFT2", "Wavelet2, Haar", "Wavelet2, db2"]
    print(f"{'':28}" + "".join(f"{name:>18}" for name in names))
    for is_complex in (False, True):
        fourier = FFT2Complex(16) if is_complex else FFT2Real(16, 1)
        decomps = [fourier, *(Wavelet2(16, w, 1, is_complex=is_complex) for w in ("haar", "db2"))]
        x = torch.zeros(1, 1, 16, 16, dtype=torch.complex64 if is_complex else torch.float32)
        for case in cases(x, decomps[1])[5 if is_complex else 0 : -1]:  # The last is the first, with more noise.
            print(f"{case.name:28}" + "".join(f"{coupling(d, case):18.3f}" for d in decomps))


if __name__ == "__main__":
    main()
