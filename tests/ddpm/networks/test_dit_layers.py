"""The DiT's building blocks: patches and back, the embedding of places, the block and the final layer by formula."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ddpm.networks.dit_layers import DiTBlock, patchify, position_embedding, unpatchify


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_unpatchify_undoes_patchify(channels: int, down: int, across: int, patch_size: int, batch: int) -> None:
    images = torch.randn(batch, channels, down * patch_size, across * patch_size)
    patches = patchify(images, patch_size)
    assert patches.shape == (batch, down * across, channels * patch_size**2)
    assert torch.equal(unpatchify(patches, (down, across), patch_size), images)
    for row in range(down):
        for column in range(across):
            rows, columns = (slice(place * patch_size, (place + 1) * patch_size) for place in (row, column))
            patch = patches[:, row * across + column].reshape(batch, channels, patch_size, patch_size)
            assert torch.equal(patch, images[:, :, rows, columns])


@pytest.mark.parametrize("grid", [(3, 3), (6, 10), (10, 6), (1, 5)])
def test_position_embedding_is_the_formula(grid: tuple[int, int]) -> None:
    """The place in its row first, then the row: also where there are more of one than of the other."""
    (down, across), width = grid, 16
    table = position_embedding(grid, width)
    assert table.dtype == torch.float32 and table.shape == (down * across, 16)
    frequencies = [10_000 ** (-i / 4) for i in range(4)]
    for row in range(down):
        for column in range(across):
            expected = [f(place * w) for place in (column, row) for f in (math.sin, math.cos) for w in frequencies]
            assert table[row * across + column].tolist() == pytest.approx(expected, abs=1e-7)


def test_a_block_is_the_papers_formula() -> None:
    torch.manual_seed(0)
    block = DiTBlock(24, num_heads=3, mlp_width=60).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, emb = torch.randn(2, 5, 24, dtype=torch.float64), torch.randn(2, 24, dtype=torch.float64)
    silu = emb / (1 + torch.exp(-emb))
    pieces = block.emb_projection(silu).reshape(2, 6, 1, 24).unbind(1)

    def normed(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        deviation = (h.var(dim=-1, correction=0, keepdim=True) + 1e-6).sqrt()
        return (h - h.mean(dim=-1, keepdim=True)) / deviation * (1 + scale) + shift

    h = normed(x, pieces[0], pieces[1])
    attention = block.attention
    heads = []
    for head in range(3):
        part = slice(8 * head, 8 * head + 8)
        query, key, value = (one(h)[..., part] for one in (attention.query, attention.key, attention.value))
        heads.append(torch.softmax(query @ key.mT / math.sqrt(8), dim=-1) @ value)
    middle = x + pieces[2] * attention.projection(torch.cat(heads, dim=-1))
    h = block.mlp_1(normed(middle, pieces[3], pieces[4]))
    gelu = h / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    torch.testing.assert_close(block(x, emb), middle + pieces[5] * block.mlp_2(gelu), rtol=1e-12, atol=1e-12)
