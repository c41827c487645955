"""Opening stores by their URIs. The contract of stores: test_object_store.py."""

from pathlib import Path

import pytest

from pipeline.errors import ConfigError, ObjectMissingError
from pipeline.stores.s3_store import S3Store
from pipeline.stores.storage import join_uri, open_store, read_file, split_file_uri
from tests.pipeline.storage_checks import check_one_line


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
    ("uri", "advice"),
    [
        ("", "write a local path"),
        ("s3://", "names no bucket; write s3://bucket/prefix"),
        ("s3:///key", "write s3://key"),
        ("s3:/x", "write s3://x"),
        ("s3:x/y", "write s3://x/y"),
        ("s3//x", "write s3://x"),
        ("S3://x/Y", "write s3://x/Y"),
        ("S3//x", "write s3://x"),
        ("s3:\\\\x", "write s3://x"),
        ("s3://b/../x", "which no key has; write s3://bucket/prefix"),
        ("gs://bucket/x", "gs: is none of the kinds that can be opened; write a local path"),
        ("http://host/x", "http: is none"),
        ("https:/host/x", "https: is none"),
        ("s3a://bucket/x", "s3a: is none"),
        ("models:/x@y", "models: is none"),
        ("C:\\data", "C: is none"),
        ("file://host/x", "write file:///host/x"),
        ("file://", "write file:///path"),
        ("file:/x", "write file:///x"),
        ("FILE:///x", "write file:///x"),
        ("file:///a%00b", "NUL byte; write"),
        ("x ", "blanks at its ends"),
        (" s3://b/x", "blanks at its ends"),
        ("s3://b/x\n", "blanks at its ends, or control characters; write"),
        ("a\0b", "control characters; write"),
        ("a\udce4", "control characters; write"),
        ("~nobody.here/x", "no such user's folder as ~nobody.here; write"),
    ],
)
def test_uris_that_cannot_be_opened(uri: str, advice: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_store(uri)
    check_one_line(caught.value, repr(uri), advice)


@pytest.mark.parametrize("uri", ["a:b", "./s3:/x", "größe/a b", "s3", "s3x//y", "file", "~", "s3://b/ä ü", "file:///"])
def test_uris_that_are_right_as_they_stand(uri: str) -> None:
    store = open_store(uri)
    assert open_store(store.uri).uri == store.uri
