"""Inverse problems with a trained model, beside what else could solve them, on the same held-out images.

    python examples/inverse/run.py                                    # trains on digits first, 8×8
    python examples/inverse/run.py --fastmri FOLDER --out inverse-mri # complex images, 32×32, from fastMRI's volumes
    python examples/inverse/run.py --model runs/best/model --vanilla runs/vanilla/model --images images.pt

`images.pt` is a torch file with a dictionary of two tensors (N, C, H, W): "train" (16 of them choose the baselines'
weights) and "held". What was trained is kept in --out and used again. Writes results.json, results.md and a picture
of each problem. `--problems` takes parts of problems' names, so that a slow machine can do one after the other.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from baselines import Sparsity, TotalVariation, WaveletSparsity, pnp_hvae, sparse
from problems import Case, cases
from report import draw, known_error, markdown, quality, significance
from torch import Tensor

from separable_hvae import HVAE, Identity, MAPRefiner, Wavelet2, fit, posterior_draws
from separable_hvae.refine import Scale

WEIGHTS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.4]
TEMPERATURES = [0.7, 0.85, 1.0]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        solve: From a problem, the images (for their shape alone), a weight and what earlier rows found.
        weights: Weights to choose from, by squared error on training images.
    """

    solve: Callable[[Case, Tensor, float, dict[str, Tensor]], Tensor]
    weights: Sequence[float] = (0.0,)

    def tune(self, case: Case, clean: Tensor) -> float:
        """The best weight for a problem on images that are known."""
        if len(self.weights) == 1:
            return self.weights[0]
        errors = [float((self.solve(case, clean, w, {}) - clean).abs().square().mean()) for w in self.weights]
        return self.weights[errors.index(min(errors))]


def digits() -> dict[str, Tensor]:
    """Scikit-learn's handwritten digits, ``(N, 1, 8, 8)`` in [-1, 1]."""
    from sklearn.datasets import load_digits

    x = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    return {"train": x[300:], "held": x[:300]}


def volumes(folder: Path, side: int = 32) -> dict[str, Tensor]:
    """Slices of fastMRI's volumes, complex ``(N, 1, side, side)``, their parts' mean square one."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from mri import fastmri

    return {"train": fastmri(folder, train=True, size=side), "held": fastmri(folder, train=False, size=side)}


def vary(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of complex images and turn the phase of each."""
    x = torch.where(torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5, x.flip(-1), x)
    angle = 2 * torch.pi * torch.rand(len(x), 1, 1, 1, generator=generator)
    return x * torch.polar(torch.ones_like(angle), angle)


def trained(images: Tensor, folder: Path, seconds: float) -> tuple[HVAE, HVAE]:
    """The separable and the vanilla model of one size, trained alike for some seconds of CPU time."""
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
                time_budget=seconds,
                clock=time.process_time,
                batch_size=16 if is_complex else 32,
                learning_rate=4e-3 if is_complex else 8e-3,
                augment=vary if is_complex else None,
            )
            model.save_pretrained(folder / name)
        models.append(HVAE.from_pretrained(folder / name))
    return models[0], models[1]


def methods(model: HVAE, vanilla: HVAE | None, side: int, steps: int) -> dict[str, Method]:
    """Every row of the table."""

    def penalised(penalty: Sparsity) -> Method:
        return Method(lambda case, like, w, _: sparse(case.measurement, like, penalty, w), WEIGHTS)

    def refined(of: HVAE, **settings: Any) -> Method:
        return Method(lambda case, *_: MAPRefiner(guidance=case.guidance, **settings)(of, case.term(of)).reconstruction)

    def corrected(of: HVAE, name: str) -> Method:
        return Method(lambda case, like, w, found: case.term(of).correct(of, found[name]))

    rows = {
        "adjoint (zero-filled)": Method(lambda case, like, *_: case.adjoint(like)),
        "linear estimate": Method(lambda case, *_: case.term(model).guess(model)),
        "total variation": penalised(TotalVariation()),
        "wavelet sparsity": penalised(WaveletSparsity(side, model.decomp.real_channels)),
    }
    joint = {"steps": steps, "schedule": "joint", "rule": "gauss-newton"}
    adam = {"steps": 2 * steps, "step_size": 0.05, "rule": "adam"}
    if vanilla is not None:
        rows |= {
            "vanilla, amortized": refined(vanilla, steps=0),
            "vanilla, joint Adam": refined(vanilla, schedule="joint", **adam),
            "vanilla, joint": refined(vanilla, **joint),
            "vanilla, joint, corrected": corrected(vanilla, "vanilla, joint"),
            "vanilla, PnP-HVAE": Method(lambda case, like, t, _: pnp_hvae(vanilla, case.measurement, t), TEMPERATURES),
        }
    return rows | {
        "separable, amortized": refined(model, steps=0),
        "separable, scale by scale": refined(model, schedule=Scale(sweeps=2), **adam),
        "separable, joint": refined(model, **joint),
        "separable, joint, corrected": corrected(model, "separable, joint"),
    }


def uncertainty(model: HVAE, case: Case, x: Tensor, steps: int, draws: int) -> tuple[dict[str, float], Tensor, Tensor]:
    """Calibration of refined posterior draws, their mean and their standard deviation."""
    refiner = MAPRefiner(steps, guidance=case.guidance, schedule="joint", rule="gauss-newton", sample=True)
    found = posterior_draws(model, case.term(model), refiner, draws, torch.Generator().manual_seed(0))
    mean = found.mean(0)
    drawn, wrong = (torch.view_as_real(t) if t.is_complex() else t for t in (found, x - mean))
    # The mean of n draws scatters too: the truth lies around it with a deviation wider by √(1 + 1/n).
    deviation = drawn.std(0) * (1 + 1 / draws) ** 0.5
    score = wrong.abs() / deviation.clamp_min(1e-6)
    shares = {f"within {k}σ": float((score < k).float().mean()) for k in (1, 2)}
    spread = {"rms error": float(wrong.square().mean().sqrt()), "rms σ": float(deviation.square().mean().sqrt())}
    return shares | spread, mean, deviation.square().sum(-1).sqrt() if x.is_complex() else deviation


def main() -> None:
    """Train or load, run every method on every problem, write tables and pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder that save_pretrained wrote (default: train one)")
    parser.add_argument("--vanilla", type=Path, help="folder of an Identity model of the same size")
    parser.add_argument("--images", type=Path, help="torch file with images for --model")
    parser.add_argument("--fastmri", type=Path, help="folder of fastMRI volumes to train and measure on")
    parser.add_argument("--label", default="images", help="what to call the images")
    parser.add_argument("--count", type=int, default=200, help="held-out images (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=20, help="Gauss–Newton steps; Adam takes twice as many (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=100, help="CPU time of each training (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=8, help="posterior draws (default: %(default)s)")
    parser.add_argument("--uncertain", type=int, default=40, help="images whose uncertainty is measured")
    parser.add_argument("--problems", nargs="*", default=[""], help="parts of the names of problems to run")
    parser.add_argument("--out", type=Path, default=Path("inverse"), help="folder of the results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    if bool(args.model) != bool(args.images):
        parser.error("--model and --images belong together")
    images: dict[str, Tensor] = torch.load(args.images, weights_only=True) if args.images else {}
    vanilla = HVAE.from_pretrained(args.vanilla) if args.vanilla else None
    if args.model:
        model = HVAE.from_pretrained(args.model)
    else:
        images = volumes(args.fastmri) if args.fastmri else digits()
        model, vanilla = trained(images["train"], args.out, args.seconds)
    x, clean = images["held"][: args.count], images["train"][:16]

    rows = methods(model, vanilla, x.shape[-1], args.steps)
    path = args.out / "results.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"problems": {}}
    report |= {"label": args.label, "images": len(x), "steps": args.steps, "draws": args.draws}
    for case, tuning in zip(cases(x, model.decomp), cases(clean, model.decomp, seed=1), strict=True):
        if not any(part in case.name for part in args.problems):
            continue
        print(case.name, flush=True)
        solved: dict[str, Tensor] = {}
        table: dict[str, Any] = {}
        for name, method in rows.items():
            weight = method.tune(tuning, clean)
            begin = time.perf_counter()
            solved[name] = method.solve(case, x, weight, solved)
            seconds = time.perf_counter() - begin
            table[name] = quality(solved[name], x) | {"ms": 1e3 * seconds / len(x), "weight": weight}
            shown = ", ".join(f"{k} {table[name][k]['mean']:.4g}" for k in ("psnr", "ssim", "nmse"))
            print(f"  {name:28} {shown}, {table[name]['ms']:.1f} ms/image", flush=True)
        measurement, known = (t and t.rows(slice(args.uncertain)) for t in (case.measurement, case.known))
        few = replace(case, measurement=measurement, known=known)
        calibration, mean, deviation = uncertainty(model, few, x[: args.uncertain], args.steps, args.draws)
        print(f"  {calibration}", flush=True)
        measure = "nmse" if x.is_complex() else "psnr"
        found = {"methods": table, "measure": measure, "p": significance(table, measure), "calibration": calibration}
        if case.known is not None:
            found["known bands"] = {n: known_error(case, solved[n], model.decomp) for n in table}
        report["problems"][case.name] = found
        name = re.sub("[^a-z0-9]+", "-", case.name.lower())
        draw(case, x, solved, mean, deviation).savefig(args.out / f"{name}.png", dpi=110)
        path.write_text(json.dumps(report, indent=1) + "\n")
        (args.out / "results.md").write_text(markdown(report))


if __name__ == "__main__":
    main()
