"""Why a request to MLflow failed: a table of causes for what its client, its database or its artifact store raise.

`failure_of` reads status, code and the server's own words out of the chain of errors that MLflow wraps around them.
Nothing here imports MLflow: rows are told by status, by MLflow's error codes and by words that its versions share.
"""

import errno
import html
import json
import re

from pipeline.redact import redact
from pipeline.stores.causes import (
    Cause,
    Failure,
    cause_of,
    chain_of,
    is_certificate_error,
    is_disk_full,
    is_network_error,
    is_outage_status,
)
from pipeline.tracking.metric_queue import DeniedError, RefusedError

MLFLOW_VARIABLES = "tracking.uri or MLFLOW_TRACKING_URI"

# MLflow's own codes for an answer whose status the client does not keep.
_STATUS_OF_CODE = {
    "TEMPORARILY_UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
    "REQUEST_LIMIT_EXCEEDED": 429,
    "RESOURCE_EXHAUSTED": 429,
    "PERMISSION_DENIED": 403,
    "CUSTOMER_UNAUTHORIZED": 401,
    "UNAUTHENTICATED": 401,
    "ENDPOINT_NOT_FOUND": 404,
    "NOT_FOUND": 404,
    "NOT_IMPLEMENTED": 501,
}
_NO_ANSWER = frozenset(  # of requests, urllib3 and botocore: no complete answer came
    {
        "ConnectionClosedError", "ConnectTimeout", "ConnectTimeoutError", "EndpointConnectionError", "IncompleteRead",
        "NameResolutionError", "NewConnectionError", "ProtocolError", "ReadTimeout", "ReadTimeoutError",
        "ChunkedEncodingError",
    }
)  # fmt: skip
_STATUS = re.compile(r"too many (\d{3}) error responses|failed with error code (\d{3}) != |^(\d{3}) \w+ Error: ")
_BODY = re.compile(r"(?:^too many \d{3} error responses: |Response body: '|Response text: )(.*)", re.DOTALL)
_LONGEST_REASON = 200


def failure_of(error: BaseException) -> Failure:
    """What an error of MLflow's client says, whatever it is wrapped in."""
    status, code, own_code, words = None, "", "", ""
    for link in chain_of(error):
        text = str(link)
        if isinstance(answer := getattr(link, "json", None), dict):  # MLflow's RestException
            code = code or str(answer.get("error_code", ""))
            words = words or str(answer.get("message") or answer.get("detail") or text)
        elif code_here := str(getattr(link, "error_code", "")):
            own_code = own_code or ("" if code_here == "INTERNAL_ERROR" else code_here)
        elif isinstance(answer := getattr(link, "response", None), dict):  # botocore's ClientError
            code = code or str(answer.get("Error", {}).get("Code", ""))
            status = status or answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if status is None and (found := _STATUS.search(text)):
            status = int(next(filter(None, found.groups())))
        if not words and (found := _BODY.search(text)):
            body_code, words = _words_of_body(found[1].removesuffix("'"))
            code = body_code or code
    network = is_network_error(error) or any(type(link).__name__ in _NO_ANSWER for link in chain_of(error))
    if status is None and not network:  # else the client made its code up: it calls a lost answer a wrong parameter
        code = code or own_code
        status = _STATUS_OF_CODE.get(code)
    if words and status is not None:
        words = f"HTTP {status}: {words}"
    return Failure(
        status=status,
        code=code,
        reason=_one_line(words or _root_words(error)),
        error=error,
        is_network=network and status is None,
    )


def _words_of_body(body: str) -> tuple[str, str]:
    """MLflow's code and the text of an answer: its JSON message, or what a page says without its tags."""
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    if isinstance(answer, dict):
        return str(answer.get("error_code", "")), str(answer.get("message") or answer.get("detail") or body)
    page = re.sub(r"(?s)<(title|script|style)\b.*?</\1>|<!--.*?-->", " ", body) if "<" in body else body
    return "", html.unescape(re.sub(r"<[^>]*>", " ", page)).strip() or "an empty page"


def _root_words(error: BaseException) -> str:
    """The text of the innermost error, where the reason stands."""
    root = error
    while (deeper := root.__cause__ or root.__context__) is not None:
        root = deeper
    if isinstance(root, OSError) and root.strerror:
        return str(root)
    return str(root) or type(root).__name__


def _one_line(text: str) -> str:
    line = redact(" ".join(text.split()))
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]}..."


def _says(*words: str) -> re.Pattern[str]:
    return re.compile("|".join(words), re.IGNORECASE)


_FULL = _says("no space left on device", "disk is full", "disk full", "disk quota exceeded")
_SCHEMA = _says("out-of-date database schema", "can't locate revision", "schema migration")
_HOST = _says("invalid host header")
_LOGIN = _says("authentication failed", "no pg_hba.conf entry", "access denied for user", "role .* does not exist")
_UNUSABLE = _says(
    "readonly database", "read-only", "unable to open database", "no such table", "no such column", "is not a database",
    "malformed", "(database|relation|column) .* does not exist", "unknown database",
)  # fmt: skip


def _text(failure: Failure) -> str:
    return " ".join([failure.reason, *map(str, chain_of(failure.error))])


def _is_of_database(failure: Failure) -> bool:
    return "OperationalError" in _text(failure) or any(
        type(link).__module__.partition(".")[0] in ("sqlalchemy", "sqlite3", "psycopg2", "pymysql")
        for link in chain_of(failure.error)
    )


def _is_of_artifacts(failure: Failure) -> bool:
    """Whether files were sent or fetched: through the server, or straight to the store that it names."""
    return "/mlflow-artifacts/" in _text(failure) or any(
        type(link).__module__.partition(".")[0] in ("botocore", "boto3") for link in chain_of(failure.error)
    )


def _is_file_error(failure: Failure) -> bool:
    kinds = (PermissionError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
    return any(isinstance(link, kinds) for link in chain_of(failure.error)) or any(
        isinstance(link, OSError) and link.errno == errno.EROFS for link in chain_of(failure.error)
    )


def _is_tls(failure: Failure) -> bool:
    return any(type(link).__name__.startswith("SSL") for link in chain_of(failure.error))


def _is_bad_login_of_database(failure: Failure) -> bool:
    return _is_of_database(failure) and _LOGIN.search(_text(failure)) is not None


def _is_unusable_database(failure: Failure) -> bool:
    return _is_of_database(failure) and _UNUSABLE.search(_text(failure)) is not None


REFUSED_REQUEST = Cause(
    name="request refused",
    holds=lambda f: f.code in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE"),
    passes=False,
    advice="it would be refused again",
)
ARTIFACTS_FAIL = Cause(
    name="artifact store fails",
    holds=lambda f: _is_of_artifacts(f) and (f.is_network or f.status == 500),
    passes=True,
    advice="the server may be unable to reach or write it: look at the server's log and at --artifacts-destination",
)
TOO_LARGE = Cause(
    name="too large",
    holds=lambda f: f.status == 413,
    passes=False,
    advice="raise the limit of the server, or of a proxy before it, for the size of a request",
)
OUT_OF_DATE = Cause(
    name="server too old",
    holds=lambda f: (
        f.status == 404 and "/logged-models" in _text(f) and f.code not in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND")
    ),
    passes=False,
    advice="it does not know logged models, which registration needs: update the MLflow server to 3.x",
)

MLFLOW_CAUSES: tuple[Cause, ...] = (
    Cause(
        name="disk full",
        holds=lambda f: is_disk_full(f.error) or f.status == 507 or _FULL.search(_text(f)) is not None,
        passes=False,
        advice="make room on the disk that this message names, here or on the server",
    ),
    Cause(
        name="database of another MLflow version",
        holds=lambda f: _SCHEMA.search(_text(f)) is not None,
        passes=False,
        advice="back the database up and run `mlflow db upgrade`, or use the MLflow version that made it",
    ),
    REFUSED_REQUEST,
    TOO_LARGE,
    Cause(
        name="host name not allowed",
        holds=lambda f: f.status == 403 and _HOST.search(_text(f)) is not None,
        passes=False,
        advice="start the server with --allowed-hosts (or MLFLOW_SERVER_ALLOWED_HOSTS) that lists this host and port",
    ),
    Cause(
        name="credentials refused",
        holds=lambda f: f.status == 401,
        passes=False,
        advice="set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
    ),
    Cause(
        name="permission denied",
        holds=lambda f: f.status == 403,
        passes=False,
        advice="give this user the right to write to the experiment, the registered model and the artifacts",
    ),
    OUT_OF_DATE,
    Cause(
        name="certificate not trusted",
        holds=lambda f: is_certificate_error(f.error),
        passes=False,
        advice="name the authority's file in REQUESTS_CA_BUNDLE or MLFLOW_TRACKING_SERVER_CERT_PATH",
    ),
    Cause(
        name="no TLS there",
        holds=_is_tls,
        passes=False,
        advice=f"write http:// or https:// in {MLFLOW_VARIABLES} as the server speaks it",
    ),
    Cause(
        name="database refuses the login",
        holds=_is_bad_login_of_database,
        passes=False,
        advice="correct user and password of the database",
    ),
    Cause(
        name="database cannot be used",
        holds=_is_unusable_database,
        passes=False,
        advice="give the path of a database that MLflow may write",
    ),
    Cause(
        name="database locked or away",
        holds=_is_of_database,
        passes=True,
        advice="look whether the database runs, and whether another process holds it",
    ),
    ARTIFACTS_FAIL,
    Cause(
        name="artifact folder cannot be used",
        holds=lambda f: not f.is_network and _is_file_error(f),
        passes=False,
        advice="give the folder of the artifacts to this user, or another one to the experiment",
    ),
    Cause(
        name="too many requests",
        holds=lambda f: f.status == 429,
        passes=True,
        advice="the server or a proxy before it limits requests; try later, or raise its limit",
    ),
    Cause(
        name="server fails",
        holds=lambda f: is_outage_status(f.status),
        passes=True,
        advice="look at the log of the server, and of a proxy before it",
    ),
    Cause(
        name="no answer",
        holds=lambda f: f.is_network,
        passes=True,
        advice=f"start the server, or correct {MLFLOW_VARIABLES}",
    ),
    Cause(
        name="it answers, but not as MLflow does",
        holds=lambda f: f.status in (404, 405, 410, 501) or "not in a valid JSON format" in _text(f),
        passes=False,
        advice=f"correct {MLFLOW_VARIABLES}: another server, or a path of it, stands there",
    ),
    Cause(
        name="not possible",
        holds=lambda _: True,
        passes=False,
        advice=f"look at the server's log, or correct {MLFLOW_VARIABLES}",
    ),
)
"""The first row that holds is the cause."""


def mlflow_cause(error: BaseException) -> Cause:
    """Why a request to MLflow failed."""
    return cause_of(failure_of(error), MLFLOW_CAUSES)


def is_outage(error: BaseException) -> bool:
    """Whether the server is busy or away, or broke off: the same request may succeed later."""
    return mlflow_cause(error).passes


def refusal(error: BaseException) -> str | None:
    """MLflow's error code, if it says that this very request is wrong, and not the server or the caller's rights."""
    failure = failure_of(error)
    return failure.code if cause_of(failure, MLFLOW_CAUSES) is REFUSED_REQUEST else None


def describe(error: BaseException) -> str:
    """The server's own words, or the network's, in one line of about 200 characters without passwords."""
    return failure_of(error).reason


def explain(error: BaseException) -> str:
    """Cause, words and advice in one line."""
    failure = failure_of(error)
    cause = cause_of(failure, MLFLOW_CAUSES)
    return f"{cause.name} ({failure.reason}); {cause.advice}"


def for_queue(error: BaseException) -> RefusedError | DeniedError | ConnectionError:
    """The same failure as the metric queue knows it: never again, not as things are, or later."""
    if refusal(error) or mlflow_cause(error) is TOO_LARGE:
        return RefusedError(describe(error))
    return ConnectionError(describe(error)) if is_outage(error) else DeniedError(explain(error))
