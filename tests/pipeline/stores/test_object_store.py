"""One contract suite over every object store; S3 against server processes that check credentials."""

import os
import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.errors import ObjectMissingError
from pipeline.stores.object_store import ObjectStore, Versioned
from pipeline.stores.storage import open_store
from tests.pipeline.storage_checks import check_one_line, keys_of

ODD_KEYS = [
    *(
        "with space/a b.txt",
        "plus+plus",
        "percent%41",
        "hash#and?query=1&b",
        "quotes'\"`",
        "back\\slash",
        ".hidden/.file",
    ),
    *("semi;colon,comma=equals:at@", "tilde~$!*()[]{}|^<>", "umlaut-\u00e4/\u4e2d", "wide-\uff5e", "wide-\U0001f600"),
]


def test_write_read_stat_delete(store: ObjectStore) -> None:
    assert store.stat("a/b") is None
    store.write("a/b", b"one")
    store.write("a/b", b"three")
    assert store.read("a/b") == b"three"
    info = store.stat("a/b")
    assert info is not None and (info.key, info.size_bytes) == ("a/b", 5)
    assert abs(info.modified_s - time.time()) < 120
    listed = next(store.list())
    assert (listed.key, listed.size_bytes) == ("a/b", 5) and abs(listed.modified_s - info.modified_s) <= 1
    store.write("empty", b"")
    assert store.read("empty") == b"" and keys_of(store) == ["a/b", "empty"]
    store.delete("a/b")
    store.delete("a/b")
    store.delete("never/was")
    assert keys_of(store) == ["empty"]


def test_many_are_deleted_while_they_are_listed(store: ObjectStore) -> None:
    """More than one request of S3's; what is missing is fine, and what is not named stays."""
    names = {f"many/{number:04d}" for number in range(1010)} | {*ODD_KEYS, "kept/a", "keep"}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.write(key, b"x"), names))
    store.delete_all(iter([]))
    store.delete_all(["never/was", *(info.key for info in store.list() if not info.key.startswith("ke")), "nor/this"])
    assert keys_of(store) == ["keep", "kept/a"]
    store.delete_all(info.key for info in store.list())
    assert keys_of(store) == []


def test_missing_object_is_its_own_error(store: ObjectStore) -> None:
    store.write("a/b", b"x")
    for key in ("nothing", "a", "a/b/c", "a/bb"):
        with pytest.raises(ObjectMissingError) as caught:
            store.read(key)
        check_one_line(caught.value, store.uri, key)
        assert store.stat(key) is None


def test_create_has_one_winner_among_racing_threads(store: ObjectStore) -> None:
    for attempt in range(10):
        barrier = threading.Barrier(8)

        def race(number: int, key: str = f"race/{attempt}", barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return store.create(key, b"%d" % number * 5000)

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(race, range(8)))
        assert sum(won) == 1
        assert store.read(f"race/{attempt}") == b"%d" % won.index(True) * 5000


def test_create_on_an_existing_key_changes_nothing(store: ObjectStore) -> None:
    store.write("key", b"first")
    before = store.stat("key")
    assert store.create("key", b"second") is False
    assert store.create("key", b"first") is False
    assert store.read("key") == b"first" and store.stat("key") == before
    store.delete("key")
    assert store.create("key", b"third") is True
    assert store.read("key") == b"third"


def test_replace_has_one_winner_among_racing_threads(store: ObjectStore) -> None:
    store.create("key", b"start")
    for _ in range(10):
        before, barrier = store.read_versioned("key"), threading.Barrier(8)

        def race(number: int, etag: str = before.etag, barrier: threading.Barrier = barrier) -> str | None:
            barrier.wait()
            return store.replace("key", b"%d %d" % (number, time.monotonic_ns()), etag)

        with ThreadPoolExecutor(8) as pool:
            etags = list(pool.map(race, range(8)))
        (winner,) = [number for number, etag in enumerate(etags) if etag is not None]
        after = store.read_versioned("key")
        assert after.etag == etags[winner] and after.data.startswith(b"%d " % winner)


def test_replace_over_another_version_changes_nothing(store: ObjectStore) -> None:
    assert store.replace("folder/key", b"x", '"0123456789abcdef0123456789abcdef"') is None, "there is nothing"
    store.create("folder/key", b"first")
    first = store.read_versioned("folder/key")
    second = store.replace("folder/key", b"second", first.etag)
    assert second is not None and second != first.etag
    assert store.replace("folder/key", b"third", first.etag) is None
    assert store.read_versioned("folder/key") == Versioned(data=b"second", etag=second)
    store.delete("folder/key")
    assert store.replace("folder/key", b"third", second) is None
    assert store.stat("folder/key") is None and keys_of(store) == []


def test_chunks_are_one_object_that_is_seen_whole(store: ObjectStore) -> None:
    store.write("key", b"old")
    chunks = [bytes([number]) * 300_000 for number in range(50)]

    def watched() -> Iterator[bytes]:
        for chunk in chunks:
            assert store.read("key") == b"old", "nothing is seen before the end"
            yield chunk

    store.write("key", watched())
    assert store.read("key") == b"".join(chunks)
    store.write("key", iter([]))
    assert store.read("key") == b""


def test_chunks_that_end_in_an_error_leave_what_was_there(store: ObjectStore) -> None:
    store.write("key", b"old")

    def breaks() -> Iterator[bytes]:
        yield bytes(12 << 20)
        raise RuntimeError("the source broke")

    for key in ("key", "other"):
        with pytest.raises(RuntimeError, match="the source broke"):
            store.write(key, breaks())
    assert keys_of(store) == ["key"] and store.read("key") == b"old"


def test_readers_never_see_a_part_of_a_replacement(store: ObjectStore) -> None:
    size = 1 << 20
    store.write("key", b"0" * size)
    done = threading.Event()

    def replace() -> None:
        for number in range(1, 25):
            store.write("key", b"%d" % (number % 10) * size)
        done.set()

    writer = threading.Thread(target=replace)
    writer.start()
    num_reads = 0
    while not done.is_set():
        data = store.read("key")
        assert len(data) == size and data == data[:1] * size
        num_reads += 1
    writer.join()
    assert num_reads >= 3


def test_list_is_sorted_complete_and_filters_by_prefix(store: ObjectStore) -> None:
    # more than one page of S3; "a.b" < "a/..." < "a0": folders must not be walked in the order of their names
    names = {f"many/{number * 7919 % 100003:06d}" for number in range(1005)}
    names |= {"a.b", "a/z", "a/b/c", "a/b.c", "a0", "ab/c", "manyfold"}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.write(key, key.encode()), names))
    assert keys_of(store) == sorted(names)
    assert {info.key: info.size_bytes for info in store.list()} == {key: len(key) for key in names}
    for prefix in ("many/", "many", "many/0500", "a", "a/", "a/b", "a/b/", "ab/c", "zzz", "a/zz", "nothing/at/all"):
        assert keys_of(store, prefix) == sorted(key for key in names if key.startswith(prefix)), prefix


def test_keys_with_odd_characters(store: ObjectStore) -> None:
    for key in ODD_KEYS:
        assert store.create(key, key.encode()) is True
        assert store.create(key, b"other") is False
    assert keys_of(store) == sorted(ODD_KEYS, key=lambda key: key.encode())
    for key in ODD_KEYS:
        assert store.read(key) == key.encode()
        assert keys_of(store, key) == [key]
        store.delete(key)
    assert keys_of(store) == []


@pytest.mark.parametrize(
    "key", ["", "/", "/etc/passwd", "../x", "a/../../x", "..", "a/..", "./a", "a/./b", "a//b", "a/", "a\0b"]
)
def test_keys_that_leave_the_store_are_refused(store: ObjectStore, key: str) -> None:
    for attempt in (lambda: store.write(key, b"x"), lambda: store.create(key, b"x")):
        with pytest.raises(ValueError, match="key"):
            attempt()
    if key not in ("a//b", "a/", "a\0b"):  # others may have written these to S3
        for look in (store.read, store.stat, store.delete):
            with pytest.raises(ValueError, match="key"):
                look(key)
    assert keys_of(store) == []


def test_a_store_travels_to_other_processes(store: ObjectStore) -> None:
    store.write("key", b"data")  # its connection exists now, and must stay behind
    parcel = pickle.dumps(store)
    for name, value in os.environ.items():
        if name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
            assert value.encode() not in parcel
    copy: ObjectStore = pickle.loads(parcel)  # noqa: S301
    assert copy.uri == store.uri and copy.read("key") == b"data"
    assert open_store(store.uri).read("key") == b"data"


def test_a_store_serves_threads(store: ObjectStore) -> None:
    def work(number: int) -> bool:
        store.write(f"{number}", b"%d" % number * 1000)
        return store.read(f"{number}") == b"%d" % number * 1000

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(64)))
