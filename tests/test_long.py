"""tests/LONG.md says of every slow test when it last ran, and of no other."""

import re
from pathlib import Path

import pytest

from tests.conftest import COLLECTED_FILES, SLOW_TESTS

LONG = Path(__file__).with_name("LONG.md")


def test_every_slow_test_has_a_line_and_every_line_a_test(pytestconfig: pytest.Config) -> None:
    """Of the files that this run collects, which are all of them in `make test`."""
    slow = {node.partition("[")[0] for node in pytestconfig.stash[SLOW_TESTS]}
    named = re.findall(r"^\| `(tests/[\w/]+\.py::\w+)` \|", LONG.read_text(), re.MULTILINE)
    assert len(named) == len(set(named)), "one line for each test"
    assert slow - set(named) == set(), "slow tests without a line: run them and write what came of it"
    collected = {name for name in named if name.partition("::")[0] in pytestconfig.stash[COLLECTED_FILES]}
    assert collected - slow == set(), "lines of tests that are not there, or not slow"
    assert all(Path(LONG.parent.parent, name.partition("::")[0]).exists() for name in named)


def test_a_line_says_when_where_and_how_it_ended() -> None:
    rows = [line.strip("|").split("|") for line in LONG.read_text().splitlines() if line.startswith("| `")]
    for row in rows:
        _, adds, date, commit, command, duration, result = (cell.strip() for cell in row)
        assert adds and command.startswith("`") and duration and result
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", date) and re.fullmatch(r"[0-9a-f]{7,40}", commit), row
