"""The Python examples of the README and of the documentation run as they are printed, and files named exist."""

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def examples() -> list[Any]:
    """Each example with the number of lines before it, so that a traceback points into its page."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"(?ms)^```python\n(.*?)^```$", text):
            before = text.count("\n", 0, match.start(1))
            found.append(pytest.param(page, before, match[1], id=f"{page.name}-line{before + 1}"))
    return found


def named_files() -> list[Any]:
    """Local files that a page links to, shows or runs."""
    found = []
    for page in PAGES:
        shown = re.sub(r"(?s)<!--.*?-->", "", page.read_text(encoding="utf-8"))
        names = {page.parent / name for name in re.findall(r"\]\((?!https?:)([^)#]+)\)", shown)}
        names |= {ROOT / name for name in re.findall(r"python ([\w/]+\.py)", shown)}
        found += [pytest.param(name, id=f"{page.name}-{name.name}") for name in sorted(names)]
    return found


@pytest.mark.parametrize(("page", "before", "source"), examples())
def test_example_runs(page: Path, before: int, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile("\n" * before + source, str(page), "exec"), namespace)


def test_there_are_examples() -> None:
    assert len(examples()) >= 4


@pytest.mark.parametrize("path", named_files())
def test_named_file_exists(path: Path) -> None:
    assert path.exists()
