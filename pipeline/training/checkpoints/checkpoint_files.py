"""The files of a checkpoint or a snapshot: encoded one at a time, written, read back, and compared with their records.

What is to be written comes as pieces, each encoded only when its turn comes and forgotten when it is stored, so that no
more than a few files are in memory beside what they are made of.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from pipeline.errors import CheckpointError, ObjectMissingError, StorageError
from pipeline.stores.cancellation import Cancellation, CancelledWriteError
from pipeline.stores.object_store import one_line
from pipeline.stores.storage import ObjectStore, join_uri

_IN_PARALLEL = 3
_CHUNK_BYTES = 8 << 20

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


class PieceWriter:
    """Encodes, writes and reads back the files of a folder, a few at a time; may be told to stop.

    Args:
        store: Where.
        prefix: The folder.
        cancellation: Tells to stop; None: nobody does.
    """

    def __init__(self, store: ObjectStore, prefix: str, cancellation: Cancellation | None = None) -> None:
        """Nothing is written yet."""
        self._cancellation = cancellation or Cancellation()
        self._store, self.prefix = store.with_cancellation(self._cancellation), prefix
        self._writing: list[Future[list[FileRecord]]] = []

    def write(self, pieces: Iterable[Piece]) -> tuple[FileRecord, ...]:
        """Write everything.

        A request may hang for a minute. Who cancels has not got that long, so it is not waited for then: its thread
        comes to its end by itself (`wait`), with whatever the pieces are made of by then, in files that nobody reads.

        Returns:
            A record of each file, by name.

        Raises:
            CheckpointError: If what was read back differs from what was written.
            StorageError: If the store does not take them.
            CancelledWriteError: If it is cancelled.
        """
        self._cancellation.check()
        ended = SimpleQueue[Future[list[FileRecord]] | None]()
        records = list[FileRecord]()
        pool = ThreadPoolExecutor(_IN_PARALLEL, thread_name_prefix="checkpoint-file")
        try:
            self._writing = [pool.submit(self._write_piece, piece) for piece in pieces]
            for future in self._writing:
                future.add_done_callback(ended.put)
            with self._cancellation.calling(lambda: ended.put(None)):
                for _ in self._writing:
                    if (future_or_cancel := ended.get()) is None:
                        raise CancelledWriteError
                    records += future_or_cancel.result()
        finally:
            pool.shutdown(wait=not self._cancellation.is_cancelled, cancel_futures=True)
        return tuple(sorted(records, key=lambda record: record.name))

    def wait(self, timeout_s: float | None) -> bool:
        """Wait until no thread writes any more; says whether that is so."""
        # `wait` takes a future that was cancelled before its turn for one that goes on.
        return not wait([future for future in self._writing if not future.cancelled()], timeout_s).not_done

    def _write_piece(self, piece: Piece) -> list[FileRecord]:
        self._cancellation.check()
        files, records = dict(piece()), list[FileRecord]()
        while files:
            name, data = files.popitem()
            record = FileRecord(name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            self._store.write(f"{self.prefix}/{name}", self._chunks(data))
            del data  # what is read back takes its place
            read_file(self._store, self.prefix, record)
            records.append(record)
        return records

    def _chunks(self, data: bytes) -> Iterator[bytes]:
        """A store of any kind stops between two of them, and removes what it has of the file."""
        for start in range(0, len(data), _CHUNK_BYTES):
            self._cancellation.check()
            yield data[start : start + _CHUNK_BYTES]


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
