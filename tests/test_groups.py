"""xdist keeps a group in one process: else each starts a Ray of its own on the same CPUs, and all modules' fixtures."""

import pytest


@pytest.mark.xdist_group("a group")
def test_xdist_knows_of_groups(request: pytest.FixtureRequest) -> None:
    """With pytest 9.2, xdist 3.8 forgets them without a word (pytest-xdist#1386)."""
    if not getattr(request.config.option, "loadgroup", False):  # set in the processes that xdist starts
        pytest.skip("runs in one process")
    assert request.node.nodeid.endswith("@a group")
