"""Passwords planted wherever a URI can come from are nowhere after a whole run: terminal, logs, MLflow, outputs."""

import base64
import contextlib
import io
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from jobs import cli, evaluate, sample, train
from pipeline.data.prepare import PrepareConfig, open_source, prepare_source
from pipeline.errors import TrackingUnavailableError
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.tracking import TrackingConfig, check_server
from tests.fixtures_services import mlflow_server
from tests.integration.jobs import EVERY_STEP, TINY

pytestmark = [pytest.mark.services, pytest.mark.timeout(1800)]

PLACES = ("flag", "file", "environment", "endpoint", "place", "away")
SECRETS = {place: f"{place}/w0rd+of {place}" for place in PLACES}


def with_secret(uri: str, place: str) -> str:
    return uri.replace("://", f"://me:{quote(SECRETS[place], safe='')}@")


def forms(secret: str) -> Iterator[bytes]:
    """A password as it is, as in a URI, as in a URI inside another, and each in base64, whatever stands around it."""
    once = quote(secret, safe="")
    for text in (secret.encode(), quote(secret).encode(), once.encode(), quote(once, safe="").encode()):
        yield text
        for before in range(3):  # three bytes are a group of four letters; only whole groups are the same everywhere
            encoded = base64.b64encode(b"x" * before + text)
            yield encoded[4 * (before > 0) : len(encoded) - 4 * ((before + len(text)) % 3 > 0)]


def found_in(data: bytes) -> list[str]:
    return [place for place, secret in SECRETS.items() if any(form in data for form in forms(secret))]


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Terminal:
    """What jobs print, of all that were run."""

    def __init__(self) -> None:
        self.text = ""

    def run(self, job: cli.Job, *flags: str) -> tuple[int, str]:  # type: ignore[type-arg]
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                code = cli.run_job(job, flags)
            except SystemExit as stop:  # --help
                code = int(stop.code or 0)
        self.text += out.getvalue()
        return code, out.getvalue()


def test_what_is_looked_for_would_be_found() -> None:
    assert found_in(b"nothing") == []
    for place, secret in SECRETS.items():
        for text in (f"http://me:{secret}@h", with_secret("http://h", place), quote(with_secret("http://h", place))):
            for before in ("", "x", "xx"):
                assert found_in((before + text).encode()) == [place]
                assert found_in(base64.b64encode((before + text).encode())) == [place]


def test_no_password_is_printed_or_stored_by_a_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], ray_session: None
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("AWS_ENDPOINT_URL", with_secret(f"http://127.0.0.1:{closed_port()}", "endpoint"))
    for name, value in {"ACCESS_KEY_ID": "id", "SECRET_ACCESS_KEY": "x", "REGION": "r"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    digits = PrepareConfig(source="digits", dataset="dataset")
    prepare_source(digits, open_source(digits), map)
    terminal = Terminal()
    database, artifacts = f"sqlite:///{tmp_path}/server.db", str(tmp_path / "artifacts")
    with mlflow_server(database, artifacts, tmp_path) as server:
        by_flag = ["--tracking.uri", with_secret(server, "flag")]
        training = [
            "--dataset", "dataset", "--output", "run", "--steps", "2", "--checkpoint-interval-steps", "1",
            "--workers.num-workers", "1", "--schedule.num-timesteps", "20", *TINY, *EVERY_STEP,
        ]  # fmt: skip
        code, plan = terminal.run(train.JOB, *training, *by_flag, "--dry-run")
        assert code == 0 and f"http://***@{server.removeprefix('http://')}" in plan
        code, printed = terminal.run(train.JOB, *training, *by_flag)
        assert code == 0, printed
        (run,) = connect(server).search_runs([connect(server).get_experiment_by_name("ddpm").experiment_id])
        assert run.data.params["tracking.uri"] == f"http://***@{server.removeprefix('http://')}"

        # What was stored does not hold it: it is asked for again, and taken from the environment.
        (stored, *_) = Path("run/checkpoints").glob("step-000000002-*/config.toml")
        again = ["--config", str(stored), "--resume"]
        code, printed = terminal.run(train.JOB, *again)
        assert code == 2 and "--tracking.uri or in MLFLOW_TRACKING_URI" in printed, printed
        monkeypatch.setenv("MLFLOW_TRACKING_URI", with_secret(server, "environment"))
        code, printed = terminal.run(train.JOB, *again)
        assert code == 0, printed

        (tmp_path / "project.toml").write_text(
            f'dataset = "dataset"\n[tracking]\nuri = "{with_secret(server, "file")}"\n'
            '[sample]\nmodel = "models:/ddpm-digits@candidate"\noutput = "samples"\nimages_per_class = 1\n'
            "shard_size = 10\nbatch_size = 10\n[sample.sampler]\nnum_steps = 2\n"
        )
        by_file = ["--config", str(tmp_path / "project.toml")]
        for flags in (["--dry-run"], [], ["--help"]):
            code, printed = terminal.run(sample.JOB, *by_file, *flags)
            assert code == 0, printed
        measuring = [
            "--dataset", "dataset", "--sample.model", "models:/ddpm-digits@candidate", "--sample.output", "samples",
            "--sample.images-per-class", "1", "--sample.shard-size", "10", "--sample.batch-size", "10",
            "--sample.sampler.num-steps", "2", "--eps-images-per-t", "2", "--max-bound-images", "20",
        ]  # fmt: skip
        code, printed = terminal.run(evaluate.JOB, *measuring)  # with the environment's
        assert code == 0, printed
        assert "eval/eps_mse" in connect(server).get_run(run.info.run_id).data.metrics

    # Everything that can go wrong with a URI. Training begins without MLflow, and waits for it at its end.
    monkeypatch.setenv("DDPM_PATIENCE_MINUTES", "0.02")
    away = with_secret(f"http://127.0.0.1:{closed_port()}", "away")
    place = with_secret("s3://bucket/x", "place")
    wrong = [
        (train.JOB, [*training, "--tracking.url", away]),
        (train.JOB, [*training, "--steps", away]),
        (train.JOB, [*training, "--tracking", away]),
        (train.JOB, [*training, "--preset", away]),
        (train.JOB, [*training, "--network.name", away]),
        (train.JOB, [*training, "--output", place]),
        (sample.JOB, [*by_file, "--tracking.uri", away]),
        (sample.JOB, [*by_file, "--model", place]),
        (sample.JOB, [*by_file, "--model", "run", "--output", "s3://bucket/x"]),
        (sample.JOB, ["--model", "s3://bucket/model", "--output", "other"]),
    ]
    # With its whole traceback this time: what prints less holds no more.
    code, printed = terminal.run(train.JOB, *training, "--tracking.uri", away, "--output", "other", "--traceback")
    assert code in (1, 2) and "error: trained to step 2, checkpoint " in printed, printed
    assert "--resume registers it" in printed, printed
    for job, mistaken in wrong:
        for flags in ([], ["--traceback"]):
            code, printed = terminal.run(job, *mistaken, *flags)
            assert code in (1, 2) and "error: " in printed, printed
    with pytest.raises(TrackingUnavailableError) as refused:
        check_server(TrackingConfig(uri=away.replace("http", "postgresql+nothing")))
    for flags in (["--tracking.uri", away, "--help"], [*by_file, "--help"]):
        assert terminal.run(train.JOB, *flags)[0] == 0

    captured = capfd.readouterr()
    assert not found_in((terminal.text + captured.out + captured.err + str(refused.value)).encode())
    (tmp_path / "project.toml").unlink()  # the one place where somebody wrote it
    import ray

    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    files = [path for folder in (tmp_path, logs) for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".db", ".toml", ".json", ".tar", ".log", ".safetensors", ".png"}
    assert {path: found for path in files if (found := found_in(path.read_bytes()))} == {}
