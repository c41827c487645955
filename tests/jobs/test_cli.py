"""The jobs as a user meets them on the command line: one line per mistake, exit code 2, nothing written."""

import importlib
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from jobs import benchmark
from jobs.cli import run_job
from pipeline.data.prepare import PrepareConfig, open_source, prepare_source
from pipeline.training.train import describe_plan, train

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Finished:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def train_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """jobs/train.py in this process (starting one takes seconds), in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(*flags: str) -> Finished:
        capsys.readouterr()
        code = run_job(flags, lambda preset: preset.train, lambda config: print(train(config)), describe_plan)
        printed = capsys.readouterr()
        return Finished(returncode=code, stdout=printed.out, stderr=printed.err)

    return run


def test_a_job_is_a_program(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "--dataset", "nothing"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: ") and finished.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--stepz", "3"], ["Unrecognized", "--stepz"]),
        (["--steps", "many"], ["--steps", "many"]),
        (["--steps", "0"], ["error: steps: ", "above 0", "got 0"]),
        (["--unet.dropout", "3"], ["error: unet.dropout: ", "3.0"]),
        (["--post-hoc-ema.snapshot-interval-steps", "-1"], ["error: post_hoc_ema.snapshot_interval_steps: ", "-1"]),
        (["--preset", "mnist"], ["--preset", "digits", "mnist"]),
        (["--config", "nothing.toml"], ["--config", "nothing.toml"]),
        (["--dataset", "nothing"], ["nothing", "prepare_data"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(train_job, flags: list[str], words: list[str], tmp_path: Path) -> None:
    finished = train_job(*flags)
    assert finished.returncode == 2, finished.stderr
    (line,) = finished.stderr.strip().splitlines()
    assert line.startswith("error: ") and all(word in line for word in words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stepz = 3", ["mine.toml", "stepz", "steps"]),
        ('steps = "many"', ["mine.toml", "steps", "many"]),
        ("[unet]\ndropout = 3.0", ["mine.toml", "dropout"]),
        ("steps = ", ["mine.toml", "TOML"]),
    ],
)
def test_a_mistake_in_a_file_names_the_file(train_job, text: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(text)
    finished = train_job("--config", "mine.toml")
    assert finished.returncode == 2, finished.stderr
    (line,) = finished.stderr.strip().splitlines()
    assert line.startswith("error: ") and all(word in line for word in words)


def test_preset_then_file_then_flags(train_job, tmp_path: Path) -> None:
    config = PrepareConfig(source="digits", dataset="dataset", shard_size=250)
    prepare_source(config, open_source(config), map)
    text = 'dataset = "dataset"\nsteps = 7\nglobal_batch = 64\n[unet]\nbase_channels = 16\nnum_groups = 4\n'
    (tmp_path / "mine.toml").write_text(text)
    finished = train_job("--config", "mine.toml", "--steps", "9", "--dry-run")
    assert finished.returncode == 0, finished.stderr
    resolved = tomllib.loads(finished.stdout)
    assert (resolved["steps"], resolved["global_batch"], resolved["schedule"]["name"]) == (9, 64, "cosine")
    assert "# images        576 " in finished.stdout
    assert not (tmp_path / "artifacts").exists(), "a dry run writes nothing"


@pytest.mark.parametrize("name", ["prepare_data", "train", "sample", "evaluate"])
def test_help_documents_every_field(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    part = "prepare" if name == "prepare_data" else name
    importlib.import_module(f"jobs.{name}")
    with pytest.raises(SystemExit) as stop:
        run_job(["--help"], lambda preset: getattr(preset, part), lambda config: None, lambda config: [])
    assert not stop.value.code
    text = capsys.readouterr().out
    assert "--preset" in text and "--dry-run" in text
    blocks = re.split(r"^ *[│|]? *(?=--[a-z])", text, flags=re.MULTILINE)[1:]
    words = {
        block.split()[0]: re.sub(r"\(default.*?\)|[│|╰─╯-]", "", block, flags=re.DOTALL).split() for block in blocks
    }
    assert [flag for flag, said in words.items() if len(said) < 5] == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", ""], "error: model: must not be empty"),
        (["--request.split", ""], "error: request.split: must not be empty"),
        (["--request.kind", "partial"], "error: request.inputs: partial needs images"),
        (["--sampler.eta", "2"], "error: sampler.eta: must be in [0, 1]"),
        (["--sampler.eta", "x"], "error: Error parsing --sampler.eta: "),
    ],
)
def test_a_mistake_is_named_by_its_path(
    flags: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert run_job(flags, lambda preset: preset.sample, lambda config: None, lambda config: []) == 2
    assert capsys.readouterr().err.startswith(words)
    nested = [flag.replace("--", "--sample.") for flag in flags]
    assert run_job(nested, lambda preset: preset.evaluate, lambda config: None, lambda config: []) == 2
    words = words.replace("error: Error parsing --", "error: Error parsing --sample.")
    if "parsing" not in words:
        words = words.replace("error: ", "error: sample.")
    assert capsys.readouterr().err.startswith(words)


def test_a_file_with_one_job_names_it_too(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, code in ((["--help"], 0), (["draw"], 2)):
        assert benchmark.main(flags) == code
    printed = capsys.readouterr()
    assert "  jobs/benchmark.py train  " in printed.out
    assert printed.err.startswith("error: jobs/benchmark.py: must be followed by train, got 'draw'")
