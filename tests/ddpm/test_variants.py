"""The name of a variant is its own."""

import pytest

from ddpm import DDIM, SAMPLERS, UNetConfig
from ddpm.variants import check_variant_name


def test_every_sampler_has_its_own_name() -> None:
    for kind in SAMPLERS.values():
        check_variant_name(kind())


def test_the_name_of_another_variant_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^name: must be 'ddim' for DDIM, got 'heun'; leave it out"):
        DDIM(name="heun")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^name: must be 'unet' for UNetConfig, got 'dit'; leave it out"):
        UNetConfig(name="dit")  # type: ignore[arg-type]
