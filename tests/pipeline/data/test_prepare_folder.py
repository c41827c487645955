"""A folder of odd files through prepare: options of the folder and of the images, what is said, what is left out."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from pipeline.data.image_input import RESIZE_MODES, load_image
from pipeline.data.manifest import DatasetManifest
from pipeline.data.prepare import PrepareConfig, describe_plan, open_source, prepare, prepare_source
from pipeline.data.shards import decode_png, read_shard
from pipeline.errors import UndecodableImageError
from pipeline.stores.storage import open_store
from tests.pipeline.data.image_files import jpeg_cases, other_cases, png_cases, tiff_cases
from tests.pipeline.data.image_files.test_table import MAX_PIXELS


def config_of(source: Path, output: Path, **changes: object) -> PrepareConfig:
    options: dict[str, object] = {"image_size": 8, "shard_size": 100, "held_out_fraction": 0.0} | changes
    return PrepareConfig(source=str(source), dataset=str(output), **options)  # type: ignore[arg-type]


def prepare_here(config: PrepareConfig) -> DatasetManifest:
    return prepare_source(config, open_source(config), map)


def pixels_by_name(folder: Path, manifest: DatasetManifest) -> dict[str, np.ndarray]:
    store = open_store(str(folder))
    samples = [sample for record in manifest.splits["train"].shards for sample in read_shard(store, record)]
    return {sample.meta["source"]: decode_png(sample.image) for sample in samples}


def write_images(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(folder / name)
    return folder


def test_the_table_of_odd_files_through_prepare(tmp_path: Path) -> None:
    """Those that must be refused are left out by name and reason, all others are in the dataset; nothing crashes."""
    made = {
        f"{number:04d}{ending}": case
        for ending, cases in ((".png", png_cases), (".jpg", jpeg_cases), (".Tif", tiff_cases), (".JFIF", other_cases))
        for number, case in enumerate(cases.cases().values())
    }
    source = write_images(tmp_path / "source")
    for name, case in made.items():
        (source / "cat" / name).write_bytes(case.data)
    refused = {f"cat/{name}" for name, case in made.items() if case.picture is None}
    config = config_of(source, tmp_path / "out", max_pixels=MAX_PIXELS, max_quarantined=len(refused))
    manifest = prepare_here(config)
    reasons = json.loads((tmp_path / "out/quarantine.json").read_text())["reasons"]
    assert set(reasons) == refused and len(refused) > 100 and all(reasons.values())
    shown = {f"cat/{name}" for name, case in made.items() if case.picture is not None}
    assert set(pixels_by_name(tmp_path / "out", manifest)) == {*shown, "cat/1.png", "cat/2.png", "dog/1.png"}


def test_what_is_found_is_said_by_the_run_itself(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_images(tmp_path / "source")
    for name in ("cat/a.HEIC", "cat/n.txt", "dog/Thumbs.db", "raw/x.png"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"x")
    (source / "dog/link.png").symlink_to(tmp_path / "nowhere")
    config = config_of(source, tmp_path / "out", exclude=("raw",))
    findings = [
        ("class", "cat: 2 images"), ("class", "dog: 1 images"), ("ignored", "2 files by their names: 1 .heic, 1 .txt"),
        ("attention", "1 .heic: images of kinds that are not read; convert it to PNG or JPEG"),
        ("passed over", "1 files of systems: 1 Thumbs.db"), ("excluded", "1 files by 'raw'"),
        ("left out", "1, each of which leads nowhere: dog/link.png"),
    ]  # fmt: skip
    assert describe_plan(config)[-len(findings) :] == findings
    prepare(config)
    said = capsys.readouterr().out.splitlines()
    assert said[: len(findings)] == [f"{name}: {value}" for name, value in findings]


def test_every_resize_mode_gives_the_whole_dataset_its_pixels(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source")
    digests = set()
    for mode in RESIZE_MODES:
        manifest = prepare_here(config_of(source, tmp_path / mode, resize_mode=mode))
        digests.add(manifest.digest)
        for name, pixels in pixels_by_name(tmp_path / mode, manifest).items():
            data = (source / name).read_bytes()
            expected = load_image(data, image_size=(8, 8), channels=3, max_pixels=1000, resize_mode=mode)
            assert np.array_equal(pixels, expected)
    assert len(digests) == 3


def test_small_images_are_left_out(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source")
    PIL.Image.new("RGB", (99, 12)).save(source / "dog/2.png")
    assert prepare_here(config_of(source, tmp_path / "all", min_size=12)).num_quarantined == 0
    PIL.Image.new("RGB", (99, 11)).save(source / "dog/2.png")
    with pytest.raises(
        UndecodableImageError, match=r"dog/2\.png: .*99 x 11 pixels: the shorter side is below min_size"
    ):
        prepare_here(config_of(source, tmp_path / "out", min_size=12))
    manifest = prepare_here(config_of(source, tmp_path / "out", min_size=12, max_quarantined=1))
    assert manifest.num_quarantined == 1 and "dog/2.png" not in pixels_by_name(tmp_path / "out", manifest)


def test_an_empty_class_that_is_allowed_keeps_its_number(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source")
    (source / "cow").mkdir()
    (source / "cow/1.heic").write_bytes(b"x")
    manifest = prepare_here(config_of(source, tmp_path / "out", allow_empty_classes=True))
    assert manifest.class_names == ("cat", "cow", "dog")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"min_size": 0}, "min_size"),
        ({"exclude": ("a", "")}, "exclude"),
        ({"anonymous_source": True}, "anonymous_source"),
    ],
)
def test_impossible_values_name_their_field(changes: dict[str, object], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: .*; "):
        config_of(Path("x"), Path("out"), **changes)
    PrepareConfig(source="s3://b/x", dataset="out", image_size=8, anonymous_source=True)
