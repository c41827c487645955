"""S3 through the faulty proxy: signatures hold, and conditions can be ignored."""

import os
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from pipeline.stores.storage import open_store
from tests.faulty_proxy import FaultyProxy, IgnoreConditions, LoseAnswer
from tests.fixtures_s3 import S3Server, faulty_endpoint


@pytest.fixture(params=["moto", pytest.param("ceph", marks=pytest.mark.services)])
def s3(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FaultyProxy, str]]:
    """A proxy in front of a server, and the server's bucket."""
    server: S3Server = request.getfixturevalue("s3_server" if request.param == "moto" else "ceph_server")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    with faulty_endpoint() as proxy:
        yield proxy, server.bucket


def s3_client(endpoint: str) -> Any:
    session = boto3.session.Session()  # the default one keeps the credentials of the first server
    return session.client("s3", endpoint_url=endpoint, config=Config(retries={"total_max_attempts": 1}))


def test_s3_passes(s3: tuple[FaultyProxy, str]) -> None:
    proxy, bucket = s3
    client = s3_client(proxy.endpoint)
    place = {"Bucket": bucket, "Key": "faulty proxy/ä+b=c&d.bin"}
    data = os.urandom(64 << 20)
    client.put_object(**place, Body=data)
    assert client.head_object(**place)["ContentLength"] == len(data)
    assert client.get_object(**place)["Body"].read() == data
    assert client.get_object(**place, Range="bytes=5-14")["Body"].read() == data[5:15]
    upload = client.create_multipart_upload(**place)["UploadId"]
    part = client.upload_part(**place, UploadId=upload, PartNumber=1, Body=b"part")["ETag"]
    client.complete_multipart_upload(
        **place, UploadId=upload, MultipartUpload={"Parts": [{"ETag": part, "PartNumber": 1}]}
    )
    assert client.get_object(**place)["Body"].read() == b"part"
    listed = client.list_objects_v2(Bucket=bucket, Prefix="faulty proxy/")["Contents"]
    assert [entry["Key"] for entry in listed] == [place["Key"]]
    client.delete_object(**place)
    client.close()
    assert not any(request.broken for request in proxy.requests)


def test_a_server_that_ignores_conditions(s3: tuple[FaultyProxy, str]) -> None:
    proxy, bucket = s3
    client = s3_client(proxy.endpoint)
    place = {"Bucket": bucket, "Key": "conditions/ä b"}
    client.put_object(**place, Body=b"first", IfNoneMatch="*")
    with pytest.raises(ClientError, match="PreconditionFailed"):
        client.put_object(**place, Body=b"second", IfNoneMatch="*")
    proxy.add(IgnoreConditions(), path="/conditions/", times=2)
    client.get_object(**place)  # has no condition: not one of the two
    client.put_object(**place, Body=b"second", IfNoneMatch="*")
    assert client.get_object(**place)["Body"].read() == b"second"
    client.put_object(**place, Body=b"third", IfMatch='"another"')
    assert client.get_object(**place)["Body"].read() == b"third"
    assert proxy.count(IgnoreConditions) == 2
    with pytest.raises(ClientError, match="PreconditionFailed"):
        client.put_object(**place, Body=b"fourth", IfNoneMatch="*")
    client.close()


def test_a_store_in_the_environment_goes_through_the_proxy(s3_server: S3Server, faulty_s3: FaultyProxy) -> None:
    store = open_store(f"{s3_server.uri}/faulty-proxy")
    faulty_s3.add(LoseAnswer(), method="PUT", path="/faulty-proxy/key", times=1)
    store.write("key", b"data")
    assert store.read("key") == b"data" and faulty_s3.count(LoseAnswer) == 1
    assert [request.method for request in faulty_s3.requests] == ["PUT", "PUT", "GET"]
