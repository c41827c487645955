"""A walk from noise to images waits for the device nowhere: on "meta" there is no number that could be read."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm import (
    DDIM,
    Ancestral,
    DiffusionModel,
    DPMSolver2M,
    Heun,
    ModelConfig,
    Sampler,
    ScheduleConfig,
    UNetConfig,
    build_network,
    generate,
    interpolate_images,
    partial_diffusion,
    repaint,
)
from tests.ddpm.sampler_examples import CHOSEN
from tests.host_waits import WaitsOfTheHost

META = torch.device("meta")
SHAPE, BATCH = (3, 8, 8), 4
UNET = UNetConfig(base_channels=8, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=4)
GUIDED = {
    "guided": DDIM(num_steps=9, guidance_scale=2.0, guidance_rescale=0.5),
    "guided in an interval": DPMSolver2M(num_steps=9, guidance_scale=2.0, guidance_interval=(0.3, 3.0)),
}
VARIANTS: dict[str, Sampler] = {
    **{f"{number}, {one.name}": one for number, one in enumerate(CHOSEN)},
    **GUIDED,
    "analytic": Ancestral(num_steps=9, variance="analytic"),
    "learned": Ancestral(num_steps=9, variance="learned_range"),
}


def model(device: torch.device = META, *, learned_variance: bool = False) -> DiffusionModel:
    config = ModelConfig(
        network=dataclasses.replace(UNET, learned_variance=learned_variance),
        schedule=ScheduleConfig(name="cosine", num_timesteps=100),
        image_size=SHAPE[1:],
        channels=SHAPE[0],
        num_classes=5,
    )
    return DiffusionModel.of(config, build_network(config).eval()).to(device)


def given(device: torch.device = META) -> tuple[Tensor, Tensor, Tensor]:
    """Images, ids and labels."""
    ids = torch.arange(BATCH, device=device)
    return torch.zeros(BATCH, *SHAPE, device=device), ids, ids % 5


def error_of(sampler: Sampler) -> Tensor | None:
    return torch.full((100,), 0.1, dtype=torch.float64) if sampler.needs_x_0_error else None


def made(sampler: Sampler, device: torch.device) -> Tensor:
    _, ids, label = given(device)
    made_by = model(device, learned_variance=sampler.needs_learned_variance)
    return generate(made_by, sampler, seed=3, sample_ids=ids, label=label, x_0_error=error_of(sampler))


@pytest.mark.parametrize("name", VARIANTS)
def test_no_sampler_waits(name: str) -> None:
    _, ids, label = given()
    sampler = VARIANTS[name]
    asked = model(learned_variance=sampler.needs_learned_variance)
    with WaitsOfTheHost(META) as waits:
        x_0 = generate(asked, sampler, seed=3, sample_ids=ids, label=label, x_0_error=error_of(sampler))
    assert waits.found == [] and x_0.device == META and x_0.shape == (BATCH, *SHAPE)


@pytest.mark.parametrize("name", GUIDED)
def test_a_guide_does_not_either(name: str) -> None:
    _, ids, label = given()
    led, guide = model(), dataclasses.replace(model(), prediction_type="v")
    with WaitsOfTheHost(META) as waits:
        generate(led, GUIDED[name], seed=3, sample_ids=ids, label=label, guide=guide)
    assert waits.found == []


PLAIN, INTERVAL = {"guidance_scale": 1.0}, {"guidance_scale": 2.0, "guidance_interval": (0.3, 3.0)}


@pytest.mark.parametrize("guidance", [PLAIN, INTERVAL], ids=["plain", "guided"])
@pytest.mark.parametrize("sampler", [Ancestral(num_steps=9), DDIM(num_steps=9, eta=0.5)], ids=lambda one: one.name)
def test_no_inpainting_waits(sampler: Sampler, guidance: dict[str, Any]) -> None:
    (x_0, ids, label), walked = given(), model()
    known = torch.zeros(1, 1, *SHAPE[1:], dtype=torch.bool, device=META)
    with WaitsOfTheHost(META) as waits:
        repaint(
            walked,
            dataclasses.replace(sampler, **guidance),
            x_0,
            known,
            label,
            jump_length=3,
            num_resamples=2,
            seed=3,
            sample_ids=ids,
        )
    assert waits.found == []


@pytest.mark.parametrize("guidance", [PLAIN, INTERVAL], ids=["plain", "guided"])
def test_no_other_edit_waits(guidance: dict[str, Any]) -> None:
    (x_0, ids, label), walked, weight = given(), model(), torch.zeros(BATCH, device=META)
    partly, between = DDIM(num_steps=9, **guidance), DPMSolver2M(num_steps=9, **guidance)
    with WaitsOfTheHost(META) as waits:
        partial_diffusion(walked, partly, x_0, label, strength=0.6, seed=3, sample_ids=ids)
        interpolate_images(walked, between, x_0, x_0, weight, first_label=label, second_label=label, sample_ids=ids)
    assert waits.found == []


def test_who_looks_at_an_image_is_found_and_who_looks_at_t_is_not() -> None:
    (_, ids, label), walked, seen = given(), model(), list[float]()

    def looks_at_t(step: int, t: Tensor, x_t: Tensor, x_0_hat: Tensor) -> None:
        seen.append(float(t[0]))

    def looks_at_an_image(step: int, t: Tensor, x_t: Tensor, x_0_hat: Tensor) -> None:
        float(x_0_hat.mean())

    with WaitsOfTheHost(META) as waits:
        generate(walked, Heun(num_steps=3), seed=3, sample_ids=ids, label=label, callback=looks_at_t)
    assert waits.found == [] and seen == [99, 50, 0]
    with WaitsOfTheHost(META) as waits, pytest.raises(RuntimeError, match="meta"):
        generate(walked, Heun(num_steps=3), seed=3, sample_ids=ids, label=label, callback=looks_at_an_image)
    assert waits.found[0] == "Tensor.__float__ of []"


@pytest.mark.gpu
@pytest.mark.parametrize("name", VARIANTS)
def test_a_gpu_never_makes_the_host_wait(name: str) -> None:
    device = torch.device("cuda", 0)
    made(VARIANTS[name], device)  # what is made once, is made
    torch.cuda.set_sync_debug_mode("error")
    try:
        made(VARIANTS[name], device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
