"""The Python of the documentation, as tests run it and as its pictures are drawn.

    python -m tests.helpers.pages docs/tutorials/first.md --out docs/images/first

runs a page from top to bottom and puts the pictures that it draws into the folder ``--out``.
"""

import argparse
import contextlib
import importlib.util
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIALS = [page for page in PAGES if page.parent.name == "tutorials"]


def blocks(page: Path) -> list[tuple[int, str]]:
    """Each Python block of a page with the number of lines before it.

    A comment ``<!-- needs: package -->`` on the line before one leaves it out where the package is not there.
    """
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"(?ms)^(?:<!-- needs: (\w+) -->\n)?```python\n(.*?)^```$", text)
    return [(text.count("\n", 0, m.start(2)), m[2]) for m in found if not m[1] or importlib.util.find_spec(m[1])]


def program(page: Path) -> str:
    """All Python blocks of a page as one program, each on the lines where the page has it."""
    lines: list[str] = []
    for before, source in blocks(page):
        lines += [""] * (before - len(lines)) + source.splitlines()
    return "\n".join(lines) + "\n"


def run(page: Path, source: str) -> dict[str, Any]:
    """Run a program in the current folder; a traceback points into its page."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, str(page), "exec"), namespace)
    return namespace


def main() -> None:
    """Run the page named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    page, out = args.page.resolve(), args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        run(page, program(page))
        for picture in Path(folder).glob("*.png"):
            shutil.copy(picture, out)


if __name__ == "__main__":
    main()
