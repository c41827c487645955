"""Joining a Ray cluster, or starting Ray in this process, without its chatter.

Every entry point runs its work inside `ray_session`. Inside a submitted job (`ray job submit`) or with an address, the
session joins that cluster; otherwise it starts Ray on this machine and stops it at the end. What the terminal shows is
the project's own output: Ray's bars, its worker logs and its warnings stay off unless `ray_logs` asks for them.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ray
import ray.data

from pipeline.errors import ConfigError, PipelineError

# Ray reads these once, when it is first used. Usage statistics would go to a host outside the cluster.
_QUIET_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DEDUP_LOGS": "0",
    # Ray's core writes its advice to the terminal as errors.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Ray 2.60 announces a change of a default that this project does not depend on.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# An embedded Ray keeps little in its object store: streams are bounded, models are handed over once.
_MAX_SOCKET_BYTES = 103 if sys.platform == "darwin" else 107
_EMBEDDED_OBJECT_STORE_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Where the work runs."""

    address: str | None = None
    """Address of a running Ray cluster; none: the cluster of the submitted job, else Ray started in this process."""
    num_cpus: int | None = None
    """Logical CPUs of a Ray started in this process; none: as many as the machine has."""
    ray_logs: bool = False
    """Show Ray's own progress bars and the log lines of its workers."""

    def __post_init__(self) -> None:
        if self.num_cpus is not None and self.num_cpus < 1:
            raise ValueError(f"num_cpus: at least 1, got {self.num_cpus}; leave it out to use every CPU")


@contextlib.contextmanager
def ray_session(config: ClusterConfig) -> Iterator[None]:
    """Hold a Ray session for the duration of the block; an inner block shares the outer one's.

    Args:
        config: Which cluster to join or start.

    Yields:
        Nothing; `ray` is initialised inside the block.

    Raises:
        PipelineError: If the cluster at the address does not answer.
    """
    if ray.is_initialized():
        yield
        return
    if not config.ray_logs:
        for name, value in _QUIET_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    try:
        with contextlib.nullcontext() if config.ray_logs else _stderr_closed(), _sigterm_kept():
            _start(config)
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _stderr_closed() -> Iterator[None]:
    """While Ray's core starts: it announces there that it was told to be quiet. Exceptions are not affected."""
    sys.stderr.flush()
    saved = os.dup(2)
    with Path(os.devnull).open("wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Ray puts in a handler that exits: one that was there before knows what there is to clean up."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _temporary_folder() -> tuple[str, str]:
    """Where a Ray that is started here keeps its files, and the variable that says so."""
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "RAY_TMPDIR")
    return name, os.environ.get(name, "/tmp")


def _check_socket_paths() -> None:
    """Refuse a temporary folder below which Ray's sockets would have longer names than Unix takes.

    Raises:
        ConfigError: Names the variable, its length and what to do.
    """
    name, folder = _temporary_folder()
    session = f"session_2026-11-27_12-30-00_000000_{os.getpid()}"
    longest = Path(folder, "ray", session, "sockets", "plasma_store")
    excess = len(os.fsencode(longest)) - _MAX_SOCKET_BYTES
    if excess > 0:
        length = len(os.fsencode(folder))
        raise ConfigError(
            f"{name}: must have at most {length - excess} bytes, because Ray's sockets lie below it, got {length} in "
            f"{folder!r}; set RAY_TMPDIR to a shorter folder, such as /tmp"
        )


def _start(config: ClusterConfig) -> None:
    level = logging.INFO if config.ray_logs else logging.ERROR
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address is None:
        _check_socket_paths()
        try:
            ray.init(
                # "local" and not a cluster that happens to run on this machine
                address="local",
                num_cpus=config.num_cpus,
                object_store_memory=_EMBEDDED_OBJECT_STORE_BYTES,
                log_to_driver=config.ray_logs,
                logging_level=level,
            )
        except OSError as error:  # a folder that cannot be written, a full disk
            name, folder = _temporary_folder()
            reason = f"{error.strerror}: {error.filename}" if error.filename else str(error)
            raise PipelineError(
                f"{name}: Ray cannot keep its files in {folder!r} ({reason}); set RAY_TMPDIR to a folder that can be "
                "written and has space"
            ) from error
    else:
        try:
            ray.init(address=address, log_to_driver=config.ray_logs, logging_level=level)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise PipelineError(f"cluster.address: no Ray cluster answers at {address!r} ({reason})") from error
    quiet_data_context(config.ray_logs)


def quiet_data_context(ray_logs: bool = False) -> ray.data.DataContext:
    """Switch off Ray Data's bars and messages in this process (the driver's settings do not reach workers).

    Args:
        ray_logs: Leave bars and messages on.

    Returns:
        The process's current data context, for further settings.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = ray_logs
    context.print_on_execution_start = ray_logs
    # A batch of sampling or a slow store may take longer than the default half hour without being stuck.
    context.execution_no_progress_timeout_s = 24 * 3600.0
    if not ray_logs:
        for name in ("ray.data", "ray.train", "ray.tune"):
            logging.getLogger(name).setLevel(logging.ERROR)
    return context
