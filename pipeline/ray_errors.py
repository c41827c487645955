"""Finding this project's own error inside what Ray raises.

An exception of a task or an actor comes back wrapped, sometimes several times, with the text of remote tracebacks as
its message. An operator needs the one line that was meant for them.
"""

import traceback
from typing import TypedDict

from pipeline import errors
from pipeline.errors import PipelineError


class RemoteTraceback(Exception):
    """The traceback of an error in another process, as text: the cause of that error here, so that it can be shown."""


class ErrorValues(TypedDict):
    """An error as it travels in a row."""

    error: str
    """Name of its class in pipeline/errors.py; empty: none."""
    message: str
    """Its message."""
    trace: str
    """Its traceback."""


def to_values(error: PipelineError) -> ErrorValues:
    """An error as values that travel in a row: an exception would come back wrapped in Ray's, without its class.

    Returns:
        Name of its class, message and traceback, by the names of `of_values`.
    """
    return {
        "error": type(error).__name__,
        "message": str(error),
        "trace": "".join(traceback.format_exception(error)),
    }


def of_values(error: str, message: str, trace: str) -> PipelineError:
    """The error that `to_values` was given in another process."""
    made: PipelineError = getattr(errors, error)(message)
    made.__cause__ = RemoteTraceback(trace)
    return made


def own_error(error: BaseException) -> PipelineError | None:
    """The error of this project that caused another one.

    Args:
        error: What a call into Ray, Ray Data or Ray Train raised.

    Returns:
        The PipelineError with its own class and message, without Ray's text and traceback; None if there is none.
    """
    seen: set[int] = set()
    waiting: list[object] = [error]
    while waiting:
        current = waiting.pop(0)
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        wrapped = _causes(current)
        # Ray raises an instance of its own and of our class at once; the plain one is its cause.
        if isinstance(current, PipelineError) and not isinstance(getattr(current, "cause", None), PipelineError):
            return _in_one_line(current)
        waiting.extend(wrapped)
    return None


def innermost(error: BaseException) -> BaseException:
    """What an operator should read of an error: ours, or what a task raised, without the text that Ray makes of it."""
    own = own_error(error)
    if own is not None:
        return own
    while isinstance(cause := getattr(error, "cause", None), BaseException):
        error = cause
    return error


def _in_one_line(error: PipelineError) -> PipelineError:
    """Our messages have one line; Ray Data appends advice about its own settings to them."""
    line, *more = str(error).splitlines() or [""]
    return type(error)(line) if more else error


def _causes(error: BaseException) -> list[object]:
    """RayTaskError.cause, Python's own chain, and the failures that a training run reports."""
    failures = getattr(error, "worker_failures", None)
    return [
        getattr(error, "cause", None),
        getattr(error, "controller_failure", None),
        getattr(error, "_base_exc", None),
        error.__cause__,
        error.__context__,
        *(failures.values() if isinstance(failures, dict) else ()),
    ]
