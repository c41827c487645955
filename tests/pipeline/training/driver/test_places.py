"""Room for workers is what Ray has given; what is waited for is said."""

import threading
from collections.abc import Callable

import pytest
import ray

from pipeline.training.driver.places import Places, wait_for_places

CPU = {"CPU": 1.0}


class EnoughError(Exception):
    """Ends a wait."""


def wait(at_least: int, at_most: int, until: Callable[[list[str]], bool]) -> tuple[list[str], object]:
    """Wait for places until the lines are enough."""
    lines = list[str]()

    def check() -> None:
        if until(lines):
            raise EnoughError

    try:
        return lines, wait_for_places(CPU, at_least, at_most, report=lines.append, check=check, say_interval_s=0.1)
    except EnoughError:
        return lines, None


@pytest.mark.usefixtures("ray_session")
def test_there_is_room_for_as_many_as_ray_has_cpus() -> None:
    assert wait(2, 2, lambda lines: False)[1] == (2, [])
    assert wait(1, 5, lambda lines: False)[1] == (2, []), "once the number has settled"
    assert wait(1, 1, lambda lines: False)[1] == (1, []), "everything was given back"


@pytest.mark.usefixtures("ray_session")
def test_what_is_waited_for_is_said() -> None:
    line = "waiting for 3 workers with 1 CPU each: Ray has room for 2; "
    assert wait(3, 3, lambda lines: sum(said.startswith(line) for said in lines) >= 2)[1] is None


@pytest.mark.usefixtures("ray_session")
def test_room_that_is_taken_counts_when_it_is_given_back() -> None:
    with Places(CPU, 1, []) as taken:
        while not taken.num_given():
            pass
        assert wait(2, 2, lambda lines: bool(lines))[1] is None
        assert wait(1, 2, lambda lines: False)[1] == (1, [])
        released = threading.Timer(1, taken.release)
        released.start()
        assert wait(2, 2, lambda lines: False)[1] == (2, [])
        released.join()


@pytest.mark.usefixtures("ray_session")
def test_a_node_that_is_left_out_gives_no_place() -> None:
    """Of several all are left out: Ray takes the space of "a, b" for a part of b's name."""
    here = ray.get_runtime_context().get_node_id()
    nodes = ["0" * len(here), here]
    with Places(CPU, 1, nodes) as none, Places(CPU, 1, nodes[:1]) as one:
        while not one.num_given():
            pass
        assert none.num_given() == 0
