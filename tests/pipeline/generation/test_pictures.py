"""Contact sheet and gallery: none of their troubles ends a run, and none is written without the lease."""

import dataclasses
from pathlib import Path

import pytest

import jobs.sample
from jobs.cli import run_job
from pipeline.config_sections import write_section
from pipeline.errors import LeaseHeldError
from pipeline.generation.output.commits import read_record
from pipeline.generation.sample import sample
from pipeline.stores.lease import hold_lease
from tests.pipeline.generation.test_sample import config_of
from tests.pipeline.runs_in_process import make_in_process, run
from tests.pipeline.tiny_models import write_model


@pytest.mark.parametrize("damage", ["missing", "altered"])
def test_that_a_picture_cannot_be_made_ends_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    config = config_of(write_model(tmp_path / "model"), tmp_path / "out")
    make_in_process(config)
    whole = sample(config)
    assert (whole.has_contact_sheet, whole.num_pictures_failed) == (True, 0)
    tar = Path(whole.store.uri, read_record(whole.store, 0).key)
    data = tar.read_bytes()
    if damage == "missing":
        tar.unlink()
    else:
        tar.write_bytes(data[:-1] + b"x")
    (tmp_path / "sample.toml").write_text(write_section(config, "sample"))
    assert run_job(jobs.sample.JOB, ["--config", str(tmp_path / "sample.toml")]) == 0
    said = capsys.readouterr().out.splitlines()
    (line,) = [one for one in said if "the contact sheet could not be made (" in one]
    assert f"whether images were altered or lost jobs/output.py verify {whole.store.uri} tells" in line
    assert "contact sheet" not in said[-1] and said[-1].endswith("; 1 of the pictures could not be made")
    tar.write_bytes(data)
    assert sample(config).num_pictures_failed == 0


def test_a_rerun_that_has_a_picture_to_make_takes_the_lease(tmp_path: Path) -> None:
    """Who removes images holds it too, so that no picture of theirs is written after them."""
    config = config_of(write_model(tmp_path / "model"), tmp_path / "out", lease_s=1.0)
    store = run(config)[0].store
    with hold_lease(store, duration_s=1.0):
        assert sample(config).num_made == 0, "it has nothing to write"
        for changed in (
            dataclasses.replace(config, gallery_images=10),
            dataclasses.replace(config, contact_sheet_columns=2),
        ):
            with pytest.raises(LeaseHeldError):
                sample(changed)
    for lost in ("index.html", "contact_sheet.png", "gallery/contents.js", "gallery/view.js"):
        before = store.read(lost)
        store.delete(lost)
        sample(config)
        assert store.read(lost) == before
    store.write("gallery/000000-0123456789abcdef/00.webp", b"of a driver that was killed")
    sample(config)
    assert store.stat("gallery/000000-0123456789abcdef/00.webp") is None
