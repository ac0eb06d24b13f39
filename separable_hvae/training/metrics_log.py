"""What a training run says while it runs: records, a file of them, a callback and a progress bar."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from separable_hvae._validation import shown
from separable_hvae.serialization import atomic
from separable_hvae.training.evaluation import evaluate
from separable_hvae.training.optimization import StepOutput, Trainer
from separable_hvae.training.options import TrainingOptions


class JsonlLog:
    """Append records to a file.

    A run that goes on from a checkpoint repeats the steps since then, so their records, and a line that
    was cut off, are taken out of the file first.

    Args:
        path: The file; it and its folder are made if they are missing.
        step: The step that the run goes on from; ``None`` for a new run, which appends to whatever is there.

    Raises:
        ValueError: If the file of a run that goes on holds anything but records.
    """

    def __init__(self, path: Path, step: int | None) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if step is not None and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and self._step(line) <= step]
            if kept != lines:
                atomic.write({path: "".join(kept).encode()})

    def _step(self, line: str) -> int:
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is no log of a training run: {error!r} in {line[:60]!r}") from error

    def write(self, record: dict[str, Any]) -> None:
        """Append one record, which names its ``step``; JSON has no NaN and no infinity, and gets ``null``."""
        line = json.dumps(_finite(record), allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TrainingLog:
    """Keep the records of a run, on its main process.

    Args:
        options: Of the run.
        trainer: What runs.
        log: File of the records.
        bar: Progress bar, as tqdm makes them.

    Attributes:
        records: One dictionary for each logged step, with the held-out evaluation where there was one.
        enough: Whether the callback has asked the run to end.
    """

    def __init__(self, options: TrainingOptions, trainer: Trainer, log: JsonlLog | None, bar: Any) -> None:
        self.options, self.trainer, self.log, self.bar = options, trainer, log, bar
        self.records: list[dict[str, Any]] = []
        self.enough = False
        self._last = (trainer.state.step, options.clock())

    def note(self, done: StepOutput) -> None:
        """Say what there is to say after a step.

        Raises:
            TypeError: If the callback returns anything but a flag or ``None``.
        """
        options, step = self.options, self.trainer.state.step
        self.bar.update()
        evaluates = options.heldout is not None and options.is_due(step, options.heldout_interval)
        if not self.trainer.accelerator.is_main_process or not (evaluates or options.is_due(step, options.every)):
            return
        speed, skipped = self._signals_per_second(len(done.x)), self.trainer.state.skipped
        entry = done.record(self.trainer.model)
        record = {"step": step, **entry, "signals_per_second": speed, "skipped": skipped}
        kl = {"kl": f"{entry['loss'] - entry['data']:.3f}"} if "data" in entry else {}
        self.bar.set_postfix(loss=f"{entry['loss']:.3f}", **kl)
        if evaluates:
            assert options.heldout is not None
            held = evaluate(self.trainer.average, options.heldout, batch_size=options.batch_size, seed=options.seed)
            record |= {f"heldout_{k}": v for k, v in held.items()}
        self._write(record)

    def _signals_per_second(self, batch: int) -> float:
        (before, then), now = self._last, (self.trainer.state.step, self.options.clock())
        self._last = now
        signals = (now[0] - before) * batch * int(self.trainer.accelerator.num_processes)
        return signals / (now[1] - then) if now[1] > then else 0.0  # A coarse clock may stand still.

    def _write(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if self.log is not None:
            self.log.write(record)
        if self.options.callback is not None:
            answer = self.options.callback(record, self.trainer.average)
            if answer is not None and not isinstance(answer, (bool, np.bool_)):
                raise TypeError(f"callback must return True to end the run, False or None, got {shown(answer)}")
            self.enough |= bool(answer)
