r"""The training loop: minimise −ELBO per data dimension, in nats.

Everything random is a function of (seed, step): which samples form batch k and which noise it gets. A
run that stops and resumes therefore goes on exactly as if it had never stopped, with no random state
to save. Schedules are functions of progress, the share of the steps or of the time budget that is spent.
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from separable_hvae._validation import check_instance
from separable_hvae.model.hvae import HVAE
from separable_hvae.model.standardization import moments_of, warn_of_other_units
from separable_hvae.training.batches import Batches
from separable_hvae.training.graceful_stop import GracefulStop
from separable_hvae.training.metrics_log import JsonlLog, TrainingLog
from separable_hvae.training.optimization import Trainer
from separable_hvae.training.options import Augment, TrainingOptions

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Augment", "FitReport", "fit"]

_CALIBRATED_ON = 4096
"""Signals that the bands' means and deviations are taken of."""
_JUDGED_BY = 256
"""Signals whose units are compared with the calibration."""


@dataclass
class FitReport:
    """What :func:`fit` did.

    Attributes:
        records: Of this call alone, one dictionary for each logged step (``step``, ``loss`` and ``data`` in
            nats/dim, ``kl`` per layer in nats, ``residual``, the root mean square error of each band in the
            data's units, ``grad_norm``, ``learning_rate``, ``signals_per_second``, ``skipped``) or held-out
            evaluation (``step`` and what :func:`evaluate` gives, prefixed ``heldout_``).
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
    heldout: Tensor | Iterable[Tensor] | None = None,
    every: int = 100,
    augment: Augment | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 60.0,
    log: str | os.PathLike[str] | None = None,
    callback: Callable[[dict[str, Any], HVAE], bool | None] | None = None,
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
        model: The model, changed in place. It is trained on the accelerator's device, a GPU where there is one,
            and afterwards where it was before. Its bands are calibrated on the data, if they have not been;
            otherwise data in other units, by a factor of ten, draw a warning.
        data: Signals ``(N, C, *size)``, copied to the device as a whole, or a map-style dataset of signals, whose
            own random transforms a resumed run does not repeat, see below.
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
        heldout: Signals to evaluate on, with the averaged weights: a tensor, or batches such as those of a
            ``DataLoader``, which are read once before the first step, to check them.
        every: Steps between log records; held-out signals are measured a tenth as often. Both come after the
            last of ``steps``, too.
        augment: Maps a batch and a generator to a batch, on the device.
        checkpoint: Folder for the checkpoint, written before the first step, now and then, and at the end.
            If it holds one, the run resumes from it; several machines need a folder that all of them see.
        checkpoint_every: Seconds between checkpoints.
        log: File that gets each record as a line of JSON.
        callback: Called with each record and the averaged model, on the main process. The run ends where it
            returns true.
        settings: Further settings that a checkpoint must agree with, such as what ``augment`` does.
        seed: Seed of batches and noise.
        workers: Processes that load a dataset.
        progress: Whether to show a progress bar.
        accelerator: An ``accelerate.Accelerator`` for mixed precision or several processes. ``None`` makes one,
            and so settles the precision of every later one in this process, as accelerate has it: for bf16
            make yours before the first ``fit``, and pass it on to each.
        clock: Clock of ``time_budget``.

    A resumed run is exact: weights, batches, noise and what ``augment`` draws from its generator are those of
    a run that never stopped. What a dataset draws of its own accord, in random transforms, is not: its signals
    come in the same order, transformed anew. Its checkpoint then knows the number of its signals, but not
    whether they are the same. Transforms that should repeat belong into ``augment``.

    A resumed run must have the model, the data, ``batch_size``, ``seed``, ``settings`` and the number of
    processes of its checkpoint. Other numbers for learning rate, weight decay, warm-ups, ``ema``, ``clip`` and
    ``skip`` hold from there on, with a warning. ``steps`` and ``time_budget`` may grow, which prolongs a run,
    finished ones too: schedules follow the share of the new length, so that a run of 100 steps that goes on to
    200 takes up half its peak learning rate again, and falls to zero from there. All else is free, and not
    compared: what ``augment`` does is for ``settings`` to say.

    Returns:
        The report. Ctrl-C and SIGTERM end the run after the step at hand: a checkpoint is written, and the
        model holds what was learnt.

    Whatever is raised once the run has begun (a second Ctrl-C too) leaves a model that can be used: in eval
    mode, without gradients or casts of mixed precision, with the averaged weights of the steps done so far,
    or as it was before the first of them. The checkpoint stays as it was last written.

    Raises:
        ImportError: If the extra ``train`` is not installed.
        TypeError: If an argument has the wrong type, or the data's dtype does not fit the model.
        ValueError: If an option is out of range, the data are empty or not finite, the model is of half
            precision or nothing of it can be trained, or the checkpoint belongs to another model, data or
            setting, or to a run that trained other parameters of the model.
        OSError: If a record or checkpoint cannot be written; what was written before stays.
        FloatingPointError: If the loss stays non-finite.
    """
    given = dict(locals())
    model, data, accelerator = (given.pop(name) for name in ("model", "data", "accelerator"))
    options = TrainingOptions(**given)
    options.check_model(model)
    try:
        import tqdm.auto  # noqa: F401

        accelerator = _accelerator(accelerator)
    except ImportError as error:
        raise ImportError('fit needs the extra "train": pip install "separable-hvae[train]"') from error
    home = model.device
    try:
        return _train(model.to(accelerator.device), data, options, accelerator)
    finally:
        model.to(home)


def _train(
    model: HVAE, data: "Tensor | Dataset[Tensor]", options: TrainingOptions, accelerator: "Accelerator"
) -> FitReport:
    from tqdm.auto import tqdm

    main, rank, world = accelerator.is_main_process, accelerator.process_index, accelerator.num_processes
    batches = Batches(model, data, options.batch_size, options.seed, options.workers, rank, world)
    file = options.file
    resumed = file is not None and file.exists()
    if not resumed:
        if model.is_calibrated:
            few = moments_of(batches.first(_JUDGED_BY), model.decomp, model.device)
            warn_of_other_units(model.standardization, few[-1])
        else:
            model.calibrate(batches.first(_CALIBRATED_ON))
    learner = Trainer(model, options, accelerator, batches.fingerprint)
    state = learner.state
    if file is not None and resumed:
        state.load(file)
    log = options.log
    records = JsonlLog(Path(log), state.step if resumed else None) if log is not None and main else None
    shown = options.progress and main

    def save() -> None:
        if file is not None and main:
            state.save(file)

    with (
        learner.learning(),
        GracefulStop() as interruption,
        tqdm(total=options.steps, initial=state.step, disable=not shown, unit="step", dynamic_ncols=True) as bar,
    ):
        if not resumed:
            save()
        journal, interrupted = TrainingLog(options, learner, records, bar), False
        began, saved = options.clock() - state.seconds, time.monotonic()
        for batch in batches.start_at(state.step):
            state.seconds, stop, enough = _agreed(
                accelerator, options.clock() - began, interruption.requested, journal.enough
            )
            done = options.done(state.step, state.seconds)
            if done >= 1 or stop or enough:
                interrupted = done < 1 and not enough
                break
            journal.note(learner.step(batch, done))
            if time.monotonic() - saved > options.checkpoint_every:
                state.seconds = options.clock() - began
                save()
                saved = time.monotonic()
        save()
    return FitReport(journal.records, state.step, state.seconds, interrupted)


def _accelerator(given: object) -> "Accelerator":
    """The accelerator given, if it is one that training can use, or a new one."""
    from accelerate import Accelerator

    if given is None:
        return Accelerator()
    check_instance("accelerator", given, Accelerator)
    accelerator = cast(Accelerator, given)
    if accelerator.scaler is not None or accelerator.gradient_accumulation_steps > 1:
        raise ValueError(
            "accelerator must have mixed_precision 'no' or 'bf16' and gradient_accumulation_steps 1, got "
            f"{accelerator.mixed_precision!r} and {accelerator.gradient_accumulation_steps}"
        )
    return accelerator


def _agreed(accelerator: "Accelerator", seconds: float, stop: bool, enough: bool) -> tuple[float, bool, bool]:
    """The main process's clock and whether any wants to stop: one that stopped alone would leave the others waiting."""
    if accelerator.num_processes == 1:
        return seconds, stop, enough
    said = [seconds * accelerator.is_main_process, stop, enough]
    heard = accelerator.reduce(torch.tensor(said, dtype=torch.float64, device=accelerator.device), "sum")
    seconds, stops, enoughs = cast(Tensor, heard).tolist()
    return seconds, stops > 0, enoughs > 0
