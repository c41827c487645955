"""Why a request to S3, or to a server with its API, failed; which causes pass is what is tried again.

The codes are S3's own names for errors, and the names of botocore's exceptions where no server answered.
"""

import ssl

from pipeline.stores.causes import (
    Cause,
    Failure,
    chain_of,
    is_certificate_error,
    is_network_error,
    is_outage_status,
)

NO_ENDPOINT = "InvalidEndpoint"
NOT_S3 = "NotAnAnswerOfS3"

_CONNECTING = frozenset({"EndpointConnectionError", "ConnectTimeoutError", "ProxyConnectionError"})
_NO_URL = frozenset(
    {NO_ENDPOINT, "LocationParseError", "LocationValueError", "URLSchemeUnknown", "EndpointResolutionError"}
)
_EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken"})
_DENIED = frozenset({"AccessDenied", "AllAccessDisabled", "AccountProblem", "403", "401"})
_REGION = frozenset(
    {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect", "TemporaryRedirect"}
)
_CONFLICT = frozenset({"ConditionalRequestConflict", "ConcurrentModification", "OperationAborted"})
_FULL = frozenset({"XMinioStorageFull", "InsufficientStorage", "InsufficientCapacity"})
_CUT_AT_THE_SERVER = frozenset({"IncompleteBody", "RequestTimeout"})
_CREDENTIALS = frozenset({"NoCredentialsError", "PartialCredentialsError", "NoAuthTokenError"})
_RETRIEVAL = frozenset({"CredentialRetrievalError", "MetadataRetrievalError", "TokenRetrievalError"})
_CONFIG_FILES = frozenset({"ConfigParseError", "ConfigNotFound", "InvalidConfigError"})


def may_have_been_done(failure: Failure) -> bool:
    """Whether a write that failed so may be in the store all the same: its answer was lost, or says nothing of it."""
    if failure.status is not None:
        return failure.status >= 500 and failure.status != 501
    return _is_network(failure) and failure.code not in _CONNECTING


def _is_network(failure: Failure) -> bool:
    return failure.status is None and (failure.is_network or is_network_error(failure.error))


def _is_no_url(error: BaseException) -> bool:
    return type(error).__name__ in _NO_URL


def _is_foreign_tls(failure: Failure) -> bool:
    ended = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
    return any(isinstance(link, ssl.SSLError) and not isinstance(link, ended) for link in chain_of(failure.error))


def _is_of_a_command(failure: Failure) -> bool:
    return "custom-process" in failure.reason  # what botocore calls the credential_process of a configuration file


def _is_missing_bundle(failure: Failure) -> bool:
    return any(isinstance(link, FileNotFoundError) for link in chain_of(failure.error))


S3_CAUSES = (
    Cause(
        name="endpoint without scheme",
        holds=lambda failure: failure.code in _NO_URL or any(_is_no_url(link) for link in chain_of(failure.error)),
        passes=False,
        advice="write AWS_ENDPOINT_URL as http://host:port",
    ),
    Cause(
        name="certificate not trusted",
        holds=lambda failure: is_certificate_error(failure.error),
        passes=False,
        advice="name the file of the certificate's authority in AWS_CA_BUNDLE, and the host as the certificate has it",
    ),
    Cause(
        name="no TLS there",
        holds=_is_foreign_tls,
        passes=False,
        advice="write http:// in AWS_ENDPOINT_URL, or the port that speaks TLS",
    ),
    Cause(
        name="no certificate file",
        holds=_is_missing_bundle,
        passes=False,
        advice="AWS_CA_BUNDLE must name a file that is there",
    ),
    Cause(
        name="credentials not handed out",
        holds=lambda failure: failure.code in _RETRIEVAL and not _is_of_a_command(failure),
        passes=True,
        advice="check what hands out the credentials, such as the metadata service",
    ),
    Cause(
        name="credential_process fails",
        holds=lambda failure: failure.code in _RETRIEVAL,
        passes=False,
        advice="correct the command that credential_process names in AWS_CONFIG_FILE",
    ),
    Cause(
        name="cannot be reached",
        holds=lambda failure: failure.code in _CONNECTING,
        passes=True,
        advice="check AWS_ENDPOINT_URL, that the server is up, and the network",
    ),
    Cause(
        name="no complete answer",
        holds=_is_network,
        passes=True,
        advice="check the server and the network, then run again",
    ),
    Cause(
        name="no credentials",
        holds=lambda failure: failure.code in _CREDENTIALS,
        passes=False,
        advice="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or check this machine's role and its "
        "metadata service; a source in a public bucket is read without them by --anonymous-source",
    ),
    Cause(
        name="unknown profile",
        holds=lambda failure: failure.code == "ProfileNotFound",
        passes=False,
        advice="check AWS_PROFILE, and the files AWS_CONFIG_FILE and AWS_SHARED_CREDENTIALS_FILE",
    ),
    Cause(
        name="configuration file",
        holds=lambda failure: failure.code in _CONFIG_FILES,
        passes=False,
        advice="correct that file, or name another in AWS_CONFIG_FILE or AWS_SHARED_CREDENTIALS_FILE",
    ),
    Cause(
        name="bucket name impossible",
        holds=lambda failure: failure.code in ("InvalidBucketName", "InvalidDNSNameError", "ParamValidationError"),
        passes=False,
        advice="a bucket's name has 3 to 63 small letters, digits, dots and hyphens",
    ),
    Cause(
        name="another library error",
        holds=lambda failure: failure.status is None and failure.code != NOT_S3,
        passes=False,
        advice="check the AWS_ variables",
    ),
    Cause(
        name="server full",
        holds=lambda failure: failure.status == 507 or failure.code in _FULL or "QuotaExceeded" in failure.code,
        passes=False,
        advice="make room on the server, or raise the quota, then run again",
    ),
    Cause(
        name="not implemented",
        holds=lambda failure: failure.status == 501 or failure.code == "NotImplemented",
        passes=False,
        advice="the store lacks what is needed (If-None-Match, If-Match, multipart uploads): use another store",
    ),
    Cause(
        name="conflict at this moment",
        holds=lambda failure: failure.code in _CONFLICT,
        passes=True,
        advice="another write of it is going on; run again",
    ),
    Cause(
        name="busy, not in S3's words",
        holds=lambda failure: is_outage_status(failure.status) and failure.code in ("", str(failure.status)),
        passes=True,
        advice="check AWS_ENDPOINT_URL: the server is busy, or what answers there is none of S3",
    ),
    Cause(
        name="busy",
        holds=lambda failure: is_outage_status(failure.status) or failure.code in _CUT_AT_THE_SERVER,
        passes=True,
        advice="the server is busy or ill; run again later",
    ),
    Cause(
        name="access key unknown",
        holds=lambda failure: failure.code in ("InvalidAccessKeyId", "InvalidClientTokenId"),
        passes=False,
        advice="check AWS_ACCESS_KEY_ID, and that AWS_ENDPOINT_URL is the server that knows it",
    ),
    Cause(
        name="secret key wrong",
        holds=lambda failure: failure.code == "SignatureDoesNotMatch",
        passes=False,
        advice="check AWS_SECRET_ACCESS_KEY",
    ),
    Cause(
        name="token expired",
        holds=lambda failure: failure.code in _EXPIRED,
        passes=False,
        advice="get new credentials, AWS_SESSION_TOKEN among them",
    ),
    Cause(
        name="clocks differ",
        holds=lambda failure: failure.code in ("RequestTimeTooSkewed", "RequestExpired"),
        passes=False,
        advice="set the clock of this machine",
    ),
    Cause(
        name="not public",
        holds=lambda failure: failure.code in _DENIED and failure.is_anonymous,
        passes=False,
        advice="not everybody may read and list this bucket: leave out --anonymous-source, and set AWS_ACCESS_KEY_ID "
        "and AWS_SECRET_ACCESS_KEY",
    ),
    Cause(
        name="may not read",
        holds=lambda failure: failure.code in _DENIED and failure.action in ("read", "list"),
        passes=False,
        advice="give these credentials s3:GetObject and s3:ListBucket there, or use others",
    ),
    Cause(
        name="may not write",
        holds=lambda failure: failure.code in _DENIED,
        passes=False,
        advice="give these credentials s3:PutObject, s3:DeleteObject and s3:AbortMultipartUpload there, or use others",
    ),
    Cause(
        name="no bucket",
        holds=lambda failure: failure.code == "NoSuchBucket",
        passes=False,
        advice="check the bucket in the URI, and AWS_ENDPOINT_URL; the bucket must exist",
    ),
    Cause(
        name="another region",
        holds=lambda failure: failure.code in _REGION or failure.status in (301, 302, 307, 308),
        passes=False,
        advice="set AWS_REGION to the bucket's region, and AWS_ENDPOINT_URL to an endpoint of it",
    ),
    Cause(
        name="upload gone",
        holds=lambda failure: failure.code == "NoSuchUpload",
        passes=False,
        advice="somebody, or a rule of the bucket, removes unfinished uploads; run again",
    ),
    Cause(
        name="not S3",
        holds=lambda failure: failure.code in (NOT_S3, "", str(failure.status)),
        passes=False,
        advice="check AWS_ENDPOINT_URL: what answers there is no S3 server",
    ),
    Cause(
        name="refused",
        holds=lambda failure: True,
        passes=False,
        advice="the server's log may say more",
    ),
)
"""All causes. What a server answers in its own name comes after what stops a request on its way."""
