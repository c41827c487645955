"""What cannot be deleted is no reason to end a run."""

from pathlib import Path

from pipeline.errors import StorageAccessError
from pipeline.stores.local_store import LocalStore
from pipeline.training.checkpoints.checkpoint_records import Retention
from pipeline.training.checkpoints.checkpoint_store import CheckpointStore
from tests.pipeline.training.checkpoint_cases import WrappedStore, pieces


def test_forbidden_deletions_are_said_once_and_counted(tmp_path: Path) -> None:
    class KeepingStore(WrappedStore):
        def delete(self, key: str) -> None:
            raise StorageAccessError(f"{key}: deleting is forbidden")

    lines: list[str] = []
    checkpoints = CheckpointStore(KeepingStore(LocalStore(tmp_path)), lines.append)
    for step in range(1, 5):
        checkpoints.prune(checkpoints.save(step, pieces()), Retention(last=1))
    assert [record.step for record in checkpoints.records()] == [4, 3, 2, 1]
    assert len(lines) == 1 and "deleting is forbidden" in lines[0]
    checkpoints.close()
    assert len(lines) == 2 and "deleting failed 3 times" in lines[1]
