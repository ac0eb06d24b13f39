"""The examples' modules, which are no package: scripts find each other in their own folder."""

import importlib
import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def script(name: str) -> Any:
    """A module of ``examples/``."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return importlib.import_module(name)
