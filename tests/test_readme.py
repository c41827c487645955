"""The README's tree names every module, and nothing that is not there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_tree_is_true() -> None:
    readme = (ROOT / "README.md").read_text()
    tree = readme.split("## The tree")[1].split("```")[1]
    named = set(re.findall(r"[\w]+\.py", tree))
    there = {path.name for room in ("ddpm", "pipeline", "jobs") for path in (ROOT / room).rglob("*.py")} - {
        "__init__.py"
    }
    assert there - named == set(), "modules that the README does not name"
    assert named - there - {"__init__.py"} == set(), "modules that the README names and that are not there"


def test_the_files_to_read_first_exist() -> None:
    reading = (ROOT / "README.md").read_text().split("Six files to read first")[1].split("## ")[0]
    paths = re.findall(r"`([\w/]+\.py)`", reading)
    assert len(paths) == 6 and all((ROOT / path).exists() for path in paths)
