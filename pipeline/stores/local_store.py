"""An object store in a local folder; the contract is in pipeline/stores/object_store.py.

Limit: unlike in S3, one key cannot be both an object and the folder of others ("a" and "a/b").
"""

import errno
import fcntl
import hashlib
import os
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from pipeline.errors import ObjectMissingError, StorageAccessError
from pipeline.stores.cancellation import Cancellation
from pipeline.stores.object_store import TEMPORARY_PREFIX, ObjectInfo, Versioned, check_key, one_line

_FOLDER_ATTEMPTS = 100


class LocalStore:
    """A folder. Atomic by a temporary file in the same folder, fsync, then rename (write) or hard link (create)."""

    def __init__(self, root: Path) -> None:
        """Name the folder `root` (absolute); it is made by the first write."""
        self._root = root.absolute()

    @property
    def uri(self) -> str:
        """The absolute path."""
        return str(self._root)

    def __repr__(self) -> str:
        """Show the URI."""
        return f"LocalStore({self.uri!r})"

    def with_patience(self, at_most_s: float) -> "LocalStore":
        """See ObjectStore.with_patience. A folder is never waited for."""
        return self

    def with_cancellation(self, cancellation: Cancellation) -> "LocalStore":
        """See ObjectStore.with_cancellation. A folder is never waited for."""
        return self

    def read(self, key: str) -> bytes:
        """See ObjectStore.read."""
        path = self._path(key)
        try:
            return path.read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise ObjectMissingError(f"{path}: does not exist") from None
        except OSError as error:
            self._refuse(path, "read", error)

    def read_versioned(self, key: str) -> Versioned:
        """See ObjectStore.read_versioned. The version is the digest of the bytes."""
        data = self.read(key)
        return Versioned(data=data, etag=_etag(data))

    def write(self, key: str, data: bytes | Iterable[bytes]) -> None:
        """See ObjectStore.write."""
        with self._temporary_file(self._path(key), data) as (temporary, path):
            temporary.replace(path)

    def create(self, key: str, data: bytes) -> bool:
        """See ObjectStore.create."""
        path = self._path(key)
        if path.is_file():
            return False
        with self._temporary_file(path, data) as (temporary, _):
            try:
                os.link(temporary, path)
            except FileExistsError:
                if path.is_dir():
                    raise
                return False
        return True

    def replace(self, key: str, data: bytes, etag: str) -> str | None:
        """See ObjectStore.replace. Callers take turns by a lock on a file beside the object."""
        path = self._path(key)
        try:
            with self._turn(path):
                if self.read_versioned(key).etag != etag:
                    return None
                self.write(key, data)
        except ObjectMissingError:
            return None
        return _etag(data)

    def list(self, prefix: str = "", unlisted: dict[str, str] | None = None) -> Iterator[ObjectInfo]:
        """See ObjectStore.list. A missing folder is empty; links to folders are followed, loops are not.

        Args:
            prefix: See ObjectStore.list.
            unlisted: Is given what lies there and is no object, with the reason: links that lead nowhere or back to a
                folder above, and what is no regular file (a pipe would be read for ever).
        """
        folder = prefix.rpartition("/")[0]
        if folder:
            check_key(folder)
        yield from self._walk(folder + "/" if folder else "", prefix, (), {} if unlisted is None else unlisted)

    def stat(self, key: str) -> ObjectInfo | None:
        """See ObjectStore.stat."""
        path = self._path(key)
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._refuse(path, "read", error)
        if path.is_dir():
            return None
        return ObjectInfo(key=key, size_bytes=status.st_size, modified_s=status.st_mtime)

    def delete(self, key: str) -> None:
        """See ObjectStore.delete. Folders that are empty then go too: S3 has none."""
        path = self._path(key)
        try:
            path.unlink(missing_ok=True)
        except NotADirectoryError:
            return
        except OSError as error:
            self._refuse(path, "delete", error)
        self._remove_empty(path.parent)

    def delete_all(self, keys: Iterable[str]) -> None:
        """See ObjectStore.delete_all."""
        for key in keys:
            self.delete(key)

    def remove_unfinished(self, prefix: str, *, older_than_s: float) -> int:
        """See ObjectStore.remove_unfinished. The age is that of the last write to the file, on this machine's clock."""
        num_removed, now_s = 0, time.time()
        folder = self._root / prefix.rpartition("/")[0]
        for file in sorted(folder.rglob(f"{TEMPORARY_PREFIX}*")):
            if not file.relative_to(self._root).as_posix().startswith(prefix):
                continue
            with suppress(OSError):  # published, or removed by another, since
                if now_s - file.stat().st_mtime > older_than_s:
                    file.unlink()
                    num_removed += 1
                    self._remove_empty(file.parent)
        return num_removed

    def _remove_empty(self, folder: Path) -> None:
        """Remove a folder below the root, and those above it, as far as they are empty."""
        with suppress(OSError):
            while folder != self._root:
                folder.rmdir()
                folder = folder.parent

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    @contextmanager
    def _turn(self, path: Path) -> Iterator[None]:
        """Nobody else replaces an object in this folder meanwhile; a holder that dies lets go."""
        lock = path.parent / f"{TEMPORARY_PREFIX}lock"
        descriptor = None
        while descriptor is None:
            descriptor = self._try_turn(path, lock)
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink()  # while it is held: who waits for it finds it gone, and takes the next
            os.close(descriptor)

    def _try_turn(self, path: Path, lock: Path) -> int | None:
        """The descriptor of the lock, held; None if it was removed while this caller waited for it."""
        with ExitStack() as stack:
            try:
                descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
            except (FileNotFoundError, NotADirectoryError):
                raise ObjectMissingError(f"{path}: does not exist") from None
            except OSError as error:
                self._refuse(path, "write", error)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:
                self._refuse(path, "lock", error)
            try:
                is_current = os.path.samestat(os.fstat(descriptor), lock.stat())
            except FileNotFoundError:
                return None
            if not is_current:
                return None
            stack.pop_all()
            return descriptor

    @contextmanager
    def _temporary_file(self, path: Path, data: bytes | Iterable[bytes]) -> Iterator[tuple[Path, Path]]:
        """Write and sync a temporary file beside `path`; sync the folder after the body has published it."""
        temporary = path.parent / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
        try:
            try:
                with os.fdopen(_create_file(temporary), "wb") as file:
                    for chunk in [data] if isinstance(data, bytes) else data:
                        file.write(chunk)
                    file.flush()
                    os.fsync(file.fileno())
                yield temporary, path
            finally:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
            with suppress(FileNotFoundError):  # deleted since, and its folder with it
                _sync_folder(path.parent)
        except OSError as error:
            self._refuse(path, "write", error)

    def _walk(
        self, folder: str, prefix: str, above: tuple[tuple[int, int], ...], unlisted: dict[str, str]
    ) -> Iterator[ObjectInfo]:
        """Objects below `folder` ("" or "a/b/") in key order; `above` holds the folders on the way, to end loops."""
        try:
            status = (self._root / folder).stat()
            if (status.st_dev, status.st_ino) in above:
                unlisted[folder.rstrip("/")] = "leads back to a folder above it"
                return
            with os.scandir(self._root / folder) as entries:
                # a folder sorts as its keys do: "a/..." comes after "a.txt"
                names = sorted((entry.name + "/" if _is_folder(entry) else entry.name, entry) for entry in entries)
        except FileNotFoundError:
            return
        except OSError as error:
            self._refuse(self._root / folder, "list", error)
        for name, entry in names:
            key = folder + name
            if name.endswith("/"):
                if key.startswith(prefix) or prefix.startswith(key):
                    yield from self._walk(key, prefix, (*above, (status.st_dev, status.st_ino)), unlisted)
            elif key.startswith(prefix) and not name.startswith(TEMPORARY_PREFIX):
                info = self._stat(entry)
                if info is None:
                    if entry.is_symlink():  # else it was deleted since
                        unlisted[key] = "leads nowhere"
                elif stat.S_ISREG(info.st_mode):
                    yield ObjectInfo(key=key, size_bytes=info.st_size, modified_s=info.st_mtime)
                else:
                    unlisted[key] = "is no regular file"

    def _stat(self, entry: os.DirEntry[str]) -> os.stat_result | None:
        """None for what is not there: deleted since, or a link to nothing or to itself."""
        try:
            return entry.stat()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
                return None
            self._refuse(Path(entry.path), "read", error)

    def _refuse(self, path: Path, verb: str, error: OSError) -> NoReturn:
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP) and verb == "write":
            advice = "check the permissions, and that the file system supports hard links"
        elif verb == "lock":
            advice = "the file system has no locks (flock), which replacing takes: choose another place"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            advice = "a file and a folder are in each other's way: choose another place"
        else:
            advice = "check the path, the permissions and the free space"
        raise StorageAccessError(f"{path}: cannot {verb}: {error.strerror or one_line(error)}; {advice}") from error


def _create_file(path: Path) -> int:
    """The descriptor of a new file; its folder is made again where `delete` has just found it empty."""
    for attempt in range(_FOLDER_ATTEMPTS):
        try:
            _make_folder(path.parent)
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileNotFoundError:
            if attempt == _FOLDER_ATTEMPTS - 1:
                raise
    raise AssertionError("the last attempt returns or raises")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _make_folder(folder: Path) -> None:
    """Make a folder and its parents, each entry synced, so that a crash cannot lose the path to a synced file."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot sync a folder
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)
