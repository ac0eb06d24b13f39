"""Records of a run as lines of JSON, one file over interruptions."""

import json
from pathlib import Path
from typing import Any


class Records:
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
                partial = path.with_name(path.name + ".partial")
                partial.write_text("".join(kept), encoding="utf-8")
                partial.replace(path)

    def _step(self, line: str) -> int:
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is no log of a training run: {error!r} in {line[:60]!r}") from error

    def write(self, record: dict[str, Any]) -> None:
        """Append one record, which names its ``step``."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
