"""Passwords stay out of every text that is printed or stored: one function, used wherever a text leaves the program.

What is left out of a URI is its user-info, `user:password@`, and the values of query parameters that are passwords,
`?password=...`. In memory a URI stays whole, since whoever connects needs it; one that is read back from a stored text
can be told, and has to be given again.

Used by this project's errors (errors.py), by lines for the terminal (progress.py, jobs/exits.py), by files of
configurations (config_sections.py), and by what goes to MLflow as text (tracking/). A foreign text that is cut short
goes through it before: without its end a password could no longer be told.
"""

import dataclasses
import re
from typing import Any

_LEFT_OUT = "***"
_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*://"
# Up to white space, an unescaped quotation mark, or the next URI.
_URI = re.compile(rf'({_SCHEME})((?:\\"|(?!{_SCHEME})[^\s"])+)')
_PASSWORD_PARAMETER = re.compile(
    r"([?&;][\w.%-]*(?:password|passwd|pwd|secret|token|signature|credential|key_?id|api_?key|access_?key|odbc_connect)=)"
    r"[^&;#'\"]+",
    re.IGNORECASE,
)
# What follows a colon in these is rather a password than a port: secret keys of S3 hold slashes, SQLAlchemy takes them.
_RATHER_A_PASSWORD = re.compile(r"(s3|gs|postgres|mysql|mariadb|mssql|oracle)", re.IGNORECASE)


def redact(text: str) -> str:
    """A text with the user-info and the passwords of all URIs in it left out; a redacted text stays as it is."""
    return _URI.sub(lambda match: match[1] + _without_passwords(match[1], match[2]), text) if "://" in text else text


def is_redacted(uri: str) -> bool:
    """Whether something of a URI was left out."""
    return f"://{_LEFT_OUT}@" in uri or f"={_LEFT_OUT}" in uri


def redact_fields(config: Any) -> Any:
    """A copy of a configuration with all its texts redacted, to be shown only: its rules are not checked again."""
    if isinstance(config, str):
        return redact(config)
    if isinstance(config, tuple):
        return tuple(map(redact_fields, config))
    if isinstance(config, dict):
        return {key: redact_fields(value) for key, value in config.items()}
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    shown = object.__new__(type(config))
    for field in dataclasses.fields(config):
        object.__setattr__(shown, field.name, redact_fields(getattr(config, field.name)))
    return shown


def _without_passwords(scheme: str, rest: str) -> str:
    """What follows `scheme://`, redacted."""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    end = authority.rfind("@") + 1  # where RFC 3986 ends it
    if not end and _holds_a_bare_password(scheme, authority):
        end = rest.rfind("@") + 1
    tail = _PASSWORD_PARAMETER.sub(rf"\1{_LEFT_OUT}", rest[end:])
    return f"{_LEFT_OUT}@{tail}" if end else tail


def _holds_a_bare_password(scheme: str, authority: str) -> bool:
    """Whether "host:port" is rather "user:pass", cut at a "/", "?" or "#" that should have been encoded."""
    host, colon, port = authority.partition(":")
    if not colon or host.startswith("["):  # an IPv6 address
        return False
    return _RATHER_A_PASSWORD.match(scheme) is not None or re.fullmatch(r"[0-9]*\W*", port) is None
