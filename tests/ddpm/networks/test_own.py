"""Networks of one's own: built from their factory's name, and every mistake in one clear line."""

from typing import Any

import pytest
import torch

from ddpm import ModelConfig, OwnNetworkConfig, build_network, count_parameters, flops_per_image
from ddpm.networks.cost import num_parameters


def own(factory: str, **options: int | float | str | bool) -> ModelConfig:
    return ModelConfig(network=OwnNetworkConfig(factory=factory, options=options), image_size=(8, 6), channels=2)


@pytest.mark.parametrize("factory", ["UNet", "a.b:", ":c", "a..b:c", "a/b.py:c", "a:b:c"])
def test_what_is_no_name_of_a_factory_is_refused(factory: str) -> None:
    with pytest.raises(ValueError, match=r'^factory: must be "package.module:factory", got '):
        OwnNetworkConfig(factory=factory)


@pytest.mark.parametrize("keyword", ["image_size", "channels", "num_classes"])
def test_what_comes_from_the_dataset_is_no_option(keyword: str) -> None:
    with pytest.raises(ValueError, match=rf"^options: '{keyword}' comes from the dataset, got it here"):
        OwnNetworkConfig(factory="a:b", options={"width": 3, keyword: 3})


def test_options_are_not_shared() -> None:
    first, second = OwnNetworkConfig(factory="a:b"), OwnNetworkConfig(factory="a:b")
    assert first == second and first.options is not second.options


@pytest.mark.usefixtures("own_package")
@pytest.mark.parametrize("factory", ["Affine", "Box.factory", "any_keywords"])
def test_own_network(factory: str) -> None:
    network = build_network(own(f"own_networks.affine:{factory}", width=5))
    assert count_parameters(network) == (2 * 5 + 5) + (5 * 2 + 2)
    assert num_parameters(own(f"own_networks.affine:{factory}", width=5)) == count_parameters(network)
    out = network(torch.zeros(3, 2, 8, 6), torch.zeros(3, dtype=torch.int64), None)
    assert out.shape == (3, 2, 8, 6)
    again = build_network(own(f"own_networks.affine:{factory}", width=5))
    assert torch.equal(network.get_parameter("lift.weight"), again.get_parameter("lift.weight"))


@pytest.mark.usefixtures("own_package")
@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        (
            "nowhere.at_all:f",
            {},
            r"^network.factory: cannot import 'nowhere.at_all' .*ModuleNotFoundError: No module named",
        ),
        ("own_networks.fails:f", {}, r"^network.factory: cannot import 'own_networks.fails' .*ZeroDivisionError"),
        ("own_networks.talks:f", {}, r"^network.factory: .*ImportError: first line second line"),
        ("own_networks.affine:nothing", {}, r"^network.factory: .* has no 'nothing'"),
        ("own_networks.affine:Box.nothing", {}, r"^network.factory: .* has no 'Box.nothing'"),
        ("own_networks.affine:number", {}, r"^network.factory: 'own_networks.affine:number' must be callable, got int"),
        ("own_networks.affine:no_module", {}, r"^network.factory: .* must return a torch.nn.Module, got int"),
        ("own_networks.affine:Affine", {}, r"^network.options: .* \(missing a required argument: 'width'\)"),
        (
            "own_networks.affine:Affine",
            {"width": 3, "depth": 2},
            r"^network.options: .* unexpected keyword argument 'depth'",
        ),
    ],
)
def test_a_bad_factory_is_one_clear_line(factory: str, options: dict[str, Any], message: str) -> None:
    for build in (build_network, flops_per_image, num_parameters):
        with pytest.raises(ValueError, match=message) as error:
            build(own(factory, **options))
        assert "\n" not in str(error.value)


@pytest.mark.usefixtures("own_package")
def test_errors_inside_a_factory_stay_what_they_are() -> None:
    with pytest.raises(TypeError, match=r"^inside the factory$"):
        build_network(own("own_networks.affine:broken"))


@pytest.mark.usefixtures("own_package")
def test_messages_call_it_by_its_factory() -> None:
    with pytest.raises(ValueError, match=r"^gradient_checkpointing: own_networks.affine:Affine does not offer it"):
        build_network(own("own_networks.affine:Affine", width=5), gradient_checkpointing=True)
