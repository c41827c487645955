"""Editing of given images, one method per file: partial diffusion, inpainting, interpolation.

Each is a function over a denoiser (`sampling_denoiser` makes one of a network) and a sampler's config. What is random
is a function of the seed and the sample ids, so that an edited image does not depend on its neighbours in the batch.
"""

from ddpm.editing.interpolate import (
    check_deterministic,
    interpolate_images,
    invert_images,
    num_interpolation_evaluations,
    slerp,
)
from ddpm.editing.partial import num_partial_steps, partial_diffusion
from ddpm.editing.repaint import (
    check_inpainting_sampler,
    num_repaint_evaluations,
    repaint,
    repaint_sample,
    resampling_path,
)

__all__ = [
    "check_deterministic",
    "check_inpainting_sampler",
    "interpolate_images",
    "invert_images",
    "num_interpolation_evaluations",
    "num_partial_steps",
    "num_repaint_evaluations",
    "partial_diffusion",
    "repaint",
    "repaint_sample",
    "resampling_path",
    "slerp",
]
