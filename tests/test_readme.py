"""The README's Python examples run as they are printed, and the files that it names exist."""

import re
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).resolve().parents[1] / "README.md"
README = PATH.read_text(encoding="utf-8")
# Each example with the number of lines before it, so that a traceback points into README.md.
EXAMPLES = [(README.count("\n", 0, m.start(1)), m[1]) for m in re.finditer(r"(?ms)^```python\n(.*?)^```$", README)]
SHOWN = re.sub(r"(?s)<!--.*?-->", "", README)
FILES = set(re.findall(r"\]\((?!https?:)([^)#]+)\)", SHOWN)) | set(re.findall(r"python ([\w/]+\.py)", SHOWN))


@pytest.mark.parametrize(("before", "source"), EXAMPLES, ids=[f"line{before + 1}" for before, _ in EXAMPLES])
def test_example_runs(before: int, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile("\n" * before + source, str(PATH), "exec"), namespace)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 2


@pytest.mark.parametrize("name", sorted(FILES))
def test_named_file_exists(name: str) -> None:
    assert (PATH.parent / name).exists()
