"""Deletions that a run can do without: a bucket may forbid them, and that is no reason to end a job."""

from collections.abc import Callable, Iterable

from pipeline.errors import StorageError
from pipeline.stores.object_store import ObjectStore


class Remover:
    """Deletes what nobody needs any more; what cannot be deleted is said once and counted.

    Args:
        store: Where.
        report: Takes the lines.
    """

    def __init__(self, store: ObjectStore, report: Callable[[str], None]) -> None:
        """Nothing has failed yet."""
        self._store, self._report = store, report
        self.num_failed = 0
        """Deletions that failed."""

    def remove(self, keys: Iterable[str], *, through: ObjectStore | None = None) -> int:
        """Delete objects up to the first that cannot be deleted: the next would be waited for as long again.

        Args:
            keys: The objects.
            through: The same store with other patience, or a cancellation.

        Returns:
            How many were deleted.
        """
        store, num_deleted = through or self._store, 0
        for key in keys:
            try:
                store.delete(key)
            except StorageError as error:
                self.num_failed += 1
                if self.num_failed == 1:
                    self._report(f"cannot delete what is no longer needed ({error}); it stays, and the run goes on")
                return num_deleted
            num_deleted += 1
        return num_deleted

    def sum_up(self) -> None:
        """Say how often deleting has failed, where it was more than the once that was said."""
        if self.num_failed > 1:
            self._report(f"{self._store.uri}: deleting failed {self.num_failed} times; what is not needed stays there")
