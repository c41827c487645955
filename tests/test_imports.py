"""A name of `ddpm` has one place to be imported from: `ddpm`, if it is public, or else the module that defines it.

So that `__all__` alone says what others may rely on, and a room (a folder of `ddpm`) can be arranged anew.
"""

import ast
from pathlib import Path

import pytest

import ddpm

ROOT = Path(__file__).parents[1]
ROOMS = sorted(path.parent.name for path in (ROOT / "ddpm").glob("*/__init__.py"))


def defined_names(module: str) -> set[str]:
    """What a module of ddpm itself defines; nothing for a room, or where there is no such module."""
    path = ROOT / Path(*module.split(".")).with_suffix(".py")
    names = set[str]()
    for node in ast.parse(path.read_text()).body if path.exists() else []:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names


def wrong_imports(source: str, public: set[str]) -> list[str]:
    """The names of ddpm that are imported from elsewhere than their place, as line: module, name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or node.level or (node.module or "").split(".")[0] != "ddpm":
            continue
        assert node.module is not None
        for name in (alias.name for alias in node.names):
            right = name in public if node.module == "ddpm" else name in defined_names(node.module) - public
            if not right:
                found.append(f"{node.lineno}: {node.module}, {name}")
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_holds_a_docstring_only(room: str) -> None:
    body = ast.parse((ROOT / "ddpm" / room / "__init__.py").read_text()).body
    assert [type(node) for node in body] == [ast.Expr] and ast.get_docstring(ast.Module(body, [])), room


@pytest.mark.parametrize("folder", ["pipeline", "jobs", "tests"])
def test_names_are_imported_from_their_one_place(folder: str) -> None:
    public = set(ddpm.__all__)
    found = {
        str(path.relative_to(ROOT)): wrong
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (wrong := wrong_imports(path.read_text(), public))
    }
    assert found == {}


def test_inside_ddpm_they_come_from_the_module_that_defines_them() -> None:
    """Also in its own __init__: what is public there is defined one level down, and imported from nowhere between."""
    found = {
        str(path.relative_to(ROOT)): wrong
        for path in sorted((ROOT / "ddpm").rglob("*.py"))
        if (wrong := wrong_imports(path.read_text(), set()))
    }
    assert found == {}


@pytest.mark.parametrize(
    ("line", "is_right"),
    [
        ("from ddpm import generate, DDIM", True),
        ("from ddpm.samplers.sampler import check_choice", True),
        ("from ddpm.shapes import Images", True),
        ("import ddpm", True),
        ("from torch import Tensor", True),
        ("from ddpm.samplers.generate import generate", False),  # public
        ("from ddpm.samplers.ddim import SingleStepSampler", False),  # public, and from where it is but imported
        ("from ddpm.samplers.heun import reporting", False),  # defined in sampler.py
        ("from ddpm import check_choice", False),  # not public
        ("from ddpm.samplers import generate", False),  # a room
        ("from ddpm.samplers import heun", False),
        ("from ddpm.nowhere import generate", False),
        ("from ddpm import *", False),
        ("def f():\n    from ddpm.noise import Stream", False),
    ],
)
def test_each_way_that_is_wrong_is_seen(line: str, is_right: bool) -> None:
    assert (wrong_imports(line, set(ddpm.__all__)) == []) is is_right
