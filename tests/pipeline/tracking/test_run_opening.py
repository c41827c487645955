"""A run is opened once, whatever answers are lost, now or when the server is back; nothing logged meanwhile is lost."""

import copy
import dataclasses
import pickle
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pipeline.errors import ConfigError, TrackingUnavailableError
from pipeline.tracking import metric_queue, run_opening, tracking
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.run_opening import RUN_KEY_TAG, START_CHECK_TAG, NotOpenedError
from pipeline.tracking.tracking import TrackingConfig, TrackingRun, new_run_key
from tests.faulty_proxy import Answer, FaultyProxy, LoseAnswer, LoseRequest


def wait_for(what: Callable[[], object]) -> None:
    while not what():  # pytest's own limit ends a wait for nothing
        time.sleep(0.05)


def runs_of(uri: str, experiment: str = "test") -> list[Any]:
    client = connect(uri)
    found = client.get_experiment_by_name(experiment)
    return [] if found is None else list(client.search_runs([found.experiment_id]))


def test_a_key_is_one_run(config: TrackingConfig) -> None:
    key = new_run_key()
    first = TrackingRun.open(config, key, "first", params={"lr": 0.1}, tags={"ddpm.output": "out"})
    assert first.finish("FAILED") == 0
    told: list[str] = []
    again = TrackingRun.open(config, key, "second", params={"lr": 0.1}, on_opened=told.append)
    assert told == [again.run_id] == [first.run_id]
    (stored,) = runs_of(again.uri)
    assert (stored.info.run_name, stored.info.status) == ("first", "RUNNING")
    assert stored.data.params == {"lr": "0.1"}
    assert {stored.data.tags[name] for name in (RUN_KEY_TAG, "ddpm.output")} == {key, "out"}
    other = TrackingRun.open(config, new_run_key())
    assert len({first.run_id, other.run_id}) == 2


def test_a_new_experiment_is_one_of_models_in_training_and_an_old_one_is_left_as_it_is(config: TrackingConfig) -> None:
    old = connect(str(config.uri)).create_experiment("old")
    for name in ("new", "old"):
        TrackingRun.open(dataclasses.replace(config, experiment=name), new_run_key())
    new, found = (connect(str(config.uri)).get_experiment_by_name(name) for name in ("new", "old"))
    assert new.tags["mlflow.experimentKind"] == "custom_model_development"
    assert found.experiment_id == old and "mlflow.experimentKind" not in found.tags


def test_only_the_driver_makes_a_run_and_a_worker_waits_for_it(config: TrackingConfig, lines: list[str]) -> None:
    key = new_run_key()
    worker = copy.copy(TrackingRun(str(config.uri), None, experiment="test", run_key=key))  # as pickle makes one
    worker.skip_logged_steps()
    for step in range(20):
        worker.log_metrics({"loss": step}, step)
    assert worker.flush(5) == 20
    with pytest.raises(NotOpenedError):
        worker.require_id()
    with pytest.raises(TrackingUnavailableError, match="is not opened yet"):
        worker.metric_history("loss")
    assert runs_of(worker.uri) == []
    driver = TrackingRun.open(config, key)
    for step in range(20, 40):
        worker.log_metrics({"loss": step}, step)
    assert worker.close() == 0
    assert worker.run_id == driver.run_id
    assert driver.metric_history("loss") == [(step, float(step)) for step in range(40)]
    assert [line for line in lines if "lost" in line] == []


@pytest.mark.parametrize("key", ["", "it's", "a b", "a`b"])
def test_keys_that_no_filter_could_hold_are_refused(config: TrackingConfig, key: str) -> None:
    with pytest.raises(ValueError, match="a key of letters and digits"):
        TrackingRun.open(config, key)


def test_what_the_owner_refuses_at_the_start_ends_the_start(config: TrackingConfig) -> None:
    """The run's record, say, cannot be written: the run is FAILED, and nothing was trained."""

    def refuse(_: str) -> None:
        raise ConfigError("output: no room")

    with pytest.raises(ConfigError, match="no room"):
        TrackingRun.open(config, new_run_key(), on_opened=refuse)
    (stored,) = runs_of(str(config.uri))
    assert stored.info.status == "FAILED"


def test_a_start_that_the_checks_refuse_leaves_no_run(config: TrackingConfig, lines: list[str]) -> None:
    """Else each that is tried again would leave one more; a run that was there before stays, FAILED."""

    def refuse(_: object) -> None:
        raise TrackingUnavailableError("no room for artifacts")

    told = list[str]()
    for _ in range(2):
        with pytest.raises(TrackingUnavailableError, match="no room"):
            TrackingRun.open(config, new_run_key(), check=refuse, on_opened=told.append)
    assert (runs_of(str(config.uri)), told) == ([], [])
    key = new_run_key()
    TrackingRun.open(config, key).finish("KILLED")
    with pytest.raises(TrackingUnavailableError, match="no room"):
        TrackingRun.open(config, key, check=refuse)
    (stored,) = runs_of(str(config.uri))
    assert (stored.info.status, stored.data.tags[START_CHECK_TAG]) == ("FAILED", "no room for artifacts")
    assert lines == []


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["made", "params", "check"])
def test_an_interrupted_start_leaves_no_run_that_is_running(
    config: TrackingConfig, monkeypatch: pytest.MonkeyPatch, interruption: type[BaseException], where: str
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise interruption

    if where == "made":  # its answer does not come to be known
        make_run = tracking.make_run
        monkeypatch.setattr(tracking, "make_run", lambda *args: interrupt(make_run(*args)))
    if where == "params":
        monkeypatch.setattr("pipeline.tracking.run_requests.log_params", interrupt)
    with pytest.raises(interruption):
        TrackingRun.open(config, new_run_key(), params={"lr": 1}, check=interrupt if where == "check" else None)
    (stored,) = runs_of(str(config.uri))
    assert stored.info.status == "KILLED"


def test_an_interrupted_job_is_not_held_for_long(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_INTERRUPTED_CLOSE_S", 0.5)
    monkeypatch.setattr(tracking, "_SILENT_S", 0.2)
    run = TrackingRun("http://127.0.0.1:9", "a" * 32)
    started_s = time.monotonic()
    run.finish("KILLED")
    assert time.monotonic() - started_s < 100
    assert [line for line in lines if line.startswith("waiting for MLflow at http://127.0.0.1:9, which has")] != []
    assert lines[-1].endswith(f"are lost, among them the status KILLED of run {'a' * 32}")


def test_a_run_that_is_deleted_in_mid_run_is_told_in_a_few_lines(config: TrackingConfig, lines: list[str]) -> None:
    run = TrackingRun.open(config, new_run_key())
    connect(run.uri).delete_run(run.require_id())
    for step in range(100):
        run.log_metrics({"loss": 1.0, "lr": 1.0}, step)
    assert run.close() == 200
    assert "the run was deleted at" in lines[0]
    assert len(lines) <= 3


def test_a_run_to_resume_that_is_gone_offers_a_new_one(config: TrackingConfig) -> None:
    run = TrackingRun.open(config, new_run_key())
    connect(run.uri).delete_run(str(run.run_id))
    with pytest.raises(ConfigError, match=r"deleted; restore it, or go on in a new run with --new-run$"):
        TrackingRun.join(config, str(run.run_id), run_key=run.run_key)
    with pytest.raises(ConfigError, match=r"'f00': not at sqlite.*--new-run"):
        TrackingRun.join(config, "f00")


@pytest.fixture
def proxy(served: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    monkeypatch.setattr(run_opening, "_LONGEST_PAUSE_S", 1.0)
    monkeypatch.setattr(metric_queue, "_LONGEST_PAUSE_S", 1.0)
    with FaultyProxy(served) as proxy:
        yield proxy


WORKER = """
    import pickle, sys
    from pipeline.tracking import metric_queue
    metric_queue._LONGEST_PAUSE_S = 1.0
    run = pickle.loads(bytes.fromhex(sys.argv[1]))
    run.skip_logged_steps()
    for step in range(40):
        run.log_metrics({"loss": step}, step)
        if step == 19:
            print("twenty", flush=True)
            sys.stdin.readline()
    sys.exit(run.close())
"""


@pytest.mark.services
def test_a_server_that_is_away_at_the_start(proxy: FaultyProxy, lines: list[str]) -> None:
    away, key, told, checked = proxy.down(), new_run_key(), list[str](), list[str]()
    config = TrackingConfig(uri=proxy.endpoint, experiment="away at the start")
    run = TrackingRun.open(
        config,
        key,
        "late",
        params={"lr": 0.1},
        tags={"ddpm.output": "out"},
        check=lambda opened: checked.append(str(opened.run_id)),
        on_opened=told.append,
    )
    assert (run.run_id, told, checked) == (None, [], [])
    assert lines == [
        f"MLflow at {proxy.endpoint} gives no answer ([Errno 111] Connection refused); "
        "the job begins, its metrics are kept and sent when the server is there; "
        "start the server, or correct tracking.uri or MLFLOW_TRACKING_URI"
    ]
    run.log_text("a = 1\n", "config.toml")
    command = [sys.executable, "-c", textwrap.dedent(WORKER), pickle.dumps(run).hex()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "twenty\n"
        away.close()
        wait_for(lambda: told)
        assert told == checked == [run.run_id]
        worker.communicate("go on\n", timeout=300)
        assert worker.returncode == 0
    assert run.finish() == 0
    (stored,) = runs_of(run.uri, "away at the start")
    assert stored.info.run_id == run.run_id
    assert (stored.info.run_name, stored.info.status) == ("late", "FINISHED")
    assert stored.data.params == {"lr": "0.1"}
    assert (stored.data.tags[RUN_KEY_TAG], stored.data.tags["ddpm.output"]) == (key, "out")
    assert run.metric_history("loss") == [(step, float(step)) for step in range(40)]
    assert [file.path for file in connect(run.uri).list_artifacts(str(run.run_id))] == ["config.toml"]
    assert f"MLflow at {run.uri} answers; the run is open" in lines


@pytest.mark.services
def test_lost_answers_make_no_second_run(served: str, proxy: FaultyProxy, lines: list[str]) -> None:
    """Of create_run, then of the search that would find the run; and of the creating of its experiment."""
    proxy.add(LoseAnswer(), path="experiments/create", times=1)
    proxy.add(LoseAnswer(), path="runs/create", times=2)
    proxy.add(LoseRequest(), path="runs/search", times=1, after=1)
    told: list[str] = []
    config = TrackingConfig(uri=proxy.endpoint, experiment="lost-answers")
    run = TrackingRun.open(config, new_run_key(), params={"lr": 0.1}, on_opened=told.append)
    wait_for(lambda: told)
    assert proxy.count(LoseAnswer) == 2, "no second run was asked for"
    assert proxy.count(LoseRequest) == 1
    (stored,) = runs_of(served, "lost-answers")
    assert told == [run.run_id] == [stored.info.run_id]
    assert stored.data.params == {"lr": "0.1"}
    assert len(lines) == 2, lines
    run.finish()


@pytest.mark.services
def test_a_refusal_that_is_found_later_is_a_line_and_a_tag(served: str, proxy: FaultyProxy, lines: list[str]) -> None:
    def refuse(_: TrackingRun) -> None:
        raise TrackingUnavailableError("registering 'ddpm' was tried: permission denied (no, http://me:secret-word@x)")

    config, away = TrackingConfig(uri=proxy.endpoint, experiment="refused-later"), proxy.down()
    run = TrackingRun.open(config, new_run_key(), check=refuse)
    run.log_metrics({"loss": 1.0}, 1)
    with away:
        pass
    wait_for(lambda: any(line.startswith("error: the start checks") for line in lines))
    run.log_metrics({"loss": 2.0}, 2)
    assert run.flush() == 0
    (stored,) = runs_of(served, "refused-later")
    assert stored.info.status == "RUNNING"
    assert stored.data.tags[START_CHECK_TAG].startswith(
        "registering 'ddpm' was tried: permission denied (no, http://***@x"
    )
    assert run.finish() == 0
    assert run.metric_history("loss") == [(1, 1.0), (2, 2.0)]
    (line,) = (line for line in lines if line.startswith("error: "))
    assert "permission denied" in line and "--resume registers the model afterwards" in line
    assert "secret-word" not in "".join(lines)


@pytest.mark.services
def test_what_the_server_refuses_now_is_raised(proxy: FaultyProxy) -> None:
    proxy.add(Answer(403, b"Permission denied"), path="runs/create")
    with pytest.raises(TrackingUnavailableError, match=r"permission denied \(HTTP 403: Permission denied\)"):
        TrackingRun.open(TrackingConfig(uri=proxy.endpoint, experiment="no-runs"), new_run_key())


@pytest.mark.services
def test_a_run_that_the_server_refuses_later_is_tried_until_it_may(
    served: str, proxy: FaultyProxy, lines: list[str]
) -> None:
    config, away = TrackingConfig(uri=proxy.endpoint, experiment="no-runs-yet"), proxy.down()
    run = TrackingRun.open(config, new_run_key())
    run.log_metrics({"loss": 1.0}, 1)
    proxy.add(Answer(403, b"Permission denied"), path="runs/create")
    with away:
        pass
    wait_for(lambda: proxy.count(Answer) > 2)
    assert len([line for line in lines if "the run cannot be opened (HTTP 403: Permission denied)" in line]) == 1
    proxy.clear()
    assert run.finish() == 0
    assert runs_of(served, "no-runs-yet")[0].info.run_id == run.run_id
    assert run.metric_history("loss") == [(1, 1.0)]


@pytest.mark.services
def test_a_server_that_is_away_when_a_run_goes_on(served: str, proxy: FaultyProxy, lines: list[str]) -> None:
    first = TrackingRun.open(TrackingConfig(uri=served, experiment="resumed"), new_run_key())
    for step in range(20):
        first.log_metrics({"loss": step}, step)
    assert first.finish("KILLED") == 0
    config, away, checked = TrackingConfig(uri=proxy.endpoint, experiment="resumed"), proxy.down(), list[str]()
    run = TrackingRun.join(config, str(first.run_id), check=lambda joined: checked.append(str(joined.run_id)))
    assert run.run_id == first.run_id
    run.skip_logged_steps()
    for step in range(10, 40):
        run.log_metrics({"loss": step}, step)
    with away:
        pass
    wait_for(lambda: checked)
    assert connect(served).get_run(str(run.run_id)).info.status == "RUNNING"
    assert run.finish() == 0
    assert first.metric_history("loss") == [(step, float(step)) for step in range(40)]
    assert connect(served).get_run(str(run.run_id)).info.status == "FINISHED"
    assert not any("lost" in line for line in lines)


@pytest.mark.services
def test_a_server_that_comes_back_at_the_very_end(
    served: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pauses have grown by then; the end does not sleep through them, and makes no start checks any more."""
    monkeypatch.setattr(run_opening, "_FIRST_PAUSE_S", 3600.0)
    config, away, checked = TrackingConfig(uri=proxy.endpoint, experiment="the-end"), proxy.down(), list[str]()
    run = TrackingRun.open(config, new_run_key(), params={"lr": 0.1}, check=lambda _: checked.append("late"))
    run.log_metrics({"loss": 1.0}, 1)
    threading.Timer(1, away.close).start()
    started_s = time.monotonic()
    assert run.finish() == 0
    assert time.monotonic() - started_s < 300
    (stored,) = runs_of(served, "the-end")
    assert (stored.info.status, stored.data.params, checked) == ("FINISHED", {"lr": "0.1"}, [])
    assert run.metric_history("loss") == [(1, 1.0)]


@pytest.mark.services
def test_a_server_that_never_comes_is_given_up_in_the_end(proxy: FaultyProxy, lines: list[str]) -> None:
    proxy.down()
    run = TrackingRun.open(TrackingConfig(uri=proxy.endpoint, experiment="never"), new_run_key())
    run.log_metrics({"loss": 1.0}, 1)
    started_s = time.monotonic()
    assert run.finish(timeout_s=2) == 2, "with the status"
    assert time.monotonic() - started_s < 100
    status = f"the status FINISHED of run {run.run_key}"
    assert lines[-1].endswith(f"2 metrics or files of run {run.run_key} are lost, among them {status}")
    wait_for(lambda: not any(thread.name == "mlflow-opening" for thread in threading.enumerate()))
