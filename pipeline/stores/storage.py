"""Where data live: opening a store by its URI, and the arithmetic of URIs."""

from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from pipeline.errors import ConfigError
from pipeline.redact import redact
from pipeline.stores.local_store import LocalStore
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.s3_store import S3Store

__all__ = ["ObjectStore", "join_uri", "open_store", "read_file", "split_file_uri"]


def open_store(uri: str) -> ObjectStore:
    """Open a store; nothing is created, read or checked yet.

    Args:
        uri: A local path (made absolute here, "~" is expanded), file:///path (percent-encoded) or s3://bucket/prefix.

    Raises:
        ConfigError: If the URI has another scheme, a remote host, no bucket, or a user or password: credentials are the
            environment's, and URIs are stored in records and configurations.
    """
    if redact(uri) != uri:
        raise ConfigError(
            f"URI {uri!r}: must hold no user and password, which come from the environment; leave them out, and set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    scheme = uri.split("://", 1)[0] if "://" in uri else ""
    if scheme == "s3":
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not bucket:
            raise ConfigError(f"URI {uri!r}: names no bucket; write s3://bucket/prefix")
        return S3Store(bucket, prefix.strip("/"))
    if scheme == "file":
        parts = urlsplit(uri.replace("?", "%3F").replace("#", "%23"))
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise ConfigError(f"URI {uri!r}: file URIs are local and absolute; write file:///path")
        return LocalStore(Path(unquote(parts.path)))
    if scheme or not uri:
        raise ConfigError(f"URI {uri!r}: cannot be opened; write a local path, file:///path or s3://bucket/prefix")
    return LocalStore(Path(uri).expanduser().absolute())


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
    if name in ("", ".", "..") or folder.endswith(":/"):
        raise ConfigError(f"URI {uri!r}: names no file; write a local path, file:///path or s3://bucket/key")
    return folder or slash or ".", unquote(name) if uri.startswith("file://") else name


def read_file(uri: str) -> bytes:
    """The content of a single file, by its URI; errors as ObjectStore.read and split_file_uri."""
    folder, name = split_file_uri(uri)
    return open_store(folder).read(name)
