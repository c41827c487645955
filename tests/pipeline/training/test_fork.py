"""A run that begins with another model's weights: the average, whole, and of the model that it was made from."""

import dataclasses
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ddpm import ModelConfig, build_network
from pipeline.errors import ConfigError, ModelMissingError
from pipeline.presets import digits
from pipeline.stores.storage import open_store
from pipeline.training.checkpoints.checkpoint_store import CheckpointStore
from pipeline.training.fork import begin_with_fork, check_fork
from pipeline.training.train_config import TrainConfig
from tests.pipeline.storage_checks import check_one_line
from tests.pipeline.training.small_runs import MODEL, make_run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    make_run(folder, steps=4, interval=0)
    checkpoints = CheckpointStore.of_run(str(folder))
    newest = checkpoints.newest()
    assert newest is not None
    return checkpoints.uri(newest)


def fork_of(uri: str | None) -> TrainConfig:
    return dataclasses.replace(digits().train, fork_from=uri)


def test_the_network_begins_with_the_average(checkpoint: str) -> None:
    config = fork_of(checkpoint)
    digest = check_fork(config, MODEL)
    network = build_network(MODEL, seed=1)
    begin_with_fork(config, network, digest)
    average = safetensors.torch.load_file(Path(checkpoint, "weights.safetensors"))
    assert network.state_dict().keys() == average.keys()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, average[name]), name


def test_without_a_fork_weights_are_random() -> None:
    assert check_fork(fork_of(None), MODEL) is None
    network, same = build_network(MODEL, seed=1), build_network(MODEL, seed=1)
    begin_with_fork(fork_of(None), network, None)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), same.parameters()))


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(MODEL, num_classes=7),
        dataclasses.replace(MODEL, channels=3),
        dataclasses.replace(MODEL, network=dataclasses.replace(MODEL.network, base_channels=16)),
    ],
    ids=["classes", "channels", "width"],
)
def test_weights_of_another_network_are_refused(checkpoint: str, other: ModelConfig) -> None:
    with pytest.raises(ConfigError) as caught:
        check_fork(fork_of(checkpoint), other)
    check_one_line(caught.value, f"fork_from: the weights of {checkpoint} do not fit", "give the network the options")


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelMissingError, match=r"no model\.json there"):
        check_fork(fork_of(str(tmp_path)), MODEL)
    with pytest.raises(ValueError, match="fork_from"):
        fork_of("models:/x")


def test_a_run_does_not_begin_with_another_model_than_it_was_made_from(checkpoint: str, tmp_path: Path) -> None:
    digest = check_fork(fork_of(checkpoint), MODEL)
    make_run(tmp_path, steps=8, interval=0)
    other = next(CheckpointStore.of_run(str(tmp_path)).records())
    uri = CheckpointStore(open_store(str(tmp_path / "checkpoints"))).uri(other)
    with pytest.raises(ConfigError) as caught:
        begin_with_fork(fork_of(uri), build_network(MODEL), digest)
    check_one_line(caught.value, f"fork_from: {uri} has digest", "name the version or the checkpoint that it was then")
