"""Two models on the same noise: what they share cancels, and a better one is told from a worse one."""

import dataclasses
from pathlib import Path

import pytest
import torch

from ddpm import LikelihoodConfig, ModelConfig, ScheduleConfig, build_network
from pipeline.config_io import from_json
from pipeline.data.manifest import load_manifest
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.errors import ConfigError, ModelMissingError
from pipeline.evaluation.studies.bound_comparison import (
    BoundComparison,
    BoundComparisonConfig,
    compare_bounds,
    describe_plan,
)
from pipeline.models.model_files import ModelCard, encode_model
from pipeline.stores.storage import open_store
from tests.pipeline.tiny_models import TINY_UNET


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("bounds") / "dataset")
    prepare(PrepareConfig(source="digits", dataset=folder, shard_size=250))
    return folder


def write_model(
    folder: Path,
    *,
    shift: float = 0.0,
    image_size: int = 8,
    learned_variance: bool = False,
    class_names: str = "0123456789",
    dataset_digest: str = "",
) -> str:
    """An untrained model, which answers 0 plus a shift."""
    config = ModelConfig(
        network=dataclasses.replace(TINY_UNET, learned_variance=learned_variance),
        schedule=ScheduleConfig(name="cosine", num_timesteps=30),
        image_size=(image_size, image_size),
        channels=1,
        num_classes=10,
    )
    weights = build_network(config).state_dict()
    last = [name for name, tensor in weights.items() if name.endswith("bias") and len(tensor) == 1 + learned_variance]
    weights[last[-1]] = torch.full_like(weights[last[-1]], shift)
    folder.mkdir(parents=True)
    card = ModelCard(config=config, class_names=tuple(class_names), dataset_digest=dataset_digest)
    for name, data in encode_model(card, weights, None).as_dict().items():
        (folder / name).write_bytes(data)
    return str(folder)


def config(dataset: str, tmp_path: Path, **changes: object) -> BoundComparisonConfig:
    options: dict[str, object] = {"max_images": 60, "output": str(tmp_path / "report"), **changes}
    return BoundComparisonConfig(dataset=dataset, **options)  # type: ignore[arg-type]


def test_a_better_model_is_told_from_a_worse_one(dataset: str, tmp_path: Path) -> None:
    good, bad = write_model(tmp_path / "good"), write_model(tmp_path / "bad", shift=-0.5)
    found = compare_bounds(config(dataset, tmp_path, model=good, baseline=bad))
    whole = found.difference["bits_per_dim"]
    assert whole.value < -2 * whole.standard_error < 0
    for name in ("bits_per_dim", "prior", "denoising", "decoder"):
        gap = found.of_model[name].value - found.of_baseline[name].value
        assert found.difference[name].value == pytest.approx(gap, abs=1e-9)
    parts = sum(found.difference[name].value for name in ("prior", "denoising", "decoder"))
    assert whole.value == pytest.approx(parts, abs=1e-9)
    # The images' own spread is in both bounds and cancels in the difference.
    assert whole.standard_error < found.of_model["bits_per_dim"].standard_error
    stored = (tmp_path / "report" / "bounds.json").read_bytes()
    assert from_json(BoundComparison, stored, "bounds.json") == found
    assert "bits_per_dim" in found.table() and "+-" in found.table()


def test_each_model_has_its_own_variance(dataset: str, tmp_path: Path) -> None:
    learned = write_model(tmp_path / "learned", learned_variance=True)
    fixed = write_model(tmp_path / "fixed")
    found = compare_bounds(config(dataset, tmp_path, model=learned, baseline=fixed))
    # Both predict eps = 0, so that the means are equal: only the variance of the steps tells them apart.
    assert found.difference["prior"].value == 0.0
    assert abs(found.difference["denoising"].value) > 2 * found.difference["denoising"].standard_error


def test_what_does_not_fit_is_refused_in_one_line(dataset: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"^dataset: .* 8 x 8 pixels .* makes images of 16 x 16 pixels"):
        compare_bounds(config(dataset, tmp_path, model=model, baseline=write_model(tmp_path / "big", image_size=16)))
    with pytest.raises(ConfigError, match=r"^dataset: .*the same classes in another order"):
        reordered = write_model(tmp_path / "reordered", class_names="1023456789")
        compare_bounds(config(dataset, tmp_path, model=model, baseline=reordered))
    with pytest.raises(ModelMissingError):
        compare_bounds(config(dataset, tmp_path, model=model, baseline=str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match=r"bound\.num_steps: must be in \[1, 30\]"):
        long = LikelihoodConfig(num_steps=31)
        other = write_model(tmp_path / "other", shift=0.5)
        compare_bounds(config(dataset, tmp_path, model=model, baseline=other, bound=long))
    with pytest.raises(ConfigError, match="baseline: must be another model"):
        compare_bounds(config(dataset, tmp_path, model=model, baseline=model))
    assert not (tmp_path / "report").exists()
    with pytest.raises(ValueError, match="importance"):
        importance = LikelihoodConfig(terms="importance", terms_per_image=3)
        config(dataset, tmp_path, model=model, baseline=model, bound=importance)


def test_each_model_that_was_trained_on_something_else_is_named(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = load_manifest(open_store(dataset)).digest
    model = write_model(tmp_path / "model", dataset_digest=own)
    other = write_model(tmp_path / "other", shift=0.5, dataset_digest="a" * 64)
    asked = config(dataset, tmp_path, model=model, baseline=other, max_images=4)
    (warning,) = compare_bounds(asked).warnings
    assert warning.startswith(f"{other} was trained on another dataset")
    assert capsys.readouterr().out == f"warning: {warning}\n"
    assert ("warning", warning) in describe_plan(asked)


def test_the_plan_says_what_it_takes(dataset: str, tmp_path: Path) -> None:
    model, other = write_model(tmp_path / "model"), write_model(tmp_path / "other", shift=0.5)
    plan = dict(describe_plan(config(dataset, tmp_path, model=model, baseline=other)))
    assert "30 evaluations" in plan["model"] and "about 60 held-out" in plan["dataset"]
