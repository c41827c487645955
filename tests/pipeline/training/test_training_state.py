"""The state of a training run: what a step does to it, and its way through files."""

import math

import pytest
import torch

from ddpm import ModelConfig, UNetConfig, build_model
from pipeline.errors import CheckpointError
from pipeline.models.model_files import WEIGHTS, ModelCard
from pipeline.training.train_config import OptimizerConfig
from pipeline.training.training_state import TrainingState

MODEL = ModelConfig(
    unet=UNetConfig(
        base_channels=8, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=4
    ),
    image_size=8,
    channels=1,
)
OPTIMIZER = OptimizerConfig(learning_rate=0.01, warmup_steps=4, grad_clip_norm=1.0, ema_halflife_images=100)


def make_state(seed: int = 0) -> TrainingState:
    return TrainingState(build_model(MODEL, seed=seed), OPTIMIZER, keep_ema=True)


def step(state: TrainingState, scale: float = 1.0) -> float:
    generator = torch.Generator().manual_seed(state.step)
    for parameter in state.network.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    return state.apply_gradient(num_images=16)


def test_the_step_size_warms_up_linearly() -> None:
    state, sizes = make_state(), []
    for _ in range(6):
        sizes.append(state.learning_rate)
        step(state)
    assert sizes == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


def test_the_reported_norm_is_that_before_clipping() -> None:
    state = make_state()
    norms = [step(state, scale) for scale in (1.0, 1.0)]
    generator = torch.Generator().manual_seed(0)
    squares = sum(float(torch.randn(p.shape, generator=generator).square().sum()) for p in state.network.parameters())
    assert norms[0] == pytest.approx(math.sqrt(squares), rel=1e-5)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_position(poison: float) -> None:
    state = make_state()
    step(state)
    before = {name: tensor.clone() for name, tensor in state.network.state_dict().items()}
    average = {name: tensor.clone() for name, tensor in state.ema.state_dict().items()} if state.ema else {}
    next(state.network.parameters()).grad = torch.full_like(next(state.network.parameters()), poison)
    state.apply_gradient(num_images=16)
    assert state.step == 2 and state.skipped_steps == [1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.network.state_dict().items())
    assert state.ema is not None
    assert all(torch.equal(tensor, average[name]) for name, tensor in state.ema.state_dict().items())
    step(state)
    assert not torch.equal(next(iter(state.network.state_dict().values())), next(iter(before.values())))


def test_a_restored_state_goes_on_bit_for_bit() -> None:
    state = make_state()
    for _ in range(3):
        step(state)
    files = state.to_files(ModelCard(config=MODEL, train_step=state.step), None)
    restored = make_state(seed=9)
    restored.restore(files)
    assert restored.step == 3
    for _ in range(3):
        assert step(state) == step(restored)
    assert state.ema is not None and restored.ema is not None
    for one, other in ((state.network, restored.network), (state.ema, restored.ema)):
        mine, theirs = one.state_dict(), other.state_dict()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_checkpoint_of_another_network_is_refused() -> None:
    files = make_state().to_files(ModelCard(config=MODEL), None)
    other = TrainingState(torch.nn.Linear(2, 2), OPTIMIZER, keep_ema=False)
    with pytest.raises(CheckpointError, match="does not fit"):
        other.restore(files)
    with pytest.raises(CheckpointError, match="does not fit"):
        make_state().restore({name: data for name, data in files.items() if name != WEIGHTS})
