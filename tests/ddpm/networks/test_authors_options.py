"""Initial weights, the eps of group norm and the frequencies of t: Ho's, and those of the authors of ADM."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddpm import UNet, UNetConfig
from ddpm.networks.layers import TimeEmbedding, sinusoidal_embedding

SMALL = UNetConfig(
    base_channels=16, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_groups=4
)


def test_initial_weights_are_pytorchs_where_asked() -> None:
    """Those of the authors of ADM: what nn.Conv2d and nn.Linear begin with, but for the layers that begin at zero."""
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, initial_weights="torch")
    net = UNet(config, image_size=(8, 8), channels=1, num_classes=3)
    num_zero = 0
    for name, module in net.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        assert module.bias is not None
        if name.endswith(("conv_2", "projection", "conv_out")) and "emb_projection" not in name:
            assert not module.weight.any() and not module.bias.any(), name
            num_zero += 1
            continue
        fan_in = module.weight[0].numel()
        for tensor in (module.weight, module.bias):  # both uniform in +- 1 / sqrt(fan_in)
            assert 0 < tensor.abs().max() <= fan_in**-0.5, name
            wanted = pytest.approx(1 / 3, abs=6 * 0.3 / tensor.numel() ** 0.5)
            assert tensor.square().mean().item() * fan_in == wanted, name
    assert num_zero == 8 + 4 + 1  # blocks: 2 down, 2 in the middle, 4 up; attention: 1, 1 and 2; the last
    x_t = torch.randn(2, 1, 8, 8)
    assert torch.equal(net(x_t, torch.tensor([3, 700])), torch.zeros_like(x_t))
    plain = UNet(
        dataclasses.replace(config, residual_resampling=True, adaptive_group_norm=True),
        image_size=(8, 8),
        channels=1,
        num_classes=None,
    )
    started = [m for m in plain.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m.weight.any()]
    assert all(module.bias is not None and module.bias.any() for module in started)


def test_a_config_without_the_authors_options_is_what_it_was() -> None:
    """The fields were added to a stored format: at their pins, weights, output and digest are those of before."""
    spelled = dataclasses.replace(
        SMALL, initial_weights="glorot", group_norm_eps=1e-6, embedding_divisor="half_minus_1"
    )
    assert spelled == SMALL
    for field, other in (("initial_weights", "torch"), ("group_norm_eps", 1e-5), ("embedding_divisor", "half")):
        assert {f.name: f.metadata.get("pin") for f in dataclasses.fields(SMALL)}[field] == getattr(SMALL, field)
        assert dataclasses.replace(SMALL, **{field: other}) != SMALL


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("initial_weights", "zeros", "must be glorot or torch, got 'zeros'"),
        ("embedding_divisor", "half_plus_1", "must be half_minus_1 or half, got 'half_plus_1'"),
        ("group_norm_eps", 0.0, r"must be in \(0, 1\), got 0.0"),
        ("group_norm_eps", 1.0, r"must be in \(0, 1\), got 1.0"),
        ("group_norm_eps", math.nan, r"must be in \(0, 1\), got nan"),
    ],
)
def test_impossible_options_are_refused(field: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: {words}"):
        dataclasses.replace(SMALL, **{field: value})


def test_every_group_norm_has_the_eps_that_is_asked_for() -> None:
    net = UNet(dataclasses.replace(SMALL, group_norm_eps=1e-5), image_size=(8, 8), channels=1, num_classes=None)
    assert {module.eps for module in net.modules() if isinstance(module, nn.GroupNorm)} == {1e-5}


def test_embedding_with_the_other_divisor_ends_one_place_before() -> None:
    emb = sinusoidal_embedding(torch.tensor([1]), 8, "half")
    frequencies = [10_000 ** (-i / 4) for i in range(4)]
    expected = [math.sin(f) for f in frequencies] + [math.cos(f) for f in frequencies]
    assert emb[0].tolist() == pytest.approx(expected, rel=1e-6)
    torch.manual_seed(0)
    one, other = (TimeEmbedding(8, 16, divisor=divisor) for divisor in ("half", "half_minus_1"))
    other.load_state_dict(one.state_dict())
    t = torch.tensor([5, 900])
    h = F.silu(sinusoidal_embedding(t, 8, "half") @ one.linear_1.weight.T)
    torch.testing.assert_close(one(t), h @ one.linear_2.weight.T)
    assert not torch.allclose(one(t), other(t), atol=1e-3)
