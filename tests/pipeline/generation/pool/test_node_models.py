"""A model staged in the output and fetched once per node, verified whenever it is read."""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import CheckpointError, ObjectMissingError
from pipeline.generation.pool.node_models import fetch_model, read_staged, stage_model
from pipeline.models.model_files import ModelFiles, read_model_files
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.storage import open_store
from tests.pipeline.tiny_models import write_model, write_own_model


@pytest.fixture(autouse=True)
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node's disk of the test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"ddpm-models-{os.getuid()}"


def model_in(folder: Path, *, channels: int = 1) -> ModelFiles:
    return read_model_files(open_store(write_model(folder, answers=True, channels=channels)))


def staged(tmp_path: Path) -> tuple[ObjectStore, ModelFiles]:
    output, files = open_store(str(tmp_path / "out")), model_in(tmp_path / "model")
    stage_model(output, files)
    return output, files


def test_what_is_staged_is_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = open_store(str(tmp_path / "out"))
    own = read_model_files(open_store(write_own_model(tmp_path / "own", monkeypatch, "fine")))
    for files in (model_in(tmp_path / "model"), own):
        stage_model(output, files)
        for read in (read_staged, fetch_model, fetch_model):
            found = read(output, files.digest, trusted=True)
            assert found == files and found.trusted and found.digest == files.digest
        assert not read_staged(output, files.digest, trusted=False).trusted


def test_staging_again_writes_nothing_and_mends_what_was_cut_short(tmp_path: Path) -> None:
    output, files = staged(tmp_path)
    weights = tmp_path / "out" / "_models" / files.digest / "weights.safetensors"
    before = weights.stat().st_ino
    stage_model(output, files)
    assert weights.stat().st_ino == before
    weights.write_bytes(b"cut short")
    stage_model(output, files)
    assert read_staged(output, files.digest, trusted=False) == files


def test_what_was_altered_is_not_used(tmp_path: Path, disk: Path) -> None:
    output, files = staged(tmp_path)
    assert fetch_model(output, files.digest, trusted=False) == files
    kept = disk / files.digest / "weights.safetensors"
    data = bytearray(kept.read_bytes())
    data[-1] ^= 1
    kept.write_bytes(data)
    assert fetch_model(output, files.digest, trusted=False) == files, "fetched anew"
    assert kept.read_bytes() == files.weights
    kept.write_bytes(data)
    (tmp_path / "out" / "_models" / files.digest / "weights.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"_models/.*was altered, sha256 differs; delete it"):
        fetch_model(output, files.digest, trusted=False)


def test_a_model_that_is_not_staged(tmp_path: Path) -> None:
    with pytest.raises(ObjectMissingError):
        fetch_model(open_store(str(tmp_path / "out")), "0" * 64, trusted=False)


class Counted:
    """A store that counts what is read."""

    def __init__(self, store: ObjectStore) -> None:
        self._store, self.reads = store, list[str]()

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def read(self, key: str) -> bytes:
        self.reads.append(key.rpartition("/")[2])
        return self._store.read(key)


def test_many_who_ask_at_once_fetch_once(tmp_path: Path) -> None:
    output, files = staged(tmp_path)
    counted = Counted(output)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: fetch_model(counted, files.digest, trusted=False), range(8)))  # type: ignore[arg-type]
    assert found == [files] * 8
    assert sorted(counted.reads) == ["model.json", "weights.safetensors"]


def test_who_dies_while_fetching_leaves_nothing_that_others_wait_for_or_use(tmp_path: Path, disk: Path) -> None:
    output, files = staged(tmp_path)
    script = f"""
import os, signal, tempfile
from pathlib import Path
tempfile.tempdir = {str(tmp_path)!r}
from pipeline.generation.pool.node_models import fetch_model
from pipeline.stores.storage import open_store
write = Path.write_bytes
def cut(path, data):
    write(path, data[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
Path.write_bytes = cut
fetch_model(open_store({output.uri!r}), {files.digest!r}, trusted=False)
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[4]).returncode == -9
    assert list((disk / files.digest).iterdir())
    assert fetch_model(output, files.digest, trusted=False) == files


def test_a_full_disk_keeps_nobody_from_working(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: Path) -> None:
    output, files = staged(tmp_path)

    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert fetch_model(output, files.digest, trusted=False) == files
    assert not (disk / files.digest).exists()


def test_a_disk_keeps_the_four_that_were_used_last(tmp_path: Path, disk: Path) -> None:
    output = open_store(str(tmp_path / "out"))
    digests = []
    for number in range(6):
        files = model_in(tmp_path / f"model{number}", channels=1 + 2 * (number % 2))
        card = {**json.loads(files.card_json), "train_step": number}
        files = ModelFiles(card_json=json.dumps(card).encode(), weights=files.weights)
        digests.append(files.digest)
        stage_model(output, files)
        fetch_model(output, files.digest, trusted=False)
        os.utime(disk / files.digest, (number, number))
        fetch_model(output, digests[0], trusted=False)  # in use all the time
    assert len(set(digests)) == 6
    assert {path.name for path in disk.iterdir() if path.is_dir()} == {digests[0], *digests[3:]}


def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path, disk: Path) -> None:
    output, files = staged(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    disk.symlink_to(tmp_path / "elsewhere")
    assert fetch_model(output, files.digest, trusted=False) == files
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("name", ["ddpm-models", "lock", "model.json"])
def test_a_disk_that_can_be_neither_read_nor_written_keeps_nobody_from_working(
    tmp_path: Path, disk: Path, name: str
) -> None:
    """In the place of a folder is a file, of a file a folder: for root, too, who may write where nobody may."""
    output, files = staged(tmp_path)
    if name == "ddpm-models":
        disk.write_text("")
    else:
        (disk / (f"{files.digest}.lock" if name == "lock" else f"{files.digest}/{name}")).mkdir(parents=True)
    for _ in range(2):
        assert fetch_model(output, files.digest, trusted=False) == files


def test_a_machine_without_a_folder_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, files = staged(tmp_path)

    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    assert fetch_model(output, files.digest, trusted=False) == files
