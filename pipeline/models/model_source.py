"""The source of a network of your own, kept with its weights so that the model runs where your code is not installed.

What is kept is every .py file of the one top-level package or module that the factory lives in. Not kept are installed
packages (they are dependencies), this project's own code, data files, and a second package that yours imports.
"""

import atexit
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path, PurePosixPath

from ddpm import NetworkConfig, OwnNetworkConfig

_OWN_PACKAGES = frozenset({"ddpm", "pipeline", "jobs"})
# What the registered model imports; without the local part ("+cpu") that a package index does not have.
_REQUIREMENTS = ("mlflow", "torch", "jaxtyping", "safetensors", "pydantic", "tomli-w", "numpy", "pandas", "pillow")
_MAX_SOURCE_BYTES = 4 * 1024 * 1024  # a package of networks is far below this; a virtual environment is far above


def collect_source(network: NetworkConfig) -> bytes | None:
    """The source that a network needs, as canonical JSON.

    Returns:
        {relative path: text} of the top-level package or module of a network of your own as UTF-8 JSON; None for code
        of this project, and for an installed package, which `required_distribution` names instead.

    Raises:
        ValueError: If the module cannot be found, has no source, or has more than 4 MiB of it.
    """
    top_level = _top_level(network)
    if top_level is None:
        return None
    root, files = _source_files(top_level)
    if _is_installed(root):
        return None
    num_bytes = sum(file.stat().st_size for file in files)
    if num_bytes > _MAX_SOURCE_BYTES:
        raise ValueError(
            f"network.factory: the package {top_level!r} holds {num_bytes} bytes of Python, more than "
            f"{_MAX_SOURCE_BYTES}; move the network into a package of its own, or install it"
        )
    return _encode({file.relative_to(root).as_posix(): _read_source(file) for file in files})


def _read_source(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"network.factory: {file} is not UTF-8 ({error.reason}); save it as UTF-8") from None


def required_distribution(network: NetworkConfig) -> str | None:
    """The pip requirement of a network that lives in an installed package ("name==version"); None for any other."""
    top_level = _top_level(network)
    if top_level is None or not _is_installed(_source_files(top_level)[0]):
        return None
    names = importlib.metadata.packages_distributions().get(top_level, [])
    return f"{names[0]}=={importlib.metadata.version(names[0])}" if names else None


def requirements(network: NetworkConfig) -> list[str]:
    """The pip requirements of a registered model with this network, with the versions installed here."""
    own = required_distribution(network)
    versions = {name: importlib.metadata.version(name).partition("+")[0] for name in _REQUIREMENTS}
    return [f"{name}=={version}" for name, version in versions.items()] + ([own] if own else [])


def activate_source(source: bytes, network: NetworkConfig) -> None:
    """Make a network of your own importable from the source that was kept with the weights.

    Nothing happens where the same source is importable already. Otherwise it is unpacked into a temporary folder, which
    is removed when the process ends, and that folder goes before other code of the same name.

    Args:
        source: What `collect_source` gave.
        network: The network that it is the source of.

    Raises:
        ValueError: If the source is malformed, or the process has already imported another version of the package.
    """
    top_level = _top_level(network)
    if top_level is None:
        return
    files = _decode(source)
    try:
        if collect_source(network) == source:
            return
    except ValueError:
        pass  # not importable here, which is the case that the source is kept for
    digest = hashlib.sha256(source).hexdigest()
    if top_level in sys.modules:
        loaded = Path(getattr(sys.modules[top_level], "__file__", None) or "an unknown place")
        raise ValueError(
            f"network.factory: this process has already imported {top_level!r} from {loaded}, which differs "
            f"from the source kept with the model (sha256 {digest[:16]}); use that, or a fresh process elsewhere"
        )
    folder = Path(tempfile.mkdtemp(prefix=f"ddpm-source-{digest[:16]}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()


def _top_level(network: NetworkConfig) -> str | None:
    """Name of the package or module to keep; None where there is nothing to keep."""
    if not isinstance(network, OwnNetworkConfig):
        return None
    top_level = network.factory.partition(":")[0].partition(".")[0]
    return None if top_level in _OWN_PACKAGES else top_level


def _source_files(top_level: str) -> tuple[Path, list[Path]]:
    """The folder that the top-level name lies in, and its .py files in order."""
    importlib.invalidate_caches()
    try:
        spec = importlib.util.find_spec(top_level)
    except (ImportError, ValueError) as error:
        raise ValueError(f"network.factory: cannot find the module {top_level!r} ({error})") from error
    if spec is None:
        raise ValueError(f"network.factory: no module named {top_level!r}; is it in the folder of the job?")
    if spec.submodule_search_locations:
        package = Path(next(iter(spec.submodule_search_locations)))
        files = [file for file in sorted(package.rglob("*.py")) if not _is_hidden(file.relative_to(package))]
        return package.parent, files
    if spec.origin is None or not spec.origin.endswith(".py"):
        raise ValueError(f"network.factory: {top_level!r} has no Python source that could be kept with the model")
    return Path(spec.origin).parent, [Path(spec.origin)]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def _is_installed(root: Path) -> bool:
    """Whether a folder belongs to the installation (site-packages, the standard library) rather than to the user."""
    places = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib", "platstdlib")}
    return root.resolve() in places


def _encode(files: dict[str, str]) -> bytes:
    return (json.dumps(files, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n").encode()


def _decode(source: bytes) -> dict[str, str]:
    """The files by relative path; refuses anything that would be written outside its folder."""
    try:
        files = json.loads(source)
    except ValueError as error:
        raise ValueError(f"model source: not JSON ({error}); the model's files are damaged") from error
    if not isinstance(files, dict) or not all(isinstance(text, str) for text in files.values()):
        raise ValueError("model source: must map relative paths to texts; the model's files are damaged")
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or path.suffix != ".py":
            raise ValueError(f"model source: {name!r} is not the relative path of a .py file; the files are damaged")
    return files
