"""A package of a user's own, with networks good and bad."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

OWN_NETWORK = """
import torch

class Affine(torch.nn.Module):
    def __init__(self, image_size, channels, num_classes, width):
        super().__init__()
        self.shape = (channels, *image_size)
        self.lift = torch.nn.Conv2d(channels, width, 1)
        self.head = torch.nn.Conv2d(width, channels, 1)

    def forward(self, x_t, t, label):
        assert x_t.shape[1:] == self.shape
        return self.head(self.lift(x_t))

class LooksAtValues(Affine):
    def forward(self, x_t, t, label):
        if float(t.max()) > 500:  # impossible without values
            return x_t
        return super().forward(x_t, t, label)

class Attends(LooksAtValues):
    def forward(self, x_t, t, label):
        pixels = x_t.flatten(2).transpose(1, 2)[:, None].contiguous()  # the fused kernel wants it so
        torch.nn.functional.scaled_dot_product_attention(pixels, pixels, pixels)
        return super().forward(x_t, t, label)

class Box:
    factory = Affine

def no_module(image_size, channels, num_classes):
    return 7

def draws(image_size, channels, num_classes):
    torch.rand(5, device="cpu")
    return Affine(image_size, channels, num_classes, 5)

def any_keywords(**keywords):
    assert set(keywords) == {"image_size", "channels", "num_classes", "width"}
    return Affine(**keywords)

def broken(image_size, channels, num_classes):
    raise TypeError("inside the factory")

number = 7
"""


@pytest.fixture
def own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`own_networks.affine`, a package of the user's, importable."""
    package = tmp_path / "own_networks"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "affine.py").write_text(OWN_NETWORK)
    (package / "fails.py").write_text("1 / 0\n")
    (package / "talks.py").write_text('raise ImportError("first line\\nsecond line")\n')
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "own_networks"]:
        del sys.modules[name]
