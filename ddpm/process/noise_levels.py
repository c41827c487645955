"""The formulas of the noise schedules: betas, and what is done to alpha_bar afterwards.

Source:
    Ho et al. 2020 (arXiv:2006.11239). Nichol and Dhariwal 2021 (arXiv:2102.09672) for the cosine schedule. Hoogeboom et
    al. 2023 (arXiv:2301.11093) for the shift. Lin et al. 2023 (arXiv:2305.08891) for zero terminal SNR.
"""

import math

import torch

from ddpm.process.interpolation import Table


def linear_betas(num_timesteps: int) -> Table:
    """Equally spaced from 1e-4 to 0.02, times 1000 / T so that the end is as noisy for every T.

    Source:
        Ho et al. 2020, section 4; the scaling as in Nichol and Dhariwal's code.
    """
    scale = 1000 / num_timesteps
    return torch.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=torch.float64)


def cosine_betas(num_timesteps: int, offset: float = 0.008, max_beta: float = 0.999) -> Table:
    """Betas whose alpha_bar falls as a squared cosine; the last ones are capped.

    Source:
        Nichol and Dhariwal 2021, Eq. 17.
    """
    time = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    f = torch.cos((time + offset) / (1 + offset) * (math.pi / 2)).square()
    return (1 - f[1:] / f[:-1]).clamp(max=max_beta)


def shift_alpha_bar(alpha_bar: Table, shift: float) -> Table:
    """alpha_bar with sigma = sqrt((1 - alpha_bar) / alpha_bar) multiplied by shift: log-SNR less 2 log(shift).

    Neighbouring pixels of a larger image say the same thing, so that averaging k x k of them divides the noise by k; k
    times the noise hides as much of the picture as before.

    Source:
        Hoogeboom et al. 2023 (arXiv:2301.11093), section 3.1, whose log-SNR moves by 2 log(64 / d).
    """
    return alpha_bar / (alpha_bar + shift**2 * (1 - alpha_bar))


def zero_terminal_alpha_bar(alpha_bar: Table) -> Table:
    """alpha_bar with no signal left at the end: sqrt(alpha_bar) moved and scaled so that its first entry stays.

    Source:
        Lin et al. 2023, Algorithm 1.
    """
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()
