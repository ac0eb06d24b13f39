r"""The training loop: minimise −ELBO per data dimension, in nats.

Everything random is a function of (seed, step): which samples form batch k and which noise it gets. A
run that stops and resumes therefore goes on exactly as if it had never stopped, with no random state
to save. Schedules are functions of progress, the share of the steps or of the time budget that is spent.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

from separable_hvae.decomposition import pack
from separable_hvae.hvae import HVAE

if TYPE_CHECKING:
    from accelerate import Accelerator

_CHECKPOINT = "checkpoint.safetensors"
_ARMED_AFTER = 100  # Steps before gradient norms count as typical.
_MOST_SKIPS = 3  # Steps skipped in a row at most.
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
    batches = _Batches(model, data, batch_size, seed, workers, accelerator.process_index, accelerator.num_processes)
    if not int(model.calibrated):
        model.calibrate(batches.some(4096))
    if heldout is not None:
        _check_finite("heldout", model.decomp.check_signal(heldout, "heldout"))
    model.train()
    model.zero_grad()
    optimizer = torch.optim.AdamW(_decay_groups(model, weight_decay), lr=learning_rate)
    averaged = AveragedModel(model, multi_avg_fn=_ema_update(ema))
    state = _State(model, averaged, optimizer, settings={"seed": seed, "batch_size": batch_size, **batches.fingerprint})
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
            for group in optimizer.param_groups:
                group["lr"] = max(rate, 1e-3 * learning_rate)
            noise.manual_seed(_mix(seed, state.step, accelerator.process_index))
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
        mse_mean += float(_squares(model.encode(x).reconstruction, x))
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


def _check_finite(name: str, x: Tensor) -> None:
    if not bool(torch.isfinite(torch.view_as_real(x) if x.is_complex() else x).all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")


def _squares(a: Tensor, b: Tensor) -> Tensor:
    return (pack(a) - pack(b)).square().flatten(1).mean(1).sum()


class _Batches:
    """Batch k of a run, as a function of the seed and k alone."""

    def __init__(
        self,
        model: HVAE,
        data: "Tensor | Dataset[Tensor]",
        batch_size: int,
        seed: int,
        workers: int,
        rank: int,
        world: int,
    ) -> None:
        self.data, self.batch, self.seed, self.workers = data, batch_size, seed, workers
        self.rank, self.world, self.decomp = rank, world, model.decomp
        self.count = len(data)  # type: ignore[arg-type]
        if not self.count:
            raise ValueError("data must hold at least one signal")
        if isinstance(data, Tensor):
            self.data = model.decomp.check_signal(data, "data").to(model.start.device)
            _check_finite("data", self.data)
        probe = pack(self.some(min(64, self.count))).double().abs()
        self.fingerprint = {"count": self.count, "probe": float(f"{float(probe.sum()):.10g}")}

    def some(self, n: int) -> Tensor:
        """The first signals, at most ``n``."""
        if isinstance(self.data, Tensor):
            return self.data[:n]
        items = [self.data[i] for i in range(min(n, self.count))]
        for item in items:
            if not isinstance(item, Tensor):
                raise TypeError(f"data must be a dataset of tensors (C, *size), got an item of {type(item).__name__}")
        return self.decomp.check_signal(torch.stack(items), "data")

    def _indices(self, first: int) -> Iterator[list[int]]:
        stride = self.batch * self.world
        per_epoch = max(self.count // stride, 1)
        order, epoch = torch.empty(0), -1
        for k in range(first, 2**62):
            if k // per_epoch != epoch:
                epoch = k // per_epoch
                order = torch.randperm(
                    self.count, generator=torch.Generator().manual_seed(_mix(self.seed, epoch, 1 << 20))
                )
            begin = (k % per_epoch) * stride + self.rank * self.batch
            yield order[begin : begin + self.batch].tolist()

    def start_at(self, step: int) -> Iterator[Tensor]:
        if isinstance(self.data, Tensor):
            for index in self._indices(step):
                yield self.data[torch.tensor(index, device=self.data.device)]
        else:
            yield from DataLoader(
                self.data,
                batch_sampler=cast(Any, _Forward(self._indices(step))),
                num_workers=self.workers,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator().manual_seed(_mix(self.seed, step, 2 << 20)),
            )


@dataclass
class _Forward:
    indices: Iterator[list[int]]

    def __iter__(self) -> Iterator[list[int]]:
        return self.indices


class _State:
    """What a checkpoint holds: weights, their average, the optimizer's moments and counters."""

    def __init__(
        self, model: HVAE, averaged: AveragedModel, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
    ):
        self.model, self.averaged, self.optimizer, self.settings = model, averaged, optimizer, settings
        self.step, self.seconds = 0, 0.0
        self.norm, self.in_a_row, self.skipped = 0.0, 0, 0

    @property
    def typical_norm(self) -> float:
        """Running mean of gradient norms, infinite until there is one."""
        return self.norm or math.inf

    def judge(self, norm: float, skip: float) -> bool:
        """Whether to skip a step of this gradient norm; otherwise take the norm into account."""
        finite = math.isfinite(norm)
        wild = not finite or (self.step >= _ARMED_AFTER and norm > skip * self.typical_norm)
        if wild and self.in_a_row >= _MOST_SKIPS:
            if not finite:
                raise FloatingPointError(
                    f"the gradient was not finite {self.in_a_row + 1} times in a row, at step {self.step}"
                )
            wild = False
        self.in_a_row = self.in_a_row + 1 if wild else 0
        self.skipped += wild
        if finite:
            # A wild norm counts too, capped: where norms do grow for good, the threshold follows.
            typical = self.norm or norm
            self.norm += (min(norm, skip * typical) - self.norm) * (0.02 if self.norm else 1.0)
        return wild

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.averaged.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
        return {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}

    def save(self, path: Path) -> None:
        counters = {k: getattr(self, k) for k in ("step", "seconds", "norm", "in_a_row", "skipped")}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(
            self._tensors(), partial, metadata={"counters": json.dumps(counters), "settings": json.dumps(self.settings)}
        )
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)

    def load(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
            counters, settings = json.loads(metadata["counters"]), json.loads(metadata["settings"])
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no checkpoint of a training run: {error}") from error
        self._require_same_model(path, tensors)
        if settings != self.settings:
            changed = {k: (settings.get(k), v) for k, v in self.settings.items() if settings.get(k) != v}
            raise ValueError(f"{path} belongs to a run with other settings or data (there, here): {changed}")

        def part(name: str) -> dict[str, Tensor]:
            return {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}

        self.model.load_state_dict(part("model."))
        self.averaged.load_state_dict(part("average."))
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in part("optimizer.").items():
            i, name = key.split(".")
            state.setdefault(int(i), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        for name, value in counters.items():
            setattr(self, name, value)

    def _require_same_model(self, path: Path, tensors: dict[str, Tensor]) -> None:
        # Looked at before anything is loaded, so that a model stays as it was if it is refused.
        here = {f"model.{k}": tuple(v.shape) for k, v in self.model.state_dict().items()}
        there = {k: tuple(v.shape) for k, v in tensors.items() if k.startswith("model.")}
        differing = [k for k in here | there if here.get(k) != there.get(k)]
        if differing:
            k = differing[0]
            raise ValueError(
                f"{path} belongs to another model: {len(differing)} parameters or buffers differ, the first is "
                f"{k.removeprefix('model.')} with shape {there.get(k)} there and {here.get(k)} here"
            )


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


def _mix(*numbers: int) -> int:
    """One seed from several numbers, spread over 63 bits."""
    mixed = 0
    for n in numbers:
        mixed = ((mixed ^ n) * 6364136223846793005 + 1442695040888963407) % 2**64
    return mixed >> 1


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
