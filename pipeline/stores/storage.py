"""Where data live: opening a store by its URI, and the arithmetic of URIs."""

import re
import unicodedata
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from pipeline.errors import ConfigError
from pipeline.redact import redact
from pipeline.stores.local_store import LocalStore
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.s3_store import S3Store

__all__ = [
    "ObjectStore",
    "check_file_uris",
    "check_uris",
    "fault_of",
    "join_uri",
    "open_store",
    "read_file",
    "split_file_uri",
]

_FILE_KINDS = "a local path, file:///path or s3://bucket/key"
_KINDS = "a local path, file:///path or s3://bucket/prefix"
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*):[/\\]")
_OURS = re.compile(r"(?P<scheme>s3|file)(?::|//)[/\\]*(?P<rest>.*)", re.DOTALL | re.IGNORECASE)  # slips too


def open_store(uri: str, *, is_anonymous: bool = False) -> ObjectStore:
    """Open a store; nothing is created, read or checked yet.

    Args:
        uri: A local path (made absolute here, "~" is expanded), file:///path (percent-encoded) or s3://bucket/prefix.
        is_anonymous: For reading a public bucket: no credentials are looked for, and none are sent. A local folder
            knows none.

    Raises:
        ConfigError: If the URI is none of these; see `fault_of`.
    """
    fault = fault_of(uri)
    if fault is not None:
        raise ConfigError(f"URI {uri!r}: {fault}")
    if uri.startswith("s3://"):
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        return S3Store(bucket, prefix.strip("/"), is_anonymous=is_anonymous)
    return LocalStore(_local_path(uri).absolute())


def check_uris(config: object, *fields: str) -> None:
    """Refuse, before anything is made, what `open_store` would not open: a folder called "s3:" is nobody's wish.

    Args:
        config: The object.
        fields: Names of fields that hold a URI, or None.

    Raises:
        ValueError: Names the field, the value and what to write.
    """
    for name in fields:
        uri = getattr(config, name)
        fault = None if uri is None else fault_of(uri)
        if fault is not None:
            raise ValueError(f"{name}: {fault}, got {uri!r}")


def check_file_uris(config: object, *fields: str) -> None:
    """As `check_uris`, for fields that name a single file; what `read_file` would not open is refused."""
    check_uris(config, *fields)
    for name in fields:
        uri = getattr(config, name)
        if uri is not None and _names_no_file(uri):
            raise ValueError(f"{name}: names no file; write {_FILE_KINDS}, got {uri!r}")


def fault_of(uri: str) -> str | None:
    """Why a URI cannot be opened, and what to write instead; None for one that can.

    A path that looks like a scheme that was mistyped, such as s3:/x, is a fault: ./s3:/x names such a folder.
    """
    if not uri:
        return f"must not be empty; write {_KINDS}"
    if redact(uri) != uri:
        return (
            "must hold no user and password, which come from the environment; leave them out, and set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if uri != uri.strip() or any(unicodedata.category(letter) in ("Cc", "Cs") for letter in uri):
        return f"has blanks at its ends, or control characters; write {_KINDS} without them"
    ours, other = _OURS.match(uri), _SCHEME.match(uri)
    if ours is not None and ours["scheme"].lower() == "s3":
        return _fault_of_s3(uri, ours["rest"])
    if ours is not None:
        return _fault_of_file(uri, ours["rest"])
    if other is not None:
        return f"{other['scheme']}: is none of the kinds that can be opened; write {_KINDS}"
    return _fault_of_path(uri)


def _fault_of_s3(uri: str, rest: str) -> str | None:
    if not rest:
        return "names no bucket; write s3://bucket/prefix"
    if uri != f"s3://{rest}":
        return f"is no S3 URI; write s3://{rest}"
    if any(part in (".", "..") for part in rest.split("/")):
        return "has a part '.' or '..', which no key has; write s3://bucket/prefix"
    return None


def _fault_of_path(uri: str) -> str | None:
    try:
        _local_path(uri)
    except RuntimeError:
        return f"there is no such user's folder as {uri.split('/')[0]}; write the path itself"
    return None


def _fault_of_file(uri: str, rest: str) -> str | None:
    if not uri.startswith(("file:///", "file://localhost/")):
        return f"is no file URI, which is local and absolute; write file:///{rest or 'path'}"
    return "has a NUL byte; write file:///path" if "\0" in unquote(uri) else None


def _local_path(uri: str) -> Path:
    """The path of a local URI.

    Raises:
        RuntimeError: If it is below the home of a user who has none.
    """
    if uri.startswith("file://"):
        return Path(unquote(urlsplit(uri.replace("?", "%3F").replace("#", "%23")).path))
    return Path(uri).expanduser()


def join_uri(uri: str, *parts: str) -> str:
    """Append path parts to a URI that `open_store` accepts."""
    if uri.startswith("file://"):
        parts = tuple(quote(part) for part in parts)
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def split_file_uri(uri: str) -> tuple[str, str]:
    """The folder of a single file, which `open_store` accepts, and its key there.

    Raises:
        ConfigError: If the URI ends without a name.
    """
    folder, slash, name = uri.rpartition("/")
    if _names_no_file(uri):
        raise ConfigError(f"URI {uri!r}: names no file; write {_FILE_KINDS}")
    return folder or slash or ".", unquote(name) if uri.startswith("file://") else name


def _names_no_file(uri: str) -> bool:
    folder, _, name = uri.rpartition("/")
    return name in ("", ".", "..") or folder.endswith(":/")


def read_file(uri: str) -> bytes:
    """The content of a single file, by its URI; errors as ObjectStore.read and split_file_uri."""
    folder, name = split_file_uri(uri)
    return open_store(folder).read(name)
