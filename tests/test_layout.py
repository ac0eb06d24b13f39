"""The order of the packages: each imports only from those before it."""

import ast
from pathlib import Path

import pytest

import separable_hvae

ROOT = Path(separable_hvae.__file__).parent
LEVELS = [
    ["_version", "_contexts", "_validation"],
    ["_float32", "functional", "_figure"],
    ["distributions"],
    ["decompositions"],
    ["nn"],
    ["serialization"],
    ["model"],
    ["data_terms"],
    ["refine"],
    ["training"],
    ["plots", "deepinv"],
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py") if path.parent != ROOT or path.stem in LEVEL)


def imported(path: Path) -> set[str]:
    """What a module imports of the library: the first part of each name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("separable_hvae.")}
    return found


def test_every_entry_has_a_level() -> None:
    entries = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()} - {"__init__"}
    assert entries == set(LEVEL)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_come_from_earlier_packages(path: Path) -> None:
    own = path.parts[0].removesuffix(".py")
    for name in imported(path):
        allowed = name == own or LEVEL[name] < LEVEL[own]
        assert allowed, f"{path} imports {name}, which comes after {own}"
