"""The benchmark of a GPU, run on a CPU at tiny sizes: what it needs, what it writes, what it compares."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.benchmarks import gpu_benchmark
from pipeline.benchmarks.gpu_benchmark import Contender, Figures, Limits, contend
from pipeline.benchmarks.gpu_cases import CASES, MODES
from pipeline.benchmarks.gpu_report import Report

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
# All that the project depends on besides torch and jaxtyping.
BLOCKED = (
    *("boto3", "botocore", "cachetools", "matplotlib", "mlflow", "pandas", "PIL", "psutil", "pydantic", "ray"),
    *("safetensors", "scipy", "sklearn", "tenacity", "tomli_w", "tqdm", "tyro", "webdataset"),
)
SCRIPT = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path = [Without(finder) for finder in sys.meta_path]
from jobs.benchmark import main
sys.exit(main(sys.argv[2:]))
"""


def run(*flags: str, blocked: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", SCRIPT, ",".join((*BLOCKED, *blocked)), "gpu", *flags]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)


def test_it_needs_torch_and_jaxtyping_alone(tmp_path: Path) -> None:
    flags = ["--device", "cpu", "--cases", "tiny", "--modes", "float32,bf16", "--rounds", "2", "--steps", "2"]
    flags += ["--sampling-cases", "tiny"]
    done = run(*flags, "--output", str(tmp_path), blocked=("diffusers", "numpy"))
    assert done.returncode == 0, done.stderr
    assert "without a peer: diffusers is not installed" in done.stdout
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [(row["network"], row["mode"]) for row in report["figures"]] == [("ours", "float32"), ("ours", "bf16")]
    assert report["machine"].keys() == {"device", "versions", "date"} and torch.__version__ in done.stdout
    assert all(len(row["images_per_s"]) == 2 and row["model_flops_utilisation"] > 0 for row in report["figures"])
    assert report["time"]["tiny"] and sum(report["time"]["tiny"].values()) <= 1.0001
    assert [(row["network"], row["mode"]) for row in report["sampling"]] == [
        ("ours", "float32"),
        ("ours", "bf16-compiled"),
    ]
    assert all(len(row["evaluations_per_s"]) == 2 and row["batch"] in (2, 4) for row in report["sampling"])
    assert report["sampling"][0]["distance"] is None and 0 <= report["sampling"][1]["distance"] < 0.05
    assert (tmp_path / "gpu.md").read_text() in done.stdout


def test_the_peer_takes_part_in_the_same_run(tmp_path: Path) -> None:
    lines: list[str] = []
    modes = {"float32": MODES["float32"]}
    figures, table = contend("tiny", CASES["tiny"], modes, CPU, rounds=2, steps=1, with_peer=True, say=lines.append)
    assert [one.network for one in figures] == ["ours", "diffusers"]
    assert figures[0].num_parameters == figures[1].num_parameters, "of the same shape"
    assert table and lines[-1] == "tiny: round 2 of 2"
    text = Report(machine={"device": "d"}, limits=LIMITS, figures=figures, tables_of_time={"tiny": table}).to_markdown()
    assert f"| {figures[0].median / figures[1].median:.2f} |" in text


LIMITS = Limits(matrix_flops_per_s=100e12, memory_bytes_per_s=1e12)


def test_the_figures_follow_from_what_was_measured() -> None:
    ours = Figures(
        case="a",
        network="ours",
        mode="bf16",
        precision="bf16",
        compile=False,
        channels_last=False,
        cost_key="a network",
        batch=8,
        num_parameters=1,
        images_per_s=(10.0, 30.0, 20.0),
        flops_per_image=2 * 10**12,
        peak_bytes=3 * 2**30,
        start_s=4.0,
        note="not compiled: no compiler",
    )
    report = Report(machine={"device": "d"}, limits=LIMITS, figures=[ours], tables_of_time={"a": [("a|b", 0.5)]})
    text = report.to_markdown()
    assert "| a | 8 | ours | bf16 | 20 (10 to 30) |  | 40 | 40.0% | 3.0 GiB | 4 s |" in text
    assert "- a, ours, bf16: not compiled: no compiler" in text and "| `a/b` | 50.0% |" in text
    assert json.loads(report.to_json())["figures"][0]["model_flops_utilisation"] == pytest.approx(0.4)


def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(Contender):
        def __init__(self, name, case, *args, **kwargs):  # type: ignore[no-untyped-def]
            if case.batch > 2:
                raise torch.OutOfMemoryError(f"{case.batch} images")
            super().__init__(name, case, *args, **kwargs)

    monkeypatch.setattr(gpu_benchmark, "Contender", Small)
    lines: list[str] = []
    modes = {"float32": MODES["float32"]}
    figures, _ = contend("tiny", CASES["tiny"], modes, CPU, rounds=1, steps=1, with_peer=False, say=lines.append)
    assert figures[0].batch == 2 and lines[0] == "tiny: does not fit, so 2 images a step"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--cases", "cifar11"], "error: argument --cases: names of cifar10-128, "),
        (["--steps", "0"], "error: argument --steps: at least 1, got '0'"),
        (["--device", "cpu", "--output", "/dev/null/here"], "error: --output: cannot make /dev/null/here ("),
        (["--device", "cuda"], "error: --device: this torch finds no GPU; "),
        (["--stpes", "3"], "error: unrecognized arguments: --stpes 3"),
    ],
)
def test_wrong_flags_get_one_line(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs.benchmark_gpu import run as run_here

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        code: object = run_here(flags)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and error.startswith(words) and error.count("\n") == 1, error


@pytest.mark.gpu
def test_a_gpu_counts_its_memory(tmp_path: Path) -> None:
    modes = {"bf16-compiled": MODES["bf16-compiled"]}
    figures, _ = contend(
        "tiny", CASES["tiny"], modes, torch.device("cuda"), rounds=1, steps=2, with_peer=False, say=print
    )
    assert figures[0].peak_bytes and figures[0].note == ""
