"""What scripts print, on consoles of other encodings and on none, and the JSON that they write."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.scripts import EXAMPLES, script

console = script("console")
SCRIPTS = [path for path in sorted(EXAMPLES.rglob("*.py")) if "def main()" in path.read_text(encoding="utf-8")]


def test_prints_replace_what_the_encoding_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    parser = console.arguments("σ – ½")
    parser.print_help()
    sys.stdout.write("−ELBO, Gauss–Newton, \udce9\n")
    sys.stdout.flush()
    assert b"? ? ?" in written.getvalue()
    assert written.getvalue().splitlines()[-1] == b"?ELBO, Gauss?Newton, ?"


def test_there_may_be_no_console(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert console.arguments(None).parse_args([]) is not None


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.relative_to(EXAMPLES).as_posix())
def test_every_script_sees_to_its_console(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert "arguments(__doc__)" in source
    assert "ArgumentParser(" not in source
    # One rule for paths: the scripts of sub-folders put examples/ behind their own folder.
    line = "sys.path.insert(1, str(Path(__file__).resolve().parents[1]))"
    assert source.count("sys.path") == source.count(line) == (path.parent != EXAMPLES)


def test_a_script_in_ascii() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(
        [sys.executable, EXAMPLES / "inverse" / "run.py", "--help"], env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b'"denoise, ? = 1' in done.stdout


def test_json_has_no_nan(tmp_path: Path) -> None:
    value = {"a": math.nan, "b": [1.5, math.inf, {"c": (-math.inf, "σ")}], "d": 3, "e": True, "f": tmp_path}
    console.write_json(tmp_path / "a.json", value)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert found == {"a": None, "b": [1.5, None, {"c": [None, "σ"]}], "d": 3, "e": True, "f": str(tmp_path)}
    again = console.read_json(tmp_path / "a.json")
    assert math.isnan(again["a"])
    assert math.isnan(again["b"][1])
    assert again["d"] == 3
