"""One process of a data-parallel run: ``python -m tests.suites.gloo OUT`` under RANK, WORLD_SIZE and their like.

Trains for a few steps and writes the gradients of each to OUT, in float64. Noise is the same for every
sample, so that it does not matter which process draws it.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from separable_hvae import FFT1Real, fit
from separable_hvae.distributions.gaussian import Gaussian
from tests.helpers.models import tiny

SIGNALS = 24
STEPS = 3


def shared_noise(self: Gaussian, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """A posterior sample whose noise depends on the shape of one sample's latents alone."""
    shape = self.mean.shape[1:]
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape.numel()))
    return self.mean + temperature * self.sigma * noise.to(self.mean)


class Recorder(Accelerator):  # type: ignore[misc]
    """Keeps the gradients of each step, before they are clipped."""

    gradients: list[dict[str, Tensor]]

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: int = 2) -> Any:
        """Copy what has been gathered from all processes."""
        held = [p for p in parameters if p.grad is not None]
        self.gradients.append({str(i): p.grad.clone() for i, p in enumerate(held)})
        return super().clip_grad_norm_(held, max_norm, norm_type)


def main() -> None:
    """Train and write."""
    Gaussian.sample = shared_noise  # type: ignore[method-assign]
    accelerator = Recorder(cpu=True)
    accelerator.gradients = []
    model = tiny(FFT1Real(8, scales=[2, 8]), perturbed=False, layers=1, sigma="learned").double()
    data = torch.randn(SIGNALS, 1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = SIGNALS // accelerator.num_processes
    fit(model, data, steps=STEPS, batch_size=share, seed=0, progress=False, accelerator=accelerator)
    steps = accelerator.gradients
    flat = {f"{n}.{name}": g for n, step in enumerate(steps) for name, g in step.items()}
    if accelerator.is_main_process:
        save_file(flat, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
