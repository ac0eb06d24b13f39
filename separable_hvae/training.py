r"""The training loop: minimise −ELBO per data dimension, in nats.

Everything random is a function of (seed, step): which samples form batch k and which noise it gets. A
run that stops and resumes therefore goes on exactly as if it had never stopped, with no random state
to save. Schedules are functions of progress, the share of the steps or of the time budget that is spent.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import Dataset

from separable_hvae.batches import Batches, mix
from separable_hvae.checkpoint import TrainingState
from separable_hvae.decomposition import check_finite, pack
from separable_hvae.hvae import HVAE

if TYPE_CHECKING:
    from accelerate import Accelerator

_CHECKPOINT = "checkpoint.safetensors"
_ACTIVE_NATS = 0.01

Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass
class FitReport:
    """What :func:`fit` did.

    Attributes:
        records: One dictionary for each logged step (``step``, ``loss`` and ``data`` in nats/dim, ``kl``
            per layer in nats, ``grad_norm``, ``learning_rate``, ``signals_per_second``, ``skipped``)
            or held-out evaluation (``step`` and what :func:`evaluate` gives, prefixed ``heldout_``).
        steps: Steps done in all, earlier runs included.
        seconds: Time spent in all, earlier runs included.
        interrupted: Whether Ctrl-C ended the run.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    interrupted: bool = False


def fit(
    model: HVAE,
    data: "Tensor | Dataset[Tensor]",
    *,
    steps: int | None = None,
    time_budget: float | None = None,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.01,
    warmup: float = 0.05,
    kl_warmup: float = 0.0,
    ema: float = 0.999,
    clip: float = 3.0,
    skip: float = 20.0,
    heldout: Tensor | None = None,
    every: int = 100,
    augment: Augment | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: float = 60.0,
    log: str | Path | None = None,
    seed: int = 0,
    workers: int = 0,
    progress: bool = True,
    accelerator: "Accelerator | None" = None,
    clock: Callable[[], float] = time.perf_counter,
) -> FitReport:
    """Train a model; afterwards it holds the averaged (EMA) weights.

    Args:
        model: The model, changed in place and moved to the accelerator's device.
        data: Signals ``(N, C, *size)``, kept on the device as a whole, or a map-style dataset of signals.
        steps: Optimizer steps; give this or ``time_budget``, or both: the first to be reached ends the run.
        time_budget: Seconds of training in all, over interruptions.
        batch_size: Signals in each step, on each process.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        warmup: Share of the run in which the learning rate rises; it then falls along a cosine to zero.
        kl_warmup: Share of the run in which the weight of the KL rises from zero to one.
        ema: Decay of the weights' moving average, reached gradually; 0 keeps the plain weights.
        clip: Gradients are clipped at this multiple of their typical norm.
        skip: A step is skipped where the norm exceeds this multiple of the typical one or is not finite,
            never more than three in a row; armed after 100 steps.
        heldout: Signals to evaluate on, with the averaged weights.
        every: Steps between log records and held-out evaluations (a tenth as often).
        augment: Maps a batch and a generator to a batch.
        checkpoint: Folder for the checkpoint. If it holds one, the run resumes from it.
        checkpoint_every: Seconds between checkpoints.
        log: File that gets each record as a line of JSON.
        seed: Seed of batches and noise.
        workers: Processes that load a dataset.
        progress: Whether to show a progress bar.
        accelerator: An ``accelerate.Accelerator`` for mixed precision or several processes.
        clock: Clock of ``time_budget``.

    Returns:
        The report. Ctrl-C ends the run early: a checkpoint is written, and the model holds what was learnt.

    Raises:
        ImportError: If the extra ``train`` is not installed.
        ValueError: If an option is out of range, the data are empty or not finite, or the checkpoint
            belongs to another model, data or setting.
        FloatingPointError: If the loss stays non-finite.
    """
    try:
        from accelerate import Accelerator
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError('fit needs the extra "train": pip install "separable-hvae[train]"') from error
    if not isinstance(model, HVAE):
        raise TypeError(f"model must be an HVAE, got {type(model).__name__}")
    _check_options(steps, time_budget, batch_size, learning_rate, warmup, kl_warmup, ema, clip, skip, every)
    accelerator = accelerator or Accelerator()
    device = accelerator.device
    model.to(device)
    batches = Batches(model, data, batch_size, seed, workers, accelerator.process_index, accelerator.num_processes)
    if not int(model.calibrated):
        model.calibrate(batches.some(4096))
    if heldout is not None:
        check_finite("heldout", model.decomp.check_signal(heldout, "heldout"))
    model.train()
    model.zero_grad()
    optimizer = torch.optim.AdamW(_decay_groups(model, weight_decay), lr=learning_rate)
    averaged = AveragedModel(model, multi_avg_fn=_ema_update(ema))
    state = TrainingState(
        model, averaged, optimizer, settings={"seed": seed, "batch_size": batch_size, **batches.fingerprint}
    )
    path = Path(checkpoint) / _CHECKPOINT if checkpoint is not None else None
    if path is not None and path.exists():
        state.load(path)
    wrapped, wrapped_optimizer = accelerator.prepare(model, optimizer)
    noise = torch.Generator(device)
    report = FitReport()
    main = accelerator.is_main_process
    bar = tqdm(total=steps, initial=state.step, disable=not (progress and main), unit="step", dynamic_ncols=True)
    begin, saved, last = clock() - state.seconds, time.monotonic(), (state.step, clock())

    def record(entry: dict[str, Any]) -> None:
        report.records.append(entry)
        if log is not None and main:
            with Path(log).open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def save() -> None:
        if path is not None and main:
            state.save(path)

    try:
        for batch in batches.start_at(state.step):
            state.seconds = clock() - begin
            done = max(state.step / steps if steps else 0.0, state.seconds / time_budget if time_budget else 0.0)
            if done >= 1:
                break
            rate = learning_rate * min(1.0, done / warmup if warmup else 1.0) * 0.5 * (1 + math.cos(math.pi * done))
            rate = max(rate, 1e-3 * learning_rate)
            for group in optimizer.param_groups:
                group["lr"] = rate
            noise.manual_seed(mix(seed, state.step, accelerator.process_index))
            x = batch.to(device)
            if augment is not None:
                x = augment(x, noise)
            result = wrapped(x, noise)
            data_term, kl = result.data.mean() / model.decomp.numel, result.kl.mean(0)
            kl_weight = min(1.0, done / kl_warmup) if kl_warmup else 1.0
            accelerator.backward(data_term + kl_weight * kl.sum() / model.decomp.numel)
            norm = float(accelerator.clip_grad_norm_(model.parameters(), clip * state.typical_norm))
            skipped = state.judge(norm, skip)
            if not skipped:
                wrapped_optimizer.step()
            wrapped_optimizer.zero_grad()
            state.step += 1
            averaged.update_parameters(model)
            bar.update()
            if state.step % every == 0:
                per_layer = kl.detach().tolist()
                loss = float(data_term.detach()) + sum(per_layer) / model.decomp.numel
                speed = (state.step - last[0]) * len(x) * accelerator.num_processes / (clock() - last[1])
                last = (state.step, clock())
                record(
                    {
                        "step": state.step,
                        "loss": loss,
                        "data": float(data_term.detach()),
                        "kl": per_layer,
                        "grad_norm": norm,
                        "learning_rate": rate,
                        "signals_per_second": speed,
                        "skipped": state.skipped,
                    }
                )
                bar.set_postfix(loss=f"{loss:.3f}", kl=f"{sum(per_layer) / model.decomp.numel:.3f}")
                if heldout is not None and state.step % (10 * every) == 0:
                    held = evaluate(cast(HVAE, averaged.module), heldout, batch_size=batch_size, seed=seed)
                    record({"step": state.step, **{f"heldout_{k}": v for k, v in held.items()}})
            if path is not None and time.monotonic() - saved > checkpoint_every:
                save()
                saved = time.monotonic()
    except KeyboardInterrupt:
        report.interrupted = True
    finally:
        bar.close()
    state.seconds = clock() - begin
    save()
    if ema and state.step:
        model.load_state_dict(averaged.module.state_dict())
    model.eval()
    report.steps, report.seconds = state.step, state.seconds
    return report


@torch.no_grad()
def evaluate(model: HVAE, data: Tensor, *, batch_size: int = 256, seed: int = 0) -> dict[str, Any]:
    """Measure a model on held-out signals, with posterior samples.

    Args:
        model: The model; its mode is left as it was.
        data: Signals ``(N, C, *size)``.
        batch_size: Signals in each pass.
        seed: Seed of the posterior samples.

    Returns:
        ``objective`` (½·SE/σ² + KL) and ``loss`` (−ELBO), both in nats/dim; ``mse`` of the posterior
        sample and ``mse_mean`` of the posterior mean, in the data's units; ``kl`` per layer in nats;
        ``active_units``, the number of latents whose mean KL exceeds 0.01 nats, and ``units``.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator(model.start.device).manual_seed(seed)
    loss, mse, mse_mean, layers = 0.0, 0.0, 0.0, torch.zeros(model.depth, dtype=torch.float64)
    units: list[Tensor] = []
    for start in range(0, len(data), batch_size):
        x = data[start : start + batch_size].to(model.start.device)
        seen = model.observe(x)
        passes = model.top_down([None] * model.depth, len(x), seen, generator=generator)
        result = model.result(passes, x.dtype, seen.x)
        assert result.kl is not None
        loss -= float(result.elbo.double().sum())
        layers += result.kl.double().sum(0).cpu()
        mse += float(_squares(result.reconstruction, x))
        means = model.top_down([None] * model.depth, len(x), seen, temperature=0.0)
        mse_mean += float(_squares(model.result(means, x.dtype).reconstruction, x))
        pairs = [(q, p) for step in passes for q, p in zip(step.posteriors, step.priors, strict=True) if q is not None]
        batch_units = [q.kl_elements(p).sum(0).flatten() for q, p in pairs]
        units = [u + b for u, b in zip(units, batch_units, strict=True)] if units else batch_units
    model.train(was_training)
    n, numel = len(data), model.decomp.numel
    log_sigma = float(model.sigma.log())
    constants = log_sigma + 0.5 * math.log(2 * math.pi)
    return {
        "objective": loss / n / numel - constants,
        "loss": loss / n / numel,
        "mse": mse / n,
        "mse_mean": mse_mean / n,
        "kl": (layers / n).tolist(),
        "active_units": int(sum(int((u / n > _ACTIVE_NATS).sum()) for u in units)),
        "units": sum(u.numel() for u in units),
    }


def _squares(a: Tensor, b: Tensor) -> Tensor:
    return (pack(a) - pack(b)).square().flatten(1).mean(1).sum()


def _decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _ema_update(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    """Moving average whose decay rises with the number of averaged steps, so that short runs profit too."""

    @torch.no_grad()
    def update(averages: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        weight = 1 - min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(list(averages), list(current), weight)

    return update


def _check_options(
    steps: int | None,
    time_budget: float | None,
    batch_size: int,
    learning_rate: float,
    warmup: float,
    kl_warmup: float,
    ema: float,
    clip: float,
    skip: float,
    every: int,
) -> None:
    if steps is None and time_budget is None:
        raise ValueError("fit needs steps or time_budget")
    positive = {"steps": steps, "time_budget": time_budget, "batch_size": batch_size, "learning_rate": learning_rate}
    for name, value in {**positive, "clip": clip, "skip": skip, "every": every}.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    for name, value in {"steps": steps, "batch_size": batch_size, "every": every}.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name} must be an integer, got {value!r}")
    for name, value in {"warmup": warmup, "kl_warmup": kl_warmup, "ema": ema}.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}")
