"""Why a request to a server failed: whether that passes, and what to do about it.

The one place that says what is an outage, for storage and for MLflow. Each service has a table of causes beside its own
door (s3_causes.py, tracking/mlflow_causes.py) and turns what its library raised into a `Failure`; the first row whose
test holds is the cause. The server's own words stay in the message, the advice follows them.
"""

import errno
import ssl
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

_NETWORK = frozenset({errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN, errno.ETIMEDOUT})
_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A request that failed, in the words of no particular library."""

    status: int | None = None
    """HTTP status of the answer; None where none came."""
    code: str = ""
    """The server's own name for what is wrong, such as NoSuchBucket; empty where it gave none."""
    reason: str
    """The server's own words, or the network's, in one line."""
    error: BaseException
    """What the library raised."""
    is_network: bool = False
    """Whether the library says that no complete answer came: refused, timed out, reset, cut off."""
    action: str = ""
    """What was asked for: read, list, write or delete."""
    is_anonymous: bool = False
    """Whether it was asked for without credentials."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cause:
    """One row of a table."""

    name: str
    """What is wrong, in two or three words."""
    holds: Callable[[Failure], bool]
    """Whether a failure has this cause."""
    passes: bool
    """Whether it is an outage: the same request may succeed later."""
    advice: str
    """What to do, as the end of a sentence."""


def cause_of(failure: Failure, table: Sequence[Cause]) -> Cause:
    """The first cause that holds; the last row of a table holds always."""
    return next(cause for cause in table if cause.holds(failure))


def is_outage_status(status: int | None) -> bool:
    """Whether an HTTP status says that the server, or what stands before it, is busy or away.

    501 and 505 are about what was asked, 507 is a full disk: none of them is over in minutes.
    """
    return status is not None and (status in (408, 425, 429) or (status >= 500 and status not in (501, 505, 507)))


def is_network_error(error: BaseException) -> bool:
    """Whether the operating system says that no answer came: refused, reset, timed out, no route, no such host.

    A full disk, a missing file and a certificate that is not trusted are OSErrors too, and none of these.
    """
    return any(
        isinstance(link, (ConnectionError, TimeoutError))
        or (isinstance(link, OSError) and link.errno in _NETWORK)
        or type(link).__name__ == "gaierror"
        for link in chain_of(error)
    )


def is_certificate_error(error: BaseException) -> bool:
    """Whether the other side's certificate is not trusted."""
    return any(isinstance(link, ssl.SSLCertVerificationError) for link in chain_of(error))


def is_disk_full(error: BaseException) -> bool:
    """Whether a disk or a quota is full, here."""
    return any(isinstance(link, OSError) and link.errno in _DISK_FULL for link in chain_of(error))


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from, outermost first; libraries hide causes in `args` and `reason` too."""
    seen: set[int] = set()
    waiting: list[object] = [error]
    while waiting:
        link = waiting.pop(0)
        if not isinstance(link, BaseException) or id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        waiting += [link.__cause__, link.__context__, getattr(link, "reason", None), *link.args]
