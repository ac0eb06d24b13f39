"""What every script does with its arguments, prints and results, on any console and in any encoding."""

import argparse
import io
import json
import math
import sys
from pathlib import Path
from typing import Any


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser that shows a script's docstring; from now on prints replace what the console's encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, with null for numbers that are not finite (JSON has no NaN), and the text of other objects."""
    path.write_text(json.dumps(_finite(value), indent=1, allow_nan=False, default=str) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """What :func:`write_json` wrote, with NaN for null."""
    return _numbers(json.loads(path.read_text(encoding="utf-8")))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return math.nan if value is None else value
