"""What a training run says while it runs: records, a log, a callback and a progress bar."""

from typing import Any

from separable_hvae.evaluation import evaluate
from separable_hvae.learner import Learner, Step
from separable_hvae.options import Options
from separable_hvae.records import Records


class Journal:
    """Keep the records of a run, on its main process.

    Args:
        options: Of the run.
        learner: What runs.
        log: File of the records.
        bar: Progress bar, as tqdm makes them.

    Attributes:
        records: One dictionary for each logged step or held-out evaluation.
        enough: Whether the callback has asked the run to end.
    """

    def __init__(self, options: Options, learner: Learner, log: Records | None, bar: Any) -> None:
        self.options, self.learner, self.log, self.bar = options, learner, log, bar
        self.records: list[dict[str, Any]] = []
        self.enough = False
        self._last = (learner.state.step, options.clock())

    def note(self, done: Step) -> None:
        """Say what there is to say after a step."""
        options, step = self.options, self.learner.state.step
        self.bar.update()
        if not self.learner.accelerator.is_main_process or not options.is_due(step, options.every):
            return
        speed, skipped = self._signals_per_second(len(done.x)), self.learner.state.skipped
        entry = done.record(self.learner.model)
        self._write({"step": step, **entry, "signals_per_second": speed, "skipped": skipped})
        self.bar.set_postfix(loss=f"{entry['loss']:.3f}", kl=f"{entry['loss'] - entry['data']:.3f}")
        if options.heldout is not None and options.is_due(step, 10 * options.every):
            held = evaluate(self.learner.average, options.heldout, batch_size=options.batch_size, seed=options.seed)
            self._write({"step": step, **{f"heldout_{k}": v for k, v in held.items()}})

    def _signals_per_second(self, batch: int) -> float:
        (before, then), now = self._last, (self.learner.state.step, self.options.clock())
        self._last = now
        signals = (now[0] - before) * batch * int(self.learner.accelerator.num_processes)
        return signals / (now[1] - then) if now[1] > then else 0.0  # A coarse clock may stand still.

    def _write(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if self.log is not None:
            self.log.write(record)
        if self.options.callback is not None:
            self.enough |= bool(self.options.callback(record, self.learner.average))
