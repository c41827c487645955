"""What is an image, a class and a split of a folder, by names alone; what is left out is said, and no class is lost."""

import os
import unicodedata
from pathlib import Path

import pytest

from pipeline.data.folder_listing import FolderListing, list_folder
from pipeline.errors import ConfigError, DatasetMissingError
from pipeline.stores.storage import open_store
from tests.fixtures_s3 import S3Server


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")  # no file is read
    return folder


def listed(folder: Path | str, *exclude: str, allow_empty_classes: bool = False) -> FolderListing:
    return list_folder(open_store(str(folder)), exclude=exclude, allow_empty_classes=allow_empty_classes)


def said(listing: FolderListing, name: str) -> list[str]:
    return [value for what, value in listing.findings if what == name]


def labels(listing: FolderListing, split: str | None = None) -> dict[str, str]:
    """The class of each key; "" without classes."""
    images = listing.images[split]
    assert len(images.keys) == len(images.labels) == len(images.sizes_bytes) and set(images.sizes_bytes) <= {1}
    names = (*listing.class_names, "")
    return {key: names[label] for key, label in zip(images.keys, images.labels, strict=True)}


def refusal(folder: Path, *exclude: str) -> str:
    with pytest.raises(ConfigError) as caught:
        listed(folder, *exclude)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    return str(caught.value)


# ---------------------------------------------------------------- images


@pytest.mark.parametrize(
    "name",
    ["a.png", "A.PNG", "a.jpg", "a.JPEG", "a.jfif", "a.jpe", "a.webp", "a.bmp", "a.tif", "a.TIFF", "a.gif", "a.avif",
     "a.tar.png", "a.png.jpg", "a.txt.png", "a b.png", "ä.png", "..png", "x/y/z.png"],
)  # fmt: skip
def test_names_of_images(tmp_path: Path, name: str) -> None:
    is_hidden = name.startswith(".")
    write(tmp_path, name, "x/sure.png") if "/" in name else write(tmp_path, name, "sure.png")
    assert (name in labels(listed(tmp_path))) is not is_hidden


@pytest.mark.parametrize("name", ["a.heic", "a.svg", "a.txt", "a.png.txt", "a.png~", "png", "a.", "a.png.bak", "a.npy"])
def test_other_names_are_ignored_and_counted(tmp_path: Path, name: str) -> None:
    listing = listed(write(tmp_path, name, "sure.png"))
    assert list(labels(listing)) == ["sure.png"] and listing.num_ignored == 1


def test_what_is_ignored_is_said_by_endings(tmp_path: Path) -> None:
    names = [*(f"{n}.txt" for n in range(4)), "A.HEIC", "b.heic", "c.svg", "README", *(f"{n}.d{n}" for n in range(5))]
    listing = listed(write(tmp_path, "a.png", *names))
    assert listing.num_ignored == 13
    assert said(listing, "ignored") == ["13 files by their names: 4 .txt, 2 .heic, 1 .d0, 1 .d1, 1 .d2 and 4 more"]
    assert said(listing, "attention") == [
        "2 .heic, 1 .svg: images of kinds that are not read; convert it to PNG or JPEG"
    ]
    with pytest.raises(DatasetMissingError) as caught:
        listed(write(tmp_path / "no", "a.heic", "b.heic", "c"))
    assert "(3 files, none of them .png" in str(caught.value) and "2 .heic, 1 without an ending" in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["@eaDir/a.png", "cat/@eaDir/a.png@SynoPhoto/x.jpg", ".thumbnails/a.png", "cat/.a.png", "cat/._a.png",
     "cat/Thumbs.db", "THUMBS.DB", "$RECYCLE.BIN/a.png", "$Recycle.Bin/S-1/a.png", "System Volume Information/a.png",
     "__MACOSX/cat/a.png", "lost+found/a.png", "#recycle/a.png", ".DS_Store", "cat/desktop.ini", ".git/a.png",
     ".ipynb_checkpoints/a.png"],
)  # fmt: skip
def test_what_systems_leave_behind_is_passed_over_and_said(tmp_path: Path, name: str) -> None:
    listing = listed(write(tmp_path, "cat/1.png", "dog/1.png", name))
    assert listing.class_names == ("cat", "dog") and listing.num_ignored == 0
    assert sorted(labels(listing)) == ["cat/1.png", "dog/1.png"]
    (line,) = said(listing, "passed over")
    assert line.startswith("1 files of systems: 1 ")


def test_links_that_lead_nowhere_are_said(tmp_path: Path) -> None:
    write(tmp_path / "source", "cat/1.png")
    (tmp_path / "source/cat/2.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "source/cat/3.png").symlink_to("3.png")
    (tmp_path / "source/cat/4").symlink_to(tmp_path / "source")
    (tmp_path / "source/cat/5.png").symlink_to(write(tmp_path / "elsewhere", "5.png") / "5.png")
    os.mkfifo(tmp_path / "source/cat/6.png")
    listing = listed(tmp_path / "source")
    assert sorted(labels(listing)) == ["cat/1.png", "cat/5.png"]
    assert said(listing, "left out") == [
        "1, each of which is no regular file: cat/6.png",
        "1, each of which leads back to a folder above it: cat/4",
        "2, each of which leads nowhere: cat/2.png, cat/3.png",
    ]
    (tmp_path / "links").mkdir()
    (tmp_path / "links/a.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DatasetMissingError, match=r"\(1 links that lead nowhere, and the like\)"):
        listed(tmp_path / "links")


# ---------------------------------------------------------------- exclude

FILES = ("cat/1.png", "cat/raw/2.png", "dog/1.png", "dog/raw/2.png", "dog/old/raw/3.png", "docs/x.txt")


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        (("docs",), FILES[:5]),
        (("docs/", "raw"), ("cat/1.png", "dog/1.png")),
        (("docs", "2.*"), ("cat/1.png", "dog/1.png", "dog/old/raw/3.png")),
        (("docs", "cat/raw"), ("cat/1.png", *FILES[2:5])),
        (("docs", "dog/*"), FILES[:2]),
        (("docs", "*/raw"), ("cat/1.png", "dog/1.png")),
        (("d[or]*",), FILES[:2]),
        (("*.txt",), FILES[:5]),
        (("docs", "RAW"), FILES[:5]),
    ],
)
def test_globs_leave_files_and_folders_out(tmp_path: Path, patterns: tuple[str, ...], left: tuple[str, ...]) -> None:
    listing = listed(write(tmp_path, *FILES), *patterns)
    assert sorted(labels(listing)) == sorted(left)
    lines = said(listing, "excluded")
    assert len(lines) == len(patterns) and lines[0].endswith(f"files by {patterns[0]!r}")
    if "RAW" in patterns:
        assert lines[1] == "0 files by 'RAW'", "a slip of the keyboard is seen"


def test_everything_may_be_excluded(tmp_path: Path) -> None:
    with pytest.raises(DatasetMissingError, match=r"\(6 excluded\)"):
        listed(write(tmp_path, *FILES), "*")


# ---------------------------------------------------------------- classes


def test_classes_are_said_with_their_counts(tmp_path: Path) -> None:
    listing = listed(write(tmp_path, "cat/1.png", "cat/2.jpg", "dog/a/b/1.png"))
    assert said(listing, "class") == ["cat: 2 images", "dog: 1 images"]
    many = listed(write(tmp_path / "many", *(f"{n:02d}/{m}.png" for n in range(25) for m in range(1 + n % 2))))
    lines = said(many, "class")
    assert len(lines) == 21 and lines[0] == "00: 1 images" and lines[20] == "and 5 more, with 7 images"
    assert said(listed(write(tmp_path / "flat", "a.png")), "class") == []


@pytest.mark.parametrize("ending", ["heic", "txt", "svg"])
def test_a_class_without_an_image_is_an_error_unless_it_is_allowed(tmp_path: Path, ending: str) -> None:
    write(tmp_path, "ant/1.png", "bee/1.png", f"bat/1.{ending}", f"bat/deep/2.{ending}")
    line = refusal(tmp_path)
    assert f"{tmp_path}/bat/ holds no image that is read (2 .{ending});" in line
    assert "--exclude 'bat'" in line and "--allow-empty-classes" in line and "convert it to PNG or JPEG" in line
    assert listed(tmp_path, "bat").class_names == ("ant", "bee")
    allowed = listed(tmp_path, allow_empty_classes=True)
    assert allowed.class_names == ("ant", "bat", "bee") and "bat: 0 images" in said(allowed, "class")
    assert labels(allowed) == {"ant/1.png": "ant", "bee/1.png": "bee"}
    write(tmp_path, "cow/1.md", "dab/1.md")
    assert "nor do 2 folders more, such as cow/" in refusal(tmp_path)


def test_a_folder_of_leftovers_or_of_nothing_is_no_class(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert listed(write(tmp_path, "cat/1.png", "x/Thumbs.db", "y/.DS_Store")).class_names == ("cat",)


def test_one_name_in_two_unicode_forms_is_one_class(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "müll") for form in ("NFC", "NFD"))
    assert composed != decomposed
    listing = listed(write(tmp_path, f"{composed}/1.png", f"{decomposed}/2.png", "ant/1.png"))
    assert listing.class_names == ("ant", composed)
    assert labels(listing) == {f"{composed}/1.png": composed, f"{decomposed}/2.png": composed, "ant/1.png": "ant"}
    assert said(listing, "class") == ["ant: 1 images", f"{composed}: 2 images"]
    assert said(listing, "one class") == [f"{composed}: 2 folders whose names differ in their Unicode form only"]
    alone = listed(write(tmp_path / "alone", f"{decomposed}/2.png"))
    assert alone.class_names == (composed,) and list(labels(alone)) == [f"{decomposed}/2.png"]
    for form in (composed, decomposed):
        assert listed(tmp_path, form, "alone").class_names == ("ant",), "globs take either form too"
    # neither form alone is empty
    write(tmp_path / "two", f"{composed}/1.png", f"{decomposed}/x.txt")
    assert listed(tmp_path / "two").class_names == (composed,)


def test_names_that_differ_by_case_are_said(tmp_path: Path) -> None:
    listing = listed(write(tmp_path, "Cat/1.png", "cat/1.png", "CAT/1.png", "dog/1.png"))
    assert listing.class_names == ("CAT", "Cat", "cat", "dog")
    assert said(listing, "attention") == ["CAT, Cat, cat are 3 classes: their names differ by case only"]


def test_images_beside_classes_are_refused(tmp_path: Path) -> None:
    assert "2 images directly in it (first: a.png) beside sub-folders (first: cat/)" in refusal(
        write(tmp_path, "cat/1.png", "dog/1.png", "b.png", "a.png")
    )
    line = refusal(write(tmp_path / "s", "train/a.png", "train/cat/1.png", "val/cat/1.png"))
    assert "1 images directly in it (first: train/a.png) beside sub-folders (first: train/cat/)" in line


# ---------------------------------------------------------------- splits


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Validation", "VAL"])
def test_folders_called_after_splits_are_splits(tmp_path: Path, val: str) -> None:
    listing = listed(write(tmp_path, "train/cat/1.png", "train/dog/a/1.png", f"{val}/cat/2.png", f"{val}/dog/2.png"))
    assert listing.class_names == ("cat", "dog")
    assert labels(listing, "train") == {"train/cat/1.png": "cat", "train/dog/a/1.png": "dog"}
    assert labels(listing, "held_out") == {f"{val}/cat/2.png": "cat", f"{val}/dog/2.png": "dog"}
    assert said(listing, "split train") == ["train/"] and said(listing, "split held_out") == [f"{val}/"]
    assert said(listing, "class") == ["cat: 2 images", "dog: 2 images"]


def test_test_is_held_out_only_where_nothing_else_is(tmp_path: Path) -> None:
    two = listed(write(tmp_path / "two", "train/cat/1.png", "test/cat/2.png"))
    assert set(two.images) == {"train", "held_out"} and list(labels(two, "held_out")) == ["test/cat/2.png"]
    three = listed(write(tmp_path / "three", "train/cat/1.png", "val/cat/2.png", "test/cat/3.png", "test/other/4.png"))
    assert list(labels(three, "held_out")) == ["val/cat/2.png"] and three.class_names == ("cat",)
    assert said(three, "left out") == ["test/, beside a validation folder"] and said(three, "class") == [
        "cat: 2 images"
    ]


def test_splits_without_classes_and_a_train_folder_alone(tmp_path: Path) -> None:
    flat = listed(write(tmp_path / "flat", "train/1.png", "train/2.png", "val/3.png"))
    assert flat.class_names == () and labels(flat, "held_out") == {"val/3.png": ""}
    alone = listed(write(tmp_path / "alone", "train/cat/1.png", "train/dog/1.png"))
    assert set(alone.images) == {"train"} and alone.class_names == ("cat", "dog")
    # an ordinary class of that name, such as of vehicles, and an ordinary folder
    assert listed(write(tmp_path / "vehicles", "train/1.png", "bus/1.png")).class_names == ("bus", "train")
    assert listed(write(tmp_path / "one", "test/1.png")).class_names == ("test",)


def test_splits_must_agree(tmp_path: Path) -> None:
    line = refusal(write(tmp_path / "a", "train/cat/1.png", "train/dog/1.png", "val/cat/1.png"))
    assert "has the class 'dog' in the split 'train' and not in 'held_out' (1 such classes)" in line
    assert listed(tmp_path / "a", "dog").class_names == ("cat",)
    assert listed(tmp_path / "a", allow_empty_classes=True).class_names == ("cat", "dog")
    line = refusal(write(tmp_path / "b", "train/cat/1.png", "val/cat/1.png", "val/eel/1.png", "val/fox/1.png"))
    assert "has the class 'eel' in the split 'held_out' and not in 'train' (2 such classes)" in line
    line = refusal(write(tmp_path / "c", "train/cat/1.png", "val/cat/1.heic"))
    assert "/val/ is a split and holds no image that is read (1 .heic)" in line
    line = refusal(write(tmp_path / "d", "train/cat/1.png", "train/dog/1.heic", "val/cat/1.png", "val/dog/1.png"))
    assert "/train/dog/ holds no image that is read (1 .heic)" in line
    line = refusal(write(tmp_path / "e", "val/cat/1.png", "test/cat/1.png"))
    assert "has test/, val/ and no train/" in line
    line = refusal(write(tmp_path / "f", "train/cat/1.png", "val/cat/1.png", "extra/1.png"))
    assert "has train/, val/, which are splits, beside extra/, which is none; leave it out by --exclude 'extra'" in line
    assert set(listed(tmp_path / "f", "extra").images) == {"train", "held_out"}
    # folders without images beside splits are no classes
    assert listed(write(tmp_path / "g", "train/cat/1.png", "val/cat/1.png", "annotations/x.xml")).num_ignored == 1


def test_a_bucket_is_listed_as_a_folder_is(tmp_path: Path, s3_server: S3Server) -> None:
    files = ["train/cat/1.png", "val/cat/2.TIF", "train/@eaDir/x.png", "train/cat/n.txt", "test/cat/3.png"]
    local = listed(write(tmp_path, *files))
    store = open_store(f"{s3_server.uri}/listing-{tmp_path.name}")
    for name in files:
        store.write(name, b"x")
    assert list_folder(store) == local
