"""The samplers by name: each is known by its own, and says what a record of it must say."""

import dataclasses
from typing import get_args

import pytest

from ddpm import SAMPLERS, Sampler, Stream
from ddpm.samplers.registry import AnySampler


def test_a_sampler_is_known_by_its_own_name() -> None:
    assert list(SAMPLERS) == [
        "ancestral",
        "ddim",
        "dpm_solver_2m",
        "dpm_solver_2m_sde",
        "dpm_solver_3m",
        "dpm_solver_3m_common",
        "heun",
    ]
    assert [kind().name for kind in SAMPLERS.values()] == list(SAMPLERS)  # type: ignore[call-arg]
    assert set(SAMPLERS.values()) == set(get_args(AnySampler))


@pytest.mark.parametrize("name", SAMPLERS)
def test_its_name_is_the_only_one_of_its_type(name: str) -> None:
    """So that a stored config says which of the variants it is."""
    (field,) = (field for field in dataclasses.fields(SAMPLERS[name]) if field.name == "name")
    assert get_args(field.type) == (name,)


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_it_declares(name: str) -> None:
    kind = SAMPLERS[name]
    assert issubclass(kind, Sampler) and kind.__doc__
    assert type(kind.order) is int and kind.order in (1, 2, 3)
    assert type(kind.revision) is int and kind.revision >= 1
    assert kind.noise_stream in (Stream.STEP, Stream.CHURN)
    assert {"order", "revision", "noise_stream"}.isdisjoint(field.name for field in dataclasses.fields(kind))
