"""Refinement under abuse: every schedule and update rule, wild settings, inputs of seven kinds.

    python -m tests.abuse --inputs 10000

Each schedule and rule refines that many inputs. Step sizes from 1e-6 to 1e3 and guidance from 0 to 1e6
are drawn anew for each batch, and so are the start, the loss, the number of steps and the precision.
Counted is what must never happen: a result that is not finite, a sample whose objective exceeds its
start's by more than 1e-5 (1 + |J|), an input or a parameter that changed.
"""

import argparse
import copy
import hashlib
import itertools
import math
import time
import warnings
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from separable_hvae import HVAE, FFT2Real, Identity, MAPRefiner, Wavelet2
from separable_hvae.refine.rules import RULES
from separable_hvae.refine.schedules import SCHEDULES

BATCH = 125
SLACK = 1e-5


@dataclass
class Count:
    """What happened, in samples; all but ``inputs`` and ``refused`` must be zero."""

    inputs: int = 0
    refused: int = 0
    non_finite: int = 0
    worse: int = 0
    changed: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Count)))


def models() -> list[HVAE]:
    """Small models of 8 × 8 images, with priors that are no standard normals any more."""
    digits = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    made = []
    for seed, decomp in enumerate((FFT2Real(8, 1, [2, 8]), Wavelet2(8, "db2", 1, [4, 8]), Identity(8, 1, [4, 8]))):
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # few latents: small on purpose
            model = HVAE(decomp, layers=2, width=8, bottleneck=4, blocks=0, sigma=(0.02, 0.1, 0.5)[seed])
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        model.calibrate(digits)
        made.append(model.eval())
    return made


def inputs(n: int, random: torch.Generator) -> Tensor:
    """Natural, constant, noisy, saturated, huge, tiny and one-pixel images in turn, ``(n, 1, 8, 8)``."""
    digits = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    x = digits[torch.randint(len(digits), (n,), generator=random)]
    noise = torch.randn(x.shape, generator=random)
    pixel = torch.zeros(n, 64).scatter_(1, torch.randint(64, (n, 1), generator=random), 10.0).reshape(x.shape)
    kinds = [x, noise[:, :, :1, :1].expand_as(x), noise, noise.sign(), 1e6 * noise, 1e-30 * noise, pixel]
    return torch.stack([kinds[i % len(kinds)][i] for i in range(n)])


def one(low: float, high: float, random: torch.Generator) -> float:
    """A number, its logarithm uniform."""
    return math.exp(math.log(low) + (math.log(high) - math.log(low)) * float(torch.rand((), generator=random)))


def pick(n: int, random: torch.Generator) -> int:
    return int(torch.randint(n, (), generator=random))


def objective(model: HVAE, latents: list[Tensor], x: Tensor, guidance: float, loss: str) -> Tensor:
    """The MAP objective of latents, from what the model itself decodes: ``(B,)``, float64."""
    result = model.decode(latents)
    error = (result.reconstruction.double() - x.double()).flatten(1)
    sigma = float(model.sigma.detach())
    if loss == "l1":  # on the bands, as refinement has it
        pairs = zip(result.bands, model.decomp.analysis(x), strict=True)
        data = math.sqrt(2) / sigma * torch.cat([(a - b).double().abs().flatten(1) for a, b in pairs], dim=1).sum(1)
    else:
        data = error.square().sum(1) / (2 * sigma**2)
    return (result.nll.double() + guidance * data).detach()


def digest(model: HVAE) -> str:
    """Everything that a model holds, and its modes and gradients."""
    state = b"".join(t.detach().numpy().tobytes() for t in model.state_dict().values())
    flags = [(m.training, [(p.requires_grad, p.grad is None) for p in m.parameters()]) for m in model.modules()]
    return hashlib.sha256(state + repr(flags).encode()).hexdigest()


def batch(model: HVAE, schedule: str, rule: str, size: int, random: torch.Generator) -> Count:
    """Refine one batch under settings drawn from ``random`` and look at what came back."""
    x = inputs(size, random)
    precise = pick(2, random) == 0
    if precise:
        model, x = copy.deepcopy(model).double(), x.double()
    guidance = 0.0 if pick(8, random) == 0 else one(1e-6, 1e6, random)
    names: list[Literal["l1", "l2"]] = ["l1", "l2"]
    loss = names[pick(2, random)]
    inits: list[Any] = ["posterior", "posterior", "prior", [3 * z for z in model.encode(x).latents]]
    init = inits[pick(len(inits), random)]
    sample = isinstance(init, str) and pick(2, random) == 0
    step_size, steps, seed = one(1e-6, 1e3, random), 1 + pick(4, random), pick(2**31, random)
    before, held = x.clone(), digest(model)

    def refined(n: int) -> tuple[list[Tensor], Tensor, Tensor]:
        refiner = MAPRefiner(n, step_size, guidance, loss, schedule, rule, init, sample)
        result = refiner(model, x, torch.Generator().manual_seed(seed))
        assert result.refused is not None
        return result.latents, result.reconstruction, result.refused

    start = refined(0)[0]
    latents, reconstruction, refused = refined(steps)
    finite = torch.isfinite(torch.cat([t.flatten(1) for t in (reconstruction, *latents)], dim=1)).all(1)
    first, last = (objective(model, z, x, guidance, loss) for z in (start, latents))
    # In single precision the objectives measured here carry rounding of their own.
    worse = ~(last <= first + SLACK * (1 if precise else 3) * (1 + first.abs()))
    changed = not torch.equal(x, before) or digest(model) != held
    return Count(size, int(refused.sum()), int((~finite).sum()), int(worse.sum()), size * changed)


def abuse(schedule: str, rule: str, n: int, seed: int = 0) -> Count:
    """Refine ``n`` inputs in batches, on each model in turn."""
    random = torch.Generator().manual_seed(seed)
    sizes = [min(BATCH, n - start) for start in range(0, n, BATCH)]
    subjects = itertools.cycle(models())
    return sum((batch(next(subjects), schedule, rule, size, random) for size in sizes), Count())


def main() -> None:
    """Print one line for each schedule and rule; exit with an error if anything happened that must not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000, help="for each schedule and rule")
    parser.add_argument("--schedule", choices=SCHEDULES, nargs="+", default=list(SCHEDULES))
    parser.add_argument("--rule", choices=RULES, nargs="+", default=list(RULES))
    args = parser.parse_args()
    names = [f.name.replace("_", "-") for f in fields(Count)]
    print(f"{'schedule':10}{'rule':14}" + "".join(f"{name:>12}" for name in names) + f"{'seconds':>10}")
    bad = 0
    for schedule, rule in itertools.product(args.schedule, args.rule):
        begin = time.perf_counter()
        count = abuse(schedule, rule, args.inputs)
        values = [getattr(count, f.name) for f in fields(Count)]
        print(f"{schedule:10}{rule:14}" + "".join(f"{v:12}" for v in values) + f"{time.perf_counter() - begin:10.0f}")
        bad += count.non_finite + count.worse + count.changed
    raise SystemExit(bad > 0)


if __name__ == "__main__":
    main()
