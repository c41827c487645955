"""How jobs end: by Ctrl-C at any moment, by a reader that goes, by a full disk behind the output; one line, no more."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.exits import one_line
from pipeline.errors import ShardCorruptError
from pipeline.ray_errors import RemoteTraceback, of_values, to_values

ROOT = Path(__file__).parents[2]
GUARDED = """
import atexit, os, signal, sys, time
sys.path.insert(0, {root!r})
from jobs.exits import run_guarded

def own(signum, frame):
    sys.exit(0)

def work():
{work}

sys.exit(run_guarded(work, show_traceback={show_traceback}))
"""


def takes_ctrl_c() -> None:
    """In a new process before its program: tests in the background have signals ignored, which is inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def run_work(
    work: str, stdout: int = subprocess.PIPE, show_traceback: bool = False
) -> subprocess.CompletedProcess[str]:
    """A process that does nothing but this work, as a job does it."""
    indented = "\n".join(f"    {line}" for line in work.splitlines())
    code = GUARDED.format(root=str(ROOT), work=indented, show_traceback=show_traceback)
    return subprocess.run(
        [sys.executable, "-c", code],
        stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=300, preexec_fn=takes_ctrl_c,
    )  # fmt: skip


def gone_reader() -> int:
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


INTERRUPTED_IMPORT = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "ray":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
"""


def test_ctrl_c_while_a_job_imports(tmp_path: Path) -> None:
    """The file of a job imports for seconds before its first line: the signal comes when it begins to import Ray."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED_IMPORT)
    (tmp_path / "folder").mkdir()
    finished = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "demo.py")],
        cwd=tmp_path / "folder",
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))},
        capture_output=True, text=True, timeout=300, preexec_fn=takes_ctrl_c,
    )  # fmt: skip
    assert (finished.returncode, finished.stdout, finished.stderr) == (130, "", "interrupted\n")
    assert list((tmp_path / "folder").iterdir()) == []


def test_other_processes_keep_their_ctrl_c() -> None:
    """Only a file of jobs/ takes the signal while it imports: not a test, a notebook, a service."""
    assert signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_IGN)
    code = (
        f"import sys, os, signal; sys.path.insert(0, {str(ROOT)!r}); import jobs; os.kill(os.getpid(), signal.SIGINT)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=takes_ctrl_c)
    assert "KeyboardInterrupt" in finished.stderr


CTRL_C = "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"


@pytest.mark.parametrize(
    "work",
    [
        CTRL_C,
        f"try:\n    {CTRL_C}\nfinally:\n    {CTRL_C}",
        f"def again():\n    {CTRL_C}\natexit.register(again)\n{CTRL_C}",
    ],
    ids=["once", "again while it cleans up", "again while the interpreter ends"],
)
def test_ctrl_c_is_one_line(work: str) -> None:
    finished = run_work(work)
    assert (finished.returncode, finished.stdout, finished.stderr) == (130, "", "interrupted\n")


SIGTERM = "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)"


@pytest.mark.parametrize(
    ("work", "printed"),
    [
        (f"try:\n    {SIGTERM}\nfinally:\n    print('cleaned up')", "cleaned up\n"),
        (
            f"signal.signal(signal.SIGINT, own)\ntry:\n    {SIGTERM}\nexcept SystemExit:\n    raise KeyboardInterrupt",
            "",
        ),
        (f"signal.signal(signal.SIGINT, signal.SIG_IGN)\n{SIGTERM}", ""),
    ],
    ids=["cleans up", "a library's own handler of Ctrl-C is heard", "where Ctrl-C is ignored"],
)
def test_sigterm_takes_the_way_of_ctrl_c(work: str, printed: str) -> None:
    finished = run_work(work)
    assert (finished.returncode, finished.stdout, finished.stderr) == (143, printed, "terminated\n")


def test_a_closed_terminal_takes_the_way_of_ctrl_c_too() -> None:
    hup = "os.kill(os.getpid(), signal.SIGHUP); time.sleep(60)"
    finished = run_work(f"signal.signal(signal.SIGHUP, signal.SIG_DFL)\n{hup}")
    assert finished.returncode == -signal.SIGHUP, "the work can undo it"
    finished = run_work(hup)
    assert (finished.returncode, finished.stdout, finished.stderr) == (129, "", "hung up\n")


@pytest.mark.parametrize("work", ["print('x' * 100_000)", "print('x', flush=True)", "print('x')", "os.write(1, b'x')"])
def test_a_reader_that_goes_is_no_error(work: str) -> None:
    writing = gone_reader()
    try:
        finished = run_work(work, stdout=writing)
    finally:
        os.close(writing)
    assert (finished.returncode, finished.stderr) == (141, "")


def test_a_connection_that_breaks_is_an_error() -> None:
    finished = run_work("raise BrokenPipeError(32, 'Broken pipe')")
    assert finished.returncode == 1
    assert finished.stderr == "error: BrokenPipeError: [Errno 32] Broken pipe (--traceback shows where)\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_behind_the_output_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        finished = run_work("print('x')", stdout=full.fileno())
    assert finished.returncode == 1 and finished.stderr.count("\n") == 1
    assert finished.stderr.startswith("error: OSError: [Errno 28] No space left on device")


HELP = """
import os, sys
sys.path.insert(0, {root!r})
from jobs import demo, ema, prepare_data
from jobs.cli import run_job, run_subcommand
from jobs.exits import run_guarded

def ends(work):
    if (child := os.fork()) == 0:
        sys.exit(work())
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=sys.stderr, flush=True)

ends(lambda: run_job(prepare_data.JOB, ["--help"]))
ends(lambda: run_subcommand(ema.JOBS, ["--help"], program="jobs/ema.py", doc="x"))
ends(lambda: run_guarded(lambda: demo.start(["--help"]), show_traceback=False))
"""


def test_help_may_be_cut_off(tmp_path: Path) -> None:
    """`... --help | head`, of each way that a file of jobs/ is run; one process imports once."""
    writing = gone_reader()
    try:
        finished = subprocess.run(
            [sys.executable, "-c", HELP.format(root=str(ROOT))],
            stdout=writing, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        )  # fmt: skip
    finally:
        os.close(writing)
    assert finished.stderr.split() == ["141"] * 3


def test_every_file_of_jobs_is_run_in_one_of_these_ways() -> None:
    ways = ("run_job(JOB, sys.argv[1:])", "run_subcommand(JOBS, ", "run_guarded(lambda: start(")
    ways = (*ways, "main(sys.argv[1:]))")  # of benchmark.py, which imports run_subcommand when it needs it
    programs = [text for file in (ROOT / "jobs").glob("*.py") if "__main__" in (text := file.read_text())]
    programs = [text for text in programs if "\nif __name__" in text]
    assert len(programs) >= 10
    for text in programs:
        (line,) = text.partition('\nif __name__ == "__main__":\n')[2].splitlines()
        assert line.strip().startswith(tuple(f"sys.exit({way}" for way in ways)), line


def test_traceback_shows_what_a_worker_raised_and_one_line_follows() -> None:
    work = (
        "from pipeline.errors import ShardCorruptError\n"
        "from pipeline.ray_errors import of_values\n"
        "raise of_values('ShardCorruptError', 'train/3.tar: too short', 'Traceback: in the actor, line 7')"
    )
    finished = run_work(work, show_traceback=True)
    assert "in the actor, line 7" in finished.stderr and "direct cause" in finished.stderr
    assert finished.returncode == 1 and finished.stderr.endswith("\nerror: train/3.tar: too short\n")
    assert run_work(work).stderr == "error: train/3.tar: too short\n"


def test_an_error_travels_as_values_with_its_traceback() -> None:
    try:
        raise ShardCorruptError("train/3.tar: too short")
    except ShardCorruptError as error:
        back = of_values(**to_values(error))
    assert type(back) is ShardCorruptError and str(back) == "train/3.tar: too short"
    assert isinstance(back.__cause__, RemoteTraceback) and "test_exits.py" in str(back.__cause__)


def test_what_a_task_raised_is_read_without_rays_text() -> None:
    class OfATask(Exception):
        cause = ZeroDivisionError("float division by zero")

    error = OfATask("ray::work() (pid=1)\n  Traceback ...\n  much more")
    assert one_line(error) == "ZeroDivisionError: float division by zero (--traceback shows where)"
