"""The queue between training and MLflow: ordered, bounded, never in the way, honest about what was lost."""

import threading
import time
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.stores.cancellation import Cancellation
from pipeline.tracking import metric_queue
from pipeline.tracking.metric_queue import DeniedError, MetricPoint, MetricQueue, RefusedError


class Recorder:
    """A store that can be taken away, refuses some steps for good, and keeps what it is sent like MLflow's database."""

    def __init__(self, refuses: frozenset[int] = frozenset()) -> None:
        self.away = False
        self.refuses = refuses
        self.requests: list[Sequence[MetricPoint]] = []
        self.num_refused_calls = 0
        self.done: list[str] = []
        self.lines: list[str] = []

    def send(self, points: Sequence[MetricPoint]) -> None:
        self.ping()
        if any(point.step in self.refuses for point in points):
            raise RefusedError("no such name")
        self.requests.append(points)

    def ping(self) -> None:
        if self.away:
            self.num_refused_calls += 1
            raise ConnectionError("connection\nrefused")

    @property
    def steps(self) -> list[int]:
        return [point.step for points in self.requests for point in points]

    def queue(self, **limits: int) -> MetricQueue:
        return MetricQueue(self.send, self.ping, self.lines.append, "here", **limits)


def points(step: int, num: int = 1) -> list[MetricPoint]:
    return [MetricPoint(key=f"k{index}", value=1.0, step=step, time_ms=0) for index in range(num)]


def queue_without_a_server(recorder: Recorder) -> MetricQueue:
    """Fourteen points of seven steps, and a picture, wait in it."""
    recorder.away = True
    queue = recorder.queue()
    for step in range(7):
        queue.put_points(points(step, 2))
    queue.put_task("a picture", lambda: None)
    return queue


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(metric_queue, "_FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(metric_queue, "_GATHER_S", 0.05)
    before = threading.active_count()
    yield
    deadline = time.monotonic() + 60
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before, "a queue left its thread behind"


def test_everything_arrives_in_order_in_large_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the size of a batch makes a request before the end, however slow this is."""
    monkeypatch.setattr(metric_queue, "_GATHER_S", 600.0)
    recorder = Recorder()
    queue = recorder.queue()
    for step in range(2500):
        queue.put_points(points(step, 3))
    assert queue.close(100) == 0
    assert recorder.steps == [step for step in range(2500) for _ in range(3)]
    sizes = [len(request) for request in recorder.requests]
    assert max(sizes) <= 1000
    assert len(sizes) <= 10, "not a request a step"
    assert all(size % 3 == 0 for size in sizes), "the points of one step stay together"


def test_a_call_larger_than_a_batch_is_cut() -> None:
    recorder = Recorder()
    queue = recorder.queue()
    queue.put_points(points(1, 2300))
    assert queue.close(100) == 0
    assert [len(request) for request in recorder.requests] == [1000, 1000, 300]


def test_while_the_server_is_away_nothing_waits_and_nothing_is_lost() -> None:
    recorder = Recorder()
    recorder.away = True
    queue = recorder.queue()
    for step in range(3000):
        queue.put_points(points(step))
        if step == 1500:
            before = recorder.num_refused_calls
            assert queue.flush(100) == 1501, "kept, and said so"
            assert recorder.num_refused_calls - before <= 2, "flush gives up on the first refusal instead of waiting"
    recorder.away = False
    assert queue.close(100) == 0
    assert recorder.steps == list(range(3000))
    assert len(recorder.lines) == 2
    assert "does not answer (connection refused)" in recorder.lines[0]
    assert "answers again" in recorder.lines[1]


def test_what_does_not_fit_is_counted() -> None:
    recorder = Recorder()
    recorder.away = True
    queue = recorder.queue(max_points=10, max_tasks=2)
    for step in range(25):
        queue.put_points(points(step))
    for index in range(5):
        queue.put_task(f"file {index}", lambda: None)
    recorder.away = False
    assert queue.close(100) == 15 + 3
    assert recorder.steps == list(range(10))
    assert sum("further metrics are lost" in line for line in recorder.lines) == 1


def test_what_is_left_at_the_end_is_counted() -> None:
    recorder = Recorder()
    queue = queue_without_a_server(recorder)
    assert queue.close(1.5) == 15
    assert recorder.num_refused_calls > 1, "it tries again for as long as it may"
    queue.put_points(points(8))
    assert queue.close(0.1) == 16, "what comes after the end is lost and counted, not an error"


def test_what_somebody_has_kept_is_not_lost() -> None:
    recorder = Recorder()
    queue = queue_without_a_server(recorder)
    assert queue.unsent(4) == [point for step in range(5) for point in points(step, 2)]
    recorder.away = False
    assert queue.flush(100) == 0 and queue.unsent(7) == []
    recorder.away = True
    for step in range(7, 10):
        queue.put_points(points(step, 2))
    queue.put_task("another picture", recorder.ping)
    assert queue.close(0.1, kept_to_step=8) == 3


@settings(max_examples=40, deadline=None)
@given(num=st.integers(1, 40), refused=st.sets(st.integers(0, 39), max_size=5))
def test_a_refused_point_takes_no_other_with_it(num: int, refused: set[int]) -> None:
    recorder = Recorder(refuses=frozenset(refused))
    queue = recorder.queue()
    for step in range(num):
        queue.put_points(points(step))
    expected = [step for step in range(num) if step not in refused]
    assert queue.close(100) == num - len(expected)
    assert recorder.steps == expected
    num_refused = num - len(expected)
    said = [line for line in recorder.lines if "refused 'k0' of step" in line]
    assert len(said) == min(num_refused, 1)
    assert [line for line in recorder.lines if line not in said] == (
        [f"MLflow at here: so were {num_refused - 1} more values or files (no such name)"] if num_refused > 1 else []
    )


def test_a_run_that_is_gone_costs_few_requests_and_lines() -> None:
    """It was deleted in mid-run: everything is refused, and the server says so when it is asked for the run."""
    recorder = Recorder(refuses=frozenset(range(200)))
    num_asked = 0

    def gone() -> None:
        nonlocal num_asked
        num_asked += 1
        raise RefusedError("the run was deleted")

    queue = MetricQueue(recorder.send, gone, recorder.lines.append, "here")
    for step in range(100):
        queue.put_points(points(step, 2))
    assert queue.flush(100) == 0
    queue.put_task("samples/1.png", gone)
    for step in range(100, 200):
        queue.put_points(points(step, 2))
    assert queue.close(100) == 401
    assert num_asked <= 6
    assert recorder.lines == [
        "MLflow at here: 200 values were lost (the run was deleted)",
        "MLflow at here: so were 201 more values or files (the run was deleted)",
    ]


def test_a_refusal_of_everything_is_told_in_its_words_and_waited_for() -> None:
    recorder = Recorder()
    why: list[Exception] = [DeniedError("permission denied (HTTP 403); give this user the right")]

    def send(sent: Sequence[MetricPoint]) -> None:
        if why:
            raise why[0]
        recorder.send(sent)

    queue = MetricQueue(send, recorder.ping, recorder.lines.append, "here")
    queue.put_points(points(1))
    assert queue.flush(100) == 1
    why[:] = [ConnectionError("no route")]
    assert queue.flush(100) == 1
    why.clear()
    assert queue.close(100) == 0
    assert recorder.steps == [1]
    assert [line.partition("; the run goes on")[0] for line in recorder.lines] == [
        "MLflow at here takes nothing: permission denied (HTTP 403); give this user the right",
        "MLflow at here does not answer (no route)",
        "MLflow at here answers again; 0 kept metrics follow",
    ]


def test_what_is_left_of_the_tasks_has_names() -> None:
    recorder = Recorder()
    recorder.away = True
    queue = recorder.queue()
    queue.put_task("the status FINISHED", recorder.ping)
    assert queue.close(0.1) == 1
    assert queue.unsent_names == ("the status FINISHED",)


def test_a_task_that_cannot_succeed_is_given_up_and_the_rest_goes_on() -> None:
    recorder = Recorder()
    queue = recorder.queue()
    attempts = []

    def fail() -> None:
        attempts.append(1)
        raise OSError("no\nspace")

    queue.put_task("samples/1.png", fail)
    queue.put_points(points(5))
    queue.put_task("link", lambda: recorder.done.append("link"))
    assert queue.close(100) == 1
    assert len(attempts) == 3
    assert (recorder.steps, recorder.done) == ([5], ["link"])
    assert recorder.lines == ["MLflow at here: samples/1.png was lost (no space)"]


def test_a_task_is_not_to_blame_while_the_server_is_away() -> None:
    recorder = Recorder()
    recorder.away = True
    queue = recorder.queue()

    def upload() -> None:
        recorder.ping()
        recorder.done.append("file")

    queue.put_task("file", upload)
    for _ in range(5):
        assert queue.flush(100) == 1
    recorder.away = False
    assert queue.close(100) == 0
    assert recorder.done == ["file"]


def test_many_threads_may_put() -> None:
    recorder = Recorder()
    queue = recorder.queue()

    def put(first: int) -> None:
        for step in range(first, first + 500):
            queue.put_points(points(step))

    threads = [threading.Thread(target=put, args=(index * 500,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert queue.close(100) == 0
    assert sorted(recorder.steps) == list(range(2000))
    for index in range(4):
        mine = [step for step in recorder.steps if step // 500 == index]
        assert mine == sorted(mine)


def test_a_flush_that_nobody_waits_for_any_more_ends() -> None:
    recorder, go, sending = Recorder(), threading.Event(), threading.Event()
    queue, waiting = recorder.queue(), Cancellation()
    queue.put_task("a server that hangs", lambda: (sending.set(), go.wait()))
    sending.wait()
    threading.Timer(0.2, waiting.cancel).start()
    assert queue.flush(10_000, waiting) == 1
    assert queue.flush(10_000, waiting) == 1, "at once"
    go.set()
    assert queue.flush(10_000, Cancellation()) == 0
    queue.close(5)
