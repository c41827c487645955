"""Diffusers' own pipeline with our weights, sampler and steps: what sampling speed is measured beside.

Needs diffusers, which is an extra, and torch alone.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ddpm import DDIM, Ancestral, ModelConfig, Sampler, UNetConfig
from ddpm.interop.diffusers_weights import diffusers_config, to_diffusers

_BETA_SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
_PREDICTION_TYPES = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}


def diffusers_pipeline(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    sampler: Sampler,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> Callable[[int], Any]:
    """A function that makes a batch of so many images, on the host.

    Args:
        config: The model.
        weights: Of our network.
        sampler: ddim or ancestral, unguided.
        device: Where.
        dtype: Of the whole pipeline, network and steps, as diffusers has it.
        compiled: Have PyTorch compile the network.

    Raises:
        ImportError: If diffusers is not installed.
        ValueError: If it has no such model or sampler.
    """
    import diffusers

    peer: Any = diffusers  # it is not typed
    if not isinstance(config.network, UNetConfig) or config.network.learned_variance or config.schedule.shift != 1.0:
        raise ValueError("network: diffusers has no pipeline for it; leave the peer out")
    if not isinstance(sampler, (DDIM, Ancestral)) or sampler.guidance_scale != 1.0:
        raise ValueError(f"sampler: must be ddim or ancestral without guidance beside diffusers, got {sampler.name}")
    size, classes = config.image_size, config.num_classes
    unet = peer.UNet2DModel(
        **diffusers_config(config.network, image_size=size, channels=config.channels, num_classes=classes)
    )
    unet.load_state_dict(to_diffusers(weights))
    unet.to(device).eval()
    if dtype != torch.float32:
        unet.to(dtype)
    options: dict[str, Any] = {
        "num_train_timesteps": config.schedule.num_timesteps,
        "beta_schedule": _BETA_SCHEDULES[config.schedule.name],
        "prediction_type": _PREDICTION_TYPES[config.network.prediction_type],
        "clip_sample": sampler.clip_x_0,
    }
    if isinstance(sampler, DDIM):
        pipeline = peer.DDIMPipeline(unet=unet, scheduler=peer.DDIMScheduler(**options))
        draw: Callable[..., Any] = partial(pipeline, eta=sampler.eta, output_type="np")
    else:
        pipeline = peer.DDPMPipeline(unet=unet, scheduler=peer.DDPMScheduler(**options))
        draw = partial(pipeline, output_type="pt")  # numpy has no bfloat16
    pipeline.set_progress_bar_config(disable=True)
    if compiled:
        unet.compile(dynamic=False)
    evaluate = unet.forward

    def images(batch: int) -> Any:
        if classes is not None:  # the pipelines for images know no classes
            unet.forward = partial(evaluate, class_labels=torch.arange(batch, device=device) % classes)
        made = draw(batch_size=batch, num_inference_steps=sampler.num_steps).images
        return made.cpu() if isinstance(made, Tensor) else made

    return images
