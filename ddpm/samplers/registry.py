"""The samplers by name: adding one is adding a file, and one line here."""

from typing import get_args

from ddpm.samplers.ancestral import Ancestral
from ddpm.samplers.ddim import DDIM
from ddpm.samplers.dpm_solver import DPMSolver2M, DPMSolver2MSDE
from ddpm.samplers.dpm_solver_3m import DPMSolver3M, DPMSolver3MCommon
from ddpm.samplers.heun import Heun
from ddpm.samplers.sampler import Sampler

AnySampler = (
    Ancestral  # Ho et al.
    | DDIM  # Song et al.
    | DPMSolver2M  # Lu et al.
    | DPMSolver2MSDE
    | DPMSolver3M
    | DPMSolver3MCommon
    | Heun  # Karras et al.
)
"""One of the samplers, with its options."""

SAMPLERS: dict[str, type[Sampler]] = {
    sampler.__dataclass_fields__["name"].default: sampler for sampler in get_args(AnySampler)
}
"""Their classes by name."""
