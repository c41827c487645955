"""Runs against a real database and a real server: what was logged is there, once, in order, with its steps."""

import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError, TrackingUnavailableError
from pipeline.tracking import metric_queue, run_requests
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.tracking import TrackingConfig, TrackingRun, new_run_key
from tests.fixtures_services import free_port, mlflow_server


def test_a_run_keeps_what_was_logged(config: TrackingConfig, tmp_path: Path, lines: list[str]) -> None:
    run = TrackingRun.open(
        config, new_run_key(), "first", params={"lr": 1e-3, "unet.base": 8}, tags={"ddpm.output": "s3://b/o"}
    )
    began_ms = int(time.time() * 1000)
    for step in range(2500):
        run.log_metrics({"loss": 1 / (step + 1), "grad_norm": step}, step)
    ended_ms = time.time() * 1000
    run.log_file(b"\x89PNG pixels", "samples/step-000000001.png")
    run.log_text("größe = 1\n", "config.toml")
    assert run.finish() == 0
    assert run.metric_history("loss") == [(step, 1 / (step + 1)) for step in range(2500)]
    assert run.metric_history("grad_norm") == [(step, float(step)) for step in range(2500)]
    assert run.metric_history("nothing") == []
    client = connect(run.uri)
    times_ms = [point.timestamp for point in client.get_metric_history(run.run_id, "loss")]
    assert began_ms <= min(times_ms) <= max(times_ms) <= ended_ms, "the time axis is the time of logging"
    stored = client.get_run(run.run_id)
    assert stored.info.run_name == "first"
    assert stored.info.status == "FINISHED"
    assert stored.data.params == {"lr": "0.001", "unet.base": "8"}
    assert stored.data.tags["ddpm.output"] == "s3://b/o"
    artifacts = tmp_path / "mlruns" / run.run_id / "artifacts"
    assert (artifacts / "samples/step-000000001.png").read_bytes() == b"\x89PNG pixels"
    assert (artifacts / "config.toml").read_text(encoding="utf-8") == "größe = 1\n"
    assert lines == []


def test_logging_a_step_waits_for_nothing(config: TrackingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server takes the first points and does not answer before the last are logged."""
    run = TrackingRun.open(config, new_run_key())
    send, asked, may_answer = run._queue._send, threading.Event(), threading.Event()

    def send_slowly(points: Any) -> None:
        asked.set()
        may_answer.wait()
        send(points)

    monkeypatch.setattr(run._queue, "_send", send_slowly)
    run.log_metrics({"loss": 0.5}, 0)
    assert asked.wait(60)
    for step in range(1, 2000):
        run.log_metrics({"loss": 0.5, "lr": 0.1, "images_per_s": 3.0}, step)
    may_answer.set()
    assert run.close() == 0
    assert len(run.metric_history("loss")) == 2000


def test_the_handle_travels_and_two_processes_write_at_once(config: TrackingConfig) -> None:
    run = TrackingRun.open(config, new_run_key())
    run.log_metrics({"driver": 0.0}, 0)
    code = """
        import pickle, sys
        run = pickle.loads(bytes.fromhex(sys.argv[1]))
        for step in range(300):
            run.log_metrics({"loss": step}, step)
            if step % 100 == 0:
                run.flush()
        assert run.close() == 0
    """
    worker = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), pickle.dumps(run).hex()])
    num_steps = 1
    while worker.poll() is None:
        run.log_metrics({"driver": num_steps}, num_steps)
        run.flush()
        num_steps += 1
    assert worker.returncode == 0
    assert run.finish() == 0
    assert [step for step, _ in run.metric_history("loss")] == list(range(300))
    assert [step for step, _ in run.metric_history("driver")] == list(range(num_steps))


def last_logged_step(run: TrackingRun, redone: tuple[int, int] | None = None) -> int:
    return run_requests.last_logged_step(connect(run.uri), run.require_id(), redone)


def test_redone_steps_are_logged_once_more(config: TrackingConfig) -> None:
    """After a return to step 30 from 60: what has been logged since is what stands there twice."""
    run = TrackingRun.open(config, new_run_key())

    def log(*steps: int) -> None:
        for step in steps:
            run.log_metrics({run_requests.REDONE_METRIC: 0.1, "loss": 1.0}, step)
        assert run.flush(10) == 0

    log(10, 20, 30, 40, 50, 60)
    assert last_logged_step(run) == 60
    assert last_logged_step(run, (31, 60)) == 30
    log(40, 50)
    assert last_logged_step(run, (31, 60)) == 50
    again = TrackingRun.join(config, run.require_id())
    again.skip_logged_steps((31, 60))
    for step in (40, 50, 60, 70):
        again.log_metrics({run_requests.REDONE_METRIC: 0.2}, step)
    assert again.finish() == 0
    steps = [step for step, _ in run.metric_history(run_requests.REDONE_METRIC)]
    assert steps == [10, 20, 30, 40, 40, 50, 50, 60, 60, 70]
    assert last_logged_step(run, (31, 60)) == 70
    run.close()


def test_a_resumed_run_logs_no_step_twice(config: TrackingConfig) -> None:
    run = TrackingRun.open(config, new_run_key())
    assert last_logged_step(run) == -1
    for step in range(0, 70, 10):
        run.log_metrics({"loss": step}, step)
    run.log_metrics({"other": 1.0}, 30)
    assert run.close() == 0
    resumed = TrackingRun.join(config, run.run_id)
    assert last_logged_step(run) == 60
    resumed.skip_logged_steps()
    for step in range(40, 100, 10):
        resumed.log_metrics({"loss": -step}, step)
    assert resumed.finish() == 0
    expected = [(step, float(step)) for step in range(0, 70, 10)] + [(70, -70.0), (80, -80.0), (90, -90.0)]
    assert run.metric_history("loss") == expected


def test_a_point_that_is_sent_twice_is_stored_once(config: TrackingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server takes a batch and dies before it answers: the queue cannot know, and sends it again."""
    run = TrackingRun.open(config, new_run_key())
    send, calls = run._queue._send, []

    def send_and_lose_the_answer(points: Any) -> None:
        send(points)
        calls.append(len(points))
        if len(calls) == 1:
            raise ConnectionResetError("connection reset by peer")

    monkeypatch.setattr(run._queue, "_send", send_and_lose_the_answer)
    for step in range(50):
        run.log_metrics({"loss": step, "nan": math.nan}, step)
    assert run.close() == 0
    assert calls == [100, 100]
    assert run.metric_history("loss") == [(step, float(step)) for step in range(50)]
    assert len(run.metric_history("nan")) == 50


def test_values_that_are_not_finite_and_names_that_mlflow_refuses(config: TrackingConfig, lines: list[str]) -> None:
    run = TrackingRun.open(config, new_run_key())
    run.log_metrics({"loss": math.nan, "up": math.inf, "bad!name": 1.0, "fine": 2.0}, 1)
    run.log_metrics({"text": "no number", "fine": 3.0}, 2)  # type: ignore[dict-item]
    assert run.close() == 2
    assert math.isnan(run.metric_history("loss")[0][1])
    assert run.metric_history("up")[0][1] > 1e300
    assert run.metric_history("fine") == [(1, 2.0), (2, 3.0)]
    assert any("metric 'text' of step 2 is no number" in line for line in lines)
    assert any("refused 'bad!name' of step 1" in line for line in lines)
    assert lines[-1].endswith(f"2 metrics or files of run {run.run_id} are lost")


def test_params_beyond_one_request_and_changed_ones(config: TrackingConfig) -> None:
    run = TrackingRun.open(
        config, new_run_key(), params={f"p{index}": index for index in range(250)} | {"long": "x" * 7000}
    )
    TrackingRun.join(config, run.run_id).log_params({"p1": 1, "p2": "changed", "new": None})
    data = connect(run.uri).get_run(run.run_id).data
    assert len(data.params) == 252
    assert (data.params["p2"], data.params["new"], len(data.params["long"])) == ("2", "None", 6000)
    assert {key: value for key, value in data.tags.items() if key.startswith("resumed.")} == {"resumed.p2": "changed"}


def test_a_checkpoint_appears_in_the_run_once(config: TrackingConfig) -> None:
    run = TrackingRun.open(config, new_run_key())
    for _ in range(2):  # a link whose answer was lost is made again
        run.log_checkpoint(500, "s3://bucket/it's/step-000000500-ab", "d1")
    run.log_checkpoint(1000, "s3://bucket/run/step-000001000-cd", "d2")
    assert run.finish() == 0
    client = connect(run.uri)
    stored = client.get_run(run.run_id)
    assert sorted(output.step for output in stored.outputs.model_outputs) == [500, 1000]
    models = client.search_logged_models([run.experiment_id], filter_string=f"source_run_id = '{run.run_id}'")
    found = {model.name: (model.tags["ddpm.uri"], model.tags["ddpm.digest"], str(model.status)) for model in models}
    assert found == {
        "step-000000500": ("s3://bucket/it's/step-000000500-ab", "d1", "READY"),
        "step-000001000": ("s3://bucket/run/step-000001000-cd", "d2", "READY"),
    }
    assert stored.data.tags["ddpm.checkpoint"] == "s3://bucket/run/step-000001000-cd"
    assert stored.data.tags["ddpm.checkpoint_digest"] == "d2"


def test_a_deleted_experiment_is_named(config: TrackingConfig) -> None:
    run = TrackingRun.open(config, new_run_key())
    connect(run.uri).delete_experiment(run.experiment_id)
    with pytest.raises(ConfigError, match=r"tracking\.experiment: 'test' was deleted"):
        TrackingRun.open(config, new_run_key())


def test_drivers_that_start_at_once_share_the_experiment(config: TrackingConfig) -> None:
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(lambda _: TrackingRun.open(config, new_run_key()), range(4)))
    assert len({run.experiment_id for run in runs}) == 1
    assert len({run.run_id for run in runs}) == 4


def test_a_new_database_is_made_without_a_word(tmp_path: Path) -> None:
    """Its folder, its tables, an experiment and its artifacts: all beside it, nothing in the current folder."""
    code = """
        import sys
        from pipeline.tracking.tracking import TrackingConfig, TrackingRun, new_run_key, check_server
        config = TrackingConfig(uri=sys.argv[1])
        check_server(config)
        run = TrackingRun.open(config, new_run_key())
        run.log_metrics({"loss": 1.0}, 1)
        run.log_text("x", "a/b.txt")
        run.log_checkpoint(1, "s3://b/c", "d")
        assert run.finish() == 0
    """
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    uri = f"sqlite:///{tmp_path}/new/folder/mlflow.db"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), uri], cwd=elsewhere, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(elsewhere.iterdir()) == []
    assert sorted(path.name for path in (tmp_path / "new/folder").iterdir()) == ["mlflow.db", "mlruns"]


def test_a_job_without_a_server_goes_on(lines: list[str]) -> None:
    """Joined before the server went away, never seen again: nothing raises, every loss is counted."""
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets the port meanwhile
    run = TrackingRun(f"http://127.0.0.1:{taken.getsockname()[1]}", "a" * 32)
    run.skip_logged_steps()
    for step in range(100):
        run.log_metrics({"loss": 1.0}, step)
    run.log_file(b"", "a.png")
    run.log_checkpoint(1, "s3://b/c", "d")
    assert run.flush(100) == 102
    assert run.finish("FAILED", timeout_s=1) == 103, "with the status, which did not arrive either"
    assert len(lines) == 2
    assert "does not answer ([Errno 111] Connection refused)" in lines[0]
    assert "103 metrics or files of run" in lines[1]
    with pytest.raises(TrackingUnavailableError):
        run.metric_history("loss")
    taken.close()


@pytest.mark.services
@pytest.mark.parametrize("num_outages", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_a_server_killed_and_restarted_in_mid_run_loses_nothing(
    num_outages: int, tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metric_queue, "_LONGEST_PAUSE_S", 1.0)
    database, port = f"sqlite:///{tmp_path}/server.db", free_port()
    sent: list[int] = []

    def log(run: TrackingRun, num_steps: int) -> None:
        for _ in range(num_steps):
            run.log_metrics({"loss": 1.0 / (len(sent) + 1), "lr": 0.5}, len(sent))
            sent.append(len(sent))

    def log_until_said(run: TrackingRun, words: str, times: int) -> None:
        while sum(words in line for line in lines) < times:
            log(run, 1)
            time.sleep(0.01)

    run = None
    for outage in range(num_outages):
        with mlflow_server(database, str(tmp_path / "artifacts"), tmp_path, port=port) as uri:
            if run is None:
                run = TrackingRun.open(TrackingConfig(uri=uri), new_run_key())
            log_until_said(run, "answers again", outage)
            log(run, 1000)
            assert run.flush(300) == 0
            run.log_checkpoint(outage, f"s3://bucket/step-{outage}", f"digest {outage}")
            log(run, 200)
            kill_tree(server_pid(port))
        run.log_file(f"picture {outage}".encode(), f"samples/{outage}.png")
        log_until_said(run, "does not answer", outage + 1)
        log(run, 1000)
    assert run is not None
    with mlflow_server(database, str(tmp_path / "artifacts"), tmp_path, port=port):
        assert run.finish(timeout_s=300) == 0
        assert [step for step, _ in run.metric_history("loss")] == sent
        assert [step for step, _ in run.metric_history("lr")] == sent
        client = connect(run.uri)
        stored = client.get_run(run.run_id)
        assert stored.info.status == "FINISHED"
        assert sorted(output.step for output in stored.outputs.model_outputs) == list(range(num_outages))
        assert sorted(info.path for info in client.list_artifacts(run.run_id, "samples")) == [
            f"samples/{outage}.png" for outage in range(num_outages)
        ]
        # A second process resumes while the server is there: nothing of what is stored is sent again.
        resumed = TrackingRun.join(TrackingConfig(uri=run.uri), run.run_id)
        resumed.skip_logged_steps()
        for step in range(len(sent) - 50, len(sent) + 50):
            resumed.log_metrics({"loss": -1.0}, step)
        assert resumed.close() == 0
        assert [step for step, _ in run.metric_history("loss")] == list(range(len(sent) + 50))
    assert len([line for line in lines if "does not answer" in line]) == num_outages
    assert not any("lost" in line for line in lines)


def server_pid(port: int) -> int:
    """The process that listens on a port of this machine."""
    import psutil

    return next(
        connection.pid
        for connection in psutil.net_connections("tcp")
        if connection.status == "LISTEN" and connection.laddr.port == port and connection.pid
    )


def kill_tree(pid: int) -> None:
    """SIGKILL to a server process: no answer, no clean end."""
    os.kill(pid, signal.SIGKILL)
    while Path(f"/proc/{pid}/stat").exists():
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)


def test_no_password_of_a_uri_is_logged(config: TrackingConfig, tmp_path: Path, lines: list[str]) -> None:
    """Of none that a parameter, a tag, a name or a text mentions; a value is cut only after that."""
    uri = "http://me:secret-word@host"
    params = {"uri": uri, "long": "x" * (run_requests._MAX_PARAM_LENGTH - len("http://me:secret-word")) + " " + uri}
    run = TrackingRun.open(config, new_run_key(), f"run of {uri}", params=params, tags={"ddpm.where": uri})
    run.log_params({"uri": f"{uri}/other"})
    run.log_text(f"uri = '{uri}'\n", "config.toml")
    assert run.finish() == 0
    data = connect(run.uri).get_run(run.run_id).data
    assert data.params["uri"] == data.tags["ddpm.where"] == "http://***@host"
    assert data.tags["resumed.uri"] == "http://***@host/other"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"mlflow.db", "config.toml"} <= {path.name for path in files}
    assert [path for path in files if b"secret-w" in path.read_bytes()] == []
