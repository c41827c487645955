"""Evaluation of models on real digits, against the same figures computed independently."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import sklearn.datasets
import sklearn.svm

from ddpm import DDIM, ScheduleConfig, make_schedule
from pipeline.config_io import from_json, to_json
from pipeline.data.image_formats import Jpeg, WebP
from pipeline.data.image_stream import read_images
from pipeline.data.manifest import DatasetManifest, Split, load_manifest, write_manifest
from pipeline.data.prepare import PrepareConfig, open_source, prepare_source
from pipeline.data.shard_table import ShardRecord
from pipeline.data.shards import Sample, encode_png, pack_shard
from pipeline.errors import ConfigError, DatasetMissingError
from pipeline.evaluation.evaluate import EvaluateConfig, describe_plan, evaluate
from pipeline.evaluation.report import Evaluation, EvaluationRecord, Figure
from pipeline.generation.output.manifest import load_generation_manifest, read_shards
from pipeline.generation.requests.requests import Generate
from pipeline.generation.sample_config import ImagesConfig
from pipeline.models.registration import register_model
from pipeline.models.registry import resolve_model
from pipeline.stores.storage import open_store
from pipeline.tracking.tracking import TrackingConfig, TrackingRun, new_run_key
from tests.pipeline.runs_in_process import make_in_process, snapshot
from tests.pipeline.tiny_models import write_model

NUM_IMAGES = 200

BOUND = ["bits_per_dim", "bits_per_dim_prior", "bits_per_dim_denoising", "bits_per_dim_decoder"]
FLOW = ["bits_per_dim_flow", "bits_per_dim_flow_discretisation"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = PrepareConfig(source="digits", dataset=str(tmp_path_factory.mktemp("digits")), shard_size=250)
    prepare_source(config, open_source(config), map)
    return config.dataset


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("models") / "model", num_classes=10, num_timesteps=1000)


def config_of(dataset: str, model: str, output: Path, **changes: object) -> EvaluateConfig:
    sample = ImagesConfig(
        model=model,
        output=str(output),
        images_per_class=NUM_IMAGES // 10,
        sampler=DDIM(num_steps=3),
        shard_size=64,
        batch_size=64,
    )
    return EvaluateConfig(dataset=dataset, sample=dataclasses.replace(sample, **changes))  # type: ignore[arg-type]


def run(config: EvaluateConfig) -> Evaluation:
    """Evaluate, with the images made in this process: nothing is missing, so no Ray is started."""
    make_in_process(config.sampling)
    return evaluate(config)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """From the definition. A little noise on the diagonal keeps scipy's root of singular matrices real."""
    ridge = 1e-9 * np.eye(a.shape[1])
    c_a, c_b = np.cov(a.T) + ridge, np.cov(b.T) + ridge
    root = scipy.linalg.sqrtm(c_a @ c_b).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c_a + c_b - 2 * root))


def gaussian_eps_error(x: np.ndarray, labels: np.ndarray, num_train: int) -> float:
    """Of a Gaussian per class, by inverting its covariance at each t, with noise from numpy: 40 images for each t."""
    schedule = make_schedule(ScheduleConfig(name="cosine", num_timesteps=1000))
    x, generator = 2 * x - 1, np.random.default_rng(1)
    means, covariances = [], []
    for k in range(10):
        of_class = x[:num_train][labels[:num_train] == k]
        means.append(of_class.mean(0))
        covariances.append(np.cov(of_class.T, bias=True) + 1e-3 * np.eye(64))
    errors = []
    for t in range(0, 1000, 3):
        abar = float(schedule.alpha_bar[t])
        inverses = [np.linalg.inv(abar * covariance + (1 - abar) * np.eye(64)) for covariance in covariances]
        for row in generator.integers(num_train, len(x), 40):
            k, eps = labels[row], generator.standard_normal(64)
            x_t = np.sqrt(abar) * x[row] + np.sqrt(1 - abar) * eps
            eps_hat = np.sqrt(1 - abar) * inverses[k] @ (x_t - np.sqrt(abar) * means[k])
            errors.append(((eps_hat - eps) ** 2).mean())
    return float(np.mean(errors))


def test_figures_are_those_of_independent_code(digits: str, model: str, tmp_path: Path) -> None:
    found = run(config_of(digits, model, tmp_path / "out"))
    figures = found.figures

    # The data set from its source: scikit-learn's scans in the order of the published permutation.
    source = sklearn.datasets.load_digits()
    order = np.random.default_rng(0).permutation(1797)
    x = np.round(source.images[order] * 255 / 16).reshape(1797, 64) / 255
    labels = source.target[order]
    svm = sklearn.svm.SVC().fit(x[:1500], labels[:1500])
    store = open_store(str(Path(found.uri).parent))
    manifest = load_generation_manifest(store)
    assert manifest is not None
    made = read_images(store, read_shards(store, manifest.parts))
    images = made.images.reshape(NUM_IMAGES, 64) / 255

    assert figures["label_agreement"] == pytest.approx((svm.predict(images) == np.arange(NUM_IMAGES) % 10).mean())
    assert figures["label_agreement_real"] == pytest.approx((svm.predict(x[1500:]) == labels[1500:]).mean(), rel=1e-5)
    assert figures["frechet_pixels"] == pytest.approx(frechet(images, x[1500:]), rel=1e-4)
    # Real images beside as many generated ones, the mean of seven disjoint sets, by numpy's own draws.
    generator = np.random.default_rng(0)
    draws = [frechet(x[generator.permutation(1500)[:NUM_IMAGES]], x[1500:]) for _ in range(20)]
    assert figures["frechet_pixels_real"] == pytest.approx(np.mean(draws), abs=3 * np.std(draws) / 7**0.5)
    assert figures["frechet_pixels_real"] > 1.5 * frechet(x[:1500], x[1500:]), "fewer images, a larger distance"
    independent = [frechet(x[generator.integers(1500, size=NUM_IMAGES)], x[1500:]) for _ in range(80)]
    assert figures["frechet_pixels_real_standard_error"] == pytest.approx(np.std(independent), rel=0.3)
    of_frechet = found.record.figures["frechet_pixels"]
    assert (of_frechet.num_images, of_frechet.num_real_sets) == (NUM_IMAGES, 7)
    assert f"Frechet distance in pixels (real: train), {NUM_IMAGES} images each" in found.table()
    assert figures["eps_mse_gaussian"] == pytest.approx(gaussian_eps_error(x, labels, 1500), abs=0.004)
    assert figures["eps_mse"] > 0.5, "an untrained network knows nothing of the noise"
    assert figures["label_agreement_gaussian"] > 0.95 and figures["frechet_pixels_gaussian"] < 0.5
    assert 0 < figures["eps_mse_standard_error"] < 0.01
    share = figures["label_agreement"]
    binomial = (share * (1 - share) / NUM_IMAGES) ** 0.5
    assert figures["label_agreement_standard_error"] == pytest.approx(binomial, rel=0.05)


def test_a_second_evaluation_writes_nothing(digits: str, model: str, tmp_path: Path) -> None:
    config = dataclasses.replace(config_of(digits, model, tmp_path / "out"), eps_images_per_t=2, max_bound_images=2)
    first = run(config)
    stored = Path(first.uri).read_bytes()
    assert from_json(EvaluationRecord, stored, first.uri) == first.record and stored == to_json(first.record)
    assert first.record.num_images == NUM_IMAGES and Path(first.record.model) == Path(model)
    before = snapshot(tmp_path / "out")
    assert evaluate(config) == first
    assert snapshot(tmp_path / "out") == before
    fewer = dataclasses.replace(config, sample=dataclasses.replace(config.sample, images_per_class=10))
    of_fewer = evaluate(fewer)
    assert of_fewer.record.num_images == 100, "the images asked for are measured, however many there are"
    assert of_fewer.figures["frechet_pixels"] != first.figures["frechet_pixels"]


def test_figures_are_of_the_images_as_they_are_stored(digits: str, tmp_path: Path) -> None:
    """Whatever they are stored as; a format that loses detail is a warning of the report."""
    model = write_model(tmp_path / "model", num_classes=10, num_timesteps=1000, answers=True)

    def evaluation(**changes: Any) -> Evaluation:
        config = config_of(digits, model, tmp_path / "out", images_per_class=4, **changes)
        return run(dataclasses.replace(config, eps_images_per_t=2, max_bound_images=2))

    plain, same = evaluation(), evaluation(format=WebP(), container="parquet")
    assert plain.figures == same.figures and plain.record.warnings == same.record.warnings
    assert plain.record.spec_digest != same.record.spec_digest
    lossy = evaluation(format=Jpeg(quality=30), container="parquet")
    assert lossy.figures["frechet_pixels"] != plain.figures["frechet_pixels"]
    assert lossy.record.warnings == (
        *plain.record.warnings,
        "the images are stored as JPEG of quality 30, which loses detail: what is measured is what is stored",
    )


def test_more_images_than_real_ones_are_compared_at_the_real_ones_number(
    digits: str, model: str, tmp_path: Path
) -> None:
    config = dataclasses.replace(config_of(digits, model, tmp_path / "out"), eps_images_per_t=2, max_bound_images=2)
    few = run(dataclasses.replace(config, max_train_images=100, max_classifier_images=100))
    figure = few.record.figures["frechet_pixels"]
    assert figure.num_images is not None and 100 <= figure.num_images < NUM_IMAGES == few.record.num_images
    store = open_store(str(Path(few.uri).parent))
    manifest = load_generation_manifest(store)
    assert manifest is not None
    first = read_images(store, read_shards(store, manifest.parts), figure.num_images)
    held_out = read_images(open_store(digits), load_manifest(open_store(digits)).splits["held_out"].shards)
    x, y = (images.images.reshape(-1, 64) / 255 for images in (first, held_out))
    assert figure.model == pytest.approx(frechet(x, y), rel=1e-4)


def test_images_of_chosen_labels_are_measured_and_the_report_says_so(digits: str, model: str, tmp_path: Path) -> None:
    """Real images are of all classes; and where images share their noise the error of a distance is not known."""
    plan = tmp_path / "plan.csv"
    plan.write_text("label,noise_id\n" + "".join(f"{i % 10},{i // 2}\n" for i in range(64)))
    small = dataclasses.replace(config_of(digits, model, tmp_path / "out"), eps_images_per_t=2, max_bound_images=2)
    for counts, request, num_images, words in (
        ({"num_images": 64, "images_per_class": None}, Generate(classes=(7, 3)), 64, "the labels 7, 3, in turn, real"),
        ({"images_per_class": None}, Generate(label_plan=str(plan)), 64, f"the labels 64 rows of {plan}, sha256"),
    ):
        images = dataclasses.replace(small.sample, request=request, **counts)
        config = dataclasses.replace(small, sample=images)
        (told,) = [value for name, value in describe_plan(config) if name == "warning" and "labels" in value]
        found = run(config).record
        assert found.num_images == num_images and found.warnings[-1] == told and words in told
        drawn_alone = request.label_plan is None
        assert (found.figures["frechet_pixels"].standard_error is not None) == drawn_alone


def write_dataset(folder: Path, *, size: int, channels: int = 3, held_out: bool = True) -> str:
    """A dataset without labels."""
    store, generator = open_store(str(folder)), np.random.default_rng(0)
    splits = {}
    for split in ["train", "held_out"][: 1 + held_out]:
        shards = []
        for index in range(2):
            images = generator.integers(0, 256, (20, size, size, channels), dtype=np.uint8)
            tar = pack_shard(Sample(key=f"{i}", image=encode_png(image), meta={}) for i, image in enumerate(images))
            key, sha256 = f"{split}/{index}.tar", hashlib.sha256(tar).hexdigest()
            store.write(key, tar)
            shards.append(ShardRecord(key=key, size_bytes=len(tar), sha256=sha256, num_samples=20))
        splits[split] = Split(shards=tuple(shards))
    manifest = DatasetManifest(
        name="noise",
        source="generated",
        image_size=(size, size),
        channels=channels,
        class_names=(),
        splits=splits,
        num_quarantined=0,
    )
    write_manifest(store, manifest)
    return str(folder)


def test_without_classes_the_figures_without_labels_are_measured(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "data", size=8)
    model = write_model(tmp_path / "model", num_classes=None, channels=3)
    found = run(config_of(dataset, model, tmp_path / "out"))
    assert set(found.record.figures) == {"eps_mse", "frechet_pixels", *BOUND}
    compared = [figure for name, figure in found.record.figures.items() if name not in BOUND]
    assert all(None not in (f.model, f.real, f.gaussian) for f in compared)


def test_of_large_images_only_the_eps_error_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = write_dataset(tmp_path / "data", size=40)
    model = write_model(tmp_path / "model", num_classes=None, channels=3, image_size=(40, 40), num_timesteps=30)
    config = config_of(dataset, model, tmp_path / "out", images_per_class=2)
    found = run(dataclasses.replace(config, max_bound_images=3, max_flow_images=3, flow_steps=5))
    assert list(found.record.figures) == ["eps_mse", *BOUND, *FLOW] and found.record.figures["eps_mse"].gaussian is None
    flow, missed = (found.record.figures[name].model for name in FLOW)
    assert flow is not None and missed
    lines = found.table().splitlines()
    flow_row = next(number for number, line in enumerate(lines) if "flow and decoder" in line)
    assert "twice the nodes" in lines[flow_row + 1]
    assert "too large for pixel statistics" in capsys.readouterr().out


def test_without_a_held_out_split_there_is_nothing_to_measure_on(tmp_path: Path, model: str) -> None:
    dataset = write_dataset(tmp_path / "data", size=8, held_out=False)
    with pytest.raises(DatasetMissingError, match="no held-out split"):
        evaluate(config_of(dataset, model, tmp_path / "out"))
    with pytest.raises(DatasetMissingError, match="no dataset here"):
        evaluate(config_of(str(tmp_path / "nowhere"), model, tmp_path / "out"))


@pytest.mark.parametrize(
    "other",
    [
        {"num_classes": 7},
        {"num_classes": 10, "channels": 3},
        {"num_classes": 10, "image_size": (16, 16)},
        {"num_classes": 10, "image_size": (8, 16)},
    ],
    ids=["classes", "channels", "size", "width"],
)
def test_a_model_of_other_images_is_refused_before_any_is_made(
    digits: str, tmp_path: Path, other: dict[str, Any]
) -> None:
    model = write_model(tmp_path / "model", **other)
    with pytest.raises(ConfigError, match=r"^dataset: .* holds images of 8 x 8 pixels .*, 1 channels, 256 levels, 10"):
        evaluate(config_of(digits, model, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ("1023456789", "the same classes in another order .*: label 0 is '0' here, '1' there"),
        ("012345678x", "other classes .*: label 9 is '9' here, 'x' there"),
    ],
)
def test_labels_that_mean_something_else_are_refused(digits: str, tmp_path: Path, names: str, reason: str) -> None:
    model = write_model(tmp_path / "model", num_classes=10, class_names=tuple(names))
    config = config_of(digits, model, tmp_path / "out")
    for act in (evaluate, describe_plan):
        with pytest.raises(ConfigError, match=f"^dataset: .*{reason}"):
            act(config)  # type: ignore[operator]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", [0, 1])
def test_another_split_is_measured_with_a_warning(
    tmp_path: Path, digits: str, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model was trained on these images with split seed 0: with 1, held-out ones are among those it saw."""
    folder = tmp_path / "images"
    for k in range(12):
        path = folder / str(k % 2) / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(np.full((8, 8, 1), 20 * k, dtype=np.uint8)))
    manifests = {}
    for split_seed in (0, 1):
        dataset = str(tmp_path / f"dataset-{split_seed}")
        prepare = PrepareConfig(
            source=str(folder),
            dataset=dataset,
            image_size="8",
            channels=1,
            seed=split_seed,
            held_out_fraction=0.4,
        )
        prepare_source(prepare, open_source(prepare), map)
        manifests[split_seed] = load_manifest(open_store(dataset))
    model = write_model(tmp_path / "model", num_classes=2, num_timesteps=20, dataset_digest=manifests[0].digest)
    config = config_of(str(tmp_path / f"dataset-{seed}"), model, tmp_path / "out", images_per_class=4)
    found = run(dataclasses.replace(config, eps_images_per_t=2))
    warned = found.record.warnings
    assert len(warned) == seed
    assert capsys.readouterr().out.count("warning: ") == seed
    for warning in warned:
        assert "another split" in warning and all(one.digest[:16] in warning for one in manifests.values())
        assert f"warning: {warning}" in found.table() and ("warning", warning) in describe_plan(config)
    assert from_json(EvaluationRecord, Path(found.uri).read_bytes(), "it").warnings == warned


def test_an_unconditional_model_is_measured_on_a_labelled_dataset(digits: str, tmp_path: Path) -> None:
    """Its naive rival is one Gaussian for all, which is worse than one per class."""
    model = write_model(tmp_path / "model", num_classes=None)
    found = run(config_of(digits, model, tmp_path / "out", images_per_class=100))
    assert set(found.record.figures) == {"eps_mse", "frechet_pixels", *BOUND}
    assert 0.2 < found.figures["eps_mse_gaussian"] < 0.4


def test_figures_are_logged_to_the_registered_version(digits: str, model: str, tmp_path: Path) -> None:
    import mlflow

    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    files = resolve_model(model, tracking).files
    training = TrackingRun.open(tracking, new_run_key(), "training")
    version = register_model(training, files, "digits")
    training.finish()
    config = config_of(digits, "models:/digits@candidate", tmp_path / "out")
    config = dataclasses.replace(config, eps_images_per_t=2, max_bound_images=2, tracking=tracking)
    found = run(config)
    assert found.record.model == version.uri == "models:/digits/1"
    client = mlflow.MlflowClient(version.tracking_uri)
    stored = client.get_model_version("digits", "1")
    metrics = {metric.key: metric.value for metric in client.get_logged_model(stored.tags["ddpm.model_id"]).metrics}
    assert metrics == {f"eval/{name}": value for name, value in found.figures.items()}
    assert stored.tags["ddpm.evaluation"] == found.uri


def test_the_table_is_aligned_and_leaves_out_what_was_not_measured() -> None:
    record = EvaluationRecord(
        model="models:/digits/1",
        model_digest="0" * 64,
        spec_digest="1" * 64,
        dataset_digest="2" * 64,
        num_images=10,
        figures={
            "eps_mse": Figure(model=0.14123, real=0.13, gaussian=0.178, standard_error=0.0009),
            "frechet_pixels": Figure(model=0.25, real=0.1406, gaussian=None),
        },
    )
    evaluation = Evaluation(uri="/out/evaluation.json", record=record)
    lines = evaluation.table().splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "",
        "Frechet distance in pixels (real: train)",
        "held-out eps error (real: the model on train)",
    ]
    cells = [["model", "real", "Gaussian"], ["0.2500", "0.1406", "-"], ["0.1412 +- 0.0009", "0.1300", "0.1780"]]
    starts = [[line.rindex(cell) for cell in row] for line, row in zip(lines, cells, strict=True)]
    assert starts[0] == starts[1] == starts[2]
    assert json.loads(to_json(record))["figures"]["frechet_pixels"]["gaussian"] is None
    assert (
        evaluation.figures["eps_mse_standard_error"] == 0.0009 and "frechet_pixels_gaussian" not in evaluation.figures
    )


def test_the_plan_is_described_without_a_trace(digits: str, model: str, tmp_path: Path) -> None:
    rows = dict(describe_plan(config_of(digits, model, tmp_path / "out")))
    assert "1,500 training, 297 held-out" in rows["dataset"] and rows["eps error"].startswith("4,000 held-out")
    assert not (tmp_path / "out").exists()
