"""The jobs as a user meets them on the command line: one line per mistake, exit code 2, nothing written."""

import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from jobs import benchmark, evaluate, sample, train
from jobs.cli import Job, run_job
from pipeline.data.prepare import PrepareConfig, open_source, prepare_source
from pipeline.presets import PRESETS
from pipeline.project import parse_project
from tests.jobs.every_job import EVERY_JOB, describes_nothing, resolve

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
        code = run_job(train.JOB, flags)
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
        (["--network.dropout", "3"], ["error: network.dropout: ", "3.0"]),
        (["--post-hoc-ema.snapshot-interval-steps", "-1"], ["error: post_hoc_ema.snapshot_interval_steps: ", "-1"]),
        (["--preset", "mnist"], ["--preset", "digits", "mnist"]),
        (["--config", "nothing.toml"], ["--config", "nothing.toml"]),
        (["--dataset", "nothing"], ["nothing", "prepare_data"]),
        (
            ["--config", "a.toml", "--config", "b.toml"],
            ["error: --config: must be given once, got 'a.toml' and 'b.toml'"],
        ),
        (["--preset", "digits", "--preset", "cifar10"], ["error: --preset: must be given once", "'cifar10'"]),
        (["--config", ""], ["error: --config: must not be empty"]),
        (["--config", "."], ["error: --config: cannot read . (Is a directory)", "name a TOML file"]),
        (["--config", "~nobody.here/x.toml"], ["error: --config: cannot read ~nobody.here/x.toml ("]),
        (["--config", "größe x.toml"], ["error: --config: cannot read größe x.toml (No such file"]),
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
        ("[train]\nstepz = 3", ["mine.toml: train.stepz: ", "did you mean 'steps'?"]),
        ('[train]\nsteps = "many"', ["mine.toml: train.steps: ", "many"]),
        ("[train.network]\ndropout = 3.0", ["mine.toml: train.network.dropout: ", "3.0"]),
        ("[train.network]\ndropuot = 0.5", ["mine.toml: train.network.dropuot: ", "did you mean 'dropout'?"]),
        ("[tracking]\nurl = 'x'", ["mine.toml: tracking.url: ", "did you mean 'uri'?"]),
        ("steps = 3", ["mine.toml: steps: ", "write it below [train]"]),
        ('preset = "mnist"', ["mine.toml: preset: one of digits, ", "got 'mnist'"]),
        ("[train]\nsteps = ", ["mine.toml", "TOML"]),
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
    text = 'dataset = "dataset"\n[train]\nsteps = 7\nglobal_batch = 64\n'
    (tmp_path / "mine.toml").write_text(text + "[train.network]\nbase_channels = 16\nnum_groups = 4\n")
    finished = train_job("--config", "mine.toml", "--steps", "9", "--dry-run")
    assert finished.returncode == 0, finished.stderr
    resolved = parse_project(finished.stdout, "printed")
    section = resolved["train"]
    assert (resolved["preset"], resolved["dataset"]) == ("digits", "dataset")
    assert (section["steps"], section["global_batch"], section["schedule"]["name"]) == (9, 64, "cosine")
    assert (section["network"]["name"], section["network"]["base_channels"]) == ("unet", 16)
    assert "# images        576 " in finished.stdout
    assert not (tmp_path / "artifacts").exists(), "a dry run writes nothing"


def test_the_flag_names_the_preset_before_the_file_does(train_job, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('preset = "digits_dit"\n')
    nothing = ["--config", "mine.toml", "--dataset", "nothing"]
    assert resolve(train.JOB, *nothing).run_name == "digits_dit"
    assert resolve(train.JOB, *nothing, "--preset", "cifar10").run_name == "cifar10"
    assert resolve(train.JOB, "--dataset", "nothing").run_name == "digits"


@pytest.mark.parametrize("name", ["compare samplers", "figures", "ema sweep"])
def test_studies_measure_images_from_nothing_whatever_sample_is_asked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One file serves all jobs: an edit in [sample] is no mistake of a study, one that is asked of the study is."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "mine.toml").write_text('[sample.request]\nname = "partial"\ninputs = "x"\n')
    file = str(tmp_path / "mine.toml")
    assert resolve(EVERY_JOB[name], "--config", file).sample.request.name == "generate"
    assert resolve(sample.JOB, "--config", file).request.name == "partial"
    asked = ["--config", file, "--sample.request.name", "partial", "--sample.request.inputs", "x"]
    assert run_job(does_nothing(EVERY_JOB[name]), asked) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: sample.request.name: ") and "got partial" in line


def test_a_rule_between_two_fields_names_the_file_and_the_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learned variance needs an objective that trains it."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "mine.toml").write_text("[train.network]\nlearned_variance = true\n")
    file = str(tmp_path / "mine.toml")
    assert run_job(does_nothing(train.JOB), ["--config", file]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {file}: train.objective.name: simple does not train the learned variance"), line


FLAGS = {
    "calibrate": ["--no-clip-x-0", "--dataset", "d"],
    "compare samplers": [
        "--evaluations",
        "3",
        "9",
        "--sample.images-per-class",
        "4000",
        "--sample.sampler.name",
        "heun",
    ],
    "ema sweep": ["--sigma-rels", "0.1", "--evaluate.seed", "3", "--sample.seed", "4", "--cluster.num-cpus", "2"],
    "evaluate": ["--sample.request.name", "partial", "--sample.request.inputs", "x", "--bound.num-steps", "5"],
    "sample": ["--sampler.name", "heun", "--sampler.churn", "3", "--tracking.uri", "sqlite:///x.db"],
    "train": ["--network.num-head-channels", "None", "--grid-sampler.name", "ancestral", "--optimizer.beta-1", "0.5"],
}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", EVERY_JOB)
def test_a_dry_run_prints_the_file_that_would_do_the_same(
    name: str, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    job, flags = EVERY_JOB[name], ["--preset", preset, *FLAGS.get(name, [])]
    if name == "train" and "dit" in preset:
        flags = [*flags, "--network.name", "unet"]
    assert run_job(describes_nothing(job), [*flags, "--dry-run"]) == 0
    (tmp_path / "printed.toml").write_text(capsys.readouterr().out)
    assert resolve(job, "--config", str(tmp_path / "printed.toml")) == resolve(job, *flags)


@pytest.mark.parametrize("name", EVERY_JOB)
def test_help_documents_every_field(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_job(EVERY_JOB[name], ["--help"], program=name)
    assert not stop.value.code
    text = capsys.readouterr().out
    assert text.startswith(f"usage: {name} [-h]")
    assert all(flag in text for flag in ("--preset", "--config", "--dry-run", "--traceback"))
    assert f"[{EVERY_JOB[name].section}]" in text, "which sections of the file it reads"
    blocks = re.split(r"^ *[│|]? *(?=--[a-z])", text, flags=re.MULTILINE)[1:]
    words = {
        block.split()[0]: re.sub(r"\(default.*?\)|[│|╰─╯-]", "", block, flags=re.DOTALL).split() for block in blocks
    }
    assert [flag for flag, said in words.items() if len(said) < 5] == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", ""], "error: model: must not be empty"),
        (["--request.name", "partial", "--request.inputs", "x", "--request.split", ""],
         "error: request.split: must not be empty"),
        (["--request.name", "partial", "--request.inputs", ""], "error: request.inputs: must not be empty"),
        (["--sampler.eta", "2"], "error: sampler.eta: must be in [0, 1]"),
        (["--sampler.eta", "x"], "error: Error parsing --sampler.eta: "),
        (["--sampler.name", "hein"], "error: sampler.name: must be one of"),
        (["--format.name", "jpg"], "error: format.name: must be one of png, webp, jpeg, got 'jpg'"),
        (["--format.name", "jpeg", "--format.quality", "101"], "error: format.quality: must be from 1 to 100, got 101"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_by_its_path(
    flags: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert run_job(does_nothing(sample.JOB), flags) == 2
    assert capsys.readouterr().err.startswith(words)
    nested = [flag.replace("--", "--sample.") for flag in flags]
    assert run_job(does_nothing(evaluate.JOB), nested) == 2
    words = words.replace("error: Error parsing --", "error: Error parsing --sample.")
    if "parsing" not in words:
        words = words.replace("error: ", "error: sample.")
    assert capsys.readouterr().err.startswith(words)


def does_nothing(job: Job[Any]) -> Job[Any]:
    return replace(job, run=lambda config: None)


def test_a_file_with_one_job_names_it_too(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, code in ((["--help"], 0), (["draw"], 2)):
        assert benchmark.main(flags) == code
    printed = capsys.readouterr()
    assert "  jobs/benchmark.py train  " in printed.out
    assert printed.err.startswith("error: jobs/benchmark.py: must be followed by train or sample, got 'draw'")


_LONG = "http://me:secret-word-" + "x" * 90 + "-secret-word@host"


@pytest.mark.parametrize(
    "flags",
    [
        ["--help"],
        ["--dry-run"],
        ["--tracking.url", _LONG],
        ["--steps", _LONG],
        ["--network.name", _LONG],
        ["--preset", _LONG],
        ["--tracking.uri", "me:secret-word@host"],
        ["--dataset", _LONG],
        ["--dataset", _LONG, "--traceback"],
    ],
)
def test_no_password_is_printed(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not by what breaks its lines at the terminal's width either, where a password could no longer be told."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("COLUMNS", "60")
    config = PrepareConfig(source="digits", dataset="data")
    prepare_source(config, open_source(config), map)
    Path("mine.toml").write_text(f'dataset = "data"\n[tracking]\nuri = "{_LONG}"\n')
    capsys.readouterr()
    try:
        code = run_job(train.JOB, ["--config", "mine.toml", *flags])
    except SystemExit as stop:  # --help
        code = int(stop.code or 0)
    printed = "".join(capsys.readouterr())
    assert code == (0 if flags in (["--help"], ["--dry-run"]) else 2), printed
    assert "***@host" in printed
    assert "secret" not in re.sub(r"\s|secrets?\b", "", printed)


def test_a_value_is_quoted_whole_however_narrow_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The flag parser breaks its lines at hyphens too."""
    monkeypatch.setenv("COLUMNS", "40")
    value = "a-value-with-many-hyphens-" * 6 + "and-an-end"
    assert run_job(train.JOB, ["--dataset", "d", "--output", "o", "--steps", value]) == 2
    assert value in capsys.readouterr().err


def test_a_patience_that_is_no_number_is_found_before_the_job_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A training with a local output needs it for the first time at its end."""
    monkeypatch.setenv("DDPM_PATIENCE_MINUTES", "ten")
    assert run_job(does_nothing(train.JOB), ["--dataset", str(tmp_path / "d"), "--output", str(tmp_path / "o")]) == 2
    assert "DDPM_PATIENCE_MINUTES: a number of minutes" in capsys.readouterr().err
