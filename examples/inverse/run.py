"""Inverse problems with a trained model, beside what else could solve them, on the same held-out images.

    python examples/inverse/run.py                                    # trains on digits first, 8×8
    python examples/inverse/run.py --fastmri FOLDER --out inverse-mri # complex images, 32×32, from fastMRI's volumes
    python examples/inverse/run.py --model runs/best --vanilla runs/vanilla --data cifar-10-binary.tar.gz
    python examples/inverse/run.py --model folder --images images.pt  # of save_pretrained, and images of your own

`runs/best` and `runs/vanilla` are what examples/train.py left; "deblur, bands to 8 known" and "denoise, σ = 1 …"
are the problems of the paper's Fig. 4. `images.pt` is a torch file with a dictionary of two tensors (N, C, H, W):
"train" (16 of them choose the baselines' weights) and "held". What this script trains is kept in --out and used
again. Writes results.json, results.md and a picture of each problem. `--problems` takes parts of problems' names, so
that a slow machine can do one after the other.
"""

import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from separable_hvae import HVAE, MAPRefiner, posterior_draws
from separable_hvae.refine import Scale

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # Before installed packages: one is called evaluate.
from baselines import Sparsity, TotalVariation, WaveletSparsity, pnp_hvae, sparse
from console import arguments, read_json, write_json
from problems import Case, cases
from report import CHOSEN, SWEPT, draw, known_error, markdown, quality, significance
from subjects import of_digits, of_files, of_runs, of_volumes

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

    def solved(self, case: Case, like: Tensor, weight: float, found: dict[str, Tensor], batch: int) -> Tensor:
        """The images of a problem, ``batch`` of them at a time."""
        parts = slices(len(like), batch)
        earlier = [{name: x[p] for name, x in found.items()} for p in parts]
        solved = [self.solve(case.rows(p), like[p], weight, e) for p, e in zip(parts, earlier, strict=True)]
        return torch.cat(solved)


def slices(count: int, size: int) -> list[slice]:
    """The numbers below ``count``, ``size`` of them at a time."""
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


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
        SWEPT: refined(model, schedule=Scale(sweeps=2), **adam),
        CHOSEN: refined(model, **joint),
        "separable, joint, corrected": corrected(model, CHOSEN),
    }


def uncertainty(
    model: HVAE, case: Case, x: Tensor, steps: int, draws: int, batch: int
) -> tuple[dict[str, float], Tensor, Tensor]:
    """Calibration of refined posterior draws, their mean and their standard deviation."""
    refiner = MAPRefiner(steps, guidance=case.guidance, schedule="joint", rule="gauss-newton", sample=True)
    generator, parts = torch.Generator().manual_seed(0), slices(len(x), max(1, batch // draws))
    found = torch.cat([posterior_draws(model, case.rows(p).term(model), refiner, draws, generator) for p in parts], 1)
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
    parser = arguments(__doc__)
    parser.add_argument("--model", type=Path, help="run of train.py, or folder of save_pretrained (default: train one)")
    parser.add_argument("--vanilla", type=Path, help="the same of an Identity model of the same size")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", type=Path, help="where --model is a run: CIFAR-10's archive, or fastMRI's folder")
    source.add_argument("--images", type=Path, help="where --model is of save_pretrained: torch file with images")
    source.add_argument("--fastmri", type=Path, help="folder of fastMRI volumes to train and measure on")
    parser.add_argument("--label", help="what to call the images (default: by where they come from)")
    parser.add_argument("--count", type=int, default=200, help="held-out images (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=20, help="Gauss–Newton steps; Adam takes twice as many (default: %(default)s)"
    )
    parser.add_argument("--training", type=int, default=700, help="steps of each training (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=8, help="posterior draws (default: %(default)s)")
    parser.add_argument("--uncertain", type=int, default=40, help="images whose uncertainty is measured")
    parser.add_argument("--batch", type=int, default=400, help="images, or draws, at a time (default: %(default)s)")
    parser.add_argument("--problems", nargs="*", default=[""], help="parts of the names of problems to run")
    parser.add_argument("--out", type=Path, default=Path("inverse"), help="folder of the results")
    args = parser.parse_args()
    if bool(args.model) != bool(args.data or args.images):
        parser.error("--model goes with --data or --images, and they with it")
    if args.vanilla and not args.model:
        parser.error("--vanilla goes with --model")
    args.out.mkdir(parents=True, exist_ok=True)

    try:
        if args.data:
            subject = of_runs(args.model, args.vanilla, args.data)
        elif args.images:
            subject = of_files(args.model, args.vanilla, args.images)
        elif args.fastmri:
            subject = of_volumes(args.fastmri, args.out, args.training)
        else:
            subject = of_digits(args.out, args.training)
    except (ValueError, OSError) as error:
        raise SystemExit(f"{parser.prog}: {error}") from error
    model, x, clean = subject.model, subject.held[: args.count], subject.train[:16]
    rows = methods(model, subject.vanilla, x.shape[-1], args.steps)
    path = args.out / "results.json"
    report: dict[str, Any] = read_json(path) if path.exists() else {"problems": {}}
    report |= {"label": args.label or subject.label, "images": len(x), "steps": args.steps, "draws": args.draws}
    for case, tuning in zip(cases(x, model.decomp), cases(clean, model.decomp, seed=1), strict=True):
        if not any(part in case.name for part in args.problems):
            continue
        print(case.name, flush=True)
        solved: dict[str, Tensor] = {}
        table: dict[str, Any] = {}
        for name, method in rows.items():
            weight = method.tune(tuning, clean)
            begin = time.perf_counter()
            solved[name] = method.solved(case, x, weight, solved, args.batch)
            seconds = time.perf_counter() - begin
            table[name] = quality(solved[name], x) | {"ms": 1e3 * seconds / len(x), "weight": weight}
            shown = ", ".join(f"{k} {table[name][k]['mean']:.4g}" for k in ("psnr", "ssim", "nmse"))
            print(f"  {name:28} {shown}, {table[name]['ms']:.1f} ms/image", flush=True)
        few, calibration, mean, deviation = x[: args.uncertain], {}, None, None
        if len(few):
            calibration, mean, deviation = uncertainty(model, case, few, args.steps, args.draws, args.batch)
            print(f"  {calibration}", flush=True)
        measure = "nmse" if x.is_complex() else "psnr"
        found = {"methods": table, "measure": measure, "p": significance(table, measure), "calibration": calibration}
        if case.known is not None:
            found["known bands"] = {n: known_error(case, solved[n], model.decomp) for n in table}
        report["problems"][case.name] = found
        name = re.sub("[^a-z0-9]+", "-", case.name.lower())
        draw(case, x, solved, mean, deviation).savefig(args.out / f"{name}.png", dpi=110)
        write_json(path, report)
        (args.out / "results.md").write_text(markdown(report), encoding="utf-8")


if __name__ == "__main__":
    main()
