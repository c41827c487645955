"""Jobs beside training: in order, one of a kind at a time, and no error is lost."""

import threading
import time

import pytest

from pipeline.errors import StorageError
from pipeline.training.background import BackgroundWriter


def fail() -> None:
    raise StorageError("the disk is full")


def test_jobs_run_beside_and_in_order() -> None:
    lines: list[str] = []
    writer, done, go = BackgroundWriter(lines.append), list[str](), threading.Event()
    writer.wait("snapshot")

    def wait_and_do() -> None:
        go.wait()
        done.append("snapshot")

    writer.start("snapshot", wait_and_do)
    writer.wait("checkpoint")  # another kind is not waited for
    writer.start("checkpoint", lambda: done.append("checkpoint"))
    assert done == []
    threading.Timer(0.3, go.set).start()
    writer.wait("snapshot")
    assert done[0] == "snapshot"
    writer.finish()
    assert done == ["snapshot", "checkpoint"]
    assert len(lines) == 1 and lines[0].startswith("waited 0.") and "until the snapshot before" in lines[0]
    writer.close()
    assert len(lines) == 1


def test_an_error_is_raised_at_the_next_job_and_nothing_is_done_after_it() -> None:
    lines: list[str] = []
    writer, done = BackgroundWriter(lines.append), list[str]()
    writer.start("snapshot", fail)
    writer.start("checkpoint", lambda: done.append("names a snapshot that is not there"))
    for kind in ("checkpoint", "snapshot", "another"):
        with pytest.raises(StorageError, match="the disk is full"):
            writer.wait(kind)
    writer.close()
    assert done == [] and lines == [], "it was raised, and need not be said"


def test_an_error_of_the_last_job_is_raised_at_the_end() -> None:
    writer = BackgroundWriter(print)
    writer.start("checkpoint", fail)
    with pytest.raises(StorageError, match="the disk is full"):
        writer.finish()
    writer.close()


def test_closing_finishes_what_was_started_and_says_what_nobody_was_told() -> None:
    lines: list[str] = []
    writer, done = BackgroundWriter(lines.append), list[str]()

    def slow() -> None:
        time.sleep(0.2)
        done.append("written")

    writer.start("checkpoint", slow)
    writer.start("snapshot", fail)
    writer.close()
    assert done == ["written"]
    assert lines == ["writing beside training has failed: the disk is full"]


def test_a_look_waits_for_nothing_and_raises_what_has_gone_wrong() -> None:
    writer, go = BackgroundWriter(print), threading.Event()

    def wait_and_fail() -> None:
        go.wait()
        fail()

    writer.start("snapshot", wait_and_fail)
    writer.check()
    go.set()
    with pytest.raises(StorageError, match="the disk is full"):
        while True:  # pytest's own limit ends a wait for nothing
            writer.check()
    writer.close()
