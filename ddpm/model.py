"""A diffusion model as one value: the network, and everything without which its answers mean nothing.

    model = build_model(ModelConfig(...))                       a new one
    generate(model, sampler, seed=..., sample_ids=..., ...)     images
    bound_of_images(model, config, seed=..., ...)               bits per dimension

What is stored of it is its config and its network's weights (`DiffusionModel.of` puts the two together again).
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from ddpm.networks.model_config import ModelConfig, build_network
from ddpm.process.denoiser import MovesT, Network, NetworkDenoiser
from ddpm.process.diffusion import Variance
from ddpm.process.guidance import GuidedNetwork
from ddpm.process.pixels import NumLevels
from ddpm.process.prediction import PredictionType
from ddpm.process.schedules import NoiseSchedule, make_schedule


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DiffusionModel:
    """A network, the chain that it was trained on, and what its answers are."""

    network: Network
    """Any callable network(x_t, t, label) -> prediction; a module must be in eval mode wherever it is not trained."""
    schedule: NoiseSchedule
    """The training chain."""
    image_shape: tuple[int, int, int]
    """(C, H, W) of its images."""
    prediction_type: PredictionType = "eps"
    """What the network predicts."""
    learned_variance: bool = False
    """The network answers with 2C channels, the second half for the variance of a step."""
    null_label: int | None = None
    """The label that means "no label", one more than the last class; None for a network without classes."""
    num_levels: NumLevels = 256
    """Values of a pixel of its images."""

    @classmethod
    def of(cls, config: ModelConfig, network: Network) -> "DiffusionModel":
        """The model that a config describes around its network."""
        return cls(
            network=network,
            schedule=make_schedule(config.schedule),
            image_shape=(config.channels, *config.image_size),
            prediction_type=config.network.prediction_type,
            learned_variance=config.network.learned_variance,
            null_label=config.num_classes,
            num_levels=config.num_levels,
        )

    @property
    def variance(self) -> Variance:
        """The variance that the model's steps have where nothing else is asked for."""
        return "learned_range" if self.learned_variance else "fixed_small"

    def to(self, device: torch.device | str) -> "DiffusionModel":
        """The model with its network, a module, moved to a device."""
        assert isinstance(self.network, nn.Module), "only a module has a place"
        return dataclasses.replace(self, network=self.network.to(device))

    def denoiser(
        self,
        *,
        clip_x_0: bool = True,
        dynamic_threshold: float | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
        guide: "DiffusionModel | None" = None,
    ) -> NetworkDenoiser:
        """What a sampler sees of the model: x_0_hat, limited, and the eps_hat that belongs to it.

        Args:
            clip_x_0: Limit x_0_hat to [-1, 1].
            dynamic_threshold: Quantile by which an image that exceeds 1 is divided instead.
            guidance_scale: How much to exaggerate what differs from a weaker answer; 1 is no guidance.
            guidance_interval: Guide only where sigma is above the first and at most the second number.
            guidance_rescale: Share by which guidance keeps the prediction's standard deviation.
            guide: A second, less able model to lead away from; None: the model's own answer without the label.

        Raises:
            ValueError: If a network is in training mode, there is no label to drop and no guide, the guide was trained
                on another schedule or would have no effect, or an option is out of range.
        """
        self.check_eval_mode("network")
        if guide is not None:
            guide.check_eval_mode("guide")
        network: Network = MovesT(self.network)
        if guidance_scale != 1.0:
            network = GuidedNetwork(
                network=network,
                schedule=self.schedule,
                null_label=self.null_label,
                guide=guide,
                prediction_type=self.prediction_type,
                scale=guidance_scale,
                interval=guidance_interval,
                rescale=guidance_rescale,
            )
        elif guide is not None:
            raise ValueError("guide: has no effect where guidance_scale is 1, got one; raise the scale or leave it out")
        return NetworkDenoiser(
            network=network,
            schedule=self.schedule,
            prediction_type=self.prediction_type,
            learned_variance=self.learned_variance,
            clip_x_0=clip_x_0,
            dynamic_threshold=dynamic_threshold,
        )

    def check_eval_mode(self, name: str) -> None:
        """Refuse a network whose dropout would still be at work.

        Args:
            name: What the message calls it.

        Raises:
            ValueError: If the network is a module in training mode.
        """
        if isinstance(self.network, nn.Module) and self.network.training:
            raise ValueError(f"{name}: must be in eval mode, got training mode; call {name}.eval() first")


def build_model(config: ModelConfig, *, seed: int = 0) -> DiffusionModel:
    """A new model with initial weights, on the CPU, its network in evaluation mode; arguments as build_network."""
    return DiffusionModel.of(config, build_network(config, seed=seed).eval())
