"""Jobs beside training: in order, one of a kind at a time, and no error is lost."""

import threading
import time
from concurrent.futures import Future

import pytest

from pipeline.errors import StorageError
from pipeline.stores.cancellation import Cancellation
from pipeline.training.worker.background import BackgroundWriter


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
    assert len(lines) == 1 and lines[0].startswith("waited ") and "until the snapshot before" in lines[0]
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


def test_a_job_that_is_cancelled_stops_and_is_no_error() -> None:
    lines: list[str] = []
    writer, done, running = BackgroundWriter(lines.append), list[str](), threading.Event()
    cancellation = Cancellation()

    def look_again_and_again() -> None:
        running.set()
        while True:
            cancellation.check()

    writer.cancel("checkpoint")  # there is none
    writer.start("checkpoint", look_again_and_again, cancellation)
    running.wait()
    writer.start("snapshot", lambda: done.append("snapshot"))
    writer.cancel("checkpoint")
    writer.start("checkpoint", lambda: done.append("checkpoint"), Cancellation())
    writer.finish()
    assert done == ["snapshot", "checkpoint"], "the others are done, in order"
    writer.cancel("checkpoint")
    writer.close()
    assert lines == []


def test_a_job_that_is_cancelled_before_its_turn_is_not_done() -> None:
    writer, done, go = BackgroundWriter(print), list[str](), threading.Event()
    writer.start("snapshot", lambda: done.append("snapshot" if go.wait() else ""))
    cancellation = Cancellation()
    writer.start("checkpoint", lambda: done.append("checkpoint"), cancellation)
    with cancellation.calling(go.set):  # so that `cancel`, which waits for its turn, comes back
        writer.cancel("checkpoint")
    writer.close()
    assert done == ["snapshot"]


def test_what_goes_wrong_in_a_cancelled_job_is_raised() -> None:
    writer, running, cancellation = BackgroundWriter(print), threading.Event(), Cancellation()

    def fail_when_cancelled() -> None:
        running.set()
        cancellation.event.wait()
        fail()

    writer.start("checkpoint", fail_when_cancelled, cancellation)
    running.wait()
    with pytest.raises(StorageError, match="the disk is full"):
        writer.cancel("checkpoint")
    writer.close()


def test_a_milestone_is_waited_for_and_not_what_follows_it() -> None:
    writer, go, milestone = BackgroundWriter(print), threading.Event(), Future[int]()

    def come_to_it_and_wait() -> None:
        milestone.set_result(7)
        go.wait()

    writer.start("checkpoint", come_to_it_and_wait)
    assert writer.wait_until("checkpoint", milestone) == 7
    go.set()
    writer.start("checkpoint", fail)
    with pytest.raises(StorageError, match="the disk is full"):
        writer.wait_until("checkpoint", Future[int]())
    writer.start("checkpoint", lambda: None)  # it is not done: a job before has failed
    with pytest.raises(StorageError, match="the disk is full"):
        writer.wait_until("checkpoint", Future[int]())
    writer.close()
