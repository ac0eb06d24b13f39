r"""One optimizer step, and the moving average of the weights that it leaves.

    loss        (1/N) Σ (−log p(x | z) + w Σ_l KL_l) / dim x                  nats/dim
    average     θ̄ ← θ̄ + (1 − d_k)(θ − θ̄),     d_k = min(d, (1 + k) / (10 + k))

The decay d_k rises with the number k of averaged steps, so that short runs profit too. The loss
may be one of the caller's own.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from typing_extensions import override

from separable_hvae._validation import shown
from separable_hvae.functional import check_finite
from separable_hvae.model.batches import Batch, check_batch, map_tensors, split_pair
from separable_hvae.model.hvae import HVAE
from separable_hvae.model.result import Result
from separable_hvae.training.batches import mix
from separable_hvae.training.checkpoint import TrainingState
from separable_hvae.training.evaluation import band_residuals
from separable_hvae.training.options import MAY_CHANGE, Loss, TrainingOptions

if TYPE_CHECKING:
    from accelerate import Accelerator

_COUNTING = torch.device("cpu")
"""Steps are counted in tensors, which would be on the default device: on an accelerator reading them waits."""
_AUGMENTED = "the batch that augment returns"
_ARMED_AFTER = 100  # Steps before gradient norms count as typical.
_MOST_SKIPS = 3  # Steps skipped in a row at most.


@dataclass(frozen=True)
class StepOutput:
    """What one step saw and did.

    Attributes:
        x: Signals ``(B, C, *size)``.
        result: The model's pass, or what a loss of the caller's own returned.
        grad_norm: Norm of the gradient before it was clipped.
        learning_rate: Learning rate.
    """

    x: Tensor
    result: Result | Tensor
    grad_norm: float
    learning_rate: float

    def record(self, model: HVAE) -> dict[str, Any]:
        """What a log says of it: the loss and its terms in nats/dim, the KL of each layer in nats."""
        rest = {"grad_norm": self.grad_norm, "learning_rate": self.learning_rate}
        if isinstance(self.result, Tensor):
            return {"loss": float(self.result.detach()), **rest}
        assert self.result.data is not None
        assert self.result.kl is not None
        data = float(self.result.data.detach().mean() / model.decomp.numel)
        kl = self.result.kl.detach().mean(0).tolist()
        residual = band_residuals(model, self.result.reconstruction.detach() - self.x)
        return {"loss": data + sum(kl) / model.decomp.numel, "data": data, "kl": kl, "residual": residual, **rest}


class _Forward(nn.Module):
    """What accelerate wraps: one forward pass, up to the loss where that is the caller's own."""

    def __init__(self, model: HVAE, loss: Loss | None) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    @override
    def forward(self, batch: Batch, generator: torch.Generator) -> Result | Tensor:
        if self.loss is not None:
            return self.loss(self.model, batch, generator)
        x, condition = split_pair(batch)
        result: Result = self.model(x, generator, **({} if condition is None else {"condition": condition}))
        return result


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

    Raises:
        TypeError: If ``optimizer`` returns none, or one whose steps need a closure.
    """

    def __init__(
        self, model: HVAE, options: TrainingOptions, accelerator: "Accelerator", fingerprint: Mapping[str, Any]
    ) -> None:
        self.model, self.options, self.accelerator = model, options, accelerator
        self._optimizer = _optimizer(model, options)
        self._rates = [float(group["lr"]) for group in self._optimizer.param_groups]
        with _COUNTING:
            self._averaged = AveragedModel(model, multi_avg_fn=_ema_update(options.ema))
        self.average = cast(HVAE, self._averaged.module).eval()
        settings = {"seed": options.seed, "processes": accelerator.num_processes, **fingerprint}
        settings["optimizer"] = None if options.optimizer is None else type(self._optimizer).__name__
        settings["loss"] = _name(options.loss)
        may_change = {name: getattr(options, name) for name in MAY_CHANGE} | {"schedule": _name(options.schedule)}
        self.state = TrainingState(
            model, self._averaged, self._optimizer, settings=settings | dict(options.settings or {}), options=may_change
        )
        self._noise = torch.Generator(accelerator.device)

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Make ready for steps; at the end, however it comes, give the model back with what was learnt."""
        accelerator = self.accelerator
        try:
            self._forward, self._stepper = accelerator.prepare(_Forward(self.model, self.options.loss), self._optimizer)
            self.model.train()
            self.model.zero_grad()
            yield
        finally:
            # An accelerator that is shared by several runs would keep their models and moments alive.
            for held, ours in ((accelerator._models, "_forward"), (accelerator._optimizers, "_stepper")):
                held[:] = [one for one in held if one is not self.__dict__.get(ours)]
                self.__dict__.pop(ours, None)
            self.model.zero_grad()
            if self.options.ema and self.state.step:
                self.model.load_state_dict(self.average.state_dict())
            self.model.eval()

    def step(self, batch: Batch, done: float) -> StepOutput:
        """Train on signals ``(B, C, *size)``, or a pair of such and their condition, with this share of the run done.

        Raises:
            TypeError: If ``augment`` returns something else than it got, or ``loss`` no scalar with a gradient.
            ValueError: If signals do not fit the model or are not finite.
            FloatingPointError: If the gradient stays non-finite.
        """
        options, state = self.options, self.state
        factor = options.rate(done)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._noise.manual_seed(mix(options.seed, state.step, self.accelerator.process_index))
        device = self.accelerator.device
        batch = self._augmented(map_tensors(lambda t: t.to(device), batch))
        result = self._forward(batch, self._noise)
        self.accelerator.backward(self._loss(result, options.kl_weight(done)))
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), options.clip * self._typical_norm))
        if not self._skips(norm):
            with _COUNTING:
                self._stepper.step()
        self._stepper.zero_grad()
        state.step += 1
        self._averaged.update_parameters(self.model)
        return StepOutput(split_pair(batch)[0], result, norm, self._rates[0] * factor)

    def _loss(self, result: Result | Tensor, kl_weight: float) -> Tensor:
        if self.options.loss is None:
            assert isinstance(result, Result)
            assert result.data is not None
            assert result.kl is not None
            numel = self.model.decomp.numel
            return result.data.mean() / numel + kl_weight * result.kl.mean(0).sum() / numel
        if not isinstance(result, Tensor) or result.numel() != 1 or not result.requires_grad:
            what = shown(result) + (" without a gradient" if isinstance(result, Tensor) else "")
            raise TypeError(f"loss must return a scalar tensor with a gradient, in nats per dimension, got {what}")
        return result.reshape(())

    def _augmented(self, batch: Batch) -> Batch:
        if self.options.augment is None:
            return batch
        augmented = check_batch(cast(Any, self.options.augment)(batch, self._noise), self.model.decomp, _AUGMENTED)
        if isinstance(batch, Tensor) != isinstance(augmented, Tensor):
            kinds = ("signals", "a pair of signals and a condition")
            raise TypeError(f"augment must return {kinds[not isinstance(batch, Tensor)]}, as it gets")
        check_finite(_AUGMENTED, split_pair(augmented)[0])
        return augmented

    @property
    def _typical_norm(self) -> float:
        """Running mean of gradient norms, infinite until there is one."""
        return self.state.norm or math.inf

    def _skips(self, norm: float) -> bool:
        """Whether to skip a step of this gradient norm; otherwise take the norm into account."""
        state, skip = self.state, self.options.skip
        finite = math.isfinite(norm)
        wild = not finite or (state.step >= _ARMED_AFTER and norm > skip * self._typical_norm)
        if wild and state.in_a_row >= _MOST_SKIPS:
            if not finite:
                raise FloatingPointError(
                    f"the gradient was not finite {state.in_a_row + 1} times in a row, at step {state.step}"
                )
            wild = False
        state.in_a_row = state.in_a_row + 1 if wild else 0
        state.skipped += wild
        if finite:
            # A wild norm counts too, capped: where norms do grow for good, the threshold follows.
            typical = state.norm or norm
            state.norm += (min(norm, skip * typical) - state.norm) * (0.02 if state.norm else 1.0)
        return wild


def _optimizer(model: HVAE, options: TrainingOptions) -> Optimizer:
    if options.optimizer is None:
        return torch.optim.AdamW(_decay_groups(model, options.weight_decay), lr=options.learning_rate)
    optimizer = options.optimizer([p for p in model.parameters() if p.requires_grad])
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must make a torch.optim.Optimizer of a list of parameters, got {shown(optimizer)}")
    closure = next(iter(inspect.signature(optimizer.step).parameters.values()), None)
    if closure is not None and closure.default is closure.empty and closure.kind is closure.POSITIONAL_OR_KEYWORD:
        raise TypeError(f"optimizer must step without a closure, which {type(optimizer).__name__} needs")
    return optimizer


def _name(given: Any) -> str | None:
    """What a checkpoint calls a callable of the caller's."""
    while isinstance(given, partial):
        given = given.func
    return None if given is None else getattr(given, "__qualname__", type(given).__qualname__)


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
