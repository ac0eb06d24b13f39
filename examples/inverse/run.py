"""Inverse problems with a trained model, beside what else could solve them, on the same held-out images.

    python examples/inverse/run.py                                          # trains on digits first, 8×8
    python examples/inverse/run.py --model runs/best/model --vanilla runs/vanilla/model --images heldout.pt

`--images` is a torch file with a tensor (N, C, H, W) of held-out images, or a dictionary of such tensors "train"
(for the baselines' weights) and "held". Writes results.json, results.md and one picture for each problem into
./inverse/. `--problems` takes part of the problems' names, so that a slow machine can do one after the other.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
TEMPERATURES = [0.5, 0.7, 0.85, 1.0]


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


def digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's handwritten digits for training and held out, ``(N, 1, 8, 8)`` in [-1, 1]."""
    from sklearn.datasets import load_digits

    x = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    return x[300:], x[:300]


def train_digits(train: Tensor, folder: Path, steps: int) -> tuple[HVAE, HVAE]:
    """The separable and the vanilla model of the same size, trained alike."""
    models = []
    for name, decomp in {"separable": Wavelet2(8, "haar", 1), "vanilla": Identity(8, 1)}.items():
        torch.manual_seed(0)
        model = HVAE(decomp, layers=3, width=32, bottleneck=16, blocks=1, sigma=0.1)
        model.to(memory_format=torch.channels_last)
        fit(model, train, steps=steps, batch_size=32, learning_rate=8e-3, seed=0)
        model.save_pretrained(folder / name)
        models.append(model.eval())
    return models[0], models[1]


def methods(model: HVAE, vanilla: HVAE | None, side: int, steps: int) -> dict[str, Method]:
    """Every row of the table."""

    def penalised(penalty: Sparsity) -> Method:
        return Method(lambda case, like, w, _: sparse(case.measurement, like, penalty, w), WEIGHTS)

    def refined(of: HVAE, refiner: MAPRefiner) -> Method:
        return Method(lambda case, *_: refiner(of, case.term(of)).reconstruction)

    def corrected(of: HVAE, name: str) -> Method:
        return Method(lambda case, like, w, found: case.term(of).correct(of, found[name]))

    rows = {
        "adjoint (zero-filled)": Method(lambda case, like, *_: case.adjoint(like)),
        "linear estimate": Method(lambda case, *_: case.term(model).guess(model)),
        "total variation": penalised(TotalVariation()),
        "wavelet sparsity": penalised(WaveletSparsity(side, model.decomp.real_channels)),
    }
    joint = MAPRefiner(steps, schedule="joint", rule="gauss-newton")
    if vanilla is not None:
        rows |= {
            "vanilla, amortized": refined(vanilla, MAPRefiner(0)),
            "vanilla, Adam": refined(vanilla, MAPRefiner(2 * steps, 0.05, schedule="joint", rule="adam")),
            "vanilla, joint": refined(vanilla, joint),
            "vanilla, joint, corrected": corrected(vanilla, "vanilla, joint"),
            "vanilla, PnP-HVAE": Method(lambda case, like, t, _: pnp_hvae(vanilla, case.measurement, t), TEMPERATURES),
        }
    sweeps = MAPRefiner(2 * steps, 0.05, schedule=Scale(sweeps=2), rule="adam")
    return rows | {
        "separable, amortized": refined(model, MAPRefiner(0)),
        "separable, scale by scale": refined(model, sweeps),
        "separable, joint": refined(model, joint),
        "separable, joint, corrected": corrected(model, "separable, joint"),
    }


def uncertainty(model: HVAE, case: Case, x: Tensor, steps: int, draws: int) -> tuple[dict[str, float], Tensor, Tensor]:
    """Calibration of refined posterior draws, their mean and their standard deviation."""
    refiner = MAPRefiner(steps, schedule="joint", rule="gauss-newton", sample=True)
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
    parser.add_argument("--model", type=Path, help="folder that save_pretrained wrote (default: train on digits)")
    parser.add_argument("--vanilla", type=Path, help="folder of an Identity model of the same size")
    parser.add_argument("--images", type=Path, help="torch file with held-out images (default: digits)")
    parser.add_argument("--label", default="digits, 8×8", help="what to call the images")
    parser.add_argument("--count", type=int, default=200, help="held-out images (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=20, help="Gauss–Newton steps; Adam takes twice as many (default: %(default)s)"
    )
    parser.add_argument("--training", type=int, default=600, help="training steps on digits (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=8, help="posterior draws (default: %(default)s)")
    parser.add_argument("--uncertain", type=int, default=40, help="images whose uncertainty is measured")
    parser.add_argument("--problems", nargs="*", default=[""], help="parts of the names of problems to run")
    parser.add_argument("--out", type=Path, default=Path("inverse"), help="folder of the results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    train, held = digits()
    if args.images:
        loaded = torch.load(args.images, weights_only=True)
        train, held = (loaded["train"], loaded["held"]) if isinstance(loaded, dict) else (loaded[args.count :], loaded)
    if args.model:
        model, vanilla = HVAE.from_pretrained(args.model), None
        if args.vanilla:
            vanilla = HVAE.from_pretrained(args.vanilla)
    else:
        model, vanilla = train_digits(train, args.out, args.training)
    x, clean = held[: args.count], train[:40]

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
        few = Case(
            case.name, *(None if t is None else t.rows(slice(args.uncertain)) for t in (case.measurement, case.known))
        )
        calibration, mean, deviation = uncertainty(model, few, x[: args.uncertain], args.steps, args.draws)
        print(f"  {calibration}", flush=True)
        found = {"methods": table, "p": significance(table), "calibration": calibration}
        if case.known is not None:
            found["known bands"] = {n: known_error(case, solved[n], model.decomp) for n in table}
        report["problems"][case.name] = found
        name = case.name.split(",")[0].replace(" ", "-").replace("×", "x")
        draw(case, x, solved, mean, deviation).savefig(args.out / f"{name}.png", dpi=110)
        path.write_text(json.dumps(report, indent=1) + "\n")
        (args.out / "results.md").write_text(markdown(report))


if __name__ == "__main__":
    main()
