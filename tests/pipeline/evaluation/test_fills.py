"""Fills without a model: what is known stays, the rest is what the name says; an inpainting is measured beside them."""

from pathlib import Path

import numpy as np
import PIL.Image

from ddpm import DDIM
from pipeline.data.image_stream import LabelledImages, join_images
from pipeline.data.prepare import PrepareConfig, open_source, prepare_source
from pipeline.evaluation.evaluate import EvaluateConfig, evaluate
from pipeline.evaluation.fills import Fills
from pipeline.generation.requests.edit_inputs import EditRequest, resolve_request
from pipeline.generation.requests.requests import Inpaint
from pipeline.generation.sample_config import ImagesConfig
from pipeline.models.model_files import read_card, read_model_files
from pipeline.stores.storage import open_store
from tests.pipeline.edit_fixtures import write_editing_model
from tests.pipeline.runs_in_process import make_in_process
from tests.pipeline.small_datasets import make_dataset


def edit_of(tmp_path: Path, *, label: int | None = None, num_classes: int | None = 7) -> tuple[EditRequest, np.ndarray]:
    data = make_dataset(tmp_path / "data", [7, 5])
    model = write_editing_model(tmp_path / "model", num_classes=num_classes)
    request = Inpaint(inputs=data.uri, mask="left_half", label=label)
    edit = resolve_request(request, read_card(read_model_files(open_store(model))), "model")
    assert edit is not None
    return edit, data.images


def train(num_images: int = 40) -> list[LabelledImages]:
    images = np.random.default_rng(5).integers(0, 256, (num_images, 8, 8, 1), dtype=np.uint8)
    labels = np.arange(num_images) % 6  # none of class 6
    return [LabelledImages(images=images[rows], labels=labels[rows]) for rows in (slice(0, 13), slice(13, None))]


def test_each_fill_is_what_its_name_says(tmp_path: Path) -> None:
    edit, given = edit_of(tmp_path)
    fills = Fills.fit(edit, 12, train(), 7)
    real = join_images(train())
    assert real.labels is not None
    mean = real.images.astype(float).mean(0)
    by_class = [real.images[real.labels == k].astype(float).mean(0) if k < 6 else mean for k in range(7)]
    expected = {
        "grey_fill": np.full((12, 8, 8, 1), 128.0),
        "mean_fill": np.stack([mean] * 12),
        "class_mean_fill": np.stack([by_class[i % 7] for i in range(12)]),
    }
    assert list(fills.streams) == list(expected)
    for name, open_stream in fills.streams.items():
        made = join_images(list(open_stream()))
        assert made.labels is not None and made.labels.tolist() == [i % 7 for i in range(12)]
        assert (made.images[:, :, 4:] == given[:, :, 4:]).all()
        assert np.abs(made.images[:, :, :4] - expected[name][:, :, :4]).max() <= 0.5 + 1e-9


def test_a_label_for_all_chooses_the_mean(tmp_path: Path) -> None:
    edit, _ = edit_of(tmp_path, label=2)
    made = join_images(list(Fills.fit(edit, 5, train(), 7).streams["class_mean_fill"]()))
    assert made.labels is not None and made.labels.tolist() == [2] * 5
    assert (made.images[:, :, :4] == made.images[:1, :, :4]).all()


def test_without_classes_there_is_no_mean_of_a_class(tmp_path: Path) -> None:
    edit, given = edit_of(tmp_path, num_classes=None)
    fills = Fills.fit(edit, 12, train(), None)
    assert list(fills.streams) == ["grey_fill", "mean_fill"]
    assert fills.picture(given[:3])


def test_an_inpainting_is_evaluated_beside_its_fills(tmp_path: Path) -> None:
    """Nothing is hidden from the judge: an untrained model completes worse than the mean of the class."""
    prepared = PrepareConfig(source="digits", dataset=str(tmp_path / "digits"), shard_size=250)
    prepare_source(prepared, open_source(prepared), map)
    config = EvaluateConfig(
        dataset=prepared.dataset,
        sample=ImagesConfig(
            model=write_editing_model(tmp_path / "model", num_classes=10, class_names="0123456789"),
            output=str(tmp_path / "out"),
            sampler=DDIM(num_steps=2),
            request=Inpaint(
                inputs=prepared.dataset,
                split="held_out",
                mask="lower_half",
                num_images=60,
                num_resamples=1,
            ),
            shard_size=60,
            batch_size=60,
            contact_sheet_columns=5,
        ),
        eps_images_per_t=2,
        max_bound_images=4,
    )
    make_in_process(config.sampling)
    found = evaluate(config)
    figures = found.figures
    assert found.record.num_images == 60
    for metric in ("label_agreement", "frechet_pixels"):
        assert {f"{metric}{fill}" for fill in ("", "_grey_fill", "_mean_fill", "_class_mean_fill")} <= set(figures)
    assert figures["label_agreement_class_mean_fill"] > 0.95 > figures["label_agreement_grey_fill"]
    assert figures["label_agreement"] < figures["label_agreement_class_mean_fill"]
    assert "with that of the class" in found.table()
    picture = np.asarray(PIL.Image.open(Path(found.uri).with_name("completions.png")))[::4, ::4]
    assert picture.shape == (4 * 9 - 1, 5 * 9 - 1)
    rows = [picture[9 * k : 9 * k + 8] for k in range(4)]
    assert all((row[:4] == rows[0][:4]).all() for row in rows), "the known half, four times"
    assert (rows[1][4:, :8] == 128).all() and not (rows[2][4:] == rows[3][4:]).all()
