"""How many skipped steps are too many, in which window."""

import copy

import pytest
import torch

from pipeline.training.worker.health import SkipLimit, TooManySkipped
from pipeline.training.worker.loss_watch import summary_of
from tests.pipeline.training.step_cases import make_task, single_rank

CONFIG = make_task(max_skipped_batches=1, skip_window_steps=10).config
SUMMARIES = dict.fromkeys(range(30), summary_of(torch.tensor([1.0, 2.0]), torch.tensor([7, 8])))


def test_the_window_ends_with_the_latest_skipped_step() -> None:
    limit = SkipLimit(CONFIG, (), ())
    limit.check((3,), SUMMARIES)
    limit.check((3, 13), SUMMARIES)  # the window is 4 to 13
    limit.check((3, 13), SUMMARIES)
    with single_rank(), pytest.raises(TooManySkipped) as raised:
        limit.check((3, 13, 22), SUMMARIES)  # and now 13 to 22
    assert raised.value.steps == (13, 22)
    assert str(raised.value) == (
        "step 22: the loss or its gradient is not finite, for 2 of the last 10 steps (max_skipped_batches is 1); "
        "highest loss at sample 8"
    )


def test_what_was_skipped_before_a_resume_counts_with_the_next_one_only() -> None:
    limit = SkipLimit(CONFIG, (), (18, 19))
    limit.check((18, 19), {})
    with single_rank(), pytest.raises(TooManySkipped) as raised:
        limit.check((18, 19, 20), SUMMARIES)
    assert raised.value.steps == (18, 19, 20)


def test_left_out_steps_do_not_count_whether_they_come_again_or_stand_in_the_checkpoint() -> None:
    limit = SkipLimit(CONFIG, (18, 19, 22), (18, 19))
    limit.check((18, 19, 20), SUMMARIES)
    limit.check((18, 19, 20, 22), {})
    with single_rank(), pytest.raises(TooManySkipped) as raised:
        limit.check((18, 19, 20, 22, 23), SUMMARIES)
    assert raised.value.steps == (20, 23)


def test_the_first_window_with_too_many_ends_it_and_what_is_known_to_follow_is_left_out_as_well() -> None:
    limit = SkipLimit(CONFIG, (16,), ())
    limit.check((1,), SUMMARIES)
    with single_rank(), pytest.raises(TooManySkipped, match=r"^step 14: ") as raised:
        limit.check((1, 11, 14, 16, 29), SUMMARIES)
    assert raised.value.steps == (11, 14, 29)


def test_it_reaches_another_process_whole() -> None:
    error = copy.copy(TooManySkipped((1, 2), "why"))  # by what pickle asks it for
    assert (error.steps, str(error)) == ((1, 2), "why")
