"""From words to steps: exact integers at their limits, strata and probabilities as they are stated."""

import pytest
import torch

from ddpm.process.random_steps import importance_probabilities, timestep_in_stratum, timestep_of_word


def test_integers_are_exact_at_their_limits() -> None:
    last = torch.tensor([2**32 - 1])
    assert timestep_in_stratum(2, torch.tensor([2**30 - 2]), 2**30 - 1, last).tolist() == [1]
    assert timestep_in_stratum(1000, torch.tensor([0, 127]), 128, torch.tensor([0, 2**32 - 1])).tolist() == [0, 999]
    for T, strata in ((2, 2**30), (0, 4), (4, 0)):
        with pytest.raises(ValueError, match=r"^num_strata: "):
            timestep_in_stratum(T, torch.tensor([0]), strata, last)


def test_probabilities_follow_the_root_of_the_second_moment() -> None:
    moment = torch.tensor([1.0, 9.0, 0.0, 4.0], dtype=torch.float64)
    expected = torch.tensor([1.0, 3.0, 0.0, 2.0], dtype=torch.float64) / 6
    torch.testing.assert_close(importance_probabilities(moment, 0.0), expected)
    torch.testing.assert_close(importance_probabilities(moment, 0.2), 0.8 * expected + 0.05)
    assert importance_probabilities(moment * 0, 0.2).tolist() == [0.25] * 4


def test_words_fall_where_the_probabilities_say() -> None:
    probabilities = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25], dtype=torch.float64)
    word = torch.tensor([0, 2**30 - 1, 2**30, 3 * 2**30 - 1, 3 * 2**30, 2**32 - 1])
    assert timestep_of_word(probabilities, word).tolist() == [1, 1, 3, 3, 4, 4]
    short = torch.full((3,), 0.333, dtype=torch.float64)  # sums to less than the last word
    assert timestep_of_word(short, word[-1:]).tolist() == [2]
