"""What MLflow's client repeats by itself, and what it may not: a create whose answer was lost."""

from collections.abc import Iterator

import pytest
from mlflow.utils import request_utils

from pipeline.tracking.client_retry import ClientRetry
from pipeline.tracking.mlflow_causes import describe, mlflow_cause
from pipeline.tracking.mlflow_client import connect
from tests.faulty_proxy import Answer, Fault, FaultyProxy, LoseRequest


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    with FaultyProxy("http://127.0.0.1:9") as proxy:
        yield proxy


@pytest.mark.parametrize("fault", [LoseRequest(), Answer(500), Answer(503), Answer(429), Answer(504)])
def test_what_may_have_made_something_is_sent_once(proxy: FaultyProxy, fault: Fault) -> None:
    proxy.add(fault)
    client = connect(proxy.endpoint)
    with pytest.raises(Exception) as caught:
        client.create_run("0")
    assert mlflow_cause(caught.value).passes
    assert [request.path for request in proxy.requests].count("/api/2.0/mlflow/runs/create") == 1
    with pytest.raises(Exception) as caught:
        client.get_run("f00")
    assert mlflow_cause(caught.value).passes
    asked = [request.path for request in proxy.requests]
    assert asked.count("/api/2.0/mlflow/runs/get") == 3, "a question is asked again"


def test_a_server_that_is_not_there_yet_is_asked_again_for_a_create(proxy: FaultyProxy) -> None:
    """Where no connection was made, nothing was."""
    retry = ClientRetry(total=2, connect=2, read=2, status=2, allowed_methods=None)
    refused = request_utils.urllib3.exceptions.NewConnectionError(None, "refused")  # type: ignore[arg-type]
    assert retry.increment("POST", "/create", error=refused).total == 1


def test_the_words_of_a_server_that_fails_are_kept(proxy: FaultyProxy) -> None:
    proxy.add(Answer(500, b'{"error_code": "INTERNAL_ERROR", "message": "the disk smells of smoke"}'))
    for ask in (lambda: connect(proxy.endpoint).create_run("0"), lambda: connect(proxy.endpoint).get_run("f00")):
        with pytest.raises(Exception) as caught:
            ask()
        assert describe(caught.value) == "HTTP 500: the disk smells of smoke"


def test_a_server_does_not_say_how_long_to_wait(proxy: FaultyProxy) -> None:
    proxy.add(Answer(503, headers=(("Retry-After", "3600"),)))
    with pytest.raises(Exception) as caught:
        connect(proxy.endpoint).get_run("f00")
    assert mlflow_cause(caught.value).name == "server fails"
