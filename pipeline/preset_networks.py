"""The presets' networks, which the benchmark of a GPU builds without the rest of a preset."""

from ddpm import DiTConfig, UNetConfig

HO_CIFAR10 = UNetConfig(channel_multipliers=(1, 2, 2, 2), dropout=0.1)
"""Ho et al. 2020, appendix B, for 32x32."""
HO_256 = UNetConfig(channel_multipliers=(1, 1, 2, 2, 4, 4), dropout=0.0)
"""The same for 256x256."""
ADM_64 = UNetConfig(
    base_channels=192,
    channel_multipliers=(1, 2, 3, 4),
    num_res_blocks=3,
    attention_resolutions=(32, 16, 8),
    num_head_channels=64,
    adaptive_group_norm=True,
    residual_resampling=True,
    dropout=0.1,
    learned_variance=True,
    initial_weights="torch",
    group_norm_eps=1e-5,
    embedding_divisor="half",
)
"""Dhariwal & Nichol 2021, appendix I, for ImageNet at 64x64."""
DIT_B_4 = DiTConfig(
    patch_size=4, hidden_size=768, depth=12, num_heads=12, learned_variance=True, embedding_divisor="half"
)
"""Peebles & Xie 2023."""
