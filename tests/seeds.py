"""Seeds of the tests whose claim holds for every seed: 0, one of the commit, and in `make test-long` nine more.

Not for statistics: a test with a false-alarm rate keeps a fixed seed, or one commit in so many would fail by chance.
"""

import os
import subprocess
from pathlib import Path

import pytest


def _commit() -> str:
    """The commit under test, from the variables of common CI systems or from git; "none" outside a repository."""
    for name in ("CI_COMMIT_SHA", "GITHUB_SHA"):
        if os.environ.get(name):
            return os.environ[name]
    command = ["git", "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return found.stdout.strip()


COMMIT = _commit()
COMMIT_SEED = int(COMMIT[:8], 16) if COMMIT != "none" else 1

# The name of the commit's seed does not change with it, so that a test keeps its name; the summary prints the number.
SEEDS = [
    pytest.param(0, id="seed0"),
    pytest.param(COMMIT_SEED, id="commit"),
    *(pytest.param(seed, id=f"seed{seed}", marks=pytest.mark.slow) for seed in range(1, 10)),
]
