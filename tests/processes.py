"""Processes that tests start: the Ray that they join, and an end as of a machine that is lost."""

import contextlib
import os
import subprocess
import time
from typing import Any

import psutil


def environment(address: str | None = None) -> dict[str, str]:
    """This process's environment, with the address of a Ray that is to be joined, or without any."""
    without = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return without if address is None else without | {"RAY_ADDRESS": address}


def kill_with_its_machine(process: subprocess.Popen[Any]) -> None:
    """SIGKILL to a driver, its Ray and its workers; none of them runs any more at the return."""
    driver = psutil.Process(process.pid)
    victims = [*driver.children(recursive=True), driver]
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    process.wait()
    while any(_runs(victim) for victim in victims):
        time.sleep(0.05)


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
