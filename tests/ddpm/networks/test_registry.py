"""The networks by name: each config is known by its own."""

import dataclasses
from typing import get_args

import pytest

from ddpm import NETWORKS, NetworkConfig
from ddpm.networks.registry import AnyNetwork


def test_a_network_is_known_by_its_own_name() -> None:
    assert list(NETWORKS) == ["unet", "dit", "own"]
    assert set(NETWORKS.values()) == set(get_args(AnyNetwork))


@pytest.mark.parametrize("name", NETWORKS)
def test_its_name_is_the_only_one_of_its_type_and_its_default(name: str) -> None:
    """So that a stored config says which of the variants it is."""
    assert issubclass(NETWORKS[name], NetworkConfig) and NETWORKS[name].__doc__
    (field,) = (field for field in dataclasses.fields(NETWORKS[name]) if field.name == "name")
    assert get_args(field.type) == (name,) and field.default == name
