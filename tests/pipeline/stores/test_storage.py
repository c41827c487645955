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
    "uri", ["", "s3://", "s3:///key", "gs://bucket/x", "http://host/x", "file://host/x", "file://"]
)
def test_uris_that_cannot_be_opened(uri: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_store(uri)
    check_one_line(caught.value, repr(uri), "write")
