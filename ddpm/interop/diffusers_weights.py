"""Weights of our U-Net under the names that diffusers' `UNet2DModel` gives them, in both directions.

Both networks compute the same function, so a published checkpoint (google/ddpm-cifar10-32, say) can be sampled from
here, and a network trained here can be loaded there. Pure renaming: no file is read or written, no tensor is copied,
and diffusers is not imported. Other networks than the U-Net have no counterpart here and are refused.
"""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from ddpm.networks.network_config import ImageSize
from ddpm.networks.unet import UNetConfig, level_resolutions

# Ours on the left. A name is a whole path below, or one of the prefixes and one of the layers; then "weight" or "bias".
_PATHS = {
    "conv_in": "conv_in",
    "time_embedding.linear_1": "time_embedding.linear_1",
    "time_embedding.linear_2": "time_embedding.linear_2",
    "label_embedding": "class_embedding",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
_PREFIXES = {
    r"down_levels\.(\d+)\.res_blocks\.(\d+)": r"down_blocks.\1.resnets.\2",
    r"down_levels\.(\d+)\.attentions\.(\d+)": r"down_blocks.\1.attentions.\2",
    r"down_levels\.(\d+)\.downsample": r"down_blocks.\1.downsamplers.0",
    r"middle\.res_block_1": r"mid_block.resnets.0",
    r"middle\.attention": r"mid_block.attentions.0",
    r"middle\.res_block_2": r"mid_block.resnets.1",
    r"up_levels\.(\d+)\.res_blocks\.(\d+)": r"up_blocks.\1.resnets.\2",
    r"up_levels\.(\d+)\.attentions\.(\d+)": r"up_blocks.\1.attentions.\2",
    r"up_levels\.(\d+)\.upsample": r"up_blocks.\1.upsamplers.0",
}
_LAYERS = {
    "norm_1": "norm1",
    "conv_1": "conv1",
    "emb_projection": "time_emb_proj",
    "norm_2": "norm2",
    "conv_2": "conv2",
    "shortcut": "conv_shortcut",
    "norm": "group_norm",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "projection": "to_out.0",
    "conv": "conv",
}
# Attention layers in files written by older diffusers, the published DDPM ones among them; diffusers renames them too.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def diffusers_name(name: str) -> str:
    """Name in `UNet2DModel.state_dict()` of a tensor in `UNet.state_dict()`.

    Raises:
        ValueError: If no U-Net of ours has a tensor of that name.
    """
    path, _, kind = name.rpartition(".")
    if path in _PATHS:
        return f"{_PATHS[path]}.{kind}"
    prefix, _, layer = path.rpartition(".")
    for ours, theirs in _PREFIXES.items():
        match = re.fullmatch(ours, prefix)
        if match and layer in _LAYERS:
            return f"{match.expand(theirs)}.{_LAYERS[layer]}.{kind}"
    raise ValueError(f"name: no tensor of the U-Net is called {name!r}; no other network has names in UNet2DModel")


def to_diffusers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a `UNet` under diffusers' names, the same tensors.

    Raises:
        ValueError: If a name is none of the U-Net's.
    """
    return {diffusers_name(name): tensor for name, tensor in state_dict.items()}


def from_diffusers(state_dict: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The weights of a diffusers `UNet2DModel` under our names, the same tensors.

    Args:
        state_dict: Weights of the `UNet2DModel`, as this or an older diffusers wrote them.
        names: Names of the tensors of the `UNet` to be filled: `network.state_dict()` will do.

    Returns:
        One tensor per name, for `UNet.load_state_dict`, which checks the shapes.

    Raises:
        ValueError: If tensors are missing or left over: the two networks are not of the same shape.
    """
    theirs = {_without_old_names(name): tensor for name, tensor in state_dict.items()}
    wanted = {name: diffusers_name(name) for name in names}
    missing = sorted(set(wanted.values()) - set(theirs))
    left_over = sorted(set(theirs) - set(wanted.values()))
    if missing or left_over:
        what = f"{missing[0]!r} is missing" if missing else f"{left_over[0]!r} has no place"
        raise ValueError(
            f"state_dict: not the weights of this network, {what} "
            f"({len(missing)} missing, {len(left_over)} left over); compare the two configs"
        )
    return {ours: theirs[name] for ours, name in wanted.items()}


def diffusers_config(
    config: UNetConfig,
    *,
    image_size: ImageSize,
    channels: int,
    num_classes: int | None,
) -> dict[str, object]:
    """Keywords for diffusers' `UNet2DModel` that make the same network as `UNet` does with these arguments.

    Raises:
        ValueError: If the images do not fit the config, or the first level is wider than base_channels, for which
            diffusers has one number.
    """
    if config.channel_multipliers[0] != 1:
        raise ValueError(
            f"channel_multipliers: must begin with 1 for diffusers, got {config.channel_multipliers}; "
            "no UNet2DModel computes what this network does"
        )
    attention = [resolution in config.attention_resolutions for resolution in level_resolutions(config, image_size)]
    plain, plain_up = ("ResnetDownsample", "ResnetUpsample") if config.residual_resampling else ("Down", "Up")
    return {
        "sample_size": image_size[0] if image_size[0] == image_size[1] else image_size,
        "in_channels": channels,
        "out_channels": channels * (2 if config.learned_variance else 1),
        "block_out_channels": tuple(config.base_channels * multiplier for multiplier in config.channel_multipliers),
        "layers_per_block": config.num_res_blocks,
        "down_block_types": tuple("AttnDownBlock2D" if here else f"{plain}Block2D" for here in attention),
        "up_block_types": tuple("AttnUpBlock2D" if here else f"{plain_up}Block2D" for here in reversed(attention)),
        "downsample_type": "resnet" if config.residual_resampling else "conv",  # of levels with attention
        "upsample_type": "resnet" if config.residual_resampling else "conv",
        "resnet_time_scale_shift": "scale_shift" if config.adaptive_group_norm else "default",
        "attention_head_dim": config.num_head_channels,
        "dropout": config.dropout,
        "norm_num_groups": config.num_groups,
        "attn_norm_num_groups": config.num_groups,  # of the middle, which has no norm there by default
        "norm_eps": config.group_norm_eps,
        "act_fn": "silu",
        "time_embedding_type": "positional",
        "flip_sin_to_cos": False,
        "freq_shift": 1 if config.embedding_divisor == "half_minus_1" else 0,  # log(10000) / (half - freq_shift)
        "downsample_padding": 0,  # which there means (0, 1, 0, 1)
        "num_class_embeds": None if num_classes is None else num_classes + 1,  # and the null label
    }


def _without_old_names(name: str) -> str:
    """Today's name of a tensor in an old file."""
    return re.sub(
        r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\b",
        lambda match: match[1] + _OLD_ATTENTION[match[2]],
        name,
    )
