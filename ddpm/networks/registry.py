"""The networks by name: adding one is adding a file, and one line here."""

from typing import get_args

from ddpm.networks.dit import DiTConfig
from ddpm.networks.network_config import NetworkConfig
from ddpm.networks.own import OwnNetworkConfig
from ddpm.networks.unet import UNetConfig

AnyNetwork = (
    UNetConfig  # Ho et al., Dhariwal & Nichol
    | DiTConfig  # Peebles & Xie
    | OwnNetworkConfig  # yours
)
"""A configuration of one of the networks."""

NETWORKS: dict[str, type[NetworkConfig]] = {
    config.__dataclass_fields__["name"].default: config for config in get_args(AnyNetwork)
}
"""Their configurations by name."""
