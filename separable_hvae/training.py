r"""The training loop: minimise −ELBO per data dimension, in nats.

Everything random is a function of (seed, step): which samples form batch k and which noise it gets. A
run that stops and resumes therefore goes on exactly as if it had never stopped, with no random state
to save. Schedules are functions of progress, the share of the steps or of the time budget that is spent.
"""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import Dataset

from separable_hvae.batches import Batches, mix
from separable_hvae.checkpoint import TrainingState
from separable_hvae.checks import (
    Allowed,
    check_callable,
    check_flag,
    check_instance,
    check_integer,
    check_number,
    check_seed,
)
from separable_hvae.decomposition import check_finite, plain
from separable_hvae.evaluation import band_residuals, evaluate
from separable_hvae.hvae import HVAE
from separable_hvae.interruption import Interruption
from separable_hvae.records import Records

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINT = "checkpoint.safetensors"
"""Name of the checkpoint in its folder."""

_NUMBERS: dict[str, Allowed] = {
    "time_budget": "positive and finite",
    "learning_rate": "positive and finite",
    "weight_decay": "at least 0 and finite",
    "warmup": "in [0, 1)",
    "kl_warmup": "in [0, 1)",
    "ema": "in [0, 1)",
    "clip": "positive",
    "skip": "positive",
    "checkpoint_every": "at least 0 and finite",
}
_INTEGERS = {"steps": 1, "batch_size": 1, "every": 1, "workers": 0}
"""The least of each."""
_CALLABLES = {
    "augment": "(batch, generator) -> batch",
    "callback": "(record, model) -> None",
    "clock": "() -> seconds",
}
_MAY_BE_NONE = {"steps", "time_budget", "augment", "callback"}
_AUGMENTED = "the batch that augment returns"
_OWN_SETTINGS = {"seed", "batch_size", "processes", "count", "checksum"}

Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass
class FitReport:
    """What :func:`fit` did.

    Attributes:
        records: One dictionary for each logged step (``step``, ``loss`` and ``data`` in nats/dim, ``kl``
            per layer in nats, ``residual``, the root mean square error of each band in the data's units,
            ``grad_norm``, ``learning_rate``, ``signals_per_second``, ``skipped``) or held-out evaluation
            (``step`` and what :func:`evaluate` gives, prefixed ``heldout_``).
        steps: Steps done in all, earlier runs included.
        seconds: Time spent in all, earlier runs included.
        interrupted: Whether Ctrl-C or SIGTERM ended the run.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    interrupted: bool = False


@torch.inference_mode(False)
@torch.enable_grad()
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
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 60.0,
    log: str | os.PathLike[str] | None = None,
    callback: Callable[[dict[str, Any], HVAE], None] | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    workers: int = 0,
    progress: bool = True,
    accelerator: "Accelerator | None" = None,
    clock: Callable[[], float] = time.perf_counter,
) -> FitReport:
    """Train a model; afterwards it holds the averaged (EMA) weights.

    Works under ``no_grad`` and ``inference_mode`` too.

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
        clip: Gradients are clipped at this multiple of their typical norm; ``math.inf`` clips none.
        skip: A step is skipped where the norm exceeds this multiple of the typical one or is not finite,
            never more than three in a row; armed after 100 steps.
        heldout: Signals to evaluate on, with the averaged weights.
        every: Steps between log records; held-out signals are measured a tenth as often. Both come after the
            last of ``steps``, too.
        augment: Maps a batch and a generator to a batch, on the device.
        checkpoint: Folder for the checkpoint, written before the first step, now and then, and at the end.
            If it holds one, the run resumes from it; several machines need a folder that all of them see.
        checkpoint_every: Seconds between checkpoints.
        log: File that gets each record as a line of JSON.
        callback: Called with each record and the averaged model, on the main process.
        settings: Further settings that a checkpoint must agree with, such as what ``augment`` does.
        seed: Seed of batches and noise.
        workers: Processes that load a dataset.
        progress: Whether to show a progress bar.
        accelerator: An ``accelerate.Accelerator`` for mixed precision or several processes.
        clock: Clock of ``time_budget``.

    Returns:
        The report. Ctrl-C and SIGTERM end the run after the step at hand: a checkpoint is written, and the
        model holds what was learnt.

    Raises:
        ImportError: If the extra ``train`` is not installed.
        TypeError: If an argument has the wrong type, or the data's dtype does not fit the model.
        ValueError: If an option is out of range, the data are empty or not finite, nothing of the model
            can be trained, or the checkpoint belongs to another model, data or setting.
        OSError: If a record or checkpoint cannot be written; what was written before stays.
        FloatingPointError: If the loss stays non-finite.
    """
    given = dict(locals())
    try:
        from accelerate import Accelerator
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError('fit needs the extra "train": pip install "separable-hvae[train]"') from error
    _check_options(given)
    if accelerator is not None:
        check_instance("accelerator", accelerator, Accelerator)
        if accelerator.scaler is not None or accelerator.gradient_accumulation_steps > 1:
            raise ValueError(
                "accelerator must have mixed_precision 'no' or 'bf16' and gradient_accumulation_steps 1, got "
                f"{accelerator.mixed_precision!r} and {accelerator.gradient_accumulation_steps}"
            )
    accelerator = accelerator or Accelerator()
    device, world, main = accelerator.device, accelerator.num_processes, accelerator.is_main_process
    model.to(device)
    batches = Batches(model, data, batch_size, seed, workers, accelerator.process_index, world)
    if not int(model.calibrated):
        model.calibrate(batches.some(4096))
    model.train()
    model.zero_grad()
    optimizer = torch.optim.AdamW(_decay_groups(model, weight_decay), lr=learning_rate)
    averaged = AveragedModel(model, multi_avg_fn=_ema_update(ema))
    average = cast(HVAE, averaged.module).eval()
    known = {"seed": seed, "batch_size": batch_size, "processes": world, **batches.fingerprint, **(settings or {})}
    state = TrainingState(model, averaged, optimizer, settings=known)
    path = Path(checkpoint) / CHECKPOINT if checkpoint is not None else None
    resumed = path is not None and path.exists()
    if path is not None and resumed:
        state.load(path)
    records = Records(Path(log), state.step if resumed else None) if log is not None and main else None
    wrapped, wrapped_optimizer = accelerator.prepare(model, optimizer)
    noise = torch.Generator(device)
    report = FitReport()

    def record(entry: dict[str, Any]) -> None:
        report.records.append(entry)
        if records is not None:
            records.write(entry)
        if callback is not None and main:
            callback(entry, average)

    def save() -> None:
        if path is not None and main:
            state.save(path)

    if not resumed:
        save()
    shown = progress and main
    with (
        Interruption() as interruption,
        tqdm(total=steps, initial=state.step, disable=not shown, unit="step", dynamic_ncols=True) as bar,
    ):
        begin, saved, last = clock() - state.seconds, time.monotonic(), (state.step, clock())
        for batch in batches.start_at(state.step):
            state.seconds, stop = _agreed(accelerator, clock() - begin, interruption.requested)
            done = max(state.step / steps if steps else 0.0, state.seconds / time_budget if time_budget else 0.0)
            if done >= 1 or stop:
                report.interrupted = done < 1
                break
            rate = learning_rate * max(_rate(done, warmup), 1e-3)
            for group in optimizer.param_groups:
                group["lr"] = rate
            noise.manual_seed(mix(seed, state.step, accelerator.process_index))
            x = batch.to(device)
            if augment is not None:
                x = model.decomp.check_signal(augment(x, noise), _AUGMENTED)
                check_finite(_AUGMENTED, x)
            result = wrapped(x, noise)
            data_term, kl = result.data.mean() / model.decomp.numel, result.kl.mean(0)
            kl_weight = min(1.0, done / kl_warmup) if kl_warmup else 1.0
            accelerator.backward(data_term + kl_weight * kl.sum() / model.decomp.numel)
            norm = float(accelerator.clip_grad_norm_(model.parameters(), clip * state.typical_norm))
            if not state.judge(norm, skip):
                wrapped_optimizer.step()
            wrapped_optimizer.zero_grad()
            state.step += 1
            averaged.update_parameters(model)
            bar.update()
            if (state.step % every == 0 or state.step == steps) and main:
                per_layer = kl.detach().tolist()
                loss = float(data_term.detach()) + sum(per_layer) / model.decomp.numel
                speed = (state.step - last[0]) * len(x) * world / (clock() - last[1])
                last = (state.step, clock())
                record(
                    {
                        "step": state.step,
                        "loss": loss,
                        "data": float(data_term.detach()),
                        "kl": per_layer,
                        "residual": band_residuals(model, result.reconstruction.detach() - x),
                        "grad_norm": norm,
                        "learning_rate": rate,
                        "signals_per_second": speed,
                        "skipped": state.skipped,
                    }
                )
                bar.set_postfix(loss=f"{loss:.3f}", kl=f"{sum(per_layer) / model.decomp.numel:.3f}")
                if heldout is not None and (state.step % (10 * every) == 0 or state.step == steps):
                    held = evaluate(average, heldout, batch_size=batch_size, seed=seed)
                    record({"step": state.step, **{f"heldout_{k}": v for k, v in held.items()}})
            if time.monotonic() - saved > checkpoint_every:
                state.seconds = clock() - begin
                save()
                saved = time.monotonic()
        save()
    # Mixed precision had wrapped the model's own forward.
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    if ema and state.step:
        model.load_state_dict(average.state_dict())
    model.eval()
    report.steps, report.seconds = state.step, state.seconds
    return report


def _agreed(accelerator: "Accelerator", seconds: float, stop: bool) -> tuple[float, bool]:
    """The main process's clock and whether any wants to stop: one that stopped alone would leave the others waiting."""
    if accelerator.num_processes == 1:
        return seconds, stop
    said = torch.tensor([seconds * accelerator.is_main_process, stop], dtype=torch.float64, device=accelerator.device)
    seconds, stops = cast(Tensor, accelerator.reduce(said, "sum")).tolist()
    return seconds, stops > 0


def _rate(done: float, warmup: float) -> float:
    """Share of the peak learning rate at this share of the run."""
    return min(1.0, done / warmup if warmup else 1.0) * 0.5 * (1 + math.cos(math.pi * done))


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


def _check_options(given: Mapping[str, Any]) -> None:
    """Check the arguments of :func:`fit`, before anything changes, as far as it goes without the data."""
    model, heldout, settings = given["model"], given["heldout"], given["settings"]
    check_instance("model", model, HVAE)
    if given["steps"] is None and given["time_budget"] is None:
        raise ValueError("fit needs steps or time_budget")
    given = {name: value for name, value in given.items() if value is not None or name not in _MAY_BE_NONE}
    for name, least in _INTEGERS.items():
        if name in given:
            check_integer(name, given[name], least)
    for name, allowed in _NUMBERS.items():
        if name in given:
            check_number(name, given[name], allowed)
    for name, form in _CALLABLES.items():
        if name in given:
            check_callable(name, given[name], form)
    check_seed("seed", given["seed"])
    check_flag("progress", given["progress"])
    _check_paths(given.get("checkpoint"), given.get("log"))
    if settings is not None:
        check_instance("settings", settings, Mapping)
        plain("settings", dict(settings))
        if own := sorted(_OWN_SETTINGS & set(settings)):
            raise ValueError(f"settings must not hold {own}, which a checkpoint holds anyway")
    if heldout is not None:
        check_finite("heldout", model.decomp.check_signal(heldout, "heldout"))
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("model must have parameters to train, got none that requires a gradient")
    if any(p.is_inference() for p in trained):
        raise ValueError("model must be built outside torch.inference_mode to be trained")


def _check_paths(checkpoint: object, log: object) -> None:
    for name, path in {"checkpoint": checkpoint, "log": log}.items():
        if path is not None and not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"{name} must be a path, got {path!r}")
    if checkpoint is not None and Path(cast(str, checkpoint)).is_file():
        raise ValueError(f"checkpoint must be a folder, got the file {checkpoint}")
    if log is not None and Path(cast(str, log)).is_dir():
        raise ValueError(f"log must be a file, got the folder {log}")
