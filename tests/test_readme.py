"""What the READMEs say of the tree and of files is true."""

import re
from pathlib import Path

import pytest

from pipeline.config_sections import SECTIONS
from pipeline.presets import PRESETS

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "ddpm/README.md", "ddpm/measurements.md", "pipeline/README.md", "CONTRIBUTING.md"]


def test_the_tree_is_true() -> None:
    readme = (ROOT / "README.md").read_text()
    tree = readme.split("## The tree")[1].split("```")[1]
    named = set(re.findall(r"[\w]+\.py", tree))
    there = {path.name for room in ("ddpm", "pipeline", "jobs") for path in (ROOT / room).rglob("*.py")} - {
        "__init__.py"
    }
    assert there - named == set(), "modules that the README does not name"
    assert named - there - {"__init__.py"} == set(), "modules that the README names and that are not there"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text().split("## The tree")[0]
    named = re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|png|md))`", text)
    places = [ROOT, ROOT / "ddpm", ROOT / "pipeline", *(ROOT / "ddpm").iterdir(), *(ROOT / "pipeline").iterdir()]
    missing = [name for name in named if not any((place / name).exists() for place in places)]
    # What jobs write, and what a reader may name a file.
    assert set(missing) <= {"contact_sheet.png", "completions.png", "samplers.png", "models.png", "ema_sweep.png"}


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_a_page_names_exist(page: str) -> None:
    named = re.findall(r"tests/[\w/.]+", (ROOT / page).read_text())
    assert [name for name in named if not (ROOT / name.rstrip(".")).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_functions_that_a_page_finds_in_a_file_are_there(page: str) -> None:
    found = re.findall(
        r"`([\w.]+)`(?: and `([\w.]+)`)? (?:in|\()\s?`((?:[\w-]+/)*[\w-]+\.py)`", (ROOT / page).read_text()
    )
    places = [ROOT, ROOT / "ddpm", ROOT / "pipeline"]
    for *names, file in found:
        source = next((place / file).read_text() for place in places if (place / file).exists())
        for name in filter(None, names):
            assert re.search(rf"(def|class) {name.rpartition('.')[2]}\b|\b{name.rpartition('.')[2]}:", source), (
                name,
                file,
            )


def test_the_sections_that_the_readme_lists_are_all() -> None:
    listed = re.search(r"The\s+sections are ([\w\s,]+);", (ROOT / "README.md").read_text())
    assert listed is not None
    assert tuple(re.findall(r"\w+", listed[1].replace(" and ", " "))) == SECTIONS


def test_the_most_workers_that_the_readme_grants_a_preset() -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    assert "`data.lanes`: 8 for `cifar10` and `celebahq256`, 32 for the two of ImageNet." in text
    lanes = {name: make().train.data.lanes for name, make in PRESETS.items() if not name.startswith("digits")}
    assert lanes == {"cifar10": 8, "celebahq256": 8, "imagenet64": 32, "imagenet64_dit": 32}
