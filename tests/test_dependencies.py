"""Which versions may be installed: what the tests have run (requirements.lock), and releases that promise the same.

Every dependency has a floor and a ceiling. The floor is no older than the major version that the tests ran (before 1.0:
the minor one), and the ceiling is the next; where the code leans on what a library does not promise, it is nearer.
"""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [
    Requirement(text)
    for text in (
        *PROJECT["dependencies"],
        *(text for extra in PROJECT["optional-dependencies"].values() for text in extra),
    )
]
# Ingest leans on callbacks of Ray Data's executor, training on the order in which Ray Train restarts: the next minor
# release may change either. Torch promises nothing between minor releases; these three are those of STATED below.
NEXT_MINOR = {"ray"}
# What tests cannot have run, and why it may be installed.
NOT_LOCKED = {"nvidia-ml-py": "reads a GPU's load, and is installed where there is one"}
STATED = {"torch": "2.11 to 2.13: an accelerator's build comes with its own; the library uses documented calls alone"}


def locked_versions(text: str) -> dict[str, Version]:
    pairs = [line.split("==") for line in text.splitlines() if "==" in line]
    return {_plain(name): Version(version) for name, version in pairs}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def bounds(requirement: Requirement) -> tuple[Version | None, Version | None]:
    """The floor (included) and the ceiling (excluded)."""
    by_operator = {one.operator: Version(one.version) for one in requirement.specifier}
    return by_operator.get(">="), by_operator.get("<")


def next_release(version: Version, *, minor: bool) -> Version:
    major, second = (*version.release, 0)[:2]
    return Version(f"{major}.{second + 1}") if minor or major == 0 else Version(f"{major + 1}")


def faults(requirements: list[Requirement], locked: dict[str, Version]) -> list[str]:
    found = []
    for requirement in requirements:
        name = _plain(requirement.name)
        floor, ceiling = bounds(requirement)
        if floor is None or ceiling is None:
            found.append(f"{name}: needs a floor (>=) and a ceiling (<)")
        elif name in locked:
            version = locked[name]
            nearest = next_release(version, minor=name in NEXT_MINOR)
            if not floor <= version < ceiling:
                found.append(f"{name}: the lock's {version} is outside {requirement.specifier}")
            if name not in STATED and ceiling > nearest:
                found.append(f"{name}: the ceiling is above {nearest}, the next release after the lock's {version}")
            first = next_release(floor, minor=name in NEXT_MINOR)
            if name not in STATED and first <= version:
                found.append(f"{name}: the floor {floor} is of an earlier release than the lock's {version}")
        elif name not in NOT_LOCKED:
            found.append(f"{name}: is not in the lock, so that no test has run it")
    return found


def test_what_may_be_installed_is_what_was_run() -> None:
    assert faults(REQUIREMENTS, locked_versions((ROOT / "requirements.lock").read_text())) == []


@pytest.mark.parametrize(
    ("requirement", "words"),
    [
        ("ray>=2.60,<3", "ceiling is above 2.61"),
        ("ray>=2.59,<2.61", "earlier release"),
        ("pandas>=2.2", "needs a floor"),
        ("pandas>=2.2,<4", "earlier release"),
        ("pandas<4", "needs a floor"),
        ("tyro>=1,<3", "ceiling is above 2"),
        ("tyro>=1.1,<2", "outside"),
        ("safetensors>=0.8,<1", "ceiling is above 0.9"),
        ("left-pad>=1,<2", "not in the lock"),
    ],
)
def test_a_bound_that_promises_too_much_is_seen(requirement: str, words: str) -> None:
    locked = {name: Version(version) for name, version in VERSIONS.items()}
    (fault,) = faults([Requirement(requirement)], locked)
    assert words in fault
    assert faults([Requirement(good) for good in ("ray>=2.60,<2.61", "pandas>=3,<4", "tyro>=1.0,<2")], locked) == []


VERSIONS = {"ray": "2.60.0", "pandas": "3.1.1", "tyro": "1.0.17", "safetensors": "0.8.0"}
