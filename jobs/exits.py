"""How a job ends: one line and an exit code, whatever ends it, at whichever moment.

Exit codes: 0 done, 1 failed, 2 wrong use, 3 stopped on request after a checkpoint, 130 interrupted (Ctrl-C), 141 who
read the output has gone (`| head`), 143 terminated (SIGTERM), 129 hung up (SIGHUP: the terminal was closed).
Nothing that takes long is imported here, so that the seconds that all else takes are guarded too.
"""

import contextlib
import multiprocessing
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.ray_errors import innermost
from pipeline.redact import redact

_INTERRUPTED, _READER_GONE = 130, 141  # 128 + the signal's number, as shells have it
_WORDS = {signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}


def end_at_interrupts_while_importing() -> None:
    """Let Ctrl-C end the process with one line while a job's file imports what it needs: nothing has begun yet.

    Only in a process that runs a file of jobs/, and only where Ctrl-C would raise KeyboardInterrupt; a process that
    such a job has started leaves the signal, which goes to the whole terminal, to the job.
    """
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    if main is None or Path(main).absolute().parent != Path(__file__).absolute().parent:
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        is_child = multiprocessing.parent_process() is not None
        signal.signal(signal.SIGINT, signal.SIG_IGN if is_child else _end_with_a_line)


def run_guarded(work: Callable[[], None], *, show_traceback: bool) -> int:
    """Do the work of a job, and say in one line what ended it.

    Args:
        work: The job.
        show_traceback: Whether to show where an error came from.

    Returns:
        The exit code.
    """
    if signal.getsignal(signal.SIGINT) is _end_with_a_line:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on there is something to clean up
    ends = _EndsAsInterrupts()
    try:
        try:
            with ends:
                work()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where a reader that has gone is no message of the interpreter's
        return 0
    except KeyboardInterrupt:
        _leave_the_rest_to_the_exit()
        _complain("interrupted" if ends.came is None else _WORDS[ends.came])
        return _INTERRUPTED if ends.came is None else 128 + ends.came
    except Exception as error:
        if _is_reader_gone(error):
            return _READER_GONE
        if show_traceback:
            _complain("".join(traceback.format_exception(error)).rstrip())
        _complain(f"{error.said_as if isinstance(error, PipelineError) else 'error'}: {one_line(error)}")
        return error.exit_code if isinstance(error, PipelineError) else 1
    finally:
        _drop_what_cannot_be_written()


def one_line(error: BaseException) -> str:
    """An error as one line for the terminal."""
    error = innermost(error)
    text = " ".join(str(error).split())
    return text if isinstance(error, PipelineError) else f"{type(error).__name__}: {text} (--traceback shows where)"


def _end_with_a_line(signum: int, frame: Any) -> None:
    os.write(2, b"interrupted\n")
    os._exit(_INTERRUPTED)


class _EndsAsInterrupts:
    """While the block runs SIGTERM and SIGHUP take the way of Ctrl-C: what is cleaned up after one is after all."""

    def __init__(self) -> None:
        self.came: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        for signum in _WORDS:
            if signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup has it
                with contextlib.suppress(ValueError):  # not the main thread
                    self._before[signum] = signal.signal(signum, self._interrupt)

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _interrupt(self, signum: int, frame: Any) -> None:
        self.came = signal.Signals(signum)
        handler = signal.getsignal(signal.SIGINT)  # a library may have its own, as Ray Train has
        if callable(handler):
            handler(signal.SIGINT, frame)
        raise KeyboardInterrupt


def _leave_the_rest_to_the_exit() -> None:
    """One more Ctrl-C, while the interpreter shuts down, ends it at once and without a word."""
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, lambda signum, frame: os._exit(_INTERRUPTED))


def _is_reader_gone(error: Exception) -> bool:
    """Whether an error is that nobody reads our own output any more, and not that of some connection."""
    if not isinstance(error, BrokenPipeError):
        return False
    watch = select.poll()
    for number in (1, 2):
        watch.register(number, 0)  # what is wrong is always reported
    return any(state & (select.POLLERR | select.POLLHUP) for _, state in watch.poll(0))


def _drop_what_cannot_be_written() -> None:
    """The interpreter writes at its exit what is left: where that fails, it would add lines and an exit code."""
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, number)
            os.close(nothing)


def _complain(line: str) -> None:
    with contextlib.suppress(OSError):
        print(redact(line), file=sys.stderr, flush=True)
