"""What a release says of itself in several places agrees."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from separable_hvae import __version__

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    loaded: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return loaded


def test_the_version_comes_from_one_place(project: dict[str, Any]) -> None:
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "separable_hvae/_version.py"
    cited = re.search(r"(?m)^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited is not None
    assert cited[1] == __version__
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_badges_tell_the_truth(project: dict[str, Any]) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    badges = dict(re.findall(r"!\[(\w+): ([^\]]+)\]\(docs/images/badges/\w+\.svg\)", readme))
    assert badges["python"] == project["project"]["requires-python"].replace(">=", "≥ ")
    assert badges["licence"] == project["project"]["license"]
    assert "MIT License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert badges["types"] == "strict"
    assert project["tool"]["mypy"]["strict"] is True
    assert (ROOT / "separable_hvae" / "py.typed").exists()
    for name, says in badges.items():
        picture = (ROOT / "docs" / "images" / "badges" / f"{name}.svg").read_text(encoding="utf-8")
        assert f"<title>{name}: {says}</title>" in picture


def test_classifiers_name_what_is_supported(project: dict[str, Any]) -> None:
    classifiers = project["project"]["classifiers"]
    lowest = tuple(map(int, project["project"]["requires-python"].removeprefix(">=").split(".")))
    named = [tuple(map(int, c.rpartition(" ")[2].split("."))) for c in classifiers if re.search(r":: 3\.\d+$", c)]
    assert min(named) == lowest
    assert named == sorted(named)


def test_every_documentation_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert set(re.findall(r"[\w/]+\.md", navigation)) == pages
