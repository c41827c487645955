"""Counts, chosen classes and label plans end to end: the right labels and noise, the same bytes in every attempt."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm import DDIM, SAMPLERS, Sampler, generate, x_0_to_images
from jobs.cli import run_job
from jobs.sample import JOB
from pipeline.data.image_stream import LabelledImages
from pipeline.data.pictures import class_grid, image_grid
from pipeline.data.shards import read_shard
from pipeline.errors import ConfigError, OutputExistsError
from pipeline.generation.making.shard_maker import ImageMaker
from pipeline.generation.output.manifest import read_shards
from pipeline.generation.requests.requests import AnyRequest, Generate, Partial
from pipeline.generation.sample import SampleResult, sample
from pipeline.generation.sample_config import SampleConfig
from pipeline.generation.sample_job import resolve_job
from pipeline.generation.sample_preview import describe_plan
from pipeline.generation.spec.labels import IdModuloChosenClasses, IdModuloClasses, PlannedLabels
from pipeline.models.model_files import load_model, read_model_files
from pipeline.stores.storage import open_store
from tests.fixtures_s3 import S3Server
from tests.pipeline.edit_fixtures import write_editing_model
from tests.pipeline.runs_in_process import digests, make_in_process, run, snapshot
from tests.pipeline.tiny_models import write_model

NOISE = [4, 1, 4, 30, 2, 5, 6, 0, 8]
LABELS = ["b", "6", "b", "0", "g", "a", "f", "2", "c"]
CLASSES = [1, 6, 1, 0, 6, 0, 5, 2, 2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its classes are a to g."""
    return write_editing_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """Nine rows; every second one has an id of the caller's."""
    file = tmp_path / "plan.csv"
    rows = [f"{label},{noise},{'' if i % 2 else f'mine-{i}'}" for i, (label, noise) in enumerate(zip(LABELS, NOISE))]
    file.write_text("label,noise_id,id\n" + "\n".join(rows) + "\n")
    return file


def config_of(model: str, output: Path, request: AnyRequest | None = None, **changes: Any) -> SampleConfig:
    values = {"sampler": DDIM(num_steps=3), "shard_size": 6, "batch_size": 4, "num_actors": 1, "seed": 3}
    return SampleConfig(model=model, output=str(output), request=request or Generate(), **{**values, **changes})


def labels_of(made: LabelledImages) -> list[int]:
    assert made.labels is not None
    return made.labels.tolist()


def metas(result: SampleResult) -> list[dict[str, Any]]:
    return [
        sample.meta
        for shard in read_shards(result.store, result.manifest.parts)
        for sample in read_shard(result.store, shard)
    ]


# ---------------------------------------------------------------- how many


@pytest.mark.parametrize(
    ("changes", "num_images"),
    [
        ({"num_images": 9}, 9),
        ({"images_per_class": 2}, 14),
        ({}, 700),
        ({"num_images": 9, "request": Generate(classes=("g", "a"))}, 9),
        ({"images_per_class": 5, "request": Generate(classes=("g", "a"))}, 10),
        ({"request": Generate(classes=("g",))}, 100),
    ],
)
def test_a_number_in_all_or_for_each_class(
    model: str, tmp_path: Path, changes: dict[str, Any], num_images: int
) -> None:
    job = resolve_job(config_of(model, tmp_path / "out", **changes))
    assert (job.num_asked, job.plan.num_images) == (num_images, num_images)


def test_the_number_is_no_part_of_the_spec(model: str, tmp_path: Path) -> None:
    for request in (Generate(), Generate(classes=("g", "a"))):
        specs = [
            resolve_job(config_of(model, tmp_path, request, **way)).spec
            for way in ({"num_images": 9}, {"images_per_class": 5}, {})
        ]
        assert specs[0] == specs[1] == specs[2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_images": 5, "images_per_class": 2}, "^num_images: goes without .*images_per_class 2 and num_images 5"),
        ({"num_images": 5, "request": Generate(label_plan="p.csv")}, "^num_images: the rows of p.csv say .*got 5"),
        ({"images_per_class": 5, "request": Generate(label_plan="p.csv")}, "^images_per_class: the rows of p.csv say"),
        ({"num_images": 5, "request": Partial(inputs="x")}, "^num_images: an edit .*got 5; .*request.num_images"),
        ({"num_images": 0}, "^num_images: must be at least 1, got 0"),
    ],
)
def test_two_answers_to_how_many_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SampleConfig(model="m", output="o", **changes)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"classes": ("a",), "label_plan": "p.csv"}, "^classes: a label plan says each image's class"),
        ({"classes": ("",)}, "^classes: must not be empty"),
        ({"label_plan": "p.txt"}, r"^label_plan: must be a file that ends in .csv, .jsonl, .ndjson, got 'p.txt'"),
        ({"label_plan": ""}, "^label_plan: must not be empty"),
        ({"label_plan": "ftp://h/p.csv"}, "^label_plan: ftp: is none of the kinds"),
    ],
)
def test_requests_that_make_no_sense_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Generate(**values)


def test_without_classes_there_are_numbers_only(tmp_path: Path) -> None:
    plain = write_model(tmp_path / "model", num_classes=None)
    _, made = run(config_of(plain, tmp_path / "out", num_images=5))
    assert len(made) == 5 and made.labels is None
    (tmp_path / "p.csv").write_text("label\n0\n")
    for request in (Generate(classes=("0",)), Generate(label_plan=str(tmp_path / "p.csv"))):
        with pytest.raises(ConfigError, match=r"^request\.(classes|label_plan): .*/model has no classes; leave it out"):
            sample(config_of(plain, tmp_path / "no", request))
    assert not (tmp_path / "no").exists()


# ---------------------------------------------------------------- which classes


def test_chosen_classes_take_turns_and_their_run_grows(model: str, tmp_path: Path) -> None:
    config = config_of(model, tmp_path / "out", Generate(classes=("g", 0, "c")), num_images=12, contact_sheet_columns=4)
    few, made = run(config)
    assert labels_of(made) == [6, 0, 2] * 4
    assert few.manifest.spec.label_rule == IdModuloChosenClasses(classes=(6, 0, 2))
    assert few.store.read("contact_sheet.png") == class_grid(made.images, 3, 4)
    more, grown = run(dataclasses.replace(config, num_images=20))
    assert more.store.uri == few.store.uri and digests(more).items() >= digests(few).items() and len(grown) == 20
    assert (grown.images[:12] == made.images).all() and labels_of(grown) == ([6, 0, 2] * 7)[:20]
    with pytest.raises(OutputExistsError, match=r"shard 3 .*ask for 20 images"):
        sample(dataclasses.replace(config, num_images=30))


def test_a_choice_of_all_classes_is_the_run_of_all(model: str, tmp_path: Path) -> None:
    every = resolve_job(config_of(model, tmp_path / "out")).spec
    assert resolve_job(config_of(model, tmp_path / "out", Generate(classes=("a,b,c,d,e,f,g",)))).spec == every
    other = resolve_job(config_of(model, tmp_path / "out", Generate(classes=("b,a,c,d,e,f,g",)))).spec
    assert every.label_rule == IdModuloClasses() and other.digest != every.digest


# ---------------------------------------------------------------- label plans


def test_a_plan_decides_labels_and_noise_and_keeps_the_callers_ids(model: str, tmp_path: Path, plan: Path) -> None:
    config = config_of(model, tmp_path / "out", Generate(label_plan=str(plan)), contact_sheet_columns=3)
    result, made = run(config)
    assert labels_of(made) == CLASSES and result.num_asked == 9 and not result.is_independent
    sha256 = hashlib.sha256(plan.read_bytes()).hexdigest()
    assert result.manifest.spec.label_rule == PlannedLabels(file_sha256=sha256, num_rows=9)
    for i, meta in enumerate(metas(result)):
        mine = {"id": "" if i % 2 else f"mine-{i}"}
        assert {key: meta[key] for key in meta.keys() & {"sample_id", "label", "noise_id", "id"}} == {
            "sample_id": i, "label": CLASSES[i], "noise_id": NOISE[i], **mine
        }  # fmt: skip
    assert (made.images[0] == made.images[2]).all(), "one label, one noise"
    assert result.store.read("contact_sheet.png") == image_grid(made.images, 3)
    # By hand, the batches of ids 0 to 3 and of 6 to 9, whose last is the first row again.
    diffusion = load_model(read_model_files(open_store(model)))[1]
    for ids, rows in ((range(4), [0, 1, 2, 3]), (range(6, 9), [6, 7, 8, 0])):
        x_0 = generate(
            diffusion,
            DDIM(num_steps=3),
            seed=3,
            sample_ids=torch.tensor([NOISE[row] for row in rows]),
            label=torch.tensor([CLASSES[row] for row in rows]),
        )
        assert (x_0_to_images(x_0).numpy()[: len(ids)] == made.images[ids.start : ids.stop]).all()
    before = snapshot(tmp_path / "out")
    assert sample(config).num_made == 0 and snapshot(tmp_path / "out") == before


def test_a_plan_of_the_default_order_makes_the_default_images(model: str, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text("".join(f'{{"label": {i % 7}}}\n' for i in range(12)))
    planned, images = run(config_of(model, tmp_path / "out", Generate(label_plan=str(file))))
    plain, expected = run(config_of(model, tmp_path / "out", num_images=12))
    assert planned.is_independent and planned.store.uri != plain.store.uri
    assert (images.images == expected.images).all() and labels_of(images) == labels_of(expected)


def test_an_altered_file_is_another_run(model: str, tmp_path: Path, plan: Path) -> None:
    config = config_of(model, tmp_path / "out", Generate(label_plan=str(plan)))
    first = resolve_job(config)
    plan.write_text(plan.read_text() + "a,3,\n")
    second = resolve_job(config)
    assert (first.num_asked, second.num_asked) == (9, 10)
    assert first.spec.digest != second.spec.digest and first.store.uri != second.store.uri
    moved = tmp_path / "moved.csv"
    moved.write_bytes(plan.read_bytes())
    again = resolve_job(config_of(model, tmp_path / "out", Generate(label_plan=str(moved))))
    assert again.spec == second.spec, "where it lies is no part of it"


def test_a_plan_is_read_from_s3(model: str, tmp_path: Path, plan: Path, s3_server: S3Server) -> None:
    open_store(s3_server.uri).write("plans/pets.csv", plan.read_bytes())
    uri = f"{s3_server.uri}/plans/pets.csv"
    assert resolve_job(config_of(model, tmp_path, Generate(label_plan=uri))).num_asked == 9
    with pytest.raises(ConfigError, match=r"^request\.label_plan: there is no such file, got s3://.*/none\.csv"):
        resolve_job(config_of(model, tmp_path, Generate(label_plan=f"{s3_server.uri}/none.csv")))


# ---------------------------------------------------------------- all samplers, and the pool

GUIDED = {"guidance_scale": 2.0, "guidance_rescale": 0.5, "guidance_interval": (0.1, 0.9)}


@pytest.mark.parametrize("guided", ["plain", "guidance", "autoguidance"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_takes_labels_and_noise(name: str, guided: str, model: str, tmp_path: Path, plan: Path) -> None:
    options = {} if guided == "plain" else GUIDED
    sampler: Sampler = dataclasses.replace(SAMPLERS[name](num_steps=3), **options)
    guide = write_editing_model(tmp_path / "guide", seed=9) if guided == "autoguidance" else None
    diffusion = load_model(read_model_files(open_store(model)))[1]
    weaker = None if guide is None else load_model(read_model_files(open_store(guide)))[1]
    for request, noise, labels in (
        (Generate(label_plan=str(plan)), NOISE[2:6], CLASSES[2:6]),
        (Generate(classes=("e", "b")), [2, 3, 4, 5], [4, 1, 4, 1]),
    ):
        job = resolve_job(config_of(model, tmp_path / "out", request, sampler=sampler, guide_model=guide))
        made, found = ImageMaker(job.ingredients, job.spec, torch.device("cpu"))(job.spec, range(2, 6))
        expected = generate(
            diffusion, sampler, seed=3, sample_ids=torch.tensor(noise), label=torch.tensor(labels), guide=weaker
        )
        assert found == labels and torch.equal(made, expected)


@pytest.mark.usefixtures("ray_session")
def test_the_plan_travels_to_the_actors(model: str, tmp_path: Path, plan: Path) -> None:
    config = config_of(model, tmp_path / "out", Generate(label_plan=str(plan)))
    result = sample(config)
    assert result.num_made == 9
    here = make_in_process(dataclasses.replace(config, output=str(tmp_path / "here")))
    assert digests(result) == here


# ---------------------------------------------------------------- the command


def ask(tmp_path: Path, model: str, *flags: str, file: str = "") -> int:
    project = tmp_path / "project.toml"
    project.write_text(f'[sample]\nmodel = "{model}"\noutput = "{tmp_path}/out"\n{file}')
    return run_job(JOB, ["--config", str(project), *flags, "--dry-run"])


@pytest.mark.parametrize(
    ("file", "flags", "words"),
    [
        ("", ["--num-images", "9"], "9, of which 9"),
        ("images_per_class = 4\n", ["--num-images=9"], "9, of which 9"),
        ("num_images = 4\n", [], "4, of which 4"),
        ("num_images = 4\n", ["--images-per-class", "2"], "14, of which 14"),
        ("num_images = 4\n", ["--num-images", "None"], "700, of which 700"),
        ("num_images = 4\n", ["--request.label-plan", "{plan}"], "9, of which 9"),
        ('request = {{label_plan = "{plan}"}}\n', [], "9 rows of "),
        ('request = {{label_plan = "{plan}"}}\n', ["--num-images", "5"], "5, of which 5"),
        ('request = {{classes = ["g", 0]}}\n', ["--images-per-class", "2"], "4, of which 4"),
        ('request = {{classes = ["g", 0]}}\n', [], "g, a, in turn"),
        ("", ["--request.classes", "3,6"], "d, g, in turn"),
        ("", ["--request.classes", "d", "g"], "d, g, in turn"),
    ],
)
def test_what_is_said_last_counts(
    file: str, flags: list[str], words: str, model: str, tmp_path: Path, plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over the preset's images_per_class, and a file's, which flags replace."""
    flags = [flag.format(plan=plan) for flag in flags]
    assert ask(tmp_path, model, *flags, file=file.format(plan=plan)) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert words in printed and "images  " in printed
    (tmp_path / "again.toml").write_text(printed)
    assert run_job(JOB, ["--config", str(tmp_path / "again.toml"), "--dry-run"]) == 0
    assert capsys.readouterr().out == printed, "the plan is a file that does the same"


@pytest.mark.parametrize(
    ("file", "flags", "words"),
    [
        ("", ["--num-images", "9", "--images-per-class", "2"], "num_images: goes without images_per_class, got "),
        ("num_images = 4\nimages_per_class = 2\n", [], "project.toml: sample.num_images: goes without"),
        ("", ["--request.label-plan", "{plan}", "--num-images", "9"], "num_images: the rows of {plan} say how many"),
        ("", ["--request.classes", "zebra"], "request.classes: {model} has the classes a, b, c, d, e, ... (or 0 to 6)"),
        ("", ["--request.classes", "1,b"], "request.classes: each class once, got number 1 twice, as '1' and as 'b'"),
        ("", ["--request.label-plan", "{plan}x.csv"], "request.label_plan: there is no such file, got {plan}x.csv"),
        ("", ["--request.label-plan", "{plan}.txt"], "request.label_plan: must be a file that ends in .csv"),
        ("", ["--request.label-plan", "{bad}"], "request.label_plan: {bad}, line 3: label: must be one of a, b"),
        ("", ["--request.name", "partial", "--request.classes", "a"], "request.classes: is an option of generate"),
        ('request = {{classes = [1.5]}}\n', [], "project.toml: sample.request.classes.0: "),
        ('request = {{label_plan = "p.txt"}}\n', [], "project.toml: sample.request.label_plan: must be a file that"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_nothing_is_written(
    file: str, flags: list[str], words: str, model: str, tmp_path: Path, plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"label": 1}\n\n{"label": "zebra"}\n')
    names = {"plan": plan, "model": model, "bad": bad}
    assert ask(tmp_path, model, *(flag.format(**names) for flag in flags), file=file.format(**names)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words.format(**names) in line, line
    assert not (tmp_path / "out").exists()


def test_the_plan_of_a_run_counts_whole_images(model: str, tmp_path: Path, plan: Path) -> None:
    told = dict(describe_plan(config_of(model, tmp_path / "out", Generate(label_plan=str(plan)))))
    assert told["images"] == "9, of which 9 are missing" and told["labels"].startswith(f"9 rows of {plan}, sha256 ")
