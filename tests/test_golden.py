"""Numbers that no change of the code's shape may move: loss curves, noise, images. A change of them is a decision.

Integers and digests are exact; floats hold to 1e-6 on any machine, because the network computes in float64. Data order
and stored formats have golden values beside their own tests. `python -m tests.test_golden` writes the file anew.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpm import (
    SAMPLERS,
    Ancestral,
    DiffusionModel,
    Heun,
    LikelihoodConfig,
    ModelConfig,
    ObjectiveConfig,
    Sampler,
    ScheduleConfig,
    Stream,
    UNetConfig,
    bound_of_images,
    build_network,
    generate,
    images_to_x_0,
    make_training_batch,
    per_sample_loss,
    random_words,
    stratified_timesteps,
)

FILE = Path(__file__).with_name("golden.json")
IDS = torch.tensor([0, 3, 77, 4711])
LABEL = IDS % 5
UNET = UNetConfig(
    base_channels=16, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_groups=8
)
VARIANTS: dict[str, Sampler] = {
    **{name: kind(num_steps=7) for name, kind in SAMPLERS.items()},
    "ancestral, analytic": Ancestral(num_steps=7, variance="analytic"),
    "heun, churn": Heun(num_steps=7, churn=10.0),
}
OBJECTIVES = {
    "simple": (ObjectiveConfig(), UNET),
    "min_snr, v": (ObjectiveConfig(weighting="min_snr"), dataclasses.replace(UNET, prediction_type="v")),
    "hybrid": (
        ObjectiveConfig(name="hybrid", t_choice="stratified"),
        dataclasses.replace(UNET, learned_variance=True, dropout=0.0),
    ),
}


def model(network: UNetConfig = UNET) -> DiffusionModel:
    """A small model with weights that are zero nowhere, in float64, which takes and gives float32."""
    config = ModelConfig(
        network=network, schedule=ScheduleConfig(name="cosine"), image_size=(8, 8), channels=3, num_classes=5
    )
    module = build_network(config, seed=1).double()
    for parameter in module.parameters():
        if float(parameter.detach().abs().max()) == 0:
            nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(3))
    return DiffusionModel.of(config, InFloat64(module).eval())


class InFloat64(nn.Module):
    """A network around one that computes in float64."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        answer: Tensor = self.inner(x_t.double(), t, label)
        return answer


def loss_curve(objective: ObjectiveConfig, network: UNetConfig) -> list[float]:
    """Mean losses of eight steps of Adam on four images, with flips and label drop."""
    trained = model(network)
    module = trained.network
    assert isinstance(module, nn.Module)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    images = torch.randint(0, 256, (4, 8, 8, 3), generator=torch.Generator().manual_seed(9), dtype=torch.uint8)
    curve = []
    for step in range(8):
        chosen = None
        if objective.t_choice == "stratified":
            chosen = stratified_timesteps(1000, seed=4, step=step, slots=torch.arange(4), global_batch=4)
        batch = make_training_batch(
            trained,
            images_to_x_0(images),
            LABEL,
            seed=4,
            sample_ids=IDS,
            epochs=torch.full((4,), step),
            flip=True,
            label_drop=0.2,
            timesteps=chosen,
        )
        loss = (per_sample_loss(trained, batch, objective=objective) * batch.weight).mean()
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(float(loss.detach()))
    return curve


def sampled(sampler: Sampler) -> list[float]:
    """The first pixel of each image, and the mean over all."""
    error = torch.linspace(0.01, 0.5, 1000, dtype=torch.float64) if sampler.needs_x_0_error else None
    x_0 = generate(model(), sampler, seed=5, sample_ids=IDS, label=LABEL, x_0_error=error)
    return [*x_0[:, 0, 0, 0].tolist(), float(x_0.double().mean())]


def bits() -> list[float]:
    x_0 = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    config = LikelihoodConfig(num_steps=20)
    return bound_of_images(model(), config, seed=1, sample_ids=IDS, x_0=x_0, label=LABEL).bits_per_dim.tolist()


def noise_digest(stream: Stream) -> str:
    words = random_words(7, stream, IDS, 3, 100)
    return hashlib.sha256(words.numpy().tobytes()).hexdigest()


def everything() -> dict[str, Any]:
    return {
        "loss_curves": {name: loss_curve(*what) for name, what in OBJECTIVES.items()},
        "images": {name: sampled(sampler) for name, sampler in VARIANTS.items()},
        "bits_per_dim": bits(),
        "noise_words": {stream.name: noise_digest(stream) for stream in Stream},
    }


GOLDEN = json.loads(FILE.read_text()) if FILE.exists() else None


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_curves(name: str) -> None:
    assert loss_curve(*OBJECTIVES[name]) == pytest.approx(GOLDEN["loss_curves"][name], rel=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_images(name: str) -> None:
    assert sampled(VARIANTS[name]) == pytest.approx(GOLDEN["images"][name], abs=1e-6)


def test_bits_per_dimension() -> None:
    assert bits() == pytest.approx(GOLDEN["bits_per_dim"], rel=1e-6)


def test_noise_is_the_same_to_the_bit() -> None:
    assert {stream.name: noise_digest(stream) for stream in Stream} == GOLDEN["noise_words"]


if __name__ == "__main__":
    FILE.write_text(json.dumps(everything(), indent=1) + "\n")
