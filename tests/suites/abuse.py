"""Refinement under abuse: every schedule and update rule, wild settings, inputs of seven kinds.

    python -m tests.suites.abuse --inputs 10000

Each schedule and rule refines that many inputs. Step sizes from 1e-6 to 1e3 and guidance from 0 to 1e6
are drawn anew for each batch, and so are the start, the number of steps, the precision, and what is known:
the inputs themselves, some coefficients of their bands, or measurements under noise of any kind and level.
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
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from separable_hvae import (
    HVAE,
    FFT2Real,
    GaussianNoise,
    Identity,
    KnownBands,
    LaplaceNoise,
    MAPRefiner,
    Measurement,
    PoissonNoise,
    Wavelet2,
)
from separable_hvae.data_terms.base import DataTerm
from separable_hvae.model.result import Result
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


@dataclass
class Known:
    """What is known of a batch.

    Attributes:
        term: What a refiner takes.
        data: The data term of what a model decodes, by formulas of this module: ``(B,)``, float64.
        tensors: All that the term was made of.
        loss: The refiner's loss.
    """

    term: Tensor | DataTerm
    data: Callable[[Result], Tensor]
    tensors: list[Tensor]
    loss: Literal["l1", "l2"] = "l2"


def gaussian(error: Tensor, variance: float | Tensor) -> Tensor:
    return (error.double().square() / (2 * variance)).flatten(1).sum(1)


def laplace(error: Tensor, variance: float | Tensor) -> Tensor:
    return (math.sqrt(2) * error.double().abs() / variance**0.5).flatten(1).sum(1)


def poisson(predicted: Tensor, y: Tensor, gain: float) -> Tensor:
    rate, counts = predicted.double() / gain, y.double() / gain
    few = math.log(0.1) + 10 * rate - 1
    log = torch.where(rate > 0.1, rate.clamp_min(0.1).log(), few)
    return (torch.where(rate > 0.1, rate, few.clamp_max(0).exp()) - counts * log).flatten(1).sum(1)


def signals(model: HVAE, x: Tensor, random: torch.Generator) -> Known:
    """The inputs themselves, by either loss."""
    variance = float(model.sigma.detach()) ** 2
    if pick(2, random):
        return Known(x, lambda result: gaussian(result.reconstruction - x, variance), [x])
    bands = torch.cat([h.flatten(1) for h in model.decomp.analysis(x)], dim=1)  # as refinement has it

    def data(result: Result) -> Tensor:
        return laplace(torch.cat([h.flatten(1) for h in result.bands], dim=1) - bands, variance)

    return Known(x, data, [x], "l1")


def coefficients(model: HVAE, x: Tensor, random: torch.Generator) -> Known:
    """About half of the coefficients of every band."""
    bands = list(model.decomp.analysis(x))
    masks = [torch.rand(h.shape, generator=random) < 0.5 for h in bands]
    noise = level(random)
    variance = float(model.sigma.detach()) ** 2 + noise**2

    def data(result: Result) -> Tensor:
        parts = zip(result.bands, bands, masks, strict=True)
        return torch.stack([gaussian(torch.where(mask, a - b, 0), variance) for a, b, mask in parts]).sum(0)

    return Known(KnownBands(bands, masks, noise), data, [*bands, *masks])


def masked(x: Tensor, mask: Tensor) -> Tensor:
    return x * mask


def pooled(x: Tensor, _: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(x, 2)


def squared(x: Tensor, _: Tensor) -> Tensor:
    return x.square()


def measurements(model: HVAE, x: Tensor, random: torch.Generator) -> Known:
    """Some pixels, means of four, or squares, under noise of any kind; of some inputs there is no pixel."""
    share = torch.rand(len(x), 1, 1, 1, generator=random).round()
    mask = (torch.rand(x.shape, generator=random) < share).to(x)
    operators: list[tuple[Callable[[Tensor, Tensor], Tensor], float]] = [(masked, 1.0), (pooled, 0.25), (squared, 0.0)]
    operator, gain = operators[pick(3, random)]  # with the eigenvalue of A A*
    linear = operator is not squared
    levels = torch.tensor([level(random) for _ in x]).reshape(-1, 1, 1, 1).to(x)
    y = operator(x + levels * torch.randn(x.shape, generator=random).to(x), mask)
    kind = pick(3, random) if linear else 2
    if kind == 2:
        y, count = y.clamp_min(0), one(1e-3, 1e3, random)
        start = None if linear else x
        term = Measurement(y, operator, PoissonNoise(count), given=[mask], linear=linear, start=start)
        return Known(term, lambda result: poisson(operator(result.reconstruction, mask), y, count), [x, y, mask])
    made, density = ((GaussianNoise, gaussian), (LaplaceNoise, laplace))[kind]
    noise = levels if pick(2, random) else float(levels[0])
    variance = noise**2 + gain * float(model.sigma.detach()) ** 2

    def data(result: Result) -> Tensor:
        return density(operator(result.reconstruction, mask) - y, variance)

    return Known(Measurement(y, operator, made(noise), given=[mask]), data, [x, y, mask, levels])


def level(random: torch.Generator) -> float:
    """Deviation of a noise, 0 now and then."""
    return 0.0 if pick(8, random) == 0 else one(1e-3, 1e3, random)


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
    known = (signals, coefficients, measurements, measurements)[pick(4, random)](model, x, random)
    inits: list[Any] = ["posterior", "posterior", "prior", [3 * z for z in model.encode(x).latents]]
    init = inits[pick(len(inits), random)]
    sample = isinstance(init, str) and pick(2, random) == 0
    step_size, steps, seed = one(1e-6, 1e3, random), 1 + pick(4, random), pick(2**31, random)
    before, held = [t.clone() for t in known.tensors], digest(model)

    def refined(n: int) -> Result:
        refiner = MAPRefiner(n, step_size, guidance, known.loss, schedule, rule, init, sample)
        return refiner(model, known.term, torch.Generator().manual_seed(seed))

    def objective(result: Result) -> Tensor:
        again = model.decode(result.latents)
        return (again.nll.double() + guidance * known.data(again)).detach()

    start, end = refined(0), refined(steps)
    assert end.refused is not None
    finite = torch.isfinite(torch.cat([t.flatten(1) for t in (end.reconstruction, *end.latents)], dim=1)).all(1)
    first, last = objective(start), objective(end)
    # In single precision the objectives measured here carry rounding of their own.
    worse = ~(last <= first + SLACK * (1 if precise else 3) * (1 + first.abs()))
    changed = not all(map(torch.equal, known.tensors, before)) or digest(model) != held
    return Count(size, int(end.refused.sum()), int((~finite).sum()), int(worse.sum()), size * changed)


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
