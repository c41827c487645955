"""Every field of every job that takes a URI: each is opened as it stands, or one line names the field."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from jobs import prepare_data, train
from jobs.cli import run_job
from tests.jobs.every_job import EVERY_JOB, resolve

# Texts that name no place. A new field of text is a URI until it stands here.
NO_URIS = {"name", "run_name", "register_as", "experiment", "address", "split", "image_size", "factory", "samplers",
           "accelerator_type", "tick", "exclude"}  # fmt: skip
PREFIX = {
    "request.inputs": ["--request.name", "inpaint", "--request.mask", "centre", "--request.split", "train"],
    "request.mask": ["--request.name", "inpaint", "--request.inputs", "x"],
}


def text_fields(config: Any, path: str = "") -> Iterator[str]:
    """Paths of the fields that hold a text, or None where a text may be."""
    for field in dataclasses.fields(config):
        value, here = getattr(config, field.name), f"{path}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from text_fields(value, f"{here}.")
        elif field.name not in NO_URIS and (field.type is str or str in get_args(field.type)):
            yield here


def uri_fields() -> list[tuple[str, str]]:
    found = [(name, path) for name, job in EVERY_JOB.items() for path in text_fields(resolve(job))]
    return [(name, path) for name, path in found if not path.endswith("tracking.uri")] + [
        ("sample", path) for path in PREFIX
    ]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_fields_are_found() -> None:
    fields = uri_fields()
    for expected in (
        ("prepare_data", "source"), ("prepare_data", "dataset"), ("train", "dataset"), ("train", "output"),
        ("sample", "model"), ("sample", "guide_model"), ("sample", "calibration"), ("evaluate", "sample.output"),
        ("ema sweep", "run"), ("compare bounds", "baseline"), ("figures", "output"), ("calibrate", "output"),
    ):  # fmt: skip
        assert expected in fields


@pytest.mark.parametrize("uri", ["s3:/x", "", "x "])  # the other slips: tests/pipeline/stores/test_storage.py
def test_a_slip_is_one_line_that_names_the_field(
    uri: str, capsys: pytest.CaptureFixture[str], empty_folder: Path
) -> None:
    for name, path in uri_fields():
        flag = f"--{path.replace('_', '-')}"
        assert run_job(EVERY_JOB[name], [*PREFIX.get(path, []), flag, uri, "--dry-run"]) == 2, (name, path)
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"error: {path}: ") and ("write " in line or "give " in line), line
        assert repr(uri) in line or repr(uri)[1:-1] in line, line
    assert list(empty_folder.iterdir()) == [], "no folder is called s3:"


@pytest.mark.parametrize("uri", ["s3://b", "s3://b/ä ü", "file:///x/y", "~", "~/x y", "a:b", "./s3:/x", "größe/a b"])
def test_what_is_right_stays_as_it_stands(uri: str) -> None:
    assert resolve(train.JOB, "--output", uri, "--dataset", uri).output == uri
    made = resolve(prepare_data.JOB, "--source", uri, "--dataset", uri, "--image-size", "8")
    assert (made.source, made.dataset) == (uri, uri)


@pytest.mark.parametrize("uri", ["model:/x@y", "models:x@y", "Models:/x@y", "x?ema=0"])
def test_a_model_with_a_typo_names_the_field(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name, path in uri_fields():
        if path.rpartition(".")[2] in ("model", "guide_model", "baseline"):
            assert run_job(EVERY_JOB[name], [f"--{path.replace('_', '-')}", uri, "--dry-run"]) == 2
            (line,) = capsys.readouterr().err.strip().splitlines()
            assert line.startswith(f"error: {path}: ") and uri in line and "give " in line, line


def test_a_file_names_the_field_too(capsys: pytest.CaptureFixture[str], empty_folder: Path) -> None:
    (empty_folder / "mine.toml").write_text('dataset = "s3:/x"\n')
    assert run_job(train.JOB, ["--config", "mine.toml", "--dry-run"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: mine.toml: dataset: is no S3 URI; write s3://x, got 's3:/x'"), line
