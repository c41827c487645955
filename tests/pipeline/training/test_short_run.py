"""A short run's model is no noise: 300 steps of 64 images give an average that predicts as the weights do."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from ddpm import DiffusionModel, Ema, ModelConfig, UNetConfig, build_network, make_schedule
from pipeline.data.batch_cutter import RankBatch
from pipeline.data.image_stream import LabelledImages
from pipeline.measuring.measures import eps_mse
from pipeline.training.train_config import OptimizerConfig
from pipeline.training.worker.loss_watch import LossWatch
from pipeline.training.worker.training_state import TrainingState
from pipeline.training.worker.training_step import LossTotals, TrainingStep
from tests.pipeline.training.step_cases import CPU, make_task, single_rank

NUM_STEPS, BATCH, NUM_TRAIN = 300, 64, 1500
UNET = UNetConfig(
    base_channels=16, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(), num_groups=4, dropout=0.0
)
MODEL = ModelConfig(network=UNET, image_size=(8, 8), channels=1)
DIGITS = np.round(load_digits().images * 255 / 16).astype(np.uint8)[..., None]


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with single_rank():
        yield


def trained(optimizer: OptimizerConfig) -> tuple[TrainingState, Ema]:
    """The state after all steps, and an average of the same weights with a constant half-life."""
    task = make_task(network=UNET, class_conditional=False, global_batch=BATCH, steps=NUM_STEPS, optimizer=optimizer)
    task = dataclasses.replace(task, model_config=MODEL)
    state = TrainingState(build_network(MODEL, seed=0), optimizer)
    step, constant = TrainingStep(task, state, CPU), Ema(state.network, optimizer.ema_halflife_images)
    for number in range(NUM_STEPS):
        places = np.arange(number * BATCH, (number + 1) * BATCH)
        ids = np.random.default_rng(0).permutation(NUM_TRAIN)[places % NUM_TRAIN]
        batch = RankBatch(images=DIGITS[ids], labels=None, sample_ids=ids, epochs=places // NUM_TRAIN)
        step(batch, LossTotals(1000, CPU), LossWatch())
        constant.update(state.network, BATCH)
    return state, constant


def held_out_error(weights: dict[str, torch.Tensor]) -> float:
    network = build_network(MODEL).eval()
    network.load_state_dict(weights)

    def stream() -> Iterator[LabelledImages]:
        yield LabelledImages(images=DIGITS[NUM_TRAIN:], labels=None)

    predict: Callable[..., torch.Tensor] = DiffusionModel.of(MODEL, network).network
    schedule = make_schedule(MODEL.schedule)
    (error,) = eps_mse([predict], schedule, stream, images_per_t=2, seed=0, batch_size=500, device=CPU)
    return error.value


def test_the_average_predicts_as_the_weights_do() -> None:
    """Of the half-life of the digits' preset and more; constant, it is still full of the first weights."""
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=50, ema_halflife_images=10_000)
    state, constant = trained(optimizer)
    raw, average = (held_out_error(dict(part.state_dict())) for part in (state.network, state.ema))
    of_constant = held_out_error(constant.state_dict())
    print(f"held-out error: weights {raw:.4f}, average {average:.4f}, with a constant half-life {of_constant:.4f}")
    assert average < 1.1 * raw < 0.5
    assert of_constant > 1.1 * raw, "what the ramp-up is for"
