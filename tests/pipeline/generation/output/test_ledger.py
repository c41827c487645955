"""The ledger: attempts add up, several drivers at once are all counted, and damage is no reason to overwrite it."""

import threading
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.generation.output.ledger import LEDGER_KEY, DeviceCost, Ledger, add_attempt, read_ledger
from pipeline.stores.storage import open_store


def cost(images: int, busy_s: float = 2.0) -> DeviceCost:
    return DeviceCost(
        device_s=2 * busy_s, busy_s=busy_s, num_images=images, num_evaluations=10 * images, num_bytes=100 * images
    )


def attempt(devices: dict[str, DeviceCost], making_s: float, **others: int) -> Ledger:
    return Ledger.of(devices, making_s, **({"num_retries": 0, "num_lost": 0} | others))


def test_attempts_add_up_by_kind_of_device(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    assert read_ledger(store) is None
    first = attempt({"cpu": cost(6)}, 2.0, num_broken=1, num_retries=3)
    assert add_attempt(store, first) == first == read_ledger(store)
    second = attempt({"cpu": cost(4), "H100": cost(30, busy_s=1.0)}, 3.0, num_lost=1)
    total = add_attempt(store, second)
    assert total == read_ledger(store) and total.last_attempt == second.last_attempt
    assert (total.num_attempts, total.num_broken, total.num_retries, total.num_lost) == (2, 1, 3, 1)
    assert total.devices == {"cpu": cost(10, busy_s=4.0), "H100": cost(30, busy_s=1.0)}
    assert (total.num_images, total.num_bytes, total.device_s) == (40, 4000, 10.0)
    assert (total.making_s, total.images_per_s, total.evaluations_per_s) == (5.0, 8.0, 80.0)
    assert total.devices["cpu"].evaluations_per_actor_s == 25.0


def test_an_attempt_that_made_nothing_has_no_rate() -> None:
    nothing = attempt(
        {"unknown": DeviceCost(device_s=7.0, busy_s=0, num_images=0, num_evaluations=0, num_bytes=0)}, 0.0
    )
    assert nothing.images_per_s == nothing.evaluations_per_s == 0.0 and nothing.device_s == 7.0
    assert nothing.devices["unknown"].evaluations_per_actor_s == 0.0


def test_drivers_that_end_at_once_are_all_counted(tmp_path: Path) -> None:
    """Each waits for the others before it adds, so that they read the same version."""
    number, added = 8, threading.Barrier(8)

    def end() -> None:
        share = attempt({"cpu": cost(1)}, 1.0)
        added.wait()
        add_attempt(open_store(str(tmp_path)), share)

    threads = [threading.Thread(target=end) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = read_ledger(open_store(str(tmp_path)))
    assert total is not None and (total.num_attempts, total.num_images) == (number, number)


def test_a_damaged_ledger_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / LEDGER_KEY).write_bytes(b"<html>")
    with pytest.raises(ConfigError, match=LEDGER_KEY):
        add_attempt(open_store(str(tmp_path)), attempt({}, 0.0))
    assert (tmp_path / LEDGER_KEY).read_bytes() == b"<html>"
