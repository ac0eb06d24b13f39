r"""The training loop: minimise −ELBO per data dimension, in nats.

Everything random is a function of (seed, step): which samples form batch k and which noise it gets. A
run that stops and resumes therefore goes on exactly as if it had never stopped, with no random state
to save. Schedules are functions of progress, the share of the steps or of the time budget that is spent.
"""

import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from typing_extensions import override

from separable_hvae._validation import check_instance
from separable_hvae.model.batches import Batch, split_pair
from separable_hvae.model.hvae import HVAE
from separable_hvae.model.standardization import AT_MOST, moments_of, warn_of_other_units
from separable_hvae.training.batches import batches_of
from separable_hvae.training.evaluation import require_condition
from separable_hvae.training.graceful_stop import GracefulStop
from separable_hvae.training.metrics_log import JsonlLog, TrainingLog
from separable_hvae.training.optimization import Trainer
from separable_hvae.training.options import Augment, Data, TrainingOptions, takes_options

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Augment", "FitReport", "fit"]

_JUDGED_BY = 256
"""Signals whose units are compared with the calibration."""


@dataclass(repr=False)
class FitReport:
    """What :func:`fit` did; printed, a few lines of it.

    Attributes:
        records: Of this call alone, one dictionary for each logged step: ``step``, ``loss`` and ``data`` in
            nats/dim, ``kl`` per layer in nats, ``residual``, the root mean square error of each band in the
            data's units, ``grad_norm``, ``learning_rate``, ``signals_per_second``, ``skipped``, and where there was
            a held-out evaluation what :func:`evaluate` gives, prefixed ``heldout_``. A loss of one's own has no
            ``data``, ``kl`` and ``residual``.
        steps: Steps done in all, earlier runs included.
        seconds: Time spent in all, earlier runs included.
        interrupted: Whether Ctrl-C or SIGTERM ended the run.

    >>> from separable_hvae import FitReport
    >>> FitReport([{"step": 100, "loss": 1.5}, {"step": 200, "loss": 0.5, "heldout_loss": 0.75}], 200, 9.5)
    FitReport: 200 steps in 9.5 s, 2 records
      step 100: loss 1.500 nats/dim
      step 200: loss 0.500 nats/dim, held out 0.750
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    interrupted: bool = False

    @override
    def __repr__(self) -> str:
        end = ", interrupted" if self.interrupted else ""
        lines = [f"FitReport: {self.steps} steps in {self.seconds:.1f} s, {len(self.records)} records{end}"]
        for record in self.records[:1] + self.records[1:][-1:]:
            held = f", held out {record['heldout_loss']:.3f}" if "heldout_loss" in record else ""
            lines.append(f"  step {record['step']}: loss {record['loss']:.3f} nats/dim{held}")
        return "\n".join(lines)


@takes_options(TrainingOptions)
@torch.inference_mode(False)
@torch.enable_grad()
def fit(model: HVAE, data: Data, options: TrainingOptions) -> FitReport:
    """Train a model; afterwards it holds the averaged (EMA) weights.

    Works under ``no_grad`` and ``inference_mode`` too.

    >>> import torch
    >>> from separable_hvae import HVAE, FFT1Real, fit
    >>> model = HVAE(FFT1Real(8, scales=[2, 8]), layers=4, width=8, bottleneck=4, blocks=0, sigma=1.0)
    >>> report = fit(model, torch.randn(64, 1, 8), steps=2, batch_size=16, every=1, progress=False)
    >>> [record["step"] for record in report.records], report.interrupted
    ([1, 2], False)

    Args:
        model: The model, changed in place. It is trained on the accelerator's device, a GPU where there is one,
            and afterwards where it was before. Its bands are calibrated on the data, if they have not been;
            otherwise data in other units, by a factor of ten, draw a warning.
        data: Signals ``(N, C, *size)``, alone or in a tuple ``(signals, condition)``, copied to the device as a whole;
            a map-style data set of signals, or of pairs ``(signal, condition)``, whose own random transforms a
            resumed run does not repeat; or an iterable of batches (or pairs), such as a ``DataLoader`` or a
            generator, see below. A condition is a tensor, or any nesting of tensors.
        options: Each by its name, see :class:`TrainingOptions`.

    A resumed run is exact: weights, batches, noise and what ``augment`` draws from its generator are those of
    a run that never stopped. What a data set draws of its own accord, in random transforms, is not: its signals
    come in the same order, transformed anew. Its checkpoint then knows the number of its signals, but not
    whether they are the same. Transforms that should repeat belong into ``augment``.

    An iterable of batches is taken as it comes. Bands are calibrated on its first batches, 16 at most, which are
    trained on, too. What can be iterated again begins a new pass where one ends; a generator that ends, ends the
    run, with a warning. A resumed run begins a new pass, and so may see again what it had seen of the one it was
    in, one pass at most; noise and weights go on exactly. Several processes take turns: each reads all batches,
    and trains on its share.

    A resumed run must have the model, the data, ``batch_size``, ``seed``, ``settings``, ``loss``, the class of the
    ``optimizer`` and the number of processes of its checkpoint; functions are compared by name. Other numbers for
    learning rate, weight decay, warm-ups, ``ema``, ``clip`` and ``skip``, of the optimizer's own options and another
    ``schedule`` hold from there on, with a warning. ``steps`` and ``time_budget`` may grow, which prolongs a run,
    finished ones too: schedules follow the share of the new length, so that a run of 100 steps that goes on to
    200 takes up half its peak learning rate again, and falls to zero from there. All else is free, and not
    compared: what ``augment`` does is for ``settings`` to say.

    Returns:
        The report. Ctrl-C and SIGTERM, sent to this process or to its group, end the run after the step at hand: a
        checkpoint is written, and the model holds what was learnt.

    Whatever is raised once the run has begun (a second Ctrl-C too) leaves a model that can be used: in eval
    mode, without gradients or casts of mixed precision, with the averaged weights of the steps done so far,
    or as it was before the first of them. The checkpoint stays as it was last written.

    Raises:
        ImportError: If the extra ``train`` is not installed.
        TypeError: If an argument has the wrong type, the data's dtype does not fit the model, they give conditions
            to a model that takes none, or a function that was given returns something else than it should.
        ValueError: If an option is out of range, the data are empty or not finite, the model is of half
            precision or nothing of it can be trained, or the checkpoint belongs to another model, data or
            setting, or to a run that trained other parameters of the model.
        OSError: If a record or checkpoint cannot be written; what was written before stays.
        FloatingPointError: If the loss stays non-finite.
    """
    options.check_model(model)
    try:
        with warnings.catch_warnings():
            # Of a notebook without widgets: the bar is one of text then.
            warnings.filterwarnings("ignore", message="IProgress not found")
            import tqdm.auto  # noqa: F401

            accelerator = _accelerator(options.accelerator)
    except ImportError as error:
        raise ImportError('fit needs the extra "train": pip install "separable-hvae[train]"') from error
    home = model.device
    try:
        return _train(model.to(accelerator.device), data, options, accelerator)
    finally:
        model.to(home)


def _train(model: HVAE, data: Data, options: TrainingOptions, accelerator: "Accelerator") -> FitReport:
    from tqdm.auto import tqdm

    main, rank, world = accelerator.is_main_process, accelerator.process_index, accelerator.num_processes
    batches = batches_of(model, data, options.batch_size, options.seed, options.workers, rank, world)
    file = options.file
    resumed = file is not None and file.exists()

    def accepted(batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if options.loss is None:
                require_condition(model, split_pair(batch)[1], "data")
            yield batch

    if not resumed:
        if model.is_calibrated:
            few = moments_of(accepted(batches.first(_JUDGED_BY)), model.decomp, model.device)
            warn_of_other_units(model.standardization, few[-1])
        else:
            model.calibrate(accepted(batches.first(AT_MOST)))
    trainer = Trainer(model, options, accelerator, batches.fingerprint)
    state = trainer.state
    if file is not None and resumed:
        state.load(file)
    log = None if options.log is None or not main else JsonlLog(Path(options.log), state.step if resumed else None)
    silent = not (options.progress and main) or sys.stderr is None

    def save() -> None:
        if file is not None and main:
            state.save(file)

    with (
        trainer.prepared(),
        GracefulStop() as interruption,
        tqdm(total=options.steps, initial=state.step, disable=silent, unit="step", dynamic_ncols=True) as bar,
    ):
        if not resumed:
            save()
        records, interrupted = TrainingLog(options, trainer, log, bar), False
        began, saved = options.clock() - state.seconds, time.monotonic()
        stream = accepted(batches.start_at(state.step))
        while True:
            state.seconds, stop, enough = _agreed(
                accelerator, options.clock() - began, interruption.requested, records.enough
            )
            done = options.done(state.step, state.seconds)
            if done >= 1 or stop or enough:
                interrupted = done < 1 and not enough
                break
            try:
                batch = next(stream, None)
            except Exception:
                if not interruption.requested or world > 1:
                    raise
                continue  # Whatever loads the data has been stopped by the same signal.
            if batches.may_end and _agreed(accelerator, 0.0, batch is None, False)[1]:
                warnings.warn(
                    f"data ended after step {state.step}, before the run did: give what can be iterated again, such "
                    "as a DataLoader, or a generator without end",
                    stacklevel=6,
                )
                break
            assert batch is not None
            records.note(trainer.step(batch, done))
            if time.monotonic() - saved > options.checkpoint_every:
                state.seconds = options.clock() - began
                save()
                saved = time.monotonic()
        save()
    return FitReport(records.records, state.step, state.seconds, interrupted)


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
