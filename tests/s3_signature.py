"""Requests of S3 without their conditions: signatures cover these, so what was signed is signed again."""

import re
from collections.abc import Mapping

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from tests.http_messages import Head

CONDITIONS = ("If-None-Match", "If-Match")


def without_conditions(head: Head, environment: Mapping[str, str]) -> Head:
    """The request without its conditions, signed again if it was signed (AWS signature version 4)."""
    signature = re.fullmatch(
        r"AWS4-HMAC-SHA256 Credential=[^/]+/\d+/(?P<region>[^/]+)/(?P<service>[^/]+)/aws4_request, ?"
        r"SignedHeaders=(?P<names>[^,]+), ?Signature=[0-9a-f]+",
        head.get("Authorization"),
    )
    head = head.without(CONDITIONS)
    if signature is None:
        return head
    conditions = {name.lower() for name in CONDITIONS}
    signed = {name: head.get(name) for name in signature["names"].split(";") if name not in conditions}
    request = AWSRequest(method=head.method, url=f"http://{head.get('Host')}{head.target}", headers=signed)
    request.context["timestamp"] = head.get("X-Amz-Date")
    keys = Credentials(environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"])
    signer = S3SigV4Auth(keys, signature["service"], signature["region"])
    text = signer.string_to_sign(request, signer.canonical_request(request))
    value = (
        f"AWS4-HMAC-SHA256 Credential={signer.scope(request)}, SignedHeaders={';'.join(sorted(signed))}, "
        f"Signature={signer.signature(text, request)}"
    )
    return head.without(["Authorization"]).adding("Authorization", value)
