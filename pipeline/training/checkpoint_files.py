"""The files of a checkpoint or a snapshot: encoded one at a time, written, read back, and compared with their records.

What is to be written comes as pieces, each encoded only when its turn comes and forgotten when it is stored, so that no
more than a few files are in memory beside what they are made of.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from pipeline.errors import CheckpointError, ObjectMissingError, StorageError
from pipeline.stores.object_store import one_line
from pipeline.stores.storage import ObjectStore, join_uri

_IN_PARALLEL = 3

Piece = Callable[[], Mapping[str, bytes]]
"""Encodes files that belong together: their contents by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """One file of a checkpoint."""

    name: str
    """File name inside the checkpoint's folder."""
    size_bytes: int
    """Length in bytes."""
    sha256: str
    """Digest of its bytes, hexadecimal."""


def encode_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """What `safetensors.torch.save` gives, by way of a temporary file.

    `save` keeps the interpreter to itself while it copies, about 0.6 s per GB, and so stops whoever trains beside it;
    `save_file` does not.

    Args:
        tensors: On the host, contiguous, each with memory of its own.

    Raises:
        StorageError: If the folder for temporary files has no room.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="ddpm-encode-") as folder:
            path = Path(folder) / "tensors.safetensors"
            safetensors.torch.save_file(dict(tensors), path)
            return path.read_bytes()
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{tempfile.gettempdir()}: cannot make a file of a checkpoint there ({one_line(error)}); free some space, "
            "or set TMPDIR to a folder that has some"
        ) from error


def write_pieces(store: ObjectStore, prefix: str, pieces: Iterable[Piece]) -> tuple[FileRecord, ...]:
    """Encode, write and read back files in a folder, a few at a time.

    Returns:
        A record of each, by name.

    Raises:
        CheckpointError: If what was read back differs from what was written.
        StorageError: If the store does not take them.
    """
    pool = ThreadPoolExecutor(_IN_PARALLEL, thread_name_prefix="checkpoint-file")
    try:
        written = pool.map(lambda piece: _write_piece(store, prefix, piece), pieces)
        return tuple(sorted((record for records in written for record in records), key=lambda record: record.name))
    finally:
        pool.shutdown(cancel_futures=True)


def _write_piece(store: ObjectStore, prefix: str, piece: Piece) -> list[FileRecord]:
    files, records = dict(piece()), list[FileRecord]()
    while files:
        name, data = files.popitem()
        record = FileRecord(name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        store.write(f"{prefix}/{name}", data)
        del data  # what is read back takes its place
        read_file(store, prefix, record)
        records.append(record)
    return records


def read_file(store: ObjectStore, prefix: str, file: FileRecord) -> bytes:
    """A file, compared with its record; read once more before it is called damaged, because a reader can fail too.

    Raises:
        CheckpointError: If it is missing, cut short or altered; names the file.
    """
    key = f"{prefix}/{file.name}"
    try:
        for _ in range(2):
            data = store.read(key)
            if len(data) == file.size_bytes and hashlib.sha256(data).hexdigest() == file.sha256:
                return data
    except ObjectMissingError as error:
        raise CheckpointError(f"{join_uri(store.uri, key)}: missing, though its record names it") from error
    raise CheckpointError(f"{join_uri(store.uri, key)}: {len(data)} bytes that are not the {file.size_bytes} recorded")
