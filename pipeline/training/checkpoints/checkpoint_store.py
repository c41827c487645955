"""Training checkpoints in the object store: verified before they count, found by their digest, pruned last.

A checkpoint is a folder `step-SSSSSSSSS-<attempt>/` of files and, written after all of them have been read back and
compared, a record `_records/step-SSSSSSSSS.json` that is created once. Only the record makes a checkpoint exist, so a
writer that is killed half way leaves a folder that nobody reads. This store is the one authority: Ray Train is given
no checkpoints.

Readers move and delete nothing: what is damaged, or of another version, is reported and left out. Only who writes here,
the holder of the run's lease, supersedes such a record, over the very version of it that was found bad.
"""

import copy
import uuid
from collections.abc import Callable, Iterable, Iterator

from pipeline.config_io import to_json
from pipeline.errors import CheckpointError, FormatVersionError, ObjectMissingError
from pipeline.models.model_files import MODEL_JSON, SOURCE_JSON, WEIGHTS, ModelCard, ModelFiles, read_card
from pipeline.progress import say
from pipeline.stores.cancellation import Cancellation, CancelledWriteError
from pipeline.stores.lease import LEASE_KEY
from pipeline.stores.remover import Remover
from pipeline.stores.storage import ObjectStore, join_uri, open_store
from pipeline.training.checkpoints.checkpoint_files import Piece, PieceWriter, read_file
from pipeline.training.checkpoints.checkpoint_records import (
    RECORDS,
    CheckpointRecord,
    PinRecord,
    Retention,
    fault_of,
    is_average_card,
    parse_record,
    parse_stored,
    record_key,
    step_folder,
    step_of_key,
)
from pipeline.training.checkpoints.ema_snapshots import parse_snapshots
from pipeline.training.checkpoints.state_files import (
    SNAPSHOTS_JSON,
    STATE_JSON,
    UNSENT_METRICS_JSON,
    Position,
    parse_position,
)

_PINNED = "_pinned/"
LEFTOVER_AGE_S = 3600.0
"""Seconds after which nobody is thought to write in a folder that no record names: much longer than one file takes."""
_HASTY_S = 10.0


class CheckpointStore:
    """The checkpoints of one training run.

    Args:
        store: Object store rooted at the run's checkpoint folder.
        report: Takes the lines about what is left out, superseded or cannot be deleted.
        output: The run's folder, whose lease shows the time on the store's clock.
    """

    def __init__(
        self, store: ObjectStore, report: Callable[[str], None] = say, *, output: ObjectStore | None = None
    ) -> None:
        """Use the folder that `store` is rooted at."""
        self._store, self._report, self._output = store, report, output
        self._said: set[str] = set()
        self._remover = Remover(store, report)
        self._cancellation, self._cancelled = Cancellation(), list[PieceWriter]()

    @classmethod
    def of_run(cls, output: str, report: Callable[[str], None] = say) -> "CheckpointStore":
        """The checkpoints of the run in an output folder."""
        return cls(open_store(join_uri(output, "checkpoints")), report, output=open_store(output))

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
            if (fault := fault_of(record, sizes, self.uri(record))) is None:
                yield record
            else:
                self.leave_out(record.step, fault)

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

    def read_position(self, record: CheckpointRecord) -> Position:
        """How far the run had come, compared with the record.

        Raises:
            CheckpointError: As `read`, or if it is another step's.
            FormatVersionError: If it is of another version.
        """
        where = f"{self.uri(record)}/{STATE_JSON}"
        position = parse_position(self.read(record, STATE_JSON), where)
        if position.step != record.step:
            raise CheckpointError(f"{where}: is of step {position.step}, its record of {record.step}")
        return position

    def check_cards(self, record: CheckpointRecord) -> None:
        """Refuse what `read_model` refuses, of every average, without reading the weights; only small files are read.

        Raises:
            CheckpointError: As `read`, or if a card names other weights or another source than the record.
            FormatVersionError: If a card is of another version.
        """
        sha256 = {file.name: file.sha256 for file in record.files}
        averages = {name: f"{name.removesuffix('.json')}.safetensors" for name in record.names if is_average_card(name)}
        for name, weights in sorted({MODEL_JSON: WEIGHTS, **averages}.items()):
            where = f"{self.uri(record)}/{name}"
            card = parse_stored(ModelCard, self.read(record, name), where)
            for file, named in ((weights, card.weights_sha256), (SOURCE_JSON, card.source_sha256)):
                if sha256.get(file) != named:
                    raise CheckpointError(f"{where}: its {file} is not the one of this checkpoint (sha256 differs)")
        if SOURCE_JSON in record.names:
            self.read(record, SOURCE_JSON)

    def verify(self, record: CheckpointRecord) -> None:
        """Compare every file with the record.

        Raises:
            CheckpointError: As `read`.
        """
        for file in record.files:
            read_file(self._store, record.prefix, file)

    def leave_out(self, step: int, error: CheckpointError | FormatVersionError) -> None:
        """Say that a checkpoint is not used; the same of the same one is said once."""
        what = "of another version" if isinstance(error, FormatVersionError) else "damaged"
        line = f"checkpoint of step {step} is {what} and left out ({error}); trying the one before it"
        if line not in self._said:
            self._said.add(line)
            self._report(line)

    # ---- writing: for the holder of the run's lease

    def with_cancellation(self, cancellation: Cancellation) -> "CheckpointStore":
        """The same checkpoints, for a `save` and a `prune` that may be told to stop: CancelledWriteError ends them."""
        view = copy.copy(self)
        view._store, view._cancellation = self._store.with_cancellation(cancellation), cancellation
        return view

    def save(
        self, step: int, pieces: Iterable[Piece], *, fence: Callable[[], object] = lambda: None
    ) -> CheckpointRecord:
        """Write the files, read each back, and only then record the checkpoint.

        A record of this step that stands already is read: if it is ours, or another attempt's that a run can go on
        from as it can from ours, it stands, and in the second case ours is removed. Otherwise ours takes its place.

        Args:
            step: Optimiser steps behind these files.
            pieces: Makes the files.
            fence: Called before a record is created or replaced; raises if this process may no longer write.

        Returns:
            The record that stands for this step.

        Raises:
            CheckpointError: If what was read back differs from what was written.
            StorageError: If the store does not answer; nothing of what was written is removed then.
            Exception: What the fence raises; nothing is recorded or removed then.
            CancelledWriteError: If it is cancelled before it is recorded: `remove_cancelled` removes the files. If an
                answer to the record is still out, they stay, because it may stand.
        """
        key, prefix = record_key(step), step_folder(step) + uuid.uuid4().hex[:8]
        writer = PieceWriter(self._store, prefix, self._cancellation)
        try:
            ours = CheckpointRecord(step=step, prefix=prefix, files=writer.write(pieces))
            fence()
            self._cancellation.check()
        except CancelledWriteError:
            self._cancelled.append(writer)
            raise
        data = to_json(ours)
        while True:
            if self._store.create(key, data):
                return ours
            try:
                standing = self._store.read_versioned(key)
            except ObjectMissingError:
                fence()
                continue  # removed since
            if standing.data == data:
                return ours  # an answer that was lost: ours has been created before
            try:
                theirs = parse_record(standing.data, step, join_uri(self._store.uri, key))
                self._check_as_usable(theirs, ours)
            except (CheckpointError, FormatVersionError) as error:
                fence()
                if self._store.replace(key, data, standing.etag) is not None:
                    self._report(f"checkpoint of step {step}: this one takes the place of a record there ({error})")
                    return ours
                fence()
                continue  # it has changed: read it again
            self._remover.remove(ours.keys, through=self._store)
            return theirs

    def _check_as_usable(self, theirs: CheckpointRecord, ours: CheckpointRecord) -> None:
        """Refuse a checkpoint that a run could not go on from as it can from ours."""
        if missing := sorted(ours.names - theirs.names - {UNSENT_METRICS_JSON}):
            raise CheckpointError(f"{self.uri(theirs)}: has no {', '.join(missing)}")
        self.verify(theirs)
        if MODEL_JSON in ours.names:
            self.check_cards(theirs)
        if STATE_JSON in ours.names:
            self.read_position(theirs)
        if SNAPSHOTS_JSON in ours.names:
            parse_snapshots(self.read(theirs, SNAPSHOTS_JSON), f"{self.uri(theirs)}/{SNAPSHOTS_JSON}")

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

        A checkpoint whose files are not all there, as long as recorded, does not count as one that is kept. Where that
        is so of the newest one, nothing is removed.

        Args:
            newest: The checkpoint that was just recorded. Later records are not its run's past, so they neither count
                nor go: they were left out when the run went on, and are superseded when it comes by.
            retention: What is kept of it and of those before it.
        """
        pinned = self._pinned_folders()
        found = [record for _, record in self._read_records() if isinstance(record, CheckpointRecord)]
        sizes = {info.key: info.size_bytes for info in self._store.list("step-")}
        if (fault := fault_of(newest, sizes, self.uri(newest))) is not None:
            self._report(f"checkpoint of step {newest.step}: no other is removed, because it is damaged ({fault})")
            return
        age = 0
        for record in (record for record in found if record.step <= newest.step):
            self._cancellation.check()
            if not retention.keeps(record.step, age) and record.prefix not in pinned:
                keys = [record_key(record.step), *record.keys]
                if self._remover.remove(keys, through=self._store) < len(keys):
                    return
            age += fault_of(record, sizes, self.uri(record)) is None

    def remove_cancelled(self, timeout_s: float = 0.0) -> None:
        """Remove the files of cancelled checkpoints; of one that still writes after so many seconds, the next time."""
        store = self._store.with_patience(_HASTY_S)  # what stays is removed as a leftover, some day
        while self._cancelled and self._cancelled[0].wait(timeout_s):
            keys = [info.key for info in store.list(f"{self._cancelled.pop(0).prefix}/")]
            self._remover.remove(keys, through=store)

    def remove_leftovers(self, *, older_than_s: float = LEFTOVER_AGE_S) -> int:
        """Remove folders of attempts that died before their record stood; for the lease's holder while nothing writes.

        A folder in which something was written lately stays: its writer may still live, without having heard that the
        lease is another's. If a record cannot be read nothing is removed, because it may name any of them.

        Args:
            older_than_s: Least age of a folder's newest file, in seconds on the store's clock.

        Returns:
            How many files were removed.
        """
        # The files are listed before the records: what is recorded in between is named by then.
        files, modified_s = list[str](), dict[str, float]()
        for info in self._store.list("step-"):
            folder = info.key.partition("/")[0]
            files.append(info.key)
            modified_s[folder] = max(info.modified_s, modified_s.get(folder, 0.0))
        now_s = max(self._lease_renewed_s(), *modified_s.values(), 0.0)
        named = self._pinned_folders()
        named |= {folder for folder, changed_s in modified_s.items() if now_s - changed_s <= older_than_s}
        for step, found in self._read_records():
            if not isinstance(found, CheckpointRecord):
                self._report(f"folders of attempts that died stay where they are: step {step} may name one ({found})")
                return 0
            named.add(found.prefix)
        self._store.remove_unfinished("step-", older_than_s=older_than_s)
        return self._remover.remove(key for key in files if key.partition("/")[0] not in named)

    def remove_after(self, step: int) -> None:
        """Remove every checkpoint of a later step; for the lease's holder, if nobody writes.

        The records go first; a folder that stays is a leftover. Of what was registered only the record goes.

        Raises:
            StorageError: If a record cannot be removed: it would be gone on from.
        """
        later = [(s, found) for s, found in self._read_records() if s > step]
        for later_step, _ in later:
            self._store.delete(record_key(later_step))
        pinned = self._pinned_folders()
        for _, found in later:
            if isinstance(found, CheckpointRecord) and found.prefix not in pinned:
                self._remover.remove(found.keys)

    def close(self) -> None:
        """Say how many deletions failed."""
        self._remover.sum_up()

    def _lease_renewed_s(self) -> float:
        """When the lease of the run was last renewed, on the store's clock; 0 where there is none."""
        lease = None if self._output is None else self._output.stat(LEASE_KEY)
        return 0.0 if lease is None else lease.modified_s

    def _pinned_folders(self) -> set[str]:
        keys = (info.key for info in self._store.list(_PINNED))
        return {key.removeprefix(_PINNED).removesuffix(".json") for key in keys}

    def _record_keys(self) -> list[tuple[int, str]]:
        """Steps and keys, newest first."""
        found = ((step_of_key(info.key), info.key) for info in self._store.list(RECORDS))
        return sorted(((step, key) for step, key in found if step is not None), reverse=True)

    def _read_records(self) -> Iterator[tuple[int, CheckpointRecord | CheckpointError | FormatVersionError]]:
        """Every record with its step, newest first, or why it cannot be read."""
        for step, key in self._record_keys():
            try:
                yield step, parse_record(self._store.read(key), step, join_uri(self._store.uri, key))
            except ObjectMissingError:
                continue  # removed since it was listed
            except (CheckpointError, FormatVersionError) as error:
                yield step, error
