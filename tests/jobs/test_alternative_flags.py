"""Flags that say in another way how many images there are, in every job that makes some."""

from pathlib import Path

import pytest

from jobs import ema, evaluate, figures, sample
from jobs.compare import JOBS
from pipeline.generation.requests.requests import Generate, Inpaint
from tests.jobs.every_job import resolve

EVERY = [evaluate.JOB, figures.JOB, ema.JOBS["sweep"], JOBS["samplers"], JOBS["models"]]


@pytest.mark.parametrize("job", EVERY, ids=lambda job: job.section)
def test_a_flag_replaces_what_a_preset_or_a_file_says(job: sample.Job, tmp_path: Path) -> None:  # type: ignore[type-arg]
    file = tmp_path / "x.toml"
    file.write_text("[sample]\nimages_per_class = 12\n")
    for before in ([], ["--config", str(file)]):
        in_all = resolve(job, *before, "--sample.num-images", "9").sample
        assert (in_all.num_images, in_all.images_per_class) == (9, None)
        planned = resolve(job, *before, "--sample.request.label-plan=p.csv").sample
        assert (planned.num_images, planned.images_per_class) == (None, None)
        assert planned.request == Generate(label_plan="p.csv")
        each = resolve(job, *before, "--sample.images_per_class", "3").sample
        assert (each.num_images, each.images_per_class) == (None, 3)


def test_an_edit_has_no_label_plan_to_take_back() -> None:
    edit = ["--request.name", "inpaint", "--request.inputs", "x", "--request.mask", "centre"]
    made = resolve(sample.JOB, "--request.num-images", "4", *edit)
    assert isinstance(made.request, Inpaint) and (made.num_images, made.request.num_images) == (None, 4)


def test_studies_take_a_moderate_number_and_the_chosen_classes(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    for text, expected in {
        "images_per_class = 5_000": (1_000, None, Generate()),
        "num_images = 50_000": (None, 10_000, Generate()),
        "num_images = 70\nrequest = {classes = [3, 'cat']}": (None, 70, Generate(classes=(3, "cat"))),
        "request = {label_plan = 'p.csv'}": (None, None, Generate()),
        "images_per_class = 9\nrequest = {name = 'partial', inputs = 'x'}": (9, None, Generate()),
    }.items():
        file.write_text(f"[sample]\n{text}\n")
        made = resolve(JOBS["samplers"], "--config", str(file)).sample
        assert (made.images_per_class, made.num_images, made.request) == expected, text
