"""Flags of several values, given several times."""

import pytest

from jobs import compare, prepare_data
from jobs.repeated_flags import gather
from tests.jobs.every_job import resolve

FOLDER = ["--source", "photos", "--dataset", "out", "--image-size", "8"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--exclude", "a", "b c", "d/*"],
        ["--exclude", "a", "--exclude", "b c", "--exclude", "d/*"],
        ["--exclude=a", "--seed", "1", "--exclude", "b c", "d/*"],
        ["--exclude", "a", "b c", "--seed=1", "--exclude=d/*"],
    ],
)
def test_all_values_count_in_their_order(flags: list[str]) -> None:
    assert resolve(prepare_data.JOB, *FOLDER, *flags).exclude == ("a", "b c", "d/*")


def test_a_field_inside_another_takes_several_too() -> None:
    flags = ["--models", "x", "--sample.request.classes", "3", "--models", "y", "--sample.request.classes", "cat,7"]
    made = resolve(compare.JOBS["models"], *flags)
    assert made.models == ("x", "y") and made.sample.request.classes == ("3", "cat,7")


def test_other_flags_stay_as_they_are() -> None:
    flags = ["stray", "--seed", "1", "--seed=2", "--exclude", "--dataset", "x=y"]
    assert gather(resolve(prepare_data.JOB, *FOLDER), flags) == flags
