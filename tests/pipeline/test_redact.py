"""Passwords of URIs: what is left out of a text, what stays, and that a cut text holds none either."""

import pickle
from dataclasses import dataclass

import pytest

from pipeline import errors
from pipeline.config_errors import short
from pipeline.errors import ConfigError, PipelineError
from pipeline.generation.sample_config import SampleConfig
from pipeline.progress import say
from pipeline.redact import is_redacted, redact, redact_fields
from pipeline.stores.storage import open_store
from pipeline.tracking.mlflow_causes import describe
from pipeline.tracking.tracking import TrackingConfig


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("http://me:pass@host:5000/x", "http://***@host:5000/x"),
        ("HTTPS://token@host", "HTTPS://***@host"),
        ("http://me:p%40%2Fss@[::1]:5000", "http://***@[::1]:5000"),
        ("http://me:p@ss@host", "http://***@host"),
        ("http://me:p:ss@host", "http://***@host"),
        ("http://me:p'ss@host", "http://***@host"),
        # Not encoded as it should be: the person gets an error, and the error must not show it.
        ("http://me:pa/ss@host", "http://***@host"),
        ("http://me:pa#ss?@host", "http://***@host"),
        ("postgresql+psycopg2://me:12/34@host:5/db?x=1", "postgresql+psycopg2://***@host:5/db?x=1"),
        ("s3://AKIA0:12/ab+c@bucket/prefix", "s3://***@bucket/prefix"),
        ("postgresql:///db?user=me&password=pass&sslmode=on", "postgresql:///db?user=me&password=***&sslmode=on"),
        ("mysql://h/db?ssl_ca=x&ssl_password=p%26q#f", "mysql://h/db?ssl_ca=x&ssl_password=***#f"),
        ("mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3Dpass", "mssql+pyodbc:///?odbc_connect=***"),
        ("https://h/k?X-Amz-Signature=ab&X-Amz-Date=1", "https://h/k?X-Amz-Signature=***&X-Amz-Date=1"),
        ('no answer from "http://a:b@c/d" (http://e:f@g)', 'no answer from "http://***@c/d" (http://***@g)'),
        ("http://one:1,http://two:pass@host", "http://one:1,http://***@host"),
        ('uri = "http://me:pa\\"ss@host"\nx = 1', 'uri = "http://***@host"\nx = 1'),
        ("a\nb http://a:b@c\n", "a\nb http://***@c\n"),
    ],
)
def test_user_info_and_passwords_are_left_out(text: str, redacted: str) -> None:
    assert redact(text) == redacted
    assert redact(redacted) == redacted and is_redacted(redacted)


@pytest.mark.parametrize(
    "text",
    [
        "http://host:5000", "http://[::1]:5000/a@b", "http://host:5000/mail/me@x.org", "models:/digits@candidate",
        "models:/digits@candidate: not in the registry at http://mlflow:5000; digits has aliases: a@b",
        "sqlite:////home/me@work/mlflow.db", "file:///home/me@work/x", "s3://bucket/a@b/c:d@e", "/home/me:1@work/x",
        "s3://bucket/run-1?ema=20000", "MLflow at http://mlflow:5000: me@host", "http://h:5000/tokenizer?tokenizer=x",
        '{"a":"http://host:1","b":"me@host"}', "a://b", "://", "x: y@z", "",
    ],
)  # fmt: skip
def test_what_holds_no_password_stays(text: str) -> None:
    assert redact(text) == text and not is_redacted(text)


def test_every_error_of_ours_is_redacted_wherever_it_goes(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PipelineError)]
    assert len(kinds) > 15
    for kind in kinds:
        error = kind("cannot reach http://me:secret-word@host")
        again = pickle.loads(pickle.dumps(error))  # noqa: S301 - made here
        assert str(error) == str(again) == "cannot reach http://***@host" and type(again) is kind
        assert "secret-word" not in repr(error)
    say("at http://me:secret-word@host")
    assert capsys.readouterr().out == "at http://***@host\n"


def test_a_text_is_redacted_before_it_is_cut() -> None:
    """Cut first, "@" would be gone, and the password could not be told."""
    uri = f"http://me:secret-word{'x' * 300}@host"
    assert "secret-word" not in short(uri) + describe(ValueError(f"cannot parse {uri}"))


@pytest.mark.parametrize(
    "uri", ["s3://key:secret-word@bucket/x", "s3://key:secret/word@bucket", "file://me:secret-word@host/x", "http://a:secret-word@h"]
)  # fmt: skip
def test_places_hold_no_credentials(uri: str) -> None:
    """They are stored in records and configurations as they are."""
    with pytest.raises(ConfigError, match=r"must hold no user and password, which come from the environment") as caught:
        open_store(uri)
    assert "secret" not in str(caught.value) and "***@" in str(caught.value)


def test_a_configuration_to_be_shown() -> None:
    @dataclass(frozen=True)
    class Nest:
        inner: SampleConfig
        names: tuple[str, ...]
        options: dict[str, str]

    uri = "http://me:secret-word@host"
    config = Nest(
        inner=SampleConfig(model="m", output="o", tracking=TrackingConfig(uri=uri)), names=(uri,), options={"a": uri}
    )
    shown = redact_fields(config)
    assert shown.inner.tracking.uri == shown.names[0] == shown.options["a"] == "http://***@host"
    assert shown.inner.sampler == config.inner.sampler and config.inner.tracking.uri == uri
