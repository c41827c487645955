"""Training checkpoints in the object store: verified before they count, found by their digest, pruned last.

A checkpoint is a folder `step-SSSSSSSSS-<attempt>/` of files and, written after all of them have been read back and
compared, a record `_records/step-SSSSSSSSS.json` that is created once. Only the record makes a checkpoint exist, so a
writer that is killed half way leaves a folder that nobody reads. This store is the one authority: Ray Train is given
no checkpoints.
"""

import contextlib
import hashlib
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from pipeline.config_io import read_record, to_json
from pipeline.errors import CheckpointError, ConfigError, ObjectMissingError
from pipeline.progress import say
from pipeline.stores.storage import ObjectStore, join_uri

TRAIN_AGAIN = "train again into another output"
"""What to do about records of an older version, of a run or its checkpoints."""
_RECORDS, _DAMAGED = "_records/", "_damaged/"


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """One file of a checkpoint."""

    name: str
    """File name inside the checkpoint's folder."""
    size_bytes: int
    """Length in bytes."""
    sha256: str
    """Digest of its bytes, hexadecimal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointRecord:
    """What makes a checkpoint exist."""

    format_version: int = 2
    """Version of this record's form."""
    step: int
    """Optimiser steps behind the checkpoint; the next global batch is the one with this index."""
    prefix: str
    """The checkpoint's folder, relative to the store."""
    files: tuple[FileRecord, ...]
    """Every file, by name."""

    @property
    def digest(self) -> str:
        """Digest of the files' digests: equal for equal contents, wherever they lie."""
        return hashlib.sha256("".join(f"{f.name}:{f.sha256}\n" for f in self.files).encode()).hexdigest()


class CheckpointStore:
    """The checkpoints of one training run.

    Args:
        store: Object store rooted at the run's checkpoint folder.
    """

    def __init__(self, store: ObjectStore) -> None:
        """Use the folder that `store` is rooted at."""
        self._store = store

    def uri(self, record: CheckpointRecord) -> str:
        """The checkpoint's URI, as `sample` and `evaluate` take it."""
        return join_uri(self._store.uri, record.prefix)

    def save(self, step: int, files: Mapping[str, bytes]) -> CheckpointRecord:
        """Write the files, read each back, and only then record the checkpoint.

        Args:
            step: Optimiser steps behind these files.
            files: Contents by file name.

        Returns:
            The record that stands for this step: this one, or an equal or earlier one of another attempt.

        Raises:
            CheckpointError: If what was read back differs from what was written.
        """
        prefix = f"step-{step:09d}-{uuid.uuid4().hex[:8]}"
        written = write_files(self._store, prefix, dict(sorted(files.items())))
        checkpoint = CheckpointRecord(step=step, prefix=prefix, files=written)
        if self._store.create(_record_key(step), to_json(checkpoint)):
            return checkpoint
        self._remove_files(checkpoint)
        return self._read_record(_record_key(step))

    def read(self, record: CheckpointRecord) -> dict[str, bytes]:
        """The files of a checkpoint, each compared with its record.

        Raises:
            CheckpointError: If a file is missing, cut short or altered; names the file.
        """
        return {file.name: read_file(self._store, record.prefix, file) for file in record.files}

    def read_one(self, record: CheckpointRecord, name: str) -> bytes | None:
        """One file of a checkpoint, compared with its record; None if the checkpoint has no such file.

        Raises:
            CheckpointError: As read.
        """
        files = {file.name: file for file in record.files}
        return read_file(self._store, record.prefix, files[name]) if name in files else None

    def records(self) -> Iterator[CheckpointRecord]:
        """Every readable record, newest first; the files are not read.

        Raises:
            FormatVersionError: As newest_good.
        """
        for key in self._record_keys():
            with contextlib.suppress(CheckpointError, ObjectMissingError):  # damaged, or removed since it was listed
                yield self._read_record(key)

    def newest_good(self, report: Callable[[str], None] = say, *, put_aside: bool) -> CheckpointRecord | None:
        """The newest checkpoint whose files are all as recorded; reports a line for each that is not.

        Args:
            report: Takes the lines about damaged checkpoints.
            put_aside: Move the record of a damaged checkpoint, so that its step can be recorded again: for the run that
                writes here. Whoever only looks changes nothing.

        Returns:
            Its record; None if there is no good checkpoint.

        Raises:
            FormatVersionError: If another version of this program wrote a record; it stays where it is.
        """
        for key in self._record_keys():
            try:
                return self._read_verified(key)
            except ObjectMissingError:
                continue  # removed since it was listed
            except CheckpointError as error:
                step = int(key.removesuffix(".json").rpartition("-")[2])
                report(f"checkpoint of step {step} is damaged and left out ({error}); trying the one before it")
                if put_aside:
                    self._store.write(f"{_DAMAGED}{key.removeprefix(_RECORDS)}", self._store.read(key))
                    self._store.delete(key)
        return None

    def prune(self, keep: int) -> None:
        """Remove all but the newest `keep` checkpoints: the record first, then the files."""
        for record in list(self.records())[keep:]:
            self._store.delete(_record_key(record.step))
            self._remove_files(record)

    def _record_keys(self) -> list[str]:
        return sorted((info.key for info in self._store.list(_RECORDS)), reverse=True)

    def _read_verified(self, key: str) -> CheckpointRecord:
        """A record whose files are good; read again before it is condemned, because a reader can fail too."""
        try:
            record = self._read_record(key)
            self.read(record)
        except CheckpointError:
            record = self._read_record(key)
            self.read(record)
        return record

    def _read_record(self, key: str) -> CheckpointRecord:
        data, where = self._store.read(key), join_uri(self._store.uri, key)
        try:
            return read_record(CheckpointRecord, data, where, remedy=TRAIN_AGAIN)
        except ConfigError as error:  # nobody typed this file: it is damaged
            raise CheckpointError(str(error)) from error

    def _remove_files(self, record: CheckpointRecord) -> None:
        for file in record.files:
            self._store.delete(f"{record.prefix}/{file.name}")


def write_files(store: ObjectStore, prefix: str, files: Mapping[str, bytes]) -> tuple[FileRecord, ...]:
    """Write files into a folder and read each back.

    Returns:
        A record of each, in the order given.

    Raises:
        CheckpointError: If what was read back differs from what was written.
    """
    records = tuple(
        FileRecord(name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for name, data in files.items()
    )
    for record in records:
        store.write(f"{prefix}/{record.name}", files[record.name])
    for record in records:
        read_file(store, prefix, record)
    return records


def read_file(store: ObjectStore, prefix: str, file: FileRecord) -> bytes:
    """A file, compared with its record.

    Raises:
        CheckpointError: If it is missing, cut short or altered; names the file.
    """
    where = join_uri(store.uri, f"{prefix}/{file.name}")
    try:
        data = store.read(f"{prefix}/{file.name}")
    except ObjectMissingError as error:
        raise CheckpointError(f"{where}: missing, though its record names it") from error
    if len(data) != file.size_bytes or hashlib.sha256(data).hexdigest() != file.sha256:
        raise CheckpointError(f"{where}: {len(data)} bytes that are not the {file.size_bytes} recorded")
    return data


def _record_key(step: int) -> str:
    return f"{_RECORDS}step-{step:09d}.json"
