"""Format by fault: what becomes of each file of the table, in memory that does not depend on what a file claims."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from pipeline.data.image_files.unusable import UnusableImage
from pipeline.data.image_input import load_image
from tests.pipeline.data.image_files import exif_cases, jpeg_cases, other_cases, png_cases, tiff_cases
from tests.pipeline.data.image_files.cases import PICTURE, Case, encode

TABLE: dict[str, Callable[[], dict[str, Case]]] = {
    "EXIF": exif_cases.cases, "PNG": png_cases.cases, "JPEG": jpeg_cases.cases, "TIFF": tiff_cases.cases,
    "others": other_cases.cases,
}  # fmt: skip
MAX_PIXELS = 10_000_000


def fault(case: Case) -> str:
    """What is wrong with a file's outcome; "" if nothing is."""
    size = PICTURE.shape[:2] if case.picture is None else case.picture.shape[:2]
    try:
        pixels, grey = (
            load_image(case.data, image_size=size, channels=channels, max_pixels=MAX_PIXELS) for channels in (3, 1)
        )
    except UnusableImage as error:
        if case.picture is not None:
            return f"is refused: {error.kind}: {error}"
        is_right = error.kind == case.kind and case.says in str(error) and str(error) and "\n" not in str(error)
        return "" if is_right else f"is refused for another reason: {error.kind}: {error}"
    if case.picture is None:
        return "is not refused"
    differs_by = np.abs(pixels.astype(int) - case.picture).max()
    if differs_by > case.tolerance:
        return f"differs by {differs_by}"
    luma = case.picture @ np.array([0.299, 0.587, 0.114])  # ITU-R 601
    grey_differs_by = np.abs(grey[..., 0] - luma).max()
    return f"its grey differs by {grey_differs_by}" if grey_differs_by > case.tolerance + 1 else ""


@pytest.mark.parametrize("part", TABLE)
def test_every_file_becomes_its_picture_or_is_refused_by_its_kind(part: str) -> None:
    faults = {name: what for name, case in TABLE[part]().items() if (what := fault(case))}
    assert faults == {}


def test_the_table_is_about_files_that_pillow_alone_refuses_or_turns_wrongly() -> None:
    """Else the rows would prove nothing: Pillow's own way through them is much shorter."""
    made = [case for cases in TABLE.values() for case in cases().values()]
    assert len(made) >= 500 and sum(case.picture is None for case in made) >= 100
    refused = [
        name for cases in (exif_cases, png_cases, jpeg_cases, tiff_cases) for name, case in cases.cases().items()
        if case.picture is not None and not exif_cases.opens_in_pillow(case.data)
    ]  # fmt: skip
    assert len(refused) >= 60, refused


LOAD_ALL = """
import re, sys
from pathlib import Path
from pipeline.data.image_input import load_image

def most_kib():  # ru_maxrss would begin with what the process that started this one had
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

def load(file):
    try:
        load_image(file.read_bytes(), image_size=(8, 8), channels=3, max_pixels=10_000_000)
    except ValueError as error:
        pass

files = sorted(Path(sys.argv[1]).iterdir())
for file in files[:2]:
    load(file)
before = most_kib()
for file in files[2:]:
    load(file)
print((most_kib() - before) >> 10)
"""


def most_mib(folder: Path) -> int:
    """What loading a folder's files takes at most, in a process of its own, above what the first two take."""
    path = os.pathsep.join([str(Path(__file__).parents[4]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", LOAD_ALL, str(folder)],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_what_a_file_claims_takes_no_memory(tmp_path: Path) -> None:
    """Texts and profiles that inflate to 200 MiB, pictures and tiles of thousands of millions of pixels."""
    made = [case.data for cases in TABLE.values() for case in cases().values() if len(case.data) < 2 << 20]
    assert len(made) > 500
    for number, data in enumerate([encode(PICTURE, "PNG"), encode(PICTURE, "JPEG"), *made]):
        (tmp_path / f"{number:04d}").write_bytes(data)
    assert most_mib(tmp_path) < 64, "the smallest bomb, inflated, is 200"


def test_memory_is_measured(tmp_path: Path) -> None:
    for number, side in enumerate((8, 8, 3100)):
        (tmp_path / str(number)).write_bytes(encode(PIL.Image.new("RGB", (side, side)), "PNG"))
    assert most_mib(tmp_path) > 64, "a picture as large as is allowed"


def test_no_decoder_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "started"
    program = tmp_path / "bin/gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {marker}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    data = encode(PICTURE, "EPS")
    with pytest.raises(UnusableImage, match=r"PostScript \(EPS\) is not read"):
        load_image(data, image_size=(8, 8), channels=3, max_pixels=MAX_PIXELS)
    assert not marker.exists()
    (tmp_path / "x.png").write_bytes(data)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    with pytest.raises(Exception), PIL.Image.open(tmp_path / "x.png") as image:  # noqa: B017
        image.load()
    assert marker.exists(), "Pillow alone starts what is called gs"
