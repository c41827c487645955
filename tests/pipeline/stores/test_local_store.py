"""What only a folder can do wrong: killed writers, permissions, a full disk, links. Contract: test_object_store.py."""

import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import StorageAccessError
from pipeline.stores.local_store import LocalStore
from pipeline.stores.object_store import TEMPORARY_PREFIX
from tests.pipeline.storage_checks import check_one_line, keys_of


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["write", "create", "delete"]),
            st.sampled_from(["x", "d/x", "d/y", "d.x", "e/f/z"]),
            st.binary(max_size=3),
        ),
        max_size=12,
    )
)
@settings(max_examples=40, deadline=None)
def test_local_store_behaves_like_a_dict(steps: list[tuple[str, str, bytes]]) -> None:
    expected: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(Path(folder))
        for action, key, data in steps:
            if action == "delete":
                store.delete(key)
                expected.pop(key, None)
            elif action == "create":
                assert store.create(key, data) is (key not in expected)
                expected.setdefault(key, data)
            else:
                store.write(key, data)
                expected[key] = data
        assert {key: store.read(key) for key in keys_of(store)} == expected
        assert keys_of(store) == sorted(expected)


WRITER = """
import sys; from pathlib import Path; from pipeline.stores.local_store import LocalStore
store, method = LocalStore(Path(sys.argv[1])), sys.argv[2]
print("ready", flush=True)
getattr(store, method)("folder/key", b"n" * (256 << 20))
"""


@pytest.mark.parametrize("method", ["write", "create"])
def test_killed_writers_leave_the_old_object_or_none(tmp_path: Path, method: str) -> None:
    store = LocalStore(tmp_path)
    (tmp_path / "folder").mkdir()
    if method == "write":
        store.write("folder/key", b"old")
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), method], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"

    def partial() -> list[Path]:
        files = (tmp_path / "folder").glob(f"{TEMPORARY_PREFIX}*")
        return [path for path in files if path.stat().st_size > 1 << 20]

    while not partial():
        assert process.poll() is None, "the writer finished before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert 0 < partial()[0].stat().st_size < 256 << 20, "killed in mid-write"
    if method == "write":
        assert store.read("folder/key") == b"old" and keys_of(store) == ["folder/key"]
    else:
        assert store.stat("folder/key") is None and keys_of(store) == []
        assert store.create("folder/key", b"new") and store.read("folder/key") == b"new"


@contextmanager
def unprivileged() -> Iterator[None]:
    """Permissions mean nothing to root: act as nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_without_permission() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        LocalStore(folder).write("readable/key", b"x")
        LocalStore(folder).write("closed/key", b"x")
        folder.chmod(0o555)
        (folder / "readable").chmod(0o555)
        (folder / "closed").chmod(0o000)
        store = LocalStore(folder)
        try:
            with unprivileged():
                assert store.read("readable/key") == b"x"
                for attempt in (
                    lambda: store.write("new/key", b"x"),
                    lambda: store.write("readable/key", b"x"),
                    lambda: store.create("readable/other", b"x"),
                    lambda: store.delete("readable/key"),
                    lambda: store.read("closed/key"),
                    lambda: store.stat("closed/key"),
                    lambda: keys_of(store),
                ):
                    with pytest.raises(StorageAccessError) as caught:
                        attempt()
                    check_one_line(caught.value, name, "Permission denied", "check")
        finally:
            for path in (folder, folder / "readable", folder / "closed"):
                path.chmod(0o755)
        assert store.read("readable/key") == b"x"


def test_a_folder_goes_with_its_last_object(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "root")
    for key in ("a/b/c/x", "a/b/y", "z"):
        store.write(key, b"x")
    store.delete("a/b/c/x")
    assert sorted(path.name for path in (tmp_path / "root/a/b").iterdir()) == ["y"]
    for key in ("a/b/y", "z", "never/was"):
        store.delete(key)
    assert list((tmp_path / "root").iterdir()) == [], "the root itself stays"


def test_folders_that_come_and_go_are_in_nobodys_way(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)

    def work(number: int) -> None:
        for turn in range(60):
            key = f"folder/of/{number % 3}/{number}"
            assert store.create(key, b"%d" % turn)
            found = store.read_versioned(key)
            assert store.replace(key, b"new %d" % turn, found.etag) is not None
            assert store.replace(f"folder/of/{number % 3}/nobody", b"", found.etag) is None
            store.delete(key)

    with ThreadPoolExecutor(9) as pool:
        list(pool.map(work, range(9)))
    assert list(tmp_path.iterdir()) == []


def test_what_killed_writers_left_is_removed_when_it_is_old(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    names = ["step-1/dead", "step-1/alive", "step-2/deep/dead", "other/dead"]
    for name in names:
        folder, _, kind = name.rpartition("/")
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        file = tmp_path / folder / f"{TEMPORARY_PREFIX}{kind}"
        file.write_bytes(b"half")
        if kind == "dead":
            os.utime(file, (0, 0))
    store.write("step-1/object", b"x")
    assert store.remove_unfinished("step-", older_than_s=3600) == 2
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert left == [f"other/{TEMPORARY_PREFIX}dead", f"step-1/{TEMPORARY_PREFIX}alive", "step-1/object"]
    assert not (tmp_path / "step-2").exists()


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for attempt in (
        lambda: LocalStore(tmp_path / "file").write("key", b"x"),
        lambda: list(LocalStore(tmp_path / "file").list()),
        lambda: LocalStore(tmp_path).write("file/key", b"x"),
        lambda: LocalStore(tmp_path.parent).write(tmp_path.name, b"x"),
        lambda: LocalStore(tmp_path.parent).create(tmp_path.name, b"x"),
    ):
        with pytest.raises(StorageAccessError) as caught:
            attempt()
        check_one_line(caught.value, str(tmp_path), "cannot", "a file and a folder are in each other's way")
    assert (tmp_path / "file").read_bytes() == b"x"


def test_a_full_disk_publishes_nothing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.write("key", b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        for attempt in (lambda: store.write("key", bytes(1 << 17)), lambda: store.create("new", bytes(1 << 17))):
            with pytest.raises(StorageAccessError) as caught:
                attempt()
            check_one_line(caught.value, str(tmp_path), "File too large", "free space")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["key"] and store.read("key") == b"old"


def test_listing_follows_links_but_not_in_circles(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    store.write("real/key", b"x")
    (tmp_path / "store/link").symlink_to(tmp_path / "store/real")
    (tmp_path / "store/real/loop").symlink_to(tmp_path / "store")
    (tmp_path / "store/dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "store/itself").symlink_to(tmp_path / "store/itself")
    (tmp_path / "store/within").symlink_to(tmp_path / "store/real/key/deeper")
    os.mkfifo(tmp_path / "store/real/pipe")
    unlisted: dict[str, str] = {}
    assert [info.key for info in store.list(unlisted=unlisted)] == keys_of(store) == ["link/key", "real/key"]
    assert unlisted == {
        "dangling": "leads nowhere",
        "itself": "leads nowhere",
        "within": "leads nowhere",
        "link/loop": "leads back to a folder above it",
        "real/loop": "leads back to a folder above it",
        "link/pipe": "is no regular file",
        "real/pipe": "is no regular file",
    }
    assert keys_of(LocalStore(tmp_path / "nowhere")) == []


def test_objects_have_ordinary_permissions(tmp_path: Path) -> None:
    LocalStore(tmp_path).write("key", b"x")
    (tmp_path / "plain").write_bytes(b"x")
    assert (tmp_path / "key").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_turns_of_many_processes_leave_no_lock(tmp_path: Path) -> None:
    """A counter that each raises by replacing: every success is one more, whatever file the lock is by now."""
    store = LocalStore(tmp_path)
    store.create("folder/count", b"0")
    command = [sys.executable, "-c", COUNTER, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(4)]
    won = [int(process.communicate()[0]) for process in processes]
    assert sum(won) == int(store.read("folder/count")) and min(won) > 0
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["count"]


COUNTER = """
import sys; from pathlib import Path; from pipeline.stores.local_store import LocalStore
store, won = LocalStore(Path(sys.argv[1])), 0
for _ in range(300):
    before = store.read_versioned("folder/count")
    won += store.replace("folder/count", b"%d" % (int(before.data) + 1), before.etag) is not None
print(won)
"""
