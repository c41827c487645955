"""The gallery's files: what is made again, what is not, and that nothing in them leads out of their folder."""

import dataclasses
import html.parser
import io
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from pipeline.data.image_stream import read_images
from pipeline.errors import ShardCorruptError
from pipeline.generation.sample import sample
from pipeline.generation.sample_job import resolve_job
from pipeline.generation.viewing import gallery_blocks
from pipeline.generation.viewing.gallery import CONTENTS_KEY, PAGE_KEY
from pipeline.generation.viewing.gallery_blocks import (
    BLOCK_IMAGES,
    SHEET_IMAGES,
    Block,
    Part,
    parse_script,
    plan_blocks,
    thumbnail_size,
)
from tests.pipeline.generation.test_sample import config_of
from tests.pipeline.generation.viewing.synthetic_runs import SPEC, SyntheticRun, make_run, shapes
from tests.pipeline.runs_in_process import make_in_process, run, snapshot
from tests.pipeline.tiny_models import write_model

PAGE_FOLDER = Path(gallery_blocks.__file__).with_name("gallery_page")
HOSTILE = "</script><img src=x onerror=alert(1)>\u2028'\"&<!--"


def contents_of(folder: Path) -> dict[str, object]:
    return parse_script((folder / CONTENTS_KEY).read_bytes())  # type: ignore[no-any-return]


def blocks_of(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "gallery").iterdir() if path.is_dir())


def thumbnails_of(folder: Path) -> dict[int, np.ndarray]:
    """The pixels of every thumbnail by id, cut from the sheets as the page does it."""
    contents = contents_of(folder)
    height, width = contents["thumbnail_size"]  # type: ignore[misc]
    found = {}
    for block in blocks_of(folder):
        data = parse_script((block / "block.js").read_bytes())
        ids = [first + k for first, count in data["ids"] for k in range(count)]
        order = sorted(range(len(ids)), key=lambda k: (data["labels"][k] if data["labels"] else 0, k))
        for place, k in enumerate(order):
            sheet, cell = divmod(place, SHEET_IMAGES)
            with PIL.Image.open(block / f"{sheet:02d}.webp") as picture:
                pixels = np.asarray(picture)
            row, column = divmod(cell, 16)
            found[ids[k]] = pixels[row * height : (row + 1) * height, column * width : (column + 1) * width]
    return found


# ---------------------------------------------------------------- what the page asks for


class _Addresses(html.parser.HTMLParser):
    """Every address of a page, every script and style in it, and its policy."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.faults: list[str] = []
        self.policy = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.addresses += [given[name] or "" for name in ("src", "href", "action", "srcset", "data") if name in given]
        self.faults += [f"<{tag} {name}>" for name in given if name.startswith("on") or name == "style"]
        if tag in ("base", "iframe", "object", "embed", "style") or (tag == "script" and "src" not in given):
            self.faults.append(f"<{tag}>")
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"] or ""


def test_the_page_names_nothing_outside_its_folder() -> None:
    page = _Addresses()
    page.feed((PAGE_FOLDER / "index.html").read_text())
    assert page.faults == []
    files = {f"gallery/{path.name}" for path in PAGE_FOLDER.iterdir()} - {"gallery/index.html"}
    assert set(page.addresses) - {"#images"} == files, "every file is used, and no other"
    for word in ("default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'", "base-uri 'none'"):
        assert word in page.policy
    assert "unsafe" not in page.policy and "*" not in page.policy and ":" not in page.policy


@pytest.mark.parametrize("name", sorted(path.name for path in PAGE_FOLDER.iterdir()))
def test_scripts_and_styles_hold_no_address_and_make_no_html(name: str) -> None:
    text = (PAGE_FOLDER / name).read_text().replace("http://www.w3.org/2000/svg", "")
    assert re.findall(r"https?://|//[a-z]+\.|url\(|@import|data:", text) == []
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "srcdoc"):
        assert way not in text
    assert len(text.splitlines()) <= 400


def test_names_of_classes_are_data_only(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 6, class_names=(HOSTILE, "dog", "bird"))
    run.write()
    for path in [tmp_path / "run" / PAGE_KEY, *(tmp_path / "run/gallery").rglob("*.js")]:
        if path.name != "contents.js":
            assert b"onerror" not in path.read_bytes(), path
    data = (tmp_path / "run" / CONTENTS_KEY).read_bytes()
    assert data.isascii(), "the end of a line in Unicode would end a string of old JavaScript"
    assert contents_of(tmp_path / "run")["classes"] == [HOSTILE, "dog", "bird"]


# ---------------------------------------------------------------- what it shows


@pytest.mark.parametrize("num_images", [1, 127, 128, 129, 350])
def test_every_image_is_there_to_the_pixel_under_its_id(tmp_path: Path, num_images: int) -> None:
    run = make_run(tmp_path / "run", num_images)
    assert run.write() == 1
    shown = thumbnails_of(run.folder)
    images = read_images(run.store, run.shards).images
    assert list(shown) == sorted(shown, key=lambda i: (i % 3, i)) and sorted(shown) == list(range(num_images))
    for sample_id, pixels in shown.items():
        assert (pixels == np.broadcast_to(images[sample_id], (8, 8, 3))).all()
    contents = contents_of(run.folder)
    (block,) = contents["blocks"]  # type: ignore[misc]
    assert (block["first"], block["last"], block["count"]) == (0, num_images - 1, num_images)
    assert block["counts"] == [sum(i % 3 == label for i in range(num_images)) for label in range(3)]


def test_images_without_labels_stand_in_the_order_of_their_ids(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 130, class_names=())
    run.write()
    assert list(thumbnails_of(run.folder)) == list(range(130))
    assert contents_of(run.folder)["classes"] == [] and contents_of(run.folder)["blocks"][0]["counts"] is None  # type: ignore[index]


@pytest.mark.parametrize(
    ("size", "thumbnail"), [((64, 64), (64, 64)), ((24, 40), (24, 40)), ((192, 256), (48, 64)), ((1000, 3), (64, 1))]
)
def test_thumbnails_have_at_most_64_pixels_and_the_images_proportions(
    size: tuple[int, int], thumbnail: tuple[int, int]
) -> None:
    assert thumbnail_size(size) == thumbnail


def test_of_larger_images_the_page_learns_where_their_bytes_are(tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, image_size=(96, 128), channels=3, shard_size=4)
    run = make_run(tmp_path / "run", 6, spec=spec, draw=shapes(spec))
    run.write()
    data = parse_script((blocks_of(run.folder)[0] / "block.js").read_bytes())
    images = read_images(run.store, run.shards).images
    keys = [key for key, count in data["shards"] for _ in range(count)]
    thumbnails = thumbnails_of(run.folder)
    for sample_id, (key, (offset, length)) in enumerate(zip(keys, data["places"], strict=True)):
        png = (run.folder / key).read_bytes()[offset : offset + length]
        with PIL.Image.open(io.BytesIO(png)) as picture:
            assert (np.asarray(picture) == images[sample_id]).all()
            reduced = np.asarray(picture.resize((64, 48)), dtype=float)
        assert abs(thumbnails[sample_id] - reduced).mean() < 8, "with loss, but this image"


# ---------------------------------------------------------------- what is made again


def test_a_second_time_nothing_is_written(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 250)
    assert run.write() == 1
    before = snapshot(run.folder)
    assert run.write() == 0
    assert snapshot(run.folder) == before


def test_elsewhere_it_has_equal_bytes_but_for_where_it_is(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_run(tmp_path / name, 250).write()
    files = {
        name: {str(p.relative_to(tmp_path / name)): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        for name in ("a", "b")
    }
    assert files["a"].keys() == files["b"].keys()
    assert [key for key in files["a"] if files["a"][key] != files["b"][key]] == [CONTENTS_KEY]


@pytest.mark.parametrize("lost", ["00.webp", "block.js", "contents.js"])
def test_what_was_lost_or_not_finished_is_made_again(tmp_path: Path, lost: str) -> None:
    run = make_run(tmp_path / "run", 250)
    run.write()
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    next((run.folder / "gallery").rglob(lost)).unlink()
    assert run.write() == 1
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before


def small_blocks(monkeypatch: pytest.MonkeyPatch, num_images: int) -> None:
    monkeypatch.setattr(gallery_blocks, "BLOCK_IMAGES", num_images)


def test_a_run_that_grows_changes_its_last_group_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, 200)  # two shards of 100
    grown = make_run(tmp_path / "run", 700)
    assert grown.write(shards=grown.shards[:3]) == 2
    first, second = (path.name for path in blocks_of(grown.folder))
    assert grown.write() == 3
    names = [path.name for path in blocks_of(grown.folder)]
    assert names[0] == first and second not in names and len(names) == 4
    assert sorted(thumbnails_of(grown.folder)) == list(range(700))


def test_removed_images_leave_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, 200)
    whole = make_run(tmp_path / "run", 600)
    assert whole.write() == 3
    names = [path.name for path in blocks_of(whole.folder)]
    removed = frozenset({250, 251, *range(300, 400)})
    less = make_run(tmp_path / "run", 600, without=removed)
    assert len(less.shards) == 5 and less.write() == 2, "the first block stays"
    left = blocks_of(less.folder)
    assert left[0].name == names[0] and not set(names[1:]) & {path.name for path in left}
    assert sorted(thumbnails_of(less.folder)) == sorted(set(range(600)) - removed)
    data = parse_script((left[1] / "block.js").read_bytes())
    assert data["ids"][:2] == [[200, 50], [252, 48]]


def test_it_covers_the_first_images_and_says_how_many_there_are(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 450)
    asked: list[int] = []

    def shards() -> object:
        for index, shard in enumerate(run.shards):
            asked.append(index)
            yield shard

    run.write(150, shards=shards())  # type: ignore[arg-type]
    assert sorted(thumbnails_of(run.folder)) == list(range(150))
    contents = contents_of(run.folder)
    assert contents["num_images"] == 450 and contents["blocks"][0]["count"] == 150  # type: ignore[index]
    run.write(0)
    assert not (run.folder / PAGE_KEY).exists() and not list(run.folder.glob("gallery/**/*.*")), "0: none"


def test_a_damaged_shard_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 50)
    path = run.folder / run.shards[0].key
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ShardCorruptError, match="sha256"):
        run.write()


# ---------------------------------------------------------------- blocks


def records(run: SyntheticRun, sizes: list[int]) -> list[object]:
    return [dataclasses.replace(run.shards[0], key=f"{k}.tar", num_samples=size) for k, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "shard_size", "limit", "expected"),
    [
        ([500] * 40, 500, 10**6, [8000, 8000, 4000]),
        ([500] * 40, 500, 8250, [8000, 250]),
        ([20_000, 20_000, 5], 20_000, 10**6, [8192, 8192, 3616, 8192, 8192, 3616, 5]),
        ([20_000, 20_000], 20_000, 20_001, [8192, 8192, 3616, 1]),
        ([BLOCK_IMAGES, BLOCK_IMAGES], BLOCK_IMAGES, 10**6, [BLOCK_IMAGES, BLOCK_IMAGES]),
        ([3000, 2999, 1], 3000, 10**6, [5999, 1]),
        ([500], 500, 0, []),
    ],
)
def test_blocks_end_with_groups_of_shards(
    tmp_path: Path, sizes: list[int], shard_size: int, limit: int, expected: list[int]
) -> None:
    run = make_run(tmp_path / "run", 1)
    shards = records(run, sizes)
    blocks = list(plan_blocks(shards, shard_size, limit))  # type: ignore[arg-type]
    assert [block.num_images for block in blocks] == expected
    assert [block.index for block in blocks] == list(range(len(expected)))
    covered = [(part.shard.key, k) for block in blocks for part in block.parts for k in range(part.start, part.stop)]
    assert covered == [(f"{n}.tar", k) for n, size in enumerate(sizes) for k in range(size)][:limit]


def test_a_run_of_ten_million_shards_is_not_listed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 1)
    endless = (dataclasses.replace(run.shards[0], num_samples=100) for _ in range(10**7))
    blocks = list(plan_blocks(endless, 100, 1_000_000))
    assert sum(block.num_images for block in blocks) == 1_000_000 and len(blocks) == 124


def test_a_blocks_name_is_a_digest_of_what_it_is_made_of(tmp_path: Path) -> None:
    shard = make_run(tmp_path / "run", 10).shards[0]
    other = dataclasses.replace(shard, sha256="ab" * 32)
    names = {
        Block(index=index, parts=(Part(shard=made_of, start=start, stop=stop),)).name
        for index, made_of, start, stop in [(0, shard, 0, 10), (0, other, 0, 10), (0, shard, 1, 10), (1, shard, 0, 10)]
    }
    assert len(names) == 4


# ---------------------------------------------------------------- in a run


def test_sample_makes_it(tmp_path: Path) -> None:
    names = ("cat", HOSTILE, "bird")
    model = write_model(tmp_path / "model", answers=True, class_names=names, dataset_digest="d1" * 32)
    result, images = run(config_of(model, tmp_path / "out"))
    folder = Path(result.store.uri)
    assert result.gallery_uri == str(folder / PAGE_KEY) and (folder / PAGE_KEY).exists()
    shown = thumbnails_of(folder)
    assert all((shown[i] == np.broadcast_to(images.images[i], (8, 8, 3))).all() for i in range(60))
    contents = contents_of(folder)
    assert contents["classes"] == list(names) and contents["command"] == (
        f"python jobs/output.py remake {folder} --ids "
    )
    lineage = dict(contents["lineage"])  # type: ignore[call-overload]
    assert lineage["Model"] == model and lineage["Model digest"] == result.manifest.spec.model_digest
    assert lineage["Dataset digest"] == "d1" * 32 and lineage["Spec digest"] == result.manifest.spec_digest
    assert lineage["Sampler"] == "ddim, 4 steps, revision 1" and lineage["Seed"] == "0"


def test_no_gallery_where_none_is_wanted(tmp_path: Path) -> None:
    config = config_of(write_model(tmp_path / "model"), tmp_path / "out", gallery_images=0)
    result, _ = run(config)
    assert result.gallery_uri is None
    assert not (Path(result.store.uri) / PAGE_KEY).exists() and not (Path(result.store.uri) / "gallery").exists()


def test_that_it_cannot_be_made_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file where the folder should be."""
    config = config_of(write_model(tmp_path / "model"), tmp_path / "out")
    make_in_process(config)
    folder = Path(resolve_job(config).store.uri)
    (folder / "gallery").write_text("in the way")
    result = sample(config)
    assert result.gallery_uri is None and result.manifest.num_images == 60
    lines = [line for line in capsys.readouterr().out.splitlines() if "gallery" in line]
    assert len(lines) == 1 and lines[0].startswith("the gallery could not be made (")
