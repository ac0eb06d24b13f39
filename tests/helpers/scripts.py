"""The examples' modules, which are no package: scripts find each other in their own folder."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def script(name: str, folder: str = "") -> Any:
    """A module of ``examples/``, or of a folder in it."""
    if (path := str(EXAMPLES / folder)) not in sys.path:
        sys.path.append(path)
    return importlib.import_module(name)


def call(monkeypatch: pytest.MonkeyPatch, module: Any, *arguments: object) -> None:
    """Run a script with these arguments."""
    monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, arguments)])
    module.main()
