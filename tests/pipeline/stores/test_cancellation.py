"""Told once, told for ever: to those who look, to those who wait, and to parts of the work."""

import pytest

from pipeline.stores.cancellation import Cancellation, CancelledWriteError


def test_who_looks_stops_once_it_is_told() -> None:
    cancellation = Cancellation()
    cancellation.check()
    cancellation.cancel()
    cancellation.cancel()
    assert cancellation.is_cancelled and cancellation.event.is_set()
    with pytest.raises(CancelledWriteError):
        cancellation.check()
    assert not issubclass(CancelledWriteError, Exception), "nothing that handles failures may swallow it"


def test_a_part_stops_with_the_whole_and_not_the_other_way_round() -> None:
    whole = Cancellation()
    part, other = Cancellation(whole), Cancellation(whole)
    part.cancel()
    assert not whole.is_cancelled and not other.is_cancelled
    whole.cancel()
    assert other.is_cancelled and Cancellation(whole).is_cancelled


def test_who_waits_is_called_once_and_in_the_block_only() -> None:
    cancellation, called = Cancellation(), list[str]()
    with cancellation.calling(lambda: called.append("gone")):
        pass
    with cancellation.calling(lambda: called.append("there")):
        cancellation.cancel()
        cancellation.cancel()
        assert called == ["there"]
    with cancellation.calling(lambda: called.append("late")):
        assert called == ["there", "late"]
