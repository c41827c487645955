"""Finding this project's own error inside what Ray raises.

An exception of a task or an actor comes back wrapped, sometimes several times, with the text of remote tracebacks as
its message. An operator needs the one line that was meant for them.
"""

from pipeline.errors import PipelineError


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
