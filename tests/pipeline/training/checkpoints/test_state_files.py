"""A state in many small files is the same state; what only training needs is in files of a bounded size."""

import json
import struct

import pytest
import torch

from pipeline.errors import CheckpointError
from pipeline.models.model_files import ModelFiles, load_model
from pipeline.training.checkpoints.checkpoint_files import encode_tensors
from pipeline.training.checkpoints.state_files import _TENSOR_HEADER_BYTES, decode_tensors, parts_of
from pipeline.training.worker.training_state import TrainingState
from tests.pipeline.training.small_runs import CARD, restore, to_files
from tests.pipeline.training.worker.test_training_state import CARD as OWN_CARD
from tests.pipeline.training.worker.test_training_state import SEVERAL, make_state, step

MODEL_FILES = {"model.json", "weights.safetensors", "ema-20.json", "ema-20.safetensors", "ema-1000.json",
               "ema-1000.safetensors"}  # fmt: skip


def trained() -> TrainingState:
    state = make_state(config=SEVERAL)
    for _ in range(3):
        step(state)
    return state


def test_one_file_or_many_are_the_same_state() -> None:
    state = trained()
    whole = to_files(state, OWN_CARD)
    assert whole.keys() == MODEL_FILES | {"train_weights.safetensors", "optimizer.safetensors", "state.json"}
    cut = to_files(state, OWN_CARD, max_file_bytes=4000)
    assert {name: cut[name] for name in MODEL_FILES} == {name: whole[name] for name in MODEL_FILES}, "never cut"
    assert len(parts_of("optimizer.safetensors", cut)) > 3 < len(parts_of("train_weights.safetensors", cut))
    resumed = []
    for files in (whole, cut):
        other = make_state(seed=9, config=SEVERAL)
        restore(other, files)
        step(other)
        resumed.append(to_files(other, OWN_CARD))
    step(state)
    assert resumed[0] == resumed[1] == to_files(state, OWN_CARD)


@pytest.mark.parametrize("limit", [1, 1000, 4000, 20_000, 10**9])
def test_files_are_bounded_but_for_a_tensor_that_is_larger(limit: int) -> None:
    files = to_files(trained(), OWN_CARD, max_file_bytes=limit)
    for base in ("optimizer.safetensors", "train_weights.safetensors"):
        names = parts_of(base, files)
        found = [decode_tensors(files[name]) for name in names]
        assert all(len(files[name]) <= limit or len(tensors) == 1 for name, tensors in zip(names, found))
        assert sum(map(len, found)) == len({key for tensors in found for key in tensors}), "each is there once"
        number = len(names)
        stem = base.removesuffix(".safetensors")
        assert names == (
            [base] if number == 1 else [f"{stem}-{k:05d}-of-{number:05d}.safetensors" for k in range(1, number + 1)]
        )
        if limit == 1:
            assert all(len(tensors) == 1 for tensors in found)


def test_a_part_that_is_missing_is_found() -> None:
    files = to_files(trained(), OWN_CARD, max_file_bytes=4000)
    names = parts_of("optimizer.safetensors", files)
    for gone in (names[0], names[-1]):
        with pytest.raises(CheckpointError, match=r"of optimizer\.safetensors there are only"):
            parts_of("optimizer.safetensors", files.keys() - {gone})
    assert parts_of("importance.safetensors", files) == []
    assert parts_of("ema.safetensors", files) == [], "ema-20.safetensors is no part of it"


def test_the_header_takes_no_more_than_is_counted() -> None:
    """The longest of everything: the largest offsets, the most dimensions, a name that JSON has to escape."""
    name = '"é' * 10
    tensor = torch.zeros(1, 1, 1, 1, 1, 1, 2**20, dtype=torch.float64)
    (header_bytes,) = struct.unpack("<Q", encode_tensors({name: tensor})[:8])
    per_tensor = header_bytes + 2 * len(str(2**40)) - len(json.dumps({}))
    assert per_tensor <= _TENSOR_HEADER_BYTES + len(name.encode())


def test_the_averages_are_models() -> None:
    files = to_files(trained(), OWN_CARD)
    for card, weights, average in (
        ("model.json", "weights.safetensors", ""),
        ("ema-20.json", "ema-20.safetensors", "half-life 20 images"),
    ):
        found, _ = load_model(ModelFiles(card_json=files[card], weights=files[weights]))
        assert found.average == average and found.config == OWN_CARD.config != CARD.config
