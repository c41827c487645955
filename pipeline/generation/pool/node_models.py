"""The model on every node: staged once by the driver, fetched once per node.

    <output>/_models/<digest>/    model.json, weights.safetensors, source.json: what images below `output` are made with

Every node can reach the output, or it could not write there; the place where the model came from (a registry with
credentials, a folder of the driver's) it may not. On a node the first process fetches and the others wait for it; what
was fetched is verified by its digest whenever it is read.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import CheckpointError
from pipeline.models.model_files import MODEL_JSON, SOURCE_JSON, WEIGHTS, ModelFiles
from pipeline.stores.object_store import ObjectStore

MODELS_FOLDER = "_models"
_MAX_KEPT = 4  # models on a node's disk


def stage_model(output: ObjectStore, files: ModelFiles) -> None:
    """Put a model where the nodes find it; what is there already stays.

    Raises:
        StorageError: If it cannot be written.
    """
    for name, data in files.as_dict().items():
        key = f"{MODELS_FOLDER}/{files.digest}/{name}"
        there = output.stat(key)
        if there is None or there.size_bytes != len(data):
            output.write(key, data)


def read_staged(output: ObjectStore, digest: str, *, trusted: bool) -> ModelFiles:
    """A staged model, verified.

    Args:
        output: The parent of the runs' prefixes.
        digest: The model's digest.
        trusted: Whether its code may run.

    Raises:
        ObjectMissingError: If it is not there.
        CheckpointError: If it was altered.
        StorageError: If it cannot be read.
    """
    folder = f"{MODELS_FOLDER}/{digest}"
    names = {info.key.rpartition("/")[2] for info in output.list(f"{folder}/")}
    source = output.read(f"{folder}/{SOURCE_JSON}") if SOURCE_JSON in names else None
    files = ModelFiles(
        card_json=output.read(f"{folder}/{MODEL_JSON}"),
        weights=output.read(f"{folder}/{WEIGHTS}"),
        source=source,
        trusted=trusted,
    )
    if files.digest != digest:
        raise CheckpointError(f"{output.uri}/{folder}: was altered, sha256 differs; delete it to have it staged again")
    return files


def fetch_model(output: ObjectStore, digest: str, *, trusted: bool) -> ModelFiles:
    """A staged model by way of this node's disk, fetched once however many processes ask; errors as `read_staged`.

    A disk that is full, read-only or broken, or a folder there of somebody else, costs each process of the node a fetch
    of its own, and nothing else.
    """
    with contextlib.suppress(OSError), _locked(_cache() / f"{digest}.lock") as lock:
        place = lock.with_suffix("")
        files = _read_kept(place, digest, trusted)
        if files is None:
            shutil.rmtree(place, ignore_errors=True)
            files = read_staged(output, digest, trusted=trusted)
            _keep(place, files)
        _drop_oldest(lock.parent, keep=place)
        return files
    return read_staged(output, digest, trusted=trusted)


def _cache() -> Path:
    folder = Path(tempfile.gettempdir(), f"ddpm-models-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or not folder.is_dir() or folder.is_symlink():
        raise OSError(f"{folder}: belongs to somebody else")
    return folder


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[Path]:
    with file.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # given back when the file is closed, also by a process that dies
        yield file


def _read_kept(place: Path, digest: str, trusted: bool) -> ModelFiles | None:
    try:
        source = place / SOURCE_JSON
        files = ModelFiles(
            card_json=(place / MODEL_JSON).read_bytes(),
            weights=(place / WEIGHTS).read_bytes(),
            source=source.read_bytes() if source.exists() else None,
            trusted=trusted,
        )
    except FileNotFoundError:
        return None
    return files if files.digest == digest else None


def _keep(place: Path, files: ModelFiles) -> None:
    """Whole, or not at all."""
    try:
        place.mkdir()
        for name, data in files.as_dict().items():
            (place / name).write_bytes(data)
    except OSError:
        shutil.rmtree(place, ignore_errors=True)


def _drop_oldest(cache: Path, keep: Path) -> None:
    with contextlib.suppress(OSError):
        os.utime(keep)
    others = sorted((path for path in cache.iterdir() if path.is_dir() and path != keep), key=_modified_s)
    for path in others[: 1 - _MAX_KEPT]:
        shutil.rmtree(path, ignore_errors=True)


def _modified_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another process has just removed it
        return 0.0
