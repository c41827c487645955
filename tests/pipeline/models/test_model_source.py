"""The source of a network of one's own: collected whole, activated elsewhere, refused where it would deceive."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ddpm import DiTConfig, OwnNetworkConfig, UNetConfig
from pipeline.models import model_source
from pipeline.models.model_source import activate_source, collect_source, required_distribution, requirements


def own(factory: str) -> OwnNetworkConfig:
    return OwnNetworkConfig(factory=factory)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a sub-package, a cache, a hidden folder and a data file."""
    root = tmp_path / "user"
    for name, text in {
        "my_nets/__init__.py": "",
        "my_nets/small.py": "from my_nets.parts.block import VALUE\n\ndef make():\n    return VALUE\n",
        "my_nets/parts/__init__.py": "",
        "my_nets/parts/block.py": "VALUE = 'größer'\n",
        "my_nets/__pycache__/small.py": "stale",
        "my_nets/.venv/lib.py": "hidden",
        "my_nets/weights.bin": "data",
        "single.py": "def make():\n    return 1\n",
        "spread/net.py": "def make():\n    return 2\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(root))
    return root


def test_a_package_is_collected_whole_and_nothing_else(package: Path) -> None:
    source = collect_source(own("my_nets.small:make"))
    assert source is not None
    files = json.loads(source)
    assert sorted(files) == [
        "my_nets/__init__.py",
        "my_nets/parts/__init__.py",
        "my_nets/parts/block.py",
        "my_nets/small.py",
    ]
    assert files["my_nets/parts/block.py"] == "VALUE = 'größer'\n"
    assert collect_source(own("my_nets.parts.block:VALUE")) == source, "one package, one source, whatever the factory"


def test_a_source_that_is_not_utf_8_is_named(package: Path) -> None:
    (package / "single.py").write_bytes(b"# coding: latin-1\nNAME = 'gr\xf6\xdfer'\n")
    with pytest.raises(ValueError, match=r"^network\.factory: .*/single\.py is not UTF-8 .*; save it as UTF-8$"):
        collect_source(own("single:make"))
    (package / "single.py").write_text("\ufeffdef make():\n    return 1\n", encoding="utf-8")
    source = collect_source(own("single:make"))
    assert source is not None, "Python reads a byte-order mark"


@pytest.mark.parametrize(("factory", "names"), [("single:make", ["single.py"]), ("spread.net:make", ["spread/net.py"])])
def test_a_module_and_a_package_without_init(package: Path, factory: str, names: list[str]) -> None:
    source = collect_source(own(factory))
    assert source is not None
    assert sorted(json.loads(source)) == names
    activate_source(source, own(factory))  # importable already: nothing changes
    assert not any("ddpm-source" in entry for entry in sys.path)


def test_what_needs_no_source() -> None:
    assert collect_source(UNetConfig()) is None and collect_source(DiTConfig()) is None
    assert collect_source(own("ddpm.networks.unet:UNet")) is None
    assert collect_source(own("diffusers:UNet2DModel")) is None
    requirement = required_distribution(own("diffusers.models:UNet2DModel"))
    assert requirement is not None
    assert requirement.startswith("diffusers==")
    assert required_distribution(UNetConfig()) is None and required_distribution(DiTConfig()) is None
    assert required_distribution(own("json:loads")) is None, "the standard library is no distribution"
    assert requirements(own("diffusers.models:UNet2DModel")) == [*requirements(UNetConfig()), requirement]
    assert requirements(own("json:loads")) == requirements(UNetConfig())


def test_too_much_source_is_refused(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_source, "_MAX_SOURCE_BYTES", 10)
    with pytest.raises(ValueError, match=r"^network\.factory: the package 'my_nets' .* more than 10"):
        collect_source(own("my_nets.small:make"))


def test_a_missing_module_is_named() -> None:
    with pytest.raises(ValueError, match=r"^network\.factory: no module named 'no_such_nets'"):
        collect_source(own("no_such_nets.unet:make"))


@pytest.mark.parametrize(
    "source",
    [
        b"{",
        b"[]",
        b'{"a.py":1}',
        b'{"../a.py":""}',
        b'{"/etc/a.py":""}',
        b'{"a/../../b.py":""}',
        b'{"a.so":""}',
        b'{"a\\\\b.py":""}',
    ],
)
def test_source_that_is_none_is_refused_before_anything_is_written(
    source: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ValueError, match="model source: "):
        activate_source(source, own("a:make"))
    assert list(tmp_path.iterdir()) == []


def _run(code: str, *arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments], cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_activated_where_the_package_is_not_installed(package: Path, tmp_path: Path) -> None:
    source = collect_source(own("my_nets.small:make"))
    assert source is not None
    (tmp_path / "source.json").write_bytes(source)
    code = """
        import importlib.util, sys
        from pathlib import Path
        from pipeline.models.model_source import activate_source, collect_source
        from ddpm import OwnNetworkConfig
        def own(factory):
            return OwnNetworkConfig(factory=factory)
        assert importlib.util.find_spec("my_nets") is None
        source = Path("source.json").read_bytes()
        activate_source(source, own("my_nets.small:make"))
        activate_source(source, own("my_nets.small:make"))
        from my_nets.small import make
        assert make() == "größer"
        assert collect_source(own("my_nets.small:make")) == source
        print(Path(sys.modules["my_nets"].__file__).parents[1])
    """
    folder = Path(_run(code, cwd=tmp_path).strip())
    assert "ddpm-source" in folder.name
    assert not folder.exists(), "the folder is removed with the process"


def test_the_kept_source_wins_over_code_that_changed_since(package: Path, tmp_path: Path) -> None:
    source = collect_source(own("single:make"))
    assert source is not None
    (tmp_path / "source.json").write_bytes(source)
    (package / "single.py").write_text("def make():\n    return 'changed'\n")
    code = """
        import sys
        from pathlib import Path
        from pipeline.models.model_source import activate_source
        from ddpm import OwnNetworkConfig
        def own(factory):
            return OwnNetworkConfig(factory=factory)
        sys.path.insert(0, sys.argv[1])
        {before}
        try:
            activate_source(Path("source.json").read_bytes(), own("single:make"))
        except ValueError as error:
            print(error)
        else:
            import single
            print(single.make())
    """
    assert _run(code.format(before=""), str(package), cwd=tmp_path) == "1\n"
    refused = _run(code.format(before="import single"), str(package), cwd=tmp_path)
    assert "already imported 'single'" in refused
    assert str(package / "single.py") in refused
