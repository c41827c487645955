"""One contract suite over every object store; S3 against server processes that check credentials."""

import os
import pickle
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest

from pipeline.errors import ConfigError, ObjectMissingError, StorageAccessError, StorageError
from pipeline.stores.storage import ObjectStore, S3Store, join_uri, open_store, read_file, split_file_uri
from tests.fixtures_s3 import S3Server
from tests.pipeline.cutting_proxy import CuttingProxy
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
SERVERS = ["moto", pytest.param("ceph", marks=pytest.mark.services)]


@pytest.fixture(params=["local", *SERVERS])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """An empty store of every kind."""
    if request.param == "local":
        return open_store(str(tmp_path / "store"))
    return open_store(join_uri(s3_uri(request, monkeypatch), uuid.uuid4().hex))


def s3_uri(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    server: S3Server = request.getfixturevalue("s3_server" if request.param == "moto" else "ceph_server")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server.uri


@pytest.fixture(params=SERVERS)
def s3(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of an S3 bucket."""
    return s3_uri(request, monkeypatch)


# ---------------------------------------------------------------- the contract


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


# ---------------------------------------------------------------- URIs


def test_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_store("data/x").uri == str(tmp_path / "data/x")
    assert open_store("~/x").uri == str(tmp_path / "home/x")
    assert open_store("file:///a%20b/c%23d").uri == "/a b/c#d"
    assert open_store("s3://bucket").uri == "s3://bucket"
    assert open_store("s3://bucket/a b/c/").uri == "s3://bucket/a b/c"
    assert isinstance(open_store("s3://bucket/x"), S3Store)
    assert join_uri("s3://bucket/", "a", "b/") == "s3://bucket/a/b"
    assert join_uri("/", "a") == "/a" and join_uri("a", "b") == "a/b"
    assert open_store(join_uri("file:///x", "a b%")).uri == "/x/a b%"


def test_a_single_file_is_read_by_its_own_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a b%.json").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    for uri in (str(tmp_path / "a b%.json"), (tmp_path / "a b%.json").as_uri(), "a b%.json", "./a b%.json"):
        assert read_file(uri) == b"x"
    assert split_file_uri("s3://bucket/key") == ("s3://bucket", "key") and split_file_uri("/x") == ("/", "x")
    with pytest.raises(ObjectMissingError):
        read_file("other.json")
    for uri in ("", "a/", "a/..", "s3://bucket", "file:///x/"):
        with pytest.raises(ConfigError, match="names no file"):
            read_file(uri)


@pytest.mark.parametrize(
    "uri", ["", "s3://", "s3:///key", "gs://bucket/x", "http://host/x", "file://host/x", "file://"]
)
def test_uris_that_cannot_be_opened(uri: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_store(uri)
    check_one_line(caught.value, repr(uri), "write")


# ---------------------------------------------------------------- S3


def test_listing_skips_markers_and_reads_what_others_wrote(s3: str) -> None:
    prefix = uuid.uuid4().hex
    client = boto3.client("s3")
    bucket = s3.removeprefix("s3://")
    for key in (
        f"{prefix}/",
        f"{prefix}/folder/",
        f"{prefix}/folder//double",
        f"{prefix}/folder/key",
        f"{prefix}-other",
    ):
        client.put_object(Bucket=bucket, Key=key, Body=b"" if key.endswith("/") else b"x")
    client.close()
    store = open_store(f"{s3}/{prefix}")
    assert keys_of(store) == ["folder//double", "folder/key"]
    assert store.read("folder//double") == b"x"


def test_wrong_secret_key(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    refused_everywhere(open_store(f"{s3}/x"), "AWS_SECRET_ACCESS_KEY")


def test_unknown_access_key(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAUNKNOWN")
    refused_everywhere(open_store(f"{s3}/x"), "AWS_ACCESS_KEY_ID")


def test_missing_bucket(s3: str) -> None:
    refused_everywhere(open_store("s3://no-such-bucket-here/x"), "NoSuchBucket", "check the bucket")


def test_impossible_bucket_name(s3: str) -> None:
    refused_everywhere(open_store("s3://Not_A_Bucket!/x"), "Not_A_Bucket!")


def test_no_credentials(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    refused_everywhere(open_store(f"{s3}/x"), "set AWS_ACCESS_KEY_ID")


def refused_everywhere(store: ObjectStore, *parts: str) -> None:
    for attempt in (
        lambda: store.read("key"),
        lambda: store.write("key", b"x"),
        lambda: store.create("key", b"x"),
        lambda: store.stat("key"),
        lambda: store.delete("key"),
        lambda: keys_of(store),
    ):
        with pytest.raises(StorageAccessError) as caught:
            attempt()
        check_one_line(caught.value, store.uri, *parts)


@pytest.fixture
def proxy(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[CuttingProxy]:
    """A proxy in front of the server, in use."""
    with CuttingProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.mark.parametrize("reset", [False, True])
def test_answers_cut_short_are_read_again(s3: str, proxy: CuttingProxy, reset: bool) -> None:
    store = open_store(f"{s3}/{uuid.uuid4().hex}")
    data = os.urandom(1 << 20)
    store.write("key", data)
    proxy.cut("GET", times=2, after_bytes=5000, reset=reset)
    assert store.read("key") == data
    assert proxy.num_cut == 2


def test_an_answer_that_never_completes_is_one_clear_line(
    s3: str, proxy: CuttingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    store = open_store(f"{s3}/{uuid.uuid4().hex}")
    store.write("key", bytes(1 << 20))
    proxy.cut("GET", times=1000, after_bytes=5000)
    with pytest.raises(StorageError) as caught:
        store.read("key")
    check_one_line(caught.value, f"{store.uri}/key", "no complete answer after all retries")
    assert proxy.num_cut == 6


def test_busy_answers_are_retried(s3: str, proxy: CuttingProxy) -> None:
    store = open_store(f"{s3}/{uuid.uuid4().hex}")
    proxy.busy(times=2)
    assert store.create("key", b"data") is True
    assert store.read("key") == b"data" and proxy.num_busy == 2


def test_a_lost_answer_to_create_leaves_our_bytes(s3: str, proxy: CuttingProxy) -> None:
    store = open_store(f"{s3}/{uuid.uuid4().hex}")
    proxy.cut("PUT", times=1, after_bytes=0)
    assert store.create("key", b"ours") is False  # it cannot know who was first
    assert proxy.num_cut == 1 and store.read("key") == b"ours"
