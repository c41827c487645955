"""Images are made again from the manifest alone, and are the same."""

from pathlib import Path

import pytest

from jobs.output import main
from pipeline.generation.upkeep.remake import remake
from pipeline.generation.upkeep.stored_run import ModelAccess
from tests.pipeline.generation.upkeep.small_run import make_run, tars


@pytest.mark.parametrize("container", ["webdataset", "parquet"])
def test_five_ids_of_three_batches_have_equal_bytes(tmp_path: Path, container: str) -> None:
    _, store = make_run(tmp_path, container=container)
    ids = (2, 3, 6, 18, 19)
    made = list(remake(store, ids, ModelAccess(), use_gpu=None))
    assert tuple(one.sample_id for one in made) == ids
    assert [one.fault for one in made] == [None] * 5


def test_the_job_writes_them_and_names_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, store = make_run(tmp_path)
    to = tmp_path / "made"
    assert main(["remake", store.uri, "--ids", "3,5-6", "--to", str(to)]) == 0
    assert sorted(path.name for path in to.iterdir()) == [f"{k:012d}.png" for k in (3, 5, 6)]
    key = tars(store)[1]
    data = bytearray(store.read(key))
    data[700] ^= 1
    store.write(key, bytes(data))
    assert main(["remake", store.uri, "--ids", "3,6"]) == 1
    said = capsys.readouterr()
    assert "image 3: made again, the same bytes" in said.out and "image 6: cannot be compared" in said.out
    assert "1 of 2 images" in said.err
