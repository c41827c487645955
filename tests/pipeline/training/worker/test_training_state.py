"""The state of a training run: what a step does to it, and its way through files."""

import json
import math
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from ddpm import Ema, ModelConfig, UNetConfig, build_network
from pipeline.errors import CheckpointError, FormatVersionError
from pipeline.models.model_files import WEIGHTS, ModelCard
from pipeline.training.train_config import OptimizerConfig
from pipeline.training.worker.training_state import TrainingState
from tests.pipeline.training.small_runs import restore, to_files

MODEL = ModelConfig(
    network=UNetConfig(
        base_channels=8, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=4
    ),
    image_size=(8, 8),
    channels=1,
)
OPTIMIZER = OptimizerConfig(
    learning_rate=0.01, warmup_steps=4, grad_clip_norm=1.0, ema_halflife_images=100, ema_ramp_up_ratio=None
)
# Of these half-lives the ramp-up reaches 20 within the test, and neither 100 nor 1000.
SEVERAL = replace(OPTIMIZER, more_ema_halflives_images=(20, 1000), ema_ramp_up_ratio=0.25)
CARD = ModelCard(config=MODEL)


def make_state(seed: int = 0, config: OptimizerConfig = OPTIMIZER) -> TrainingState:
    return TrainingState(build_network(MODEL, seed=seed), config)


def step(state: TrainingState, scale: float = 1.0) -> float:
    generator = torch.Generator().manual_seed(state.step)
    for parameter in state.network.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    return float(state.apply_gradient(num_images=16))


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


def test_clipping_scales_the_whole_gradient_and_can_be_left_out() -> None:
    """Of what Adam is given: above the norm scaled to it, below it and without clipping as it was."""

    def given_to_adam(limit: float | None, scale: float) -> list[torch.Tensor]:
        state, seen = make_state(config=replace(OPTIMIZER, grad_clip_norm=limit)), []
        state._optimizer.register_step_pre_hook(
            lambda *_: seen.extend(p.grad.clone() for p in state.network.parameters() if p.grad is not None)
        )
        step(state, scale)
        return seen

    plain = given_to_adam(None, 1.0)
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in plain))
    assert norm > 10
    for limit, scale, factor in ((1.0, 1.0, 1 / norm), (10 * norm, 1.0, 1.0), (None, 100.0, 100.0)):
        for clipped, whole in zip(given_to_adam(limit, scale), plain):
            torch.testing.assert_close(clipped, whole * factor, rtol=1e-4, atol=0)


@pytest.mark.parametrize("limit", [1.0, None])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_position(poison: float, limit: float | None) -> None:
    state = make_state(config=replace(OPTIMIZER, grad_clip_norm=limit))
    step(state)
    before = {name: tensor.clone() for name, tensor in state.network.state_dict().items()}
    average = {name: tensor.clone() for name, tensor in state.ema.state_dict().items()}
    next(state.network.parameters()).grad = torch.full_like(next(state.network.parameters()), poison)
    state.apply_gradient(num_images=16)
    assert state.step == 2 and state.skipped_steps == (1,)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.network.state_dict().items())
    assert all(torch.equal(tensor, average[name]) for name, tensor in state.ema.state_dict().items())
    step(state)
    assert not torch.equal(next(iter(state.network.state_dict().values())), next(iter(before.values())))


@pytest.mark.parametrize("limit", [1.0, None])
def test_a_skipped_step_leaves_the_moments_and_adams_count(limit: float | None) -> None:
    state = make_state(config=replace(OPTIMIZER, grad_clip_norm=limit))
    step(state)
    before = {k: t.clone() for k, t in state.parts().tensors["optimizer.safetensors"].items()}
    assert float(before["0.step"]) == 1 and before["0.exp_avg"].any() and before["0.exp_avg_sq"].any()
    step(state, math.nan)
    after = state.parts().tensors["optimizer.safetensors"]
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_each_step_is_in_the_averages_at_once() -> None:
    state = make_state()
    for number, scale in enumerate((1.0, math.nan, 1.0)):
        step(state, scale)
        assert state.averages.num_images == (16, 16, 32)[number]


class ByTheBook:
    """The step as it was when the host waited for each norm: the oracle."""

    def __init__(self, network: torch.nn.Module, config: OptimizerConfig, *, foreach: bool) -> None:
        self.network, self.config, self.step = network, config, 0
        self.optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate, foreach=foreach)
        self.ema = Ema(network, config.ema_halflife_images)

    def apply_gradient(self, num_images: int) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.grad_clip_norm or math.inf)
        if math.isfinite(float(norm)):
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.learning_rate * min(1.0, (self.step + 1) / self.config.warmup_steps)
            self.optimizer.step()
            self.ema.update(self.network, num_images)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1


@pytest.mark.parametrize("limit", [0.05, None])
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize(
    ("dtype", "of_losses", "of_averages"), [(torch.float64, 1e-15, 3e-14), (torch.float32, 5e-7, 1e-5)]
)
def test_fifty_steps_are_those_of_clip_grad_norm_and_adam(
    dtype: torch.dtype, of_losses: float, of_averages: float, foreach: bool, limit: float | None
) -> None:
    """With a step that is skipped. Fused Adam rounds otherwise in the last bits; the average of equal weights is equal.

    Measured: losses differ by 2.2e-16, relative, in float64 and by 1.2e-7 in float32; averages by 5.7e-15 and 2.6e-6 of
    the largest weight. Without dropout, whose draws would not be the same.
    """
    config = replace(OPTIMIZER, learning_rate=1e-3, grad_clip_norm=limit)
    state = TrainingState(build_network(MODEL, seed=0).to(dtype).eval(), config)
    book = ByTheBook(build_network(MODEL, seed=0).to(dtype).eval(), config, foreach=foreach)
    beside, losses = Ema(state.network, config.ema_halflife_images), {"new": [], "old": []}  # of the new weights
    generator = torch.Generator().manual_seed(0)
    for number in range(50):
        x, target = torch.randn(2, 16, 1, 8, 8, generator=generator).to(dtype)
        if number == 20:
            target = target * math.nan
        for name, trained in (("new", state), ("old", book)):
            loss = (trained.network(x, torch.arange(16), None) - target).square().mean()
            torch.autograd.backward(loss)
            trained.apply_gradient(16)
            losses[name].append(float(loss.detach()))
        if number != 20:
            beside.update(state.network, 16)
    assert state.skipped_steps == (20,)
    mine, exact, theirs = (average.state_dict() for average in (state.ema, beside, book.ema))
    assert all(torch.equal(mine[name], exact[name]) for name in mine)
    new, old = (torch.tensor(losses[name], dtype=torch.float64) for name in ("new", "old"))
    assert new[20].isnan() and old[20].isnan() and float(new[0]) - float(new[-1]) > 0.005
    difference = ((new - old) / old).nan_to_num(0.0).abs().max()
    assert float(difference) < of_losses
    scale = max(float(tensor.abs().max()) for tensor in theirs.values())
    furthest = max(float((mine[name] - theirs[name]).abs().max()) for name in mine) / scale
    print(f"{dtype}, foreach {foreach}, limit {limit}: losses {float(difference):.1e}, averages {furthest:.1e}")
    assert furthest < of_averages


def test_a_restored_state_goes_on_bit_for_bit() -> None:
    state = make_state()
    for _ in range(3):
        step(state)
    files = to_files(state, ModelCard(config=MODEL, train_step=state.step))
    restored = make_state(seed=9)
    step(restored)  # of which nothing is left
    restore(restored, files)
    assert restored.step == 3
    for _ in range(3):
        assert step(state) == step(restored)
    for one, other in ((state.network, restored.network), (state.ema, restored.ema)):
        mine, theirs = one.state_dict(), other.state_dict()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_checkpoint_of_another_network_is_refused() -> None:
    files = to_files(make_state(), ModelCard(config=MODEL))
    other = TrainingState(torch.nn.Linear(2, 2), OPTIMIZER)
    with pytest.raises(CheckpointError, match="does not fit"):
        restore(other, files)
    with pytest.raises(CheckpointError, match="does not fit"):
        restore(make_state(), {name: data for name, data in files.items() if name != WEIGHTS})


def averaged_by_hand(weights: list[torch.Tensor], halflife: float, ratio: float, num_images: int) -> torch.Tensor:
    """The average of a parameter's values after steps of num_images each, in float64, from the definition."""
    average = weights[0].double()
    for k, value in enumerate(weights[1:], start=1):
        decay = 0.5 ** (num_images / min(halflife, ratio * k * num_images))
        average = decay * average + (1 - decay) * value.double()
    return average


def test_several_averages_ramp_up_over_the_steps_that_were_made() -> None:
    """With a skipped batch in the middle: its images are in no average."""
    state, values = make_state(config=SEVERAL), []
    for scale in (1.0, 1.0, math.nan, 1.0, 1.0, 1.0, 1.0):
        step(state, scale)
        if math.isfinite(scale):
            values.append(next(iter(state.network.parameters())).detach().clone())
    assert state.skipped_steps == (2,) and state.averages.num_images == 6 * 16
    name = next(iter(dict(state.network.named_parameters())))
    files = to_files(state, CARD)
    assert json.loads(files["state.json"])["num_averaged_images"] == 6 * 16
    for file, halflife in (("weights", 100), ("ema-20", 20), ("ema-1000", 1000)):
        stored = safetensors.torch.load(files[f"{file}.safetensors"])[name]
        torch.testing.assert_close(stored.double(), averaged_by_hand(values, halflife, 0.25, 16), rtol=0, atol=1e-6)


def broken_off(files: dict[str, bytes]) -> dict[str, torch.Tensor]:
    """Every average, three steps after a restart from the files."""
    state = make_state(seed=9, config=SEVERAL)
    restore(state, files)
    for _ in range(3):
        step(state)
    later = to_files(state, CARD)
    names = ("weights.safetensors", "ema-20.safetensors", "ema-1000.safetensors")
    return {f"{file}/{key}": t for file in names for key, t in safetensors.torch.load(later[file]).items()}


def test_several_averages_go_on_bit_for_bit_and_only_with_the_count() -> None:
    state = make_state(config=SEVERAL)
    for scale in (1.0, math.nan, 1.0, 1.0, 1.0):
        step(state, scale)
    files = to_files(state, CARD)
    resumed = broken_off(files)
    for _ in range(3):
        step(state)
    unbroken = to_files(state, CARD)
    for key, tensor in resumed.items():
        file, _, name = key.partition("/")
        assert torch.equal(tensor, safetensors.torch.load(unbroken[file])[name]), key
    for wrong in (0, 5 * 16):  # nothing, or the skipped batch counted too
        position = json.loads(files["state.json"]) | {"num_averaged_images": wrong}
        other = broken_off(files | {"state.json": json.dumps(position).encode()})
        for file in ("weights.safetensors", "ema-1000.safetensors"):
            keys = [key for key in resumed if key.startswith(file)]
            assert not all(torch.equal(other[key], resumed[key]) for key in keys), (file, wrong)


def test_a_position_of_another_version_is_refused_by_name_and_a_damaged_one_as_damaged() -> None:
    files = to_files(make_state(), CARD)
    position = files["state.json"]
    with pytest.raises(FormatVersionError, match=r"^state\.json: has format_version 1, .* train again into another"):
        restore(make_state(), files | {"state.json": position.replace(b'"format_version":2', b'"format_version":1')})
    for damaged in (position[:-5], position.replace(b'"num_averaged_images":0,', b"")):
        assert damaged != position
        with pytest.raises(CheckpointError, match=r"^state\.json: "):
            restore(make_state(), files | {"state.json": damaged})


def test_a_checkpoint_without_a_further_average_is_refused() -> None:
    files = to_files(make_state(config=SEVERAL), CARD)
    del files["ema-20.safetensors"]
    with pytest.raises(CheckpointError, match="does not fit"):
        restore(make_state(config=SEVERAL), files)
