"""jobs/ema.py as a user meets it."""

import sys
from pathlib import Path

import pytest

from jobs import ema
from jobs.cli import run_subcommand
from pipeline.models.registry import resolve_model
from pipeline.tracking.tracking import TrackingConfig
from tests.pipeline.training.small_runs import make_run


def run(flags: list[str]) -> int:
    return run_subcommand(ema.JOBS, flags, program="jobs/ema.py", doc=ema.__doc__)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def test_reconstruct_makes_a_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(folder / "train", steps=32)
    tracking = f"sqlite:///{folder}/mlflow.db"
    flags = ["reconstruct", "--run", "train", "--output", "ema", "--sigma-rel", "0.075", "--register-as", "digits"]
    flags += ["--tracking.uri", tracking]
    assert run([*flags, "--dry-run"]) == 0
    assert "# snapshots   8, of sigma_rel 0.05, 0.1" in capsys.readouterr().out
    assert [path.name for path in folder.iterdir()] == ["train"], "a dry run writes nothing"
    assert run(flags) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("done: sigma_rel 0.075 in ") and last.endswith("registered models:/digits/1")
    models = [resolve_model(uri, TrackingConfig(uri=tracking)) for uri in ("ema/sigma_rel-0.075", "models:/digits/1")]
    assert models[0].files == models[1].files


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["jobs/ema.py: must be followed by reconstruct or sweep, got nothing"]),
        (["draw"], ["jobs/ema.py: must be followed by reconstruct or sweep, got 'draw'"]),
        (["--sigma-rel", "0.1"], ["reconstruct or sweep"]),
        (["sweep", "--run", ""], ["error: run: must not be empty"]),
        (["sweep", "--sigma-rels", "0.1", "9"], ["error: sigma_rels: ", "9"]),
        (["reconstruct", "--run", "nothing"], ["nothing", "holds no checkpoint"]),
        (["reconstruct", "--run", "plain"], ["plain", "--post-hoc-ema.snapshot-interval-steps"]),
        (["reconstruct", "--sigma-rel", "0.5"], ["sigma_rel", "0.5"]),
        (["reconstruct", "--run", "nothing", "--register-as", "a/b", "--dry-run"], ["error: register_as: ", "a/b"]),
        (["sweep", "--sigma-rels", "0.1", "0.1"], ["sigma_rels", "distinct"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: list[str]
) -> None:
    make_run(folder / "plain", steps=1, interval=0)
    assert run(flags) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line


@pytest.mark.parametrize(("flags", "code"), [(["--help"], 0), (["-h"], 0), (["-h", "sweep"], 0), ([], 2)])
def test_without_a_name_help_lists_the_jobs(flags: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(flags) == code
    printed = capsys.readouterr()
    assert (printed.err == "") == (code == 0)
    assert "`reconstruct` makes a model of one length" in printed.out
    assert "\n  jobs/ema.py sweep        Measure a trained run's averages" in printed.out
