"""What a run can do without, such as pictures: that it fails is no reason to end a training."""

import contextlib
from collections.abc import Callable, Iterator

from pipeline.redact import redact
from pipeline.stores.object_store import one_line


class SideWork:
    """Work of one kind; the first failure is said, all are counted.

    Args:
        name: What lines call it.
        report: Takes the lines.
    """

    def __init__(self, name: str, report: Callable[[str], None]) -> None:
        """Nothing has failed yet."""
        self._name, self._report = name, report
        self.num_failed = 0
        """How often it has failed."""

    @contextlib.contextmanager
    def attempt(self, step: int) -> Iterator[None]:
        """Do it in the block; whatever goes wrong there ends the block only."""
        try:
            yield
        except Exception as error:
            self.num_failed += 1
            if self.num_failed == 1:
                reason = redact(one_line(error) or type(error).__name__)
                self._report(f"{self._name} failed at step {step} ({reason}); the run goes on")

    def sum_up(self) -> None:
        """Say how often it has failed, where that was more than the once that was said."""
        if self.num_failed > 1:
            self._report(f"{self._name} failed {self.num_failed} times")
