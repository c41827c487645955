"""Which files know a library of the outside world, and what `ddpm/` does without: as the pages say it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text())
    for room in ("ddpm", "pipeline", "jobs")
    for path in sorted((ROOT / room).rglob("*.py"))
}
# The files that import each: a new one is a decision, and changes what the pages say.
DOORS = {
    "boto3": {"pipeline/stores/s3_requests.py"},
    "botocore": {"pipeline/stores/s3_requests.py"},
    "webdataset": {"pipeline/data/shards.py"},
    "pyarrow": {"pipeline/data/parquet_shards.py", "pipeline/data/shard_parts.py"},
    "tyro": {"jobs/cli.py", "jobs/variant_flags.py"},
    "mlflow": {
        "pipeline/tracking/mlflow_client.py",
        "pipeline/tracking/client_retry.py",
        "pipeline/tracking/run_opening.py",
        "pipeline/tracking/run_requests.py",
        "pipeline/tracking/tracking.py",
        "pipeline/models/registration.py",
        "pipeline/models/registry.py",
        "pipeline/models/sampler_model.py",
        "pipeline/models/version_records.py",
    },
    "ray": {
        "pipeline/cluster.py",
        "pipeline/cluster_nodes.py",
        "pipeline/data/ingest.py",
        "pipeline/data/prepare.py",
        "pipeline/generation/pool/actors.py",
        "pipeline/generation/pool/sampling_pool.py",
        "pipeline/generation/pool/shard_actor.py",
        "pipeline/training/driver/group_watch.py",
        "pipeline/training/driver/places.py",
        "pipeline/training/driver/validation.py",
        "pipeline/training/driver/worker_group.py",
        "pipeline/training/metrics/gauges.py",
        "pipeline/training/train_board.py",
        "pipeline/training/worker/group_control.py",
        "pipeline/training/worker/train_loop.py",
    },
}
# Of the standard library, what has neither files nor a clock. importlib finds the factory of a network of one's own.
PURE = {
    "abc",
    "collections",
    "contextlib",
    "dataclasses",
    "enum",
    "functools",
    "importlib",
    "inspect",
    "itertools",
    "math",
    "re",
    "typing",
    "weakref",
}
# Who draws from torch's global generator: initial weights, which build_network seeds, and dropout. All else is
# ddpm/noise.py's.
GLOBAL_RANDOMNESS = {
    "ddpm/networks/layers.py",
    "ddpm/networks/dit.py",
    "ddpm/networks/unet.py",
    "ddpm/networks/model_config.py",
}


def imported(tree: ast.AST) -> set[str]:
    """The first part of every module that is imported, inside functions and for types too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def importers(library: str) -> set[str]:
    return {file for file, tree in FILES.items() if library in imported(tree)}


@pytest.mark.parametrize("library", DOORS)
def test_a_library_has_the_doors_that_it_had(library: str) -> None:
    assert importers(library) == DOORS[library]


def room_of(file: str) -> str:
    """The folder below `pipeline/`; rooms inside it count as it does."""
    return "/".join(Path(file).parent.parts[:2])


def test_what_the_readme_says_of_doors() -> None:
    """One file each; the rooms of the others."""
    text = " ".join((ROOT / "README.md").read_text().split())
    for words, libraries, places in (
        ("boto3 and webdataset have one door each", ("boto3", "webdataset"), None),
        ("tyro is in `jobs/`", ("tyro",), {"jobs"}),
        ("MLflow in `tracking/` and `models/`", ("mlflow",), {"pipeline/tracking", "pipeline/models"}),
        ("Ray in `data/`, `training/`, `generation/pool/`, `cluster.py` and `cluster_nodes.py`", ("ray",),
         {"pipeline", "pipeline/data", "pipeline/training", "pipeline/generation"}),
    ):  # fmt: skip
        assert words in text, words
        for library in libraries:
            found = importers(library)
            assert len(found) == 1 if places is None else {room_of(file) for file in found} == places, library
    of_ray = importers("ray")
    assert {str(Path(file).parent) for file in of_ray if "generation" in file} == {"pipeline/generation/pool"}
    on_the_floor = {file for file in of_ray if Path(file).parent == Path("pipeline")}
    assert on_the_floor == {"pipeline/cluster.py", "pipeline/cluster_nodes.py"}


def outside(tree: ast.AST) -> set[str]:
    """What a file of ddpm imports or calls that pure torch would not: files, clocks, environment."""
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    methods = {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    strangers = imported(tree) - PURE - {"torch", "jaxtyping", "ddpm"}
    return strangers | (called & {"open", "print", "input", "exec", "eval"}) | (methods & {"torch.save", "torch.load"})


def global_draws(tree: ast.AST) -> set[str]:
    """Calls that draw from torch's global generator or set it."""
    names = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "manual_seed", "seed"}
    return {
        ast.unparse(node.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and (
            (
                ast.unparse(node.func.value) in ("torch", "torch.random", "torch.default_generator")
                and node.func.attr in names
            )
            or ast.unparse(node.func.value) == "nn.init"
            or ast.unparse(node.func) == "nn.Dropout"
        )
        and not any(keyword.arg == "generator" for keyword in node.keywords)
    }


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("ddpm/")])
def test_ddpm_has_no_files_no_clock_and_no_randomness_of_its_own(file: str) -> None:
    assert outside(FILES[file]) == set()
    assert (global_draws(FILES[file]) == set()) or file in GLOBAL_RANDOMNESS


@pytest.mark.parametrize(
    ("line", "is_pure"),
    [
        ("import time", False),
        ("from pathlib import Path", False),
        ("def f():\n    import os", False),
        ("open('x')", False),
        ("torch.load('x')", False),
        ("import numpy", False),
        ("import math\nfrom torch import nn", True),
    ],
)
def test_each_way_out_is_seen(line: str, is_pure: bool) -> None:
    assert (outside(ast.parse(line)) == set()) is is_pure


@pytest.mark.parametrize(
    ("line", "draws"),
    [
        ("torch.randn(3)", True),
        ("torch.randn(3, generator=g)", False),
        ("torch.manual_seed(0)", True),
        ("nn.init.normal_(w)", True),
        ("nn.Dropout(0.1)", True),
        ("torch.zeros(3)", False),
    ],
)
def test_each_draw_is_seen(line: str, draws: bool) -> None:
    assert (global_draws(ast.parse(line)) != set()) is draws


def test_the_rooms_of_the_pipeline_are_in_the_order_that_its_page_has() -> None:
    """Which is the contract that import-linter holds; its table names every room, and the line below every file."""
    page, project = (ROOT / "pipeline" / "README.md").read_text(), (ROOT / "pyproject.toml").read_text()
    order = re.search(r"`(benchmarks > [^`]+)`", page)
    assert order is not None
    layers = ", ".join(f'"{layer}"' for layer in order[1].split(" > "))
    assert f'containers = ["pipeline"]\nlayers = [{layers}]' in project
    rooms = {path.parent.name for path in (ROOT / "pipeline").glob("*/__init__.py")}
    assert set(re.findall(r"^\| `(\w+)/` \|", page, re.MULTILINE)) == rooms == set(re.findall(r"\w+", order[1]))
    beside = page.split("Beside the rooms:")[1].split("\n\n")[0]
    modules = {path.name for path in (ROOT / "pipeline").glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"`(\w+\.py)`", beside)) == modules


def test_no_file_is_over_400_lines() -> None:
    files = [file for room in ("ddpm", "pipeline", "jobs", "tests") for file in (ROOT / room).rglob("*.py")]
    assert len(files) > 300
    assert [file for file in files if len(file.read_text().splitlines()) > 400] == []
