"""A label plan as a file: one row for each image, as CSV with a line of column names, or as JSON lines.

    label,noise_id,id              {"label": "cat", "noise_id": 7, "id": "a-1"}
    cat,7,a-1                      {"label": 3}
    3,,

`label` is a class's name or number. The others may be missing, of all rows or of some: `noise_id` is the id whose noise
the image has, in [0, 2^48), by default the image's own, its place among the rows; `id` is a text of the caller's.

Rows go into compact arrays as they are read: a million of them, with all three columns, take about 30 MB.
"""

import csv
import io
import json
from array import array
from typing import Any

import numpy as np

from pipeline.errors import ConfigError
from pipeline.generation.requests.class_names import ClassNames
from pipeline.generation.spec.labels import CallerIds, LabelPlan
from pipeline.generation.spec.sampling_plan import MAX_IMAGES

COLUMNS = ("label", "noise_id", "id")
ENDINGS = (".csv", ".jsonl", ".ndjson")
"""What the file's name ends in: the first is CSV, the others are JSON lines."""
FIELD = "request.label_plan"

_COLUMNS = frozenset(COLUMNS)
_NOISE_ID_DIGITS = len(str(MAX_IMAGES))


def parse_label_plan(data: bytes, where: str, classes: ClassNames) -> LabelPlan:
    """The rows of a label plan.

    Args:
        data: The file's bytes, UTF-8.
        where: Its URI, whose ending says which kind it is.
        classes: The classes of the model.

    Raises:
        ConfigError: If the model has no classes, or a line is not as it must be; names file and line.
    """
    classes.check_any(FIELD)
    rows = _Rows(classes)
    try:
        if where.endswith(ENDINGS[0]):
            _read_csv(data, rows)
        else:
            _read_json_lines(data, rows)
    except UnicodeDecodeError:
        raise ConfigError(f"{FIELD}: {where}, {_undecodable(data)}") from None
    except _LineError as error:
        raise ConfigError(f"{FIELD}: {where}, line {error.line}: {error}") from None
    if not rows.labels:
        raise ConfigError(f"{FIELD}: {where}: has no rows; write one for each image")
    return rows.plan()


class _LineError(Exception):
    """What is wrong with a line."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


class _Rows:
    """Rows as they are read."""

    def __init__(self, classes: ClassNames) -> None:
        self._classes = classes
        self.labels = array("i")
        self._noise_ids = array("q")
        self._has_noise_ids = False
        self._text = bytearray()
        self._ends = array("q")

    def add(self, line: int, label: Any, noise_id: Any, caller_id: Any) -> None:
        """Check a row and keep it; None for a value that it does not have."""
        found = self._classes.find(label) if type(label) in (str, int) else None
        if found is None:
            got = "nothing" if label is None or label == "" else _short(label)
            raise _LineError(f"label: must be one of {self._classes}, got {got}; write one of them", line)
        if noise_id is None:
            noise_id = len(self.labels)
        elif type(noise_id) is not int or not 0 <= noise_id < MAX_IMAGES:
            message = f"noise_id: must be a whole number in [0, 2^48), got {_short(noise_id)}; write one, or nothing"
            raise _LineError(message, line)
        else:
            self._has_noise_ids = True
        if caller_id is not None:
            self._text += _utf_8(caller_id, line)
        self._noise_ids.append(noise_id)
        self._ends.append(len(self._text))
        self.labels.append(found)

    def plan(self) -> LabelPlan:
        """The rows as arrays, which share the memory of what was read."""
        caller_ids = None
        if self._text:
            caller_ids = CallerIds(
                text=np.frombuffer(self._text, dtype=np.uint8), ends=np.frombuffer(self._ends, dtype=np.int64)
            )
        return LabelPlan(
            labels=np.frombuffer(self.labels, dtype=np.int32),
            noise_ids=np.frombuffer(self._noise_ids, dtype=np.int64) if self._has_noise_ids else None,
            caller_ids=caller_ids,
        )


def _utf_8(value: Any, line: int) -> bytes:
    try:
        if isinstance(value, str):
            return value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write
        pass
    raise _LineError(f"id: must be a text, got {_short(value)}; write it in quotes", line)


def _read_csv(data: bytes, rows: _Rows) -> None:
    lines = csv.reader(io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline=""), skipinitialspace=True, strict=True)
    num_columns = 0
    try:
        for values in lines:
            if not values:  # an empty line
                continue
            if not num_columns:
                label, noise_id, caller_id = _places(values, lines.line_num)
                num_columns = len(values)
                continue
            if len(values) != num_columns:
                message = f"must have {num_columns} values, as the first line has, got {len(values)}; correct it"
                raise _LineError(message, lines.line_num)
            values.append("")  # where a column is that there is not
            rows.add(lines.line_num, values[label], _number(values[noise_id]), values[caller_id] or None)
    except csv.Error as error:
        raise _LineError(f"is not CSV: {error}; correct it", lines.line_num) from None


def _places(names: list[str], line: int) -> list[int]:
    """Where the columns are; -1 for one that is missing."""
    unknown = [name for name in names if name not in COLUMNS]
    if unknown or "label" not in names or len(set(names)) < len(names):
        got = ", ".join(_short(name) for name in names[: len(COLUMNS) + 1])
        message = f"must name the columns, label and perhaps noise_id and id, each once, got {got}"
        raise _LineError(f"{message}; write {','.join(COLUMNS)}", line)
    return [names.index(name) if name in names else -1 for name in COLUMNS]


def _number(text: str) -> int | str | None:
    """A whole number as its value, nothing as None, and what is none as it is."""
    if text.isdigit() and text.isascii() and len(text) <= _NOISE_ID_DIGITS:
        return int(text)
    return text or None


def _read_json_lines(data: bytes, rows: _Rows) -> None:
    for line, text in enumerate(io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline="\n"), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _LineError(f"is not JSON: {error}; correct it", line) from None
        if not isinstance(row, dict):
            raise _LineError(f'must be an object such as {{"label": 3}}, got {_short(row)}; correct it', line)
        if not row.keys() <= _COLUMNS:
            unknown = next(name for name in row if name not in _COLUMNS)
            raise _LineError(f"has {_short(unknown)}, which is none of {', '.join(COLUMNS)}; leave it out", line)
        rows.add(line, row.get("label"), row.get("noise_id"), row.get("id"))


def _undecodable(data: bytes) -> str:
    """Where a file is not UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return f"line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
    raise AssertionError("it was not UTF-8 a moment ago")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
