"""Our own errors are found again in whatever Ray makes of them."""

from typing import Any

import pytest
import ray
import ray.data
from ray.exceptions import RayTaskError
from ray.train import ControllerError, WorkerGroupError

from pipeline.errors import ShardCorruptError, StorageError
from pipeline.ray_errors import own_error


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def of_a_task(cause: Exception) -> Exception:
    """What ray.get raises."""
    task_error: Any = RayTaskError
    error: Exception = task_error("read", "Traceback ...", cause).as_instanceof_cause()
    return error


def test_the_innermost_of_a_chain_is_found() -> None:
    own = StorageError("s3://b/k: refused; check the credentials")
    for wrapped in (
        own,
        chained(RuntimeError("a"), own),
        chained(RuntimeError("a"), chained(KeyError("b"), own)),
        WorkerGroupError("a", {0: RuntimeError("b"), 3: chained(RuntimeError("c"), own)}),
        ControllerError(chained(RuntimeError("a"), own)),
        of_a_task(own),
        chained(RuntimeError("a"), of_a_task(own)),
    ):
        assert own_error(wrapped) is own


def test_what_ray_appends_to_the_message_is_cut_off() -> None:
    found = own_error(
        StorageError("s3://b/k: refused; check the credentials\nFailed to apply UDF transform\nTo change")
    )
    assert type(found) is StorageError
    assert str(found) == "s3://b/k: refused; check the credentials"


def test_other_errors_are_not_ours() -> None:
    loop = RuntimeError("a")
    loop.__context__ = chained(KeyError("b"), loop)
    assert own_error(loop) is None
    assert own_error(WorkerGroupError("a", {0: RuntimeError("b")})) is None


def test_a_task_and_an_actor_give_the_error_back(ray_session: None) -> None:
    @ray.remote(num_cpus=0)
    def outer() -> None:
        ray.get(inner.remote())

    @ray.remote(num_cpus=0)
    def inner() -> None:
        raise ShardCorruptError("train/3.tar: too short; prepare the dataset again")

    with pytest.raises(ray.exceptions.RayError) as raised:
        ray.get(outer.remote())
    own = own_error(raised.value)
    assert type(own) is ShardCorruptError
    assert str(own) == "train/3.tar: too short; prepare the dataset again"
