"""A model as one value: put together from its config, asked through its denoiser, refused in training mode."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpm import (
    DiffusionModel,
    DiTConfig,
    GuidedNetwork,
    ModelConfig,
    Network,
    NetworkDenoiser,
    ScheduleConfig,
    UNetConfig,
    build_model,
    build_network,
    make_schedule,
)
from ddpm.process.denoiser import MovesT
from ddpm.process.guidance import Guide

UNET = UNetConfig(
    base_channels=16, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_groups=4
)
SCHEDULE = make_schedule(ScheduleConfig(name="cosine"))


def halves(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    return 0.5 * x_t


def model_of(network: Network, **changes: Any) -> DiffusionModel:
    return DiffusionModel(network=network, schedule=SCHEDULE, image_shape=(1, 2, 3), **changes)


def test_it_is_what_its_config_says() -> None:
    unet = dataclasses.replace(UNET, prediction_type="v", learned_variance=True)
    config = ModelConfig(
        network=unet,
        schedule=ScheduleConfig(name="cosine", num_timesteps=50),
        image_size=(8, 16),
        channels=3,
        num_levels=65536,
        num_classes=5,
    )
    model = DiffusionModel.of(config, halves)
    assert model.network is halves and model.image_shape == (3, 8, 16)
    assert torch.equal(model.schedule.alpha_bar, make_schedule(config.schedule).alpha_bar)
    assert (model.prediction_type, model.learned_variance) == ("v", True)
    assert (model.null_label, model.num_levels) == (5, 65536)
    plain = DiffusionModel.of(ModelConfig(network=DiTConfig(), image_size=(6, 4), channels=1), halves)
    assert plain.image_shape == (1, 6, 4) and plain.null_label is None and plain.num_levels == 256
    assert (plain.prediction_type, plain.learned_variance) == ("eps", False)
    assert (plain.variance, model.variance) == ("fixed_small", "learned_range")


def test_a_new_model_has_its_seed_s_weights_and_is_ready_to_be_asked() -> None:
    config = ModelConfig(network=dataclasses.replace(UNET, dropout=0.5), image_size=(8, 8), channels=1)
    before = torch.get_rng_state()
    model = build_model(config, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    network, expected = model.network, build_network(config, seed=3)
    assert isinstance(network, nn.Module) and not network.training and expected.training
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in network.state_dict().items())
    other = build_model(config).network
    assert isinstance(other, nn.Module)
    assert not torch.equal(network.get_parameter("conv_in.weight"), other.get_parameter("conv_in.weight"))


def test_a_module_is_moved_and_the_rest_stays() -> None:
    model = model_of(nn.Conv2d(1, 1, 1), num_levels=65536, null_label=4)
    moved = model.to("meta")
    assert isinstance(moved.network, nn.Conv2d) and moved.network.weight.device.type == "meta"
    for field in ("schedule", "image_shape", "prediction_type", "learned_variance", "null_label", "num_levels"):
        assert getattr(moved, field) is getattr(model, field)
    with pytest.raises(AssertionError, match="only a module has a place"):
        model_of(halves).to("cpu")


def test_its_denoiser_is_its_own_and_limited_as_asked() -> None:
    model = model_of(halves, prediction_type="x_0")
    assert model.denoiser() == NetworkDenoiser(network=MovesT(halves), schedule=SCHEDULE, prediction_type="x_0")
    free = model.denoiser(clip_x_0=False)
    x_t, t = torch.full((1, 1, 2, 3), 4.0), torch.tensor([500])
    assert float(free(x_t, t, None).x_0_hat.max()) == 2 and float(model.denoiser()(x_t, t, None).x_0_hat.max()) == 1
    assert model.denoiser(dynamic_threshold=0.9).dynamic_threshold == 0.9
    learned = model_of(lambda x_t, t, label: torch.cat((x_t, 0 * x_t), dim=1), learned_variance=True).denoiser()
    fraction = learned(x_t, t, None).variance_fraction
    assert fraction is not None and fraction.unique().tolist() == [0.5]


def test_guidance_wraps_its_network() -> None:
    model, guide = model_of(halves, null_label=3, prediction_type="v"), model_of(halves, prediction_type="x_0")
    assert isinstance(guide, Guide)
    options: dict[str, Any] = {"guidance_interval": (0.1, 2.0), "guidance_rescale": 0.7}
    plain = model.denoiser(guidance_scale=2.0, **options).network
    assert plain == GuidedNetwork(
        network=MovesT(halves),
        schedule=SCHEDULE,
        null_label=3,
        prediction_type="v",
        scale=2.0,
        interval=(0.1, 2.0),
        rescale=0.7,
    )
    led = model.denoiser(guidance_scale=2.0, guide=guide).network
    assert isinstance(led, GuidedNetwork) and led.guide is guide
    with pytest.raises(ValueError, match=r"^guide: has no effect where guidance_scale is 1, got one"):
        model.denoiser(guide=guide)
    with pytest.raises(ValueError, match=r"^guidance_scale: needs a network trained with a null label, got 2.0"):
        model_of(halves).denoiser(guidance_scale=2.0)


def test_training_mode_is_refused_by_name() -> None:
    training = model_of(nn.Dropout())
    with pytest.raises(ValueError, match=r"^network: must be in eval mode, got training mode; call network.eval\(\)"):
        training.denoiser()
    with pytest.raises(ValueError, match=r"^guide: must be in eval mode, got training mode; call guide.eval\(\)"):
        model_of(nn.Dropout().eval()).denoiser(guidance_scale=2.0, guide=training)
    with pytest.raises(ValueError, match=r"^teacher: must be in eval mode"):
        training.check_eval_mode("teacher")
    model_of(nn.Dropout().eval()).denoiser()
    model_of(halves).check_eval_mode("network")  # a function has no mode
