"""How MLflow's HTTP client repeats a request: never one that may have made something, and with the server's words kept.

MLflow repeats every request that got no answer, `create_run` among them: an answer that is lost then makes a second
run, and nobody hears of the first. And where an answer is a 5xx or a 429, it throws the reason in its body away.
Both are decided in a class of urllib3 that MLflow takes from a name in one of its modules; there is no setting.
"""

import contextlib
from types import TracebackType
from typing import Any, Self

from urllib3.exceptions import MaxRetryError, ResponseError
from urllib3.util import Retry

_LONGEST_BODY_BYTES = 10_000


class ClientRetry(Retry):
    """Retries as MLflow sets them, but for POST: that is repeated only if no connection was made."""

    def increment(
        self,
        method: str | None = None,
        url: str | None = None,
        response: Any = None,
        error: Exception | None = None,
        _pool: Any = None,
        _stacktrace: TracebackType | None = None,
    ) -> Self:
        """The retries that are left; raises if there are none."""
        words = ""
        if response is not None and not response.get_redirect_location():
            with contextlib.suppress(Exception):  # an answer that breaks off
                words = response.read(_LONGEST_BODY_BYTES, decode_content=True).decode(errors="replace")
        made_something = method == "POST" and not (error and self._is_connection_error(error))
        left = self.new(total=0) if made_something else self
        try:
            return super(ClientRetry, left).increment(method, url, response, error, _pool, _stacktrace)
        except MaxRetryError as exhausted:
            if not words:
                raise
            reason = ResponseError(f"{exhausted.reason}: {words}")
            raise MaxRetryError(_pool, url or "", reason) from reason


def use_in_mlflow() -> None:
    """Make MLflow's client of this process repeat so."""
    from mlflow.utils import request_utils

    if vars(request_utils)["Retry"] is not ClientRetry:
        vars(request_utils)["Retry"] = ClientRetry
        request_utils._cached_get_request_session.cache_clear()
