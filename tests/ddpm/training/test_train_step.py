"""Algorithm 1: what is drawn, that it depends on the sample alone, and the pixels' range."""

import math

import pytest
import torch
from torch import Tensor, nn

from ddpm import (
    DiffusionModel,
    Network,
    ScheduleConfig,
    Stream,
    TrainingBatch,
    make_schedule,
    make_training_batch,
    per_sample_loss,
    q_sample,
    random_integers,
    standard_normal,
)
from ddpm.process.prediction import predict_x_0_from_eps

SCHEDULE = make_schedule(ScheduleConfig(name="cosine", num_timesteps=200))
SEED, NULL = 17, 10


def unasked(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    """To make a batch."""
    raise AssertionError("the network is asked")


def model_of(network: Network | None = None, null_label: int | None = NULL) -> DiffusionModel:
    return DiffusionModel(network=network or unasked, schedule=SCHEDULE, image_shape=(1, 3, 4), null_label=null_label)


def batch_of(ids: Tensor, epochs: Tensor, *, flip: bool = False, label_drop: float = 0.0) -> TrainingBatch:
    """Images and labels are functions of the id, as in a data set."""
    x_0 = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(1, 1, 3, 4) * (1 + ids[:, None, None, None]) / 4096
    return make_training_batch(
        model_of(), x_0, ids % 10, seed=SEED, sample_ids=ids, epochs=epochs, flip=flip, label_drop=label_drop
    )


def test_batch_is_made_of_the_documented_draws() -> None:
    ids, epochs = torch.arange(64), torch.arange(64) % 3
    batch = batch_of(ids, epochs)
    assert torch.equal(batch.t, random_integers(SEED, Stream.TRAIN_T, ids, epochs, 200))
    assert torch.equal(batch.eps, standard_normal(SEED, Stream.TRAIN_EPS, ids, epochs, (1, 3, 4), torch.float64))
    assert torch.equal(batch.label if batch.label is not None else ids, ids % 10)
    x_0 = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(1, 1, 3, 4) * (1 + ids[:, None, None, None]) / 4096
    assert torch.equal(batch.x_t, q_sample(SCHEDULE, x_0, batch.t, batch.eps))


def test_a_sample_is_noised_alike_in_any_batch() -> None:
    ids, epochs = torch.tensor([5, 900, 31, 2, 77, 64, 8]), torch.tensor([0, 3, 1, 0, 2, 2, 9])
    whole = batch_of(ids, epochs, flip=True, label_drop=0.5)
    for order in [torch.tensor([6, 5, 4, 3, 2, 1, 0]), torch.tensor([3]), torch.tensor([1, 4])]:
        part = batch_of(ids[order], epochs[order], flip=True, label_drop=0.5)
        assert torch.equal(part.x_t, whole.x_t[order]) and torch.equal(part.t, whole.t[order])
        assert torch.equal(part.eps, whole.eps[order])
        assert part.label is not None and whole.label is not None and torch.equal(part.label, whole.label[order])


def test_the_next_epoch_draws_anew() -> None:
    ids = torch.arange(1000)
    first, second = (batch_of(ids, torch.full_like(ids, epoch), flip=True, label_drop=0.5) for epoch in (0, 1))
    assert not bool((first.eps == second.eps).any())
    # Two uniform draws of 200 values agree with probability 1/200: 5 +- 2.2 of 1000.
    assert int((first.t == second.t).sum()) < 20


def test_half_of_the_images_are_mirrored_left_to_right() -> None:
    """x_0 is read back from x_t; 2000 +- 32 flips of 4000, bound of five standard errors (false alarms: 6e-7)."""
    ids = torch.arange(4000)
    batch = batch_of(ids, torch.zeros_like(ids), flip=True)
    plain = batch_of(ids, torch.zeros_like(ids))
    flipped, straight = (predict_x_0_from_eps(SCHEDULE, b.x_t, b.t, b.eps) for b in (batch, plain))
    mirrored = (flipped - straight.flip(-1)).abs().amax(dim=(1, 2, 3)) < 1e-9
    same = (flipped - straight).abs().amax(dim=(1, 2, 3)) < 1e-9
    assert bool((mirrored ^ same).all())
    assert abs(int(mirrored.sum()) - 2000) < 5 * math.sqrt(1000)
    assert torch.equal(batch.t, plain.t) and torch.equal(batch.eps, plain.eps)


@pytest.mark.parametrize("label_drop", [0.0, 0.1, 1.0])
def test_share_of_null_labels(label_drop: float) -> None:
    ids = torch.arange(4000)
    label = batch_of(ids, torch.zeros_like(ids), label_drop=label_drop).label
    assert label is not None
    dropped = label == NULL
    assert torch.equal(label[~dropped], (ids % 10)[~dropped])
    assert abs(int(dropped.sum()) - 4000 * label_drop) <= 5 * math.sqrt(4000 * label_drop * (1 - label_drop))


def test_labels_are_needed_only_to_drop_them() -> None:
    ids = torch.arange(3)

    def make(label: Tensor | None, label_drop: float, null_label: int | None) -> TrainingBatch:
        return make_training_batch(
            model_of(null_label=null_label),
            torch.zeros(3, 1, 2, 2),
            label,
            seed=0,
            sample_ids=ids,
            epochs=ids,
            flip=False,
            label_drop=label_drop,
        )

    assert make(None, 0.0, None).label is None
    for label, null_label in [(None, 3), (ids, None)]:
        with pytest.raises(ValueError, match=r"^label_drop: "):
            make(label, 0.1, null_label)
    with pytest.raises(ValueError, match=r"^probability: "):
        make(ids, 1.1, 3)


def test_training_draws_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    batch_of(torch.arange(4), torch.zeros(4, dtype=torch.int64), flip=True, label_drop=0.5)
    assert torch.equal(torch.get_rng_state(), before)


def test_loss_has_a_value_per_sample_and_a_gradient() -> None:
    class Scale(nn.Module):
        """eps_hat = scale * x_t, in a low precision as under autocast."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.0))

        def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
            return (self.scale * x_t).to(torch.bfloat16)

    ids = torch.arange(5)
    batch = batch_of(ids, ids)
    network = Scale()
    loss = per_sample_loss(model_of(network), batch)
    assert torch.equal(loss, batch.eps.square().mean(dim=(1, 2, 3)))
    loss.sum().backward()  # type: ignore[no-untyped-call]
    expected = -2 * (batch.eps * batch.x_t).mean(dim=(1, 2, 3)).sum()
    assert float(network.scale.grad) == pytest.approx(float(expected), rel=1e-2)  # type: ignore[arg-type]
