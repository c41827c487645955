"""The records that stand for checkpoints, and what is wrong with one that can be parsed and makes no sense."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from pipeline.config_io import read_record
from pipeline.errors import CheckpointError, ConfigError
from pipeline.stores.object_store import check_key
from pipeline.training.checkpoints.checkpoint_files import FileRecord

T = TypeVar("T")

TRAIN_AGAIN = "train again into another output"
"""What to do about records of an older version, of a run or its checkpoints."""
RECORDS = "_records/"
_RECORD_KEY = re.compile(RECORDS + r"step-(\d{9,})\.json")
_AVERAGE_CARD = re.compile(r"ema-\d+\.json")
_FOLDER = re.compile(r"step-\d{9,}-[^/]+")


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

    @property
    def keys(self) -> list[str]:
        """Keys of the files, relative to the store."""
        return [f"{self.prefix}/{file.name}" for file in self.files]


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


def record_key(step: int) -> str:
    """Key of the record of a step."""
    return f"{RECORDS}step-{step:09d}.json"


def is_average_card(name: str) -> bool:
    """Whether a file of a checkpoint is the card of a further average (see `average_names`)."""
    return _AVERAGE_CARD.fullmatch(name) is not None


def step_of_key(key: str) -> int | None:
    """The step whose record has this key; None for what is no record's key."""
    match = _RECORD_KEY.fullmatch(key)
    return int(match[1]) if match else None


def parse_stored(cls: type[T], data: bytes, where: str) -> T:
    """A record that belongs to a checkpoint.

    Args:
        cls: Its dataclass.
        data: Its JSON.
        where: What messages call it.

    Raises:
        CheckpointError: If it is damaged.
        FormatVersionError: If it is of another version.
    """
    try:
        return read_record(cls, data, where, remedy=TRAIN_AGAIN)
    except ConfigError as error:  # nobody typed this file: it is damaged
        raise CheckpointError(str(error)) from error


def parse_record(data: bytes, step: int, where: str) -> CheckpointRecord:
    """The record of a checkpoint.

    Args:
        data: Its JSON.
        step: The step that its key names.
        where: Its URI.

    Raises:
        CheckpointError: If it is damaged, or names what no checkpoint can have.
        FormatVersionError: If it is of another version.
    """
    record = parse_stored(CheckpointRecord, data, where)
    if record.step != step:
        raise CheckpointError(f"{where}: step: must be {step}, as its name says, got {record.step}")
    if not _FOLDER.fullmatch(record.prefix) or not _is_key(record.prefix):
        raise CheckpointError(f"{where}: prefix: must be a folder like {step_folder(step)}..., got {record.prefix!r}")
    if not record.files or len(record.names) < len(record.files):
        raise CheckpointError(f"{where}: files: at least one, each once, got {len(record.files)} with equal names")
    for file in record.files:
        if "/" in file.name or not _is_key(file.name) or file.size_bytes < 0:
            raise CheckpointError(
                f"{where}: files: a file name and its length, got {file.name!r} of {file.size_bytes} bytes"
            )
    return record


def fault_of(record: CheckpointRecord, sizes: Mapping[str, int], uri: str) -> CheckpointError | None:
    """What is wrong with a checkpoint by the lengths of its files.

    Args:
        record: What was recorded.
        sizes: Bytes of the files that are there, by key.
        uri: What messages call the checkpoint.
    """
    for file in record.files:
        size = sizes.get(f"{record.prefix}/{file.name}")
        if size != file.size_bytes:
            found = "missing" if size is None else f"{size} bytes"
            return CheckpointError(f"{uri}/{file.name}: {found}, recorded are {file.size_bytes} bytes")
    return None


def step_folder(step: int) -> str:
    """How the folders of all attempts at a step begin."""
    return f"step-{step:09d}-"


def _is_key(key: str) -> bool:
    try:
        check_key(key)
    except ValueError:
        return False
    return True
