"""Counter-based random numbers: noise = f(seed, stream, sample id, draw, element).

There is no generator and no state to save. Philox4x32-10 encrypts a counter under a key, so any number of any sample
can be made at any time, on any machine and in any batch, and is always the same. Key and counter are

    key     = (seed low 32 bits, seed high 32 bits)
    counter = (element block, id low 32 bits, id high 16 bits << 16 | stream, draw)

and one counter gives four 32-bit words. A *draw* is the epoch in training and the ordinal of the draw when sampling.

Integers and booleans are bit-equal on every device. Normals are Box-Muller in float64, then rounded to the dtype asked
for: bit-equal on one kind of device and software, within 1 ulp of float32 across kinds. Words are held in int64,
because torch has no arithmetic on uint32.

Source:
    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox4x32-10).
"""

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1: added to the key after every round
_NUM_ROUNDS = 10


class Stream(IntEnum):
    """What a random number is for, 16 bits of the counter. Permanent: every stored image depends on these numbers."""

    X_T = 0
    """Start of a sampling trajectory, draw 0."""
    STEP = 1
    """One draw per sampler step, counted from 1."""
    CHURN = 2
    """Noise added before a step (stochastic Heun)."""
    INPAINT = 3
    """Noise on the known part of an image."""
    TRAIN_T = 16
    """Step index of a training sample; the draw is the epoch here and in the next three."""
    TRAIN_EPS = 17
    """The noise that the network learns to predict."""
    TRAIN_FLIP = 18
    """Horizontal flip."""
    TRAIN_LABEL_DROP = 19
    """Replacement of the label by the null label."""
    TRAIN_T_SLOT = 20
    """Step index by place in the global batch: the id is the slot, the draw the global step."""
    ORDER_SHARDS = 32
    """Order of the shards in an epoch."""
    ORDER_ROWS = 33
    """Order of the rows inside a window."""
    EVAL_EPS = 48
    """Noise of the held-out loss."""
    EVAL_X_0 = 49
    """Draws of images from a baseline model."""
    EVAL_BOUND_EPS = 50
    """Noise of the variational bound; the draw counts the terms of an image."""
    EVAL_BOUND_T = 51
    """Step indices at which the bound is estimated, draw 0."""
    EVAL_PROBE = 52
    """Probes of the divergence of a flow, draw 0."""
    EVAL_X_0_ERROR_EPS = 53
    """Noise under the errors of x_0_hat; the draw counts the terms of an image."""
    EVAL_X_0_ERROR_T = 54
    """Step indices at which those are measured, draw 0."""
    EVAL_SUBSET = 55
    """Which real images stand beside as many generated ones, draw 0; the id is the image's row."""


def philox4x32(counter: Int[Tensor, "*n 4"], key: tuple[int, int]) -> Int[Tensor, "*n 4"]:
    """The Philox4x32-10 block function.

    Args:
        counter: Four words per block, int64 in [0, 2^32).
        key: Two words in [0, 2^32).

    Returns:
        Four random words per block, int64 in [0, 2^32).

    Source:
        Salmon et al. 2011; known answers are in Random123's kat_vectors.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        # The products need 64 bits unsigned; int64 multiplication wraps to the same 64 bits, `& _MASK` drops the sign.
        product_0, product_1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((product_1 >> 32) & _MASK) ^ c1 ^ k0
        c2 = ((product_0 >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = product_1 & _MASK, product_0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def random_words(
    seed: int, stream: Stream, ids: Int[Tensor, " b"], draws: int | Int[Tensor, " b"], num_words: int
) -> Int[Tensor, "b num_words"]:
    """Uniform 32-bit words of each sample. The first n words do not depend on num_words.

    Args:
        seed: Key of the run, in [0, 2^64).
        stream: What the words are for.
        ids: Sample ids in [0, 2^48), int64.
        draws: Draw, one for all or one per sample, in [0, 2^32).
        num_words: Words per sample, at most 2^34.

    Returns:
        int64 words in [0, 2^32), on the device of ids.

    Raises:
        ValueError: If seed, ids, draws or num_words are out of range. Ids and draws on an accelerator are looked at
            there, so that nothing waits for it: what it then does next fails.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: must be in [0, 2^64), got {seed}; choose another seed")
    if not 0 <= num_words <= 2**34:
        raise ValueError(f"num_words: must be in [0, 2^34], got {num_words}; draw less at once")
    if not isinstance(draws, Tensor):
        draws = torch.full((), draws, dtype=torch.int64, device=ids.device)
    draw = draws.to(ids.device, torch.int64).expand(ids.shape)
    _check_bits("ids", ids, 48, "number the samples from 0")
    _check_bits("draws", draw, 32, "count the draws from 0")

    num_blocks = -(-num_words // 4)
    counter = torch.empty((len(ids), num_blocks, 4), dtype=torch.int64, device=ids.device)
    counter[..., 0] = torch.arange(num_blocks, device=ids.device)
    counter[..., 1] = (ids & _MASK)[:, None]
    counter[..., 2] = ((ids >> 32) << 16 | int(stream))[:, None]
    counter[..., 3] = draw[:, None]
    return philox4x32(counter, (seed & _MASK, seed >> 32)).flatten(1)[:, :num_words]


def standard_normal(
    seed: int,
    stream: Stream,
    ids: Int[Tensor, " b"],
    draws: int | Int[Tensor, " b"],
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "b *shape"]:
    """Standard normal noise of each sample, row-major over shape; words 2i and 2i + 1 give normals 2i and 2i + 1.

    Args:
        seed: Key of the run, in [0, 2^64).
        stream: What the noise is for.
        ids: Sample ids [B] in [0, 2^48), int64.
        draws: Draw, one for all or one per sample, in [0, 2^32).
        shape: Shape of one sample, such as (C, H, W).
        dtype: Floating type of the result; the computation is in float64.

    Returns:
        Noise [B, *shape] on the device of ids; never beyond 6.77 (the least u is 2^-33).

    Raises:
        ValueError: As random_words.

    Source:
        Box and Muller 1958.
    """
    size = math.prod(shape)
    words = random_words(seed, stream, ids, draws, size + size % 2)
    u = (words.to(torch.float64) + 0.5) * 2.0**-32  # in (0, 1), never 0
    radius, angle = (-2.0 * u[:, 0::2].log()).sqrt(), (2.0 * math.pi) * u[:, 1::2]
    normals = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(1)
    return normals[:, :size].to(dtype).reshape(len(ids), *shape)


def random_integers(
    seed: int, stream: Stream, ids: Int[Tensor, " b"], draws: int | Int[Tensor, " b"], upper: int
) -> Int[Tensor, " b"]:
    """One uniform integer in [0, upper) per sample: floor(w * upper / 2^32), bias below upper / 2^32.

    Raises:
        ValueError: If upper is outside [1, 2^31] (the product must fit in int64), or as random_words.
    """
    if not 1 <= upper <= 2**31:
        raise ValueError(f"upper: must be in [1, 2^31], got {upper}; choose a smaller range")
    return (random_words(seed, stream, ids, draws, 1)[:, 0] * upper) >> 32


def bernoulli(
    seed: int, stream: Stream, ids: Int[Tensor, " b"], draws: int | Int[Tensor, " b"], probability: float
) -> Bool[Tensor, " b"]:
    """True with the given probability, per sample: w < round(probability * 2^32), so 0 and 1 are exact.

    Raises:
        ValueError: If probability is outside [0, 1], or as random_words.
    """
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"probability: must be in [0, 1], got {probability}; give a fraction")
    return random_words(seed, stream, ids, draws, 1)[:, 0] < round(probability * 2**32)


def _check_bits(name: str, numbers: Int[Tensor, " b"], num_bits: int, remedy: str) -> None:
    """Refuse numbers outside [0, 2^num_bits)."""
    # An arithmetic shift leaves 0 exactly when the number is neither negative nor too large.
    are_outside = (numbers >> num_bits).any()
    message = f"{name}: must be in [0, 2^{num_bits}), got a larger or negative one; {remedy}"
    if numbers.device.type != "cpu":
        torch._assert_async(~are_outside, message)
    elif bool(are_outside):
        raise ValueError(message)
