"""What several tests of object stores check."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pipeline.stores import lease
from pipeline.stores.patience import num_waits
from pipeline.stores.storage import ObjectStore


def keys_of(store: ObjectStore, prefix: str = "") -> list[str]:
    return [info.key for info in store.list(prefix)]


def check_one_line(error: BaseException, *parts: str) -> None:
    text = str(error)
    assert "\n" not in text and len(text) < 500, text
    for part in parts:
        assert part in text, f"{part!r} not in {text!r}"


OUR_SIDE = pytest.mark.parametrize("s3", ["moto"], indirect=True)
"""For what a proxy answers, or nobody, and the S3 server behind it never sees: one kind of server shows it."""
CEPH = pytest.param("ceph", marks=pytest.mark.services)
WATCHED_S = 60.0
"""A lease's duration for who is to see another at work, however long the machine keeps that one waiting."""


@contextmanager
def looking_often() -> Iterator[None]:
    """Who watches a lease for `WATCHED_S` looks at it ten times a second, and so leaves soon."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "_LOOKS_PER_DURATION", 10 * WATCHED_S)
        yield


def wait_for_pauses(number: int) -> None:
    """Wait until requests of this process have been refused so often, and are to be tried again."""
    before = num_waits()
    while num_waits() < before + number:  # pytest's own limit ends a wait for nothing
        time.sleep(0.01)


def tried_again_for_s(error: BaseException) -> float:
    """How long the error says that the request was tried again: never an exact figure, since machines differ."""
    said = re.search(r"\(tried again for ([0-9.]+) s\)", str(error))
    assert said is not None, str(error)
    return float(said[1])
