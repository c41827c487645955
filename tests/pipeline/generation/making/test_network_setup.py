"""Precision, layout and compilation of sampling: what of it reaches the network, and how far the images move."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpm import DDIM, UNetConfig, generate
from pipeline.errors import ConfigError
from pipeline.generation.making.network_setup import set_up
from pipeline.generation.making.shard_maker import ImageMaker, Ingredients
from pipeline.models.model_files import ModelFiles, load_model, read_model_files
from pipeline.stores.storage import open_store
from tests.pipeline.generation.making.test_shard_maker import spec_of
from tests.pipeline.tiny_models import TINY_UNET, write_model

CPU = torch.device("cpu")
IDS = range(4)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    folder = tmp_path_factory.mktemp("model") / "model"
    return read_model_files(open_store(write_model(folder, answers=True, channels=3)))


def images_of(files: ModelFiles, **changes: Any) -> Tensor:
    spec = spec_of(files, **changes)
    return ImageMaker(Ingredients(model=files), spec, CPU)(spec, IDS)[0]


@pytest.fixture(scope="module")
def exact(files: ModelFiles) -> Tensor:
    return images_of(files)


def test_float32_is_what_the_library_computes(files: ModelFiles, exact: Tensor) -> None:
    ids = torch.tensor(IDS)
    x_0 = generate(load_model(files)[1], DDIM(num_steps=4), seed=7, sample_ids=ids, label=ids % 3)
    assert torch.equal(exact, x_0)


@pytest.mark.parametrize(
    ("changes", "nearest", "furthest"),
    [
        ({"precision": "bf16"}, 1e-5, 0.1),  # 8 bits of precision in each of four evaluations
        ({"channels_last": True}, 0.0, 1e-4),  # another order of sums
        ({"precision": "bf16", "channels_last": True}, 1e-5, 0.1),
    ],
    ids=str,
)
def test_how_far_images_move(
    files: ModelFiles, exact: Tensor, changes: dict[str, Any], nearest: float, furthest: float
) -> None:
    moved = images_of(files, **changes)
    distance = float((moved - exact).abs().max())
    print(f"{changes}: {distance:.1e}")
    assert moved.dtype == torch.float32 and nearest <= distance < furthest
    assert torch.equal(images_of(files, **changes), moved), "a function of the spec"


@pytest.mark.parametrize(
    ("changes", "layout", "dtype"),
    [
        ({}, torch.contiguous_format, torch.float32),
        ({"precision": "bf16", "channels_last": True}, torch.channels_last, torch.bfloat16),
    ],
)
def test_what_the_network_is_given_and_what_the_sampler_gets(
    files: ModelFiles, changes: dict[str, Any], layout: torch.memory_format, dtype: torch.dtype
) -> None:
    model = set_up(load_model(files)[1], spec_of(files, **changes), CPU)
    answer = model.network(torch.rand(2, 3, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    prediction = model.denoiser()(torch.rand(2, 3, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    assert answer.dtype == dtype and answer.is_contiguous(memory_format=layout)
    assert prediction.x_0_hat.dtype == prediction.eps_hat.dtype == torch.float32


def test_a_guide_is_evaluated_alike(files: ModelFiles) -> None:
    """Leading away from itself changes nothing: both answers are the same, in the same precision."""
    sampler = DDIM(num_steps=4, guidance_scale=3.0)
    spec = spec_of(files, sampler=sampler, precision="bf16", guide_digest=files.digest)
    guided = ImageMaker(Ingredients(model=files, guide=files), spec, CPU)(spec, IDS)[0]
    assert torch.equal(guided, images_of(files, precision="bf16"))


def test_where_it_cannot_be_compiled_nothing_is_made(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(module: nn.Module, **options: Any) -> None:
        raise RuntimeError("no compiler\nis installed")

    monkeypatch.setattr(nn.Module, "compile", fails)
    with pytest.raises(ConfigError) as caught:
        images_of(files, compile=True)
    assert str(caught.value) == (
        "sample: compile: does not work here (RuntimeError: no compiler is installed); leave it out"
    )


def test_a_batch_that_does_not_fit_is_left_to_the_first_shard(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which says which batch fits; here the network is full, and is ready nevertheless."""

    def full(module: nn.Module, *inputs: Any) -> Tensor:
        raise torch.OutOfMemoryError("full")

    model, spec = load_model(files)[1], spec_of(files, compile=True)
    assert isinstance(model.network, nn.Module)
    monkeypatch.setattr(model.network, "forward", full)
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: None)
    with pytest.raises(torch.OutOfMemoryError):
        set_up(model, spec, CPU).network(torch.rand(2, 3, 8, 8), torch.zeros(2), None)


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")  # in what the compiler imports
def test_compiled_images_are_the_same_but_for_rounding(tmp_path: Path) -> None:
    """The compiler's code, of the smallest network there is: it takes seconds."""
    network = dataclasses.replace(TINY_UNET, base_channels=4, num_groups=2)
    assert isinstance(network, UNetConfig)
    files = read_model_files(open_store(write_model(tmp_path / "model", network=network, answers=True)))
    exact, compiled = images_of(files), images_of(files, compile=True)
    assert float((exact - compiled).abs().max()) < 1e-3 and float(exact.std()) > 0.1
