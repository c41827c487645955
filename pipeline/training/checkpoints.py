"""Training checkpoints in the object store: verified before they count, found by their digest, pruned last.

A checkpoint is a folder `step-SSSSSSSSS-<attempt>/` of files and, written after all of them have been read back and
compared, a record `_records/step-SSSSSSSSS.json` that is created once. Only the record makes a checkpoint exist, so a
writer that is killed half way leaves a folder that nobody reads. This store is the one authority: Ray Train is given
no checkpoints.

Readers move and delete nothing: what is damaged, or of another version, is reported and left out. Only who writes here,
the holder of the run's lease, supersedes such a record, over the very version of it that was found bad.
"""

import hashlib
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from pipeline.config_io import read_record, to_json
from pipeline.errors import CheckpointError, ConfigError, FormatVersionError, ObjectMissingError
from pipeline.models.model_files import MODEL_JSON, SOURCE_JSON, WEIGHTS, ModelFiles, read_card
from pipeline.progress import say
from pipeline.stores.remover import Remover
from pipeline.stores.storage import ObjectStore, join_uri, open_store
from pipeline.training.checkpoint_files import FileRecord, Piece, read_file, write_pieces

TRAIN_AGAIN = "train again into another output"
"""What to do about records of an older version, of a run or its checkpoints."""
_RECORDS, _PINNED = "_records/", "_pinned/"
_RECORD_KEY = re.compile(_RECORDS + r"step-(\d{9,})\.json")


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
    def names(self) -> frozenset[str]:
        """Names of the files."""
        return frozenset(file.name for file in self.files)

    @property
    def digest(self) -> str:
        """Digest of the files' digests: equal for equal contents, wherever they lie."""
        return hashlib.sha256("".join(f"{f.name}:{f.sha256}\n" for f in self.files).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class PinRecord:
    """Why a checkpoint is kept for ever; `_pinned/<its folder>.json`, and its key alone keeps it."""

    format_version: int = 2
    """Version of this record's form."""
    prefix: str
    """The checkpoint's folder."""
    registered_as: str
    """Name in the model registry under which versions of it were made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """Which checkpoints of a run are kept, beside those that are pinned."""

    last: int
    """Number of the newest that are kept."""
    every_steps: int = 0
    """A checkpoint whose step is a multiple of this is kept for ever; 0: none."""

    def keeps(self, step: int, age: int) -> bool:
        """Whether a checkpoint stays that is the age-th newest, counted from 0."""
        return age < self.last or (self.every_steps > 0 and step % self.every_steps == 0)


class CheckpointStore:
    """The checkpoints of one training run.

    Args:
        store: Object store rooted at the run's checkpoint folder.
        report: Takes the lines about what is left out, superseded or cannot be deleted.
    """

    def __init__(self, store: ObjectStore, report: Callable[[str], None] = say) -> None:
        """Use the folder that `store` is rooted at."""
        self._store, self._report = store, report
        self._remover = Remover(store, report)
        self._being_written: set[str] = set()

    @classmethod
    def of_run(cls, output: str, report: Callable[[str], None] = say) -> "CheckpointStore":
        """The checkpoints of the run in an output folder."""
        return cls(open_store(join_uri(output, "checkpoints")), report)

    @property
    def root(self) -> str:
        """The URI of the folder of all checkpoints."""
        return self._store.uri

    def uri(self, record: CheckpointRecord) -> str:
        """The checkpoint's URI, as `sample` and `evaluate` take it."""
        return join_uri(self._store.uri, record.prefix)

    # ---- reading

    def is_empty(self) -> bool:
        """Whether there is no record at all, readable or not."""
        return not self._record_keys()

    def records(self) -> Iterator[CheckpointRecord]:
        """Every readable record, newest first; a line for each that is not. The files are not looked at."""
        for step, found in self._read_records():
            if isinstance(found, CheckpointRecord):
                yield found
            else:
                self.leave_out(step, found)

    def candidates(self) -> Iterator[CheckpointRecord]:
        """The checkpoints whose files are there and as long as recorded, newest first; a line for each other one.

        No file is read: whoever reads one compares it with its record (`read`), and turns to the next candidate where
        it differs.
        """
        for record in self.records():
            sizes = {info.key: info.size_bytes for info in self._store.list(f"{record.prefix}/")}
            wrong = [file for file in record.files if sizes.get(f"{record.prefix}/{file.name}") != file.size_bytes]
            if wrong:
                file, size = wrong[0], sizes.get(f"{record.prefix}/{wrong[0].name}")
                found = "missing" if size is None else f"{size} bytes"
                where = f"{self.uri(record)}/{file.name}"
                self.leave_out(record.step, CheckpointError(f"{where}: {found}, recorded are {file.size_bytes} bytes"))
            else:
                yield record

    def newest(self) -> CheckpointRecord | None:
        """The first of `candidates`; None if there is none."""
        return next(self.candidates(), None)

    def read(self, record: CheckpointRecord, name: str) -> bytes:
        """One file of a checkpoint, compared with its record.

        Raises:
            CheckpointError: If there is no such file, or it is cut short or altered; names the file.
        """
        for file in record.files:
            if file.name == name:
                return read_file(self._store, record.prefix, file)
        raise CheckpointError(f"{self.uri(record)}: has no {name}")

    def read_model(self, record: CheckpointRecord) -> ModelFiles:
        """The average that is registered, compared with its record.

        Raises:
            CheckpointError: As `read`.
            FormatVersionError: If its card is of another version.
        """
        files = ModelFiles(
            card_json=self.read(record, MODEL_JSON),
            weights=self.read(record, WEIGHTS),
            source=self.read(record, SOURCE_JSON) if SOURCE_JSON in record.names else None,
        )
        read_card(files, self.uri(record))
        return files

    def read_finished(self, steps: int) -> tuple[CheckpointRecord, ModelFiles] | None:
        """The newest checkpoint of at least so many steps, and its model; a line for each that is damaged.

        Returns:
            None if there is none: then there is something left to train.
        """
        for record in self.candidates():
            if record.step < steps:
                return None
            try:
                return record, self.read_model(record)
            except (CheckpointError, FormatVersionError) as error:
                self.leave_out(record.step, error)
        return None

    def verify(self, record: CheckpointRecord) -> None:
        """Compare every file with the record.

        Raises:
            CheckpointError: As `read`.
        """
        for file in record.files:
            read_file(self._store, record.prefix, file)

    def leave_out(self, step: int, error: CheckpointError | FormatVersionError) -> None:
        """Say that a checkpoint is not used."""
        what = "of another version" if isinstance(error, FormatVersionError) else "damaged"
        self._report(f"checkpoint of step {step} is {what} and left out ({error}); trying the one before it")

    # ---- writing: for the holder of the run's lease

    def save(self, step: int, pieces: Iterable[Piece]) -> CheckpointRecord:
        """Write the files, read each back, and only then record the checkpoint.

        A record of this step that stands already is read: if it is ours, or a good one of another attempt, it stands,
        and in the second case ours is removed. If it is damaged or of another version, ours takes its place.

        Args:
            step: Optimiser steps behind these files.
            pieces: Makes the files.

        Returns:
            The record that stands for this step.

        Raises:
            CheckpointError: If what was read back differs from what was written.
            StorageError: If the store does not answer; nothing of what was written is removed then.
        """
        key, prefix = _record_key(step), f"step-{step:09d}-{uuid.uuid4().hex[:8]}"
        self._being_written = {prefix}
        ours = CheckpointRecord(step=step, prefix=prefix, files=write_pieces(self._store, prefix, pieces))
        data = to_json(ours)
        while not self._store.create(key, data):
            try:
                standing = self._store.read_versioned(key)
            except ObjectMissingError:
                continue  # removed since
            if standing.data == data:
                return ours  # an answer that was lost: ours has been created before
            try:
                theirs = self._parse(standing.data, key)
                self.verify(theirs)
            except (CheckpointError, FormatVersionError) as error:
                if self._store.replace(key, data, standing.etag) is not None:
                    self._report(f"checkpoint of step {step}: this one takes the place of a record there ({error})")
                    return ours
                continue  # it has changed: read it again
            self._remover.remove(_keys(ours))
            return theirs
        return ours

    def pin(self, record: CheckpointRecord, registered_as: str) -> None:
        """Keep a checkpoint for ever; safe to repeat.

        Args:
            record: The checkpoint.
            registered_as: Name in the model registry under which it is about to be registered.

        Raises:
            StorageError: If the store does not take it.
        """
        pin = PinRecord(prefix=record.prefix, registered_as=registered_as)
        self._store.create(f"{_PINNED}{record.prefix}.json", to_json(pin))

    def prune(self, newest: CheckpointRecord, retention: Retention) -> None:
        """Remove what need not be kept, the record before the files; what cannot be removed is said and counted.

        Args:
            newest: The checkpoint that was just recorded. Later records are not its run's past, so they neither count
                nor go: they were left out when the run went on, and are superseded when it comes by.
            retention: What is kept of it and of those before it.
        """
        pinned = self._pinned_folders()
        found = [record for _, record in self._read_records() if isinstance(record, CheckpointRecord)]
        for age, record in enumerate(record for record in found if record.step <= newest.step):
            if not retention.keeps(record.step, age) and record.prefix not in pinned:
                keys = [_record_key(record.step), *_keys(record)]
                if self._remover.remove(keys) < len(keys):
                    return

    def remove_leftovers(self) -> int:
        """Remove folders of attempts that died before their record stood; for the lease's holder while nothing writes.

        If a record cannot be read nothing is removed, because it may name any of them.

        Returns:
            How many files were removed.
        """
        # The files are listed before the records: what is recorded in between is named by then.
        files = [info.key for info in self._store.list("step-")]
        named = self._pinned_folders() | self._being_written
        for step, found in self._read_records():
            if not isinstance(found, CheckpointRecord):
                self._report(f"folders of attempts that died stay where they are: step {step} may name one ({found})")
                return 0
            named.add(found.prefix)
        return self._remover.remove(key for key in files if key.partition("/")[0] not in named)

    def close(self) -> None:
        """Say how many deletions failed."""
        self._remover.sum_up()

    def _pinned_folders(self) -> set[str]:
        keys = (info.key for info in self._store.list(_PINNED))
        return {key.removeprefix(_PINNED).removesuffix(".json") for key in keys}

    def _record_keys(self) -> list[tuple[int, str]]:
        """Steps and keys, newest first."""
        found = (_RECORD_KEY.fullmatch(info.key) for info in self._store.list(_RECORDS))
        return sorted(((int(match[1]), match[0]) for match in found if match), reverse=True)

    def _read_records(self) -> Iterator[tuple[int, CheckpointRecord | CheckpointError | FormatVersionError]]:
        """Every record with its step, newest first, or why it cannot be read."""
        for step, key in self._record_keys():
            try:
                yield step, self._parse(self._store.read(key), key)
            except ObjectMissingError:
                continue  # removed since it was listed
            except (CheckpointError, FormatVersionError) as error:
                yield step, error

    def _parse(self, data: bytes, key: str) -> CheckpointRecord:
        try:
            return read_record(CheckpointRecord, data, join_uri(self._store.uri, key), remedy=TRAIN_AGAIN)
        except ConfigError as error:  # nobody typed this file: it is damaged
            raise CheckpointError(str(error)) from error


def _record_key(step: int) -> str:
    return f"{_RECORDS}step-{step:09d}.json"


def _keys(record: CheckpointRecord) -> list[str]:
    return [f"{record.prefix}/{file.name}" for file in record.files]
