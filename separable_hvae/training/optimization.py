r"""One optimizer step, and the moving average of the weights that it leaves.

    loss        (1/N) Σ (−log p(x | z) + w Σ_l KL_l) / dim x                  nats/dim
    average     θ̄ ← θ̄ + (1 − d_k)(θ − θ̄),     d_k = min(d, (1 + k) / (10 + k))

The decay d_k rises with the number k of averaged steps, so that short runs profit too.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from separable_hvae.functional import check_finite
from separable_hvae.model.hvae import HVAE
from separable_hvae.model.result import Result
from separable_hvae.training.batches import mix
from separable_hvae.training.checkpoint import TrainingState
from separable_hvae.training.evaluation import band_residuals
from separable_hvae.training.options import MAY_CHANGE, TrainingOptions

if TYPE_CHECKING:
    from accelerate import Accelerator

_COUNTING = torch.device("cpu")
"""Steps are counted in tensors, which would be on the default device: on an accelerator reading them waits."""
_AUGMENTED = "the batch that augment returns"


@dataclass(frozen=True)
class StepOutput:
    """What one step saw and did.

    Attributes:
        x: Signals ``(B, C, *size)``.
        result: The model's pass.
        grad_norm: Norm of the gradient before it was clipped.
        learning_rate: Learning rate.
    """

    x: Tensor
    result: Result
    grad_norm: float
    learning_rate: float

    def record(self, model: HVAE) -> dict[str, Any]:
        """What a log says of it: terms of the loss in nats/dim, the KL of each layer in nats."""
        assert self.result.data is not None
        assert self.result.kl is not None
        data = float(self.result.data.detach().mean() / model.decomp.numel)
        kl = self.result.kl.detach().mean(0).tolist()
        return {
            "loss": data + sum(kl) / model.decomp.numel,
            "data": data,
            "kl": kl,
            "residual": band_residuals(model, self.result.reconstruction.detach() - self.x),
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
        }


class Trainer:
    """A model that is trained, its optimizer, and the average of its weights.

    Args:
        model: The model, on the accelerator's device.
        options: Of the run.
        accelerator: Wraps the model for mixed precision or several processes.
        fingerprint: What a checkpoint must know of the data.

    Attributes:
        average: The model with averaged weights, in eval mode.
        state: What a checkpoint holds.
    """

    def __init__(
        self, model: HVAE, options: TrainingOptions, accelerator: "Accelerator", fingerprint: Mapping[str, Any]
    ) -> None:
        self.model, self.options, self.accelerator = model, options, accelerator
        self._optimizer = torch.optim.AdamW(_decay_groups(model, options.weight_decay), lr=options.learning_rate)
        with _COUNTING:
            self._averaged = AveragedModel(model, multi_avg_fn=_ema_update(options.ema))
        self.average = cast(HVAE, self._averaged.module).eval()
        settings = {"seed": options.seed, "batch_size": options.batch_size, "processes": accelerator.num_processes}
        settings |= {**fingerprint, **(options.settings or {})}
        may_change = {name: getattr(options, name) for name in MAY_CHANGE}
        self.state = TrainingState(model, self._averaged, self._optimizer, settings=settings, options=may_change)
        self._noise = torch.Generator(accelerator.device)

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Make ready for steps; at the end, however it comes, give the model back with what was learnt."""
        try:
            self._wrapped, self._wrapped_optimizer = self.accelerator.prepare(self.model, self._optimizer)
            self.model.train()
            self.model.zero_grad()
            yield
        finally:
            # Mixed precision had wrapped the model's own forward.
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.model.zero_grad()
            if self.options.ema and self.state.step:
                self.model.load_state_dict(self.average.state_dict())
            self.model.eval()

    def step(self, batch: Tensor, done: float) -> StepOutput:
        """Train on a batch ``(B, C, *size)``, with this share of the run done.

        Raises:
            TypeError: If ``augment`` returns something else than signals.
            ValueError: If these do not fit the model or are not finite.
            FloatingPointError: If the gradient stays non-finite.
        """
        options, state, numel = self.options, self.state, self.model.decomp.numel
        rate = options.rate(done)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._noise.manual_seed(mix(options.seed, state.step, self.accelerator.process_index))
        x = self._augmented(batch.to(self.accelerator.device))
        result = self._wrapped(x, self._noise)
        kl = result.kl.mean(0).sum()
        self.accelerator.backward(result.data.mean() / numel + options.kl_weight(done) * kl / numel)
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), options.clip * state.typical_norm))
        if not state.judge(norm, options.skip):
            with _COUNTING:
                self._wrapped_optimizer.step()
        self._wrapped_optimizer.zero_grad()
        state.step += 1
        self._averaged.update_parameters(self.model)
        return StepOutput(x, result, norm, rate)

    def _augmented(self, x: Tensor) -> Tensor:
        if self.options.augment is None:
            return x
        x = self.model.decomp.check_signal(self.options.augment(x, self._noise), _AUGMENTED)
        check_finite(_AUGMENTED, x)
        return x


def _decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _ema_update(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    @torch.no_grad()
    def update(averages: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        weight = 1 - min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(list(averages), list(current), weight)

    return update
