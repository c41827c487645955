"""Models made of a run's snapshots: as if they had been tracked, with their lineage, once."""

import dataclasses
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ddpm import PowerEma
from pipeline.errors import CheckpointError, ModelMissingError, OutputExistsError
from pipeline.models.model_files import load_model
from pipeline.models.registry import resolve_model
from pipeline.stores.storage import open_store
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.tracking import TrackingConfig
from pipeline.training.post_hoc_ema import ReconstructConfig, RunAverages, describe_plan, reconstruct
from pipeline.training.worker.training_state import TrainingState
from tests.pipeline.training.small_runs import CARD, make_run


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run") / "train"


@pytest.fixture(scope="module")
def run(output: Path) -> tuple[TrainingState, PowerEma]:
    state, directly = make_run(output, directly=0.075)
    assert directly is not None
    return state, directly


def flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.double().flatten() for tensor in state.values()])


def test_a_length_that_was_not_tracked_is_as_if_it_had_been(output: Path, run: tuple[TrainingState, PowerEma]) -> None:
    state, directly = run
    averages = RunAverages(str(output))
    assert (len(averages.snapshots), averages.num_images) == (32, 128 * 16)
    files = averages.model(0.075)
    card, model = load_model(files)
    assert (card.average, card.train_step, card.config) == ("sigma_rel 0.075", 128, CARD.config)
    direct, last = flat(directly.state_dict()), flat(state.network.state_dict())
    assert isinstance(model.network, torch.nn.Module)
    error = float((flat(model.network.state_dict()) - direct).norm() / (direct - last).norm())
    print(f"error {error:.1e} of |theta_ema - theta_last|, residual {averages.fit(0.075).residual:.1e}")
    assert error <= 1e-2
    assert averages.model(0.075) == files, "equal bytes every time"
    in_training = safetensors.torch.load(averages.last_weights().weights)
    assert in_training.keys() == state.network.state_dict().keys()
    assert all(torch.equal(in_training[name], tensor) for name, tensor in state.network.state_dict().items())


def test_a_model_in_a_folder_and_in_the_registry_once(
    output: Path, run: tuple[TrainingState, PowerEma], tmp_path: Path
) -> None:
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    config = ReconstructConfig(
        run=str(output), output=str(tmp_path / "ema"), sigma_rel=0.12, register_as="averages", tracking=tracking
    )
    assert dict(describe_plan(config))["snapshots"] == "32, of sigma_rel 0.05, 0.1"
    made = reconstruct(config)
    assert made.uri == f"{tmp_path}/ema/sigma_rel-0.12" and made.residual < 0.01
    assert made.version is not None and made.version.uri == "models:/averages/1"
    assert reconstruct(config) == made
    in_folder, in_registry = (resolve_model(uri, tracking) for uri in (made.uri, made.version.uri))
    assert in_folder.files == in_registry.files
    client = connect(str(tracking.uri))
    version = client.get_model_version("averages", "1")
    assert client.get_registered_model("averages").aliases == {}
    expected = {"ddpm.average": "sigma_rel 0.12", "ddpm.train_run": "0" * 32, "ddpm.snapshots": f"32 in {output}"}
    assert expected.items() <= version.tags.items()
    assert client.get_run(version.run_id).info.status == "FINISHED"

    # Other snapshots make another model, which does not take the first one's place.
    make_run(tmp_path / "other", steps=64)
    with pytest.raises(OutputExistsError, match="another model"):
        reconstruct(dataclasses.replace(config, run=str(tmp_path / "other")))
    assert resolve_model(made.uri, tracking).files == in_folder.files


def test_a_poor_profile_is_said(
    output: Path, run: tuple[TrainingState, PowerEma], capsys: pytest.CaptureFixture[str]
) -> None:
    averages = RunAverages(str(output))
    averages.model(0.1)
    assert capsys.readouterr().out == ""
    averages.model(0.01)
    assert "sigma_rel 0.01: 32 snapshots reach its profile within" in capsys.readouterr().out


def test_what_is_not_there_is_said(output: Path, run: tuple[TrainingState, PowerEma], tmp_path: Path) -> None:
    with pytest.raises(ModelMissingError, match="no checkpoint"):
        RunAverages(str(tmp_path / "nothing"))
    make_run(tmp_path / "plain", steps=2, interval=0)
    with pytest.raises(ModelMissingError, match="took no snapshots"):
        RunAverages(str(tmp_path / "plain"))
    make_run(tmp_path / "damaged", steps=8)
    averages = RunAverages(str(tmp_path / "damaged"))
    store = open_store(str(tmp_path / "damaged" / "ema_snapshots"))
    store.delete(f"{averages.snapshots[0].prefix}/sigma_rel-0.1.safetensors")
    with pytest.raises(CheckpointError, match="missing, though its record names it"):
        averages.model(0.075)


@pytest.mark.parametrize("field", ["run", "output", "register_as"])
def test_empty_texts_are_refused_by_name(field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: .*got ''"):
        ReconstructConfig(**{"run": "t", "output": "o", field: ""})
