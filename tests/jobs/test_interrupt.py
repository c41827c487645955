"""Ctrl-C while a job works: one word, exit code 130."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.jobs.readme_commands import ROOT
from tests.pipeline.small_datasets import make_dataset

WAITS = """
import pathlib, time

def factory(image_size, channels, num_classes):
    pathlib.Path("reached").touch()
    time.sleep(600)
"""


def test_an_interrupted_job_says_so_and_ends_with_130(tmp_path: Path) -> None:
    """A real process, to whose whole group the signal goes, as from a terminal, while it makes a network."""
    make_dataset(tmp_path / "dataset", [20])
    (tmp_path / "waits.py").write_text(WAITS)
    flags = ["--dataset", "dataset", "--network.name", "own", "--network.factory", "waits:factory", "--dry-run"]
    job = subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "train.py"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    )
    while not (tmp_path / "reached").exists():
        assert job.poll() is None, job.communicate()
        time.sleep(0.1)
    os.killpg(job.pid, signal.SIGINT)
    assert job.communicate(timeout=300) == ("", "interrupted\n")
    assert job.returncode == 130
