"""DiT, a vision transformer as the network eps_theta, with adaLN-Zero: Peebles & Xie 2023 (arXiv:2212.09748).

The image is cut into patches, each becomes a token with a fixed embedding of its place, and the timestep and the class
scale, shift and gate every block. DiTConfig's defaults are DiT-S/2; on 32x32x4 inputs with 1000 classes and a learned
variance S/2, B/2, L/2 and XL/2 have 32,865,056, 130,315,808, 457,840,672 and 674,834,720 parameters, which the paper
rounds to 33, 130, 458 and 675 million. The fixed embedding of the places is no parameter.

The contract is that of the U-Net: forward(x_t, t, label), t an index or a float, and one more label for "no label".
The paper works on an autoencoder's latents; nothing here knows whether x_t is an image or a latent.
"""

from dataclasses import dataclass
from typing import Literal, cast

from jaxtyping import Float
from torch import Tensor, nn

from ddpm.added_field import added_field
from ddpm.networks.dit_layers import DiTBlock, FinalLayer, patchify, position_embedding, unpatchify
from ddpm.networks.gradient_checkpointing import run_block
from ddpm.networks.layers import EmbeddingDivisor, TimeEmbedding, linear
from ddpm.networks.network_config import ImageSize, NetworkConfig, check_one_of
from ddpm.networks.network_inputs import check_images, checked_label, scaled_times
from ddpm.shapes import Images, Labels, Times

_NUM_FREQUENCIES = 256  # sines and cosines of t, whatever the width
_EMBEDDING_STD = 0.02  # of the initial weights behind timestep and class, as in the authors' code


@dataclass(frozen=True, kw_only=True, slots=True)
class DiTConfig(NetworkConfig):
    """Shape of the DiT; the defaults are the sizes of DiT-S/2 of Peebles & Xie 2023."""

    name: Literal["dit"] = "dit"
    """The transformer of Peebles & Xie."""
    patch_size: int = 2
    """Height and width of a patch in pixels; divides both of the image. Half of it means four times the computation."""
    hidden_size: int = 384
    """Width of a token; a multiple of num_heads and of 4. The paper's: S 384, B 768, L 1024, XL 1152."""
    depth: int = 12
    """Number of blocks. The paper's: S and B 12, L 24, XL 28."""
    num_heads: int = 6
    """Heads of attention. The paper's: S 6, B 12, L and XL 16."""
    mlp_ratio: float = 4.0
    """Width of a block's hidden layer in units of hidden_size."""
    embedding_divisor: EmbeddingDivisor = added_field(default="half_minus_1", pin="half_minus_1")
    """Frequencies of the embedding of t. half: Peebles & Xie's. half_minus_1: the U-Net's of Ho et al., down to
    1/10000."""

    def check(self) -> None:
        """See NetworkConfig.check; `grid_size` has the rule that depends on the size of the images."""
        for name in ("patch_size", "hidden_size", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}; DiT-S/2 is the default")
        if self.hidden_size % 4:
            raise ValueError(
                f"hidden_size: must be a multiple of 4 (sine and cosine of two coordinates), got {self.hidden_size}; "
                "the paper's are 384, 768, 1024 and 1152"
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads: must divide hidden_size ({self.hidden_size}), got {self.num_heads}; choose a divisor"
            )
        check_one_of("embedding_divisor", self.embedding_divisor, EmbeddingDivisor)
        if not 1 <= self.hidden_size * self.mlp_ratio < float("inf"):
            raise ValueError(f"mlp_ratio: must leave a hidden layer of at least 1, got {self.mlp_ratio}; 4 is usual")

    def check_fits(self, image_size: ImageSize) -> None:
        """See NetworkConfig.check_fits."""
        grid_size(self, image_size)

    def build(self, *, image_size: ImageSize, channels: int, num_classes: int | None, num_timesteps: int) -> nn.Module:
        """See NetworkConfig.build."""
        return DiT(self, image_size=image_size, channels=channels, num_classes=num_classes, num_timesteps=num_timesteps)


def grid_size(config: DiTConfig, image_size: ImageSize) -> tuple[int, int]:
    """Number of patches down and across the image.

    Raises:
        ValueError: If patches do not fill the image.
    """
    for side in image_size:
        if side < 1 or side % config.patch_size:
            raise ValueError(
                f"image_size: must be a multiple of network.patch_size ({config.patch_size}), got {side}; "
                "resize the images or choose a divisor of their size"
            )
    return image_size[0] // config.patch_size, image_size[1] // config.patch_size


class DiT(nn.Module):
    """The network eps_theta(x_t, t, label).

    Args:
        config: Shape of the network.
        image_size: Height and width of the images in pixels.
        channels: Channels of the images.
        num_classes: Number of classes, or None for a network without label parameters. With classes there is one more
            embedding, the last, for "no label": see `null_label`.
        num_timesteps: Length T of the training chain; 1000 t / T is embedded: about the same noise for every T.

    Raises:
        ValueError: If the patches do not fill the images.

    Initial weights come from PyTorch's global generator, as in every `nn.Module`; `build_model` seeds them.
    Every block begins as the identity and the first eps_hat is 0.
    """

    position_embedding: Tensor

    def __init__(
        self,
        config: DiTConfig,
        *,
        image_size: ImageSize,
        channels: int,
        num_classes: int | None,
        num_timesteps: int = 1000,
    ) -> None:
        super().__init__()
        grid, width = grid_size(config, image_size), config.hidden_size
        self.image_shape = (channels, *image_size)
        self.num_classes, self.num_timesteps = num_classes, num_timesteps
        self.patch_size, self.grid = config.patch_size, grid
        self.gradient_checkpointing = False
        self.patch_embedding = linear(channels * config.patch_size**2, width)
        self.time_embedding = TimeEmbedding(_NUM_FREQUENCIES, width, divisor=config.embedding_divisor)
        nn.init.normal_(self.time_embedding.linear_1.weight, std=_EMBEDDING_STD)
        nn.init.normal_(self.time_embedding.linear_2.weight, std=_EMBEDDING_STD)
        self.label_embedding = None if num_classes is None else nn.Embedding(num_classes + 1, width)
        if self.label_embedding is not None:
            nn.init.normal_(self.label_embedding.weight, std=_EMBEDDING_STD)
        self.register_buffer("position_embedding", position_embedding(grid, width), persistent=False)
        self.blocks = nn.ModuleList(
            DiTBlock(width, num_heads=config.num_heads, mlp_width=int(width * config.mlp_ratio))
            for _ in range(config.depth)
        )
        self.final = FinalLayer(width, channels * (2 if config.learned_variance else 1) * config.patch_size**2)

    @property
    def null_label(self) -> int | None:
        """The label that means "no label" (index num_classes), or None for a network without classes."""
        return self.num_classes

    def forward(self, x_t: Images, t: Times, label: Labels | None = None) -> Float[Tensor, "b c_out h w"]:
        """Predicts the noise in x_t, or whatever else it is trained to predict.

        Args:
            x_t: Noised images [B, C, H, W].
            t: Index in the training chain [B], 0-based (t = 0 is the paper's t = 1), or floats between two of them.
            label: Classes [B] in [0, num_classes]; num_classes is the null label, and None means that for every image.

        Returns:
            eps_hat [B, C, H, W]; [B, 2C, H, W] with a learned variance.

        Raises:
            ValueError: If x_t, t or label has another shape, a label is given to a network without classes, or a label
                on the CPU is out of range (to look at it would stall an accelerator; there the embedding fails).
        """
        check_images(x_t, t, self.image_shape)
        emb: Tensor = self.time_embedding(scaled_times(t, self.num_timesteps))
        label = checked_label(label, t, self.num_classes)
        if self.label_embedding is not None:
            emb = emb + cast(Tensor, self.label_embedding(label))
        tokens = self.patch_embedding(patchify(x_t, self.patch_size)) + self.position_embedding
        for block in self.blocks:
            tokens = run_block(block, tokens, emb, recompute=self.gradient_checkpointing)
        return unpatchify(self.final(tokens, emb), self.grid, self.patch_size)
