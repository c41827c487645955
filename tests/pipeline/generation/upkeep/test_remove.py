"""Images that are taken down stay down: through kills, reruns, growth, repair and remake."""

import dataclasses
import gc
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow.dataset
import pytest
import webdataset

from jobs.output import main
from pipeline.config_io import to_json
from pipeline.data.shards import decode_image, read_shard
from pipeline.errors import ConfigError, PipelineError, StorageAccessError
from pipeline.generation.output.commits import read_record
from pipeline.generation.output.inventory import collect_orphans
from pipeline.generation.output.manifest import load_generation_manifest, read_shards
from pipeline.generation.output.removals import read_removals
from pipeline.generation.sample import sample
from pipeline.generation.upkeep.remake import remake
from pipeline.generation.upkeep.remove import remove
from pipeline.generation.upkeep.repair import repair
from pipeline.generation.upkeep.stored_run import ModelAccess
from pipeline.generation.viewing import contact_sheet
from pipeline.generation.viewing.gallery import CONTENTS_KEY
from pipeline.generation.viewing.gallery_blocks import Block, BlockImages, BlockReader, parse_script
from pipeline.stores.local_store import LocalStore
from pipeline.stores.object_store import ObjectStore
from pipeline.stores.storage import open_store
from tests.pipeline.generation.upkeep.small_run import contents, found, make_run, tars
from tests.pipeline.runs_in_process import make_in_process, run

IDS = (3, 6, 8)


def ids_of(store: ObjectStore) -> list[int]:
    manifest = load_generation_manifest(store)
    assert manifest is not None
    return [int(one.key) for shard in read_shards(store, manifest.parts) for one in read_shard(store, shard)]


def without_times(store: ObjectStore) -> dict[str, bytes]:
    there = contents(store)
    for key in [key for key in there if key.startswith("_removed/")]:
        record = json.loads(there[key])
        del record["removed_at_utc"]
        there[key] = json.dumps(record).encode()
    return there


class Killed(Exception):
    """The process is gone."""


class KilledStore:
    """A real store whose user is killed just before the n-th operation that changes something, after the one before."""

    def __init__(self, store: ObjectStore, operation: int) -> None:
        self._store, self._left = store, operation

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._store, name)
        if name == "delete_all":
            return lambda keys: [self.delete(key) for key in keys]
        if name not in ("write", "create", "replace", "delete"):
            return value

        def operate(*arguments: object) -> Any:
            self._left -= 1
            if self._left <= 0:
                raise Killed
            return value(*arguments)

        return operate


@pytest.mark.parametrize("container", ["webdataset", "parquet"])
def test_removed_images_are_gone_and_the_others_have_the_bytes_that_they_had(tmp_path: Path, container: str) -> None:
    _, store = make_run(tmp_path, container=container)
    manifest = load_generation_manifest(store)
    assert manifest is not None
    before, old = contents(store), tars(store)
    images = {one.key: one.image for s in read_shards(store, manifest.parts) for one in read_shard(store, s)}
    assert remove(store, IDS, "asked for").num_removed == 3
    assert ids_of(store) == [one for one in range(20) if one not in IDS]
    after = load_generation_manifest(store)
    assert after is not None and after.num_images == 20
    for shard in read_shards(store, after.parts):
        for one in read_shard(store, shard):
            assert one.image == images[one.key]
    assert found(store) == [] and found(store, quick=True) == []
    there = contents(store)
    assert old[0] not in there and old[1] not in there and tars(store)[2:] == old[2:]
    assert {"_removed/000000000-0000.json", "_removed/000000001-0000.json"} <= there.keys()
    record = read_removals(store)[1].records[0]
    assert (record.ids, record.reason, record.old_key, record.num_samples) == ((6, 8), "asked for", old[1], 4)
    assert to_json(read_record(store, 1)) == before["_parts/000000001.json"], "the commit record stays"
    assert there["index.html"] == before["index.html"] and there["contact_sheet.png"] != before["contact_sheet.png"]
    assert not {key for key in there if key.endswith(".webp")} & {key for key in before if key.endswith(".webp")}


def test_the_contact_sheet_keeps_the_place_of_each(tmp_path: Path) -> None:
    _, store = make_run(tmp_path)
    before = PIL.Image.open(io.BytesIO(store.read("contact_sheet.png")))
    remove(store, (3,), "asked for")
    after = PIL.Image.open(io.BytesIO(store.read("contact_sheet.png")))
    assert after.size == before.size
    box = tuple(PIL.ImageChops.difference(before, after).getbbox())
    assert box[0] >= after.size[0] // 2 and box[3] <= after.size[1] // 3, "class 0, second column: that of image 3"


@pytest.mark.parametrize("container", ["webdataset", "parquet"])
def test_reruns_growth_repair_and_remake_honour_it(tmp_path: Path, container: str) -> None:
    config, store = make_run(tmp_path, container=container, num_images=18)
    remove(store, IDS, "asked for")
    left, there = [one for one in range(18) if one not in IDS], contents(store)
    assert sample(config).num_made == 0 and contents(store) == there
    make_in_process(config)  # as a driver that knew nothing of it
    assert contents(store) == there
    longer = dataclasses.replace(config, num_images=30)
    run(longer)
    assert ids_of(store) == [*left, *range(18, 30)] and found(store) == []
    with pytest.raises(ConfigError, match=r"image 6 was removed for good \(asked for\)"):
        list(remake(store, (5, 6), ModelAccess(), use_gpu=None))
    assert [one.fault for one in remake(store, (2, 7, 9), ModelAccess(), use_gpu=None)] == [None] * 3
    there = contents(store)
    key = tars(store)[1]
    store.delete(key)
    store.delete("_parts/000000000.json")
    manifest = load_generation_manifest(store)
    assert manifest is not None
    store.delete(manifest.parts[0].key)
    assert repair(store, ModelAccess(), use_gpu=None, orphan_age_s=None).unmended == []
    assert contents(store).keys() == there.keys() and store.read(key) == there[key] and found(store) == []


@pytest.mark.parametrize("container", ["webdataset", "parquet"])
def test_a_shard_can_be_emptied(tmp_path: Path, container: str) -> None:
    """One by one or at once; it keeps its place, and is honoured as any that has images left."""
    config, store = make_run(tmp_path, container=container, num_images=18)
    remove(store, (7, 8), "first")
    remove(store, (6, 9, 10, 11, 12), "the rest, and one of the next")
    left = [one for one in range(18) if not 6 <= one <= 12]
    assert ids_of(store) == left and found(store) == [] and found(store, quick=True) == []
    manifest = load_generation_manifest(store)
    assert manifest is not None and manifest.num_images == 18
    assert [shard.num_samples for shard in read_shards(store, manifest.parts)] == [6, 0, 5]
    there = contents(store)
    result = sample(config)
    assert [len(one) for one in result.images()] == [6, 5] and contents(store) == there
    assert b'["' + tars(store)[1].encode() not in b"".join(there[key] for key in there if key.endswith("block.js"))
    make_in_process(config)  # as a driver that knew nothing of it
    assert contents(store) == there
    run(dataclasses.replace(config, num_images=30))
    assert ids_of(store) == [*left, *range(18, 30)] and found(store) == []
    there, key, manifest = contents(store), tars(store)[1], load_generation_manifest(store)
    assert manifest is not None
    for lost in (key, "_parts/000000001.json", manifest.parts[0].key):
        store.delete(lost)
    assert repair(store, ModelAccess(), use_gpu=None, orphan_age_s=None).unmended == []
    assert contents(store).keys() == there.keys() and store.read(key) == there[key] and found(store) == []
    with pytest.raises(ConfigError, match=r"image 6 was removed for good \(the rest, and one of the next\)"):
        list(remake(store, (6,), ModelAccess(), use_gpu=None))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves its file to the collector
def test_other_readers_take_an_empty_shard(tmp_path: Path) -> None:
    _, store = make_run(tmp_path / "tars", shard_size=1, batch_size=1, num_images=3)
    remove(store, (1,), "asked for")
    files = [str(Path(store.uri, key)) for key in tars(store)]
    read = webdataset.WebDataset(files, shardshuffle=False, handler=webdataset.reraise_exception)
    assert [int(one["__key__"]) for one in read] == [0, 2]
    gc.collect()
    _, store = make_run(tmp_path / "parquet", shard_size=1, batch_size=1, num_images=3, container="parquet")
    remove(store, (1,), "asked for")
    table = pyarrow.dataset.dataset([str(Path(store.uri, key)) for key in tars(store)]).to_table()
    assert table["sample_id"].to_pylist() == [0, 2]


def test_a_run_without_any_image_left(tmp_path: Path) -> None:
    _, store = make_run(tmp_path)
    assert main(["remove", store.uri, "--ids", "0-19", "--reason", "asked for"]) == 0
    assert ids_of(store) == [] and found(store) == [] and not list(store.list("gallery/0"))
    sheet = PIL.Image.open(io.BytesIO(store.read("contact_sheet.png")))
    assert len(sheet.getcolors()) == 1
    assert main(["verify", store.uri]) == main(["repair", store.uri]) == 0


def test_a_shard_that_lost_its_tar_is_not_made_with_what_was_removed(tmp_path: Path) -> None:
    config, store = make_run(tmp_path, num_images=18)
    remove(store, IDS, "asked for")
    store.delete(tars(store)[1])
    for info in list(store.list("_manifest/")):
        store.delete(info.key)
    store.delete("manifest.json")
    with pytest.raises(PipelineError, match=r"shard 1, from which images were removed, has lost its tar"):
        sample(config)


def test_a_run_grows_whose_removal_was_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After its record, and before the part: what the manifest names still has the image, and no run names it again."""
    config, store = make_run(tmp_path, num_images=18)
    with pytest.raises(Killed):
        remove(KilledStore(store, 3), (17,), "asked for")  # type: ignore[arg-type]
    assert 17 in ids_of(store) and read_removals(store)[2].ids == {17}
    run(dataclasses.replace(config, num_images=30))
    assert ids_of(store) == [one for one in range(30) if one != 17]
    assert "images were removed, and that is not finished; run jobs/output.py remove again" in capsys.readouterr().out
    remove(store, (17,), "asked for")
    assert found(store) == []


def test_a_second_removal_of_a_shard_follows_the_first(tmp_path: Path) -> None:
    _, store = make_run(tmp_path)
    remove(store, (6,), "first")
    again = remove(store, (6, 7), "second")
    assert (again.num_removed, again.num_gone) == (1, 1)
    assert [(one.ids, one.reason) for one in read_removals(store)[1].records] == [((6,), "first"), ((7,), "second")]
    assert ids_of(store) == [one for one in range(20) if one not in (6, 7)] and found(store) == []


def test_nothing_is_collected_that_a_removal_names(tmp_path: Path) -> None:
    _, store = make_run(tmp_path)
    remove(store, (6,), "asked for")
    objects = [info for info in store.list() if info.key in tars(store)]
    assert collect_orphans(store, objects, older_than_s=0, now_s=2e10) == []


def test_killed_at_any_operation_it_is_run_again_and_ends_the_same(tmp_path: Path) -> None:
    _, store = make_run(tmp_path)
    reference = tmp_path / "reference"
    shutil.copytree(store.uri, reference / Path(store.uri).name)
    expected_store = open_store(str(reference / Path(store.uri).name))
    remove(expected_store, IDS, "asked for")
    number, was_killed, between = 0, True, 0
    while was_killed:
        number += 1
        place = tmp_path / "killed" / Path(store.uri).name
        shutil.copytree(store.uri, place)
        broken = open_store(str(place))
        was_killed = False
        try:
            remove(KilledStore(broken, number), IDS, "asked for")  # type: ignore[arg-type]
        except Killed:
            was_killed = True
        assert all(broken.stat(key) for key in tars(broken)), "the manifest names only what is there"
        between += found(broken) != []
        remove(broken, IDS, "asked for")
        ours, theirs = without_times(broken), without_times(expected_store)
        for one in (ours, theirs):
            del one["gallery/contents.js"]  # it says where the run is
        assert ours == theirs, number
        assert found(broken) == []
        shutil.rmtree(place)
    assert number > 10 and between > 5


def test_what_cannot_be_removed_is_refused_before_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, store = make_run(tmp_path)
    there = contents(store)
    for ids, reason, said in (
        ("20", "x", "ids: must be below 20"),
        ("1", " ", "reason: must say why"),
    ):
        assert main(["remove", store.uri, "--ids", ids, "--reason", reason]) == 2
        assert said in capsys.readouterr().err
    assert contents(store) == there | {"lease.json": store.read("lease.json")}
    assert main(["remove", store.uri, "--ids", "1", "--reason", "asked for"]) == 0
    assert "done: 1 images removed for good from" in capsys.readouterr().out


def shown_in(store: ObjectStore) -> set[int]:
    """Ids of all images of which the gallery's folder has a thumbnail, named by its contents or not."""
    blocks = [parse_script(store.read(info.key)) for info in store.list("gallery/") if info.key.endswith("/block.js")]
    return {first + k for block in blocks for first, count in block["ids"] for k in range(count)}


def test_an_image_removed_while_the_gallery_is_made_leaves_no_thumbnail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By somebody whom no lease keeps away: the driver has lost its own, or goes without."""
    config, store = make_run(tmp_path, gallery_images=0, lease_s=0.0)
    read, left = BlockReader.read, [IDS]

    def read_and_remove(reader: BlockReader, block: Block) -> BlockImages:
        images = read(reader, block)
        if left:
            remove(store, left.pop(), "asked for")
        return images

    monkeypatch.setattr(BlockReader, "read", read_and_remove)
    assert sample(dataclasses.replace(config, gallery_images=100)).has_gallery
    assert not left and shown_in(store) == set(range(20)) - set(IDS)
    named = {entry["name"] for entry in parse_script(store.read(CONTENTS_KEY))["blocks"]}
    assert named == {info.key.split("/")[1] for info in store.list("gallery/") if info.key.count("/") == 2}
    assert found(store) == []


def test_an_image_removed_while_the_contact_sheet_is_made_is_not_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, store = make_run(tmp_path, lease_s=0.0)
    expected_store = open_store(str(shutil.copytree(store.uri, tmp_path / "reference")))
    remove(expected_store, IDS, "asked for")
    store.delete("contact_sheet.png")
    left = [IDS]

    def decode_and_remove(data: bytes, extension: str) -> np.ndarray:
        if left:
            remove(store, left.pop(), "asked for")
        return decode_image(data, extension)

    monkeypatch.setattr(contact_sheet, "decode_image", decode_and_remove)
    sample(config)
    assert not left and store.read("contact_sheet.png") == expected_store.read("contact_sheet.png")


def test_of_a_gallery_that_was_not_finished_no_thumbnail_stays(tmp_path: Path) -> None:
    config, store = make_run(tmp_path)
    store.delete(CONTENTS_KEY)
    assert shown_in(store) >= set(IDS)
    remove(store, IDS, "asked for")
    assert shown_in(store) == set() and list(store.list("gallery/")) == []
    assert sample(config).num_made == 0 and shown_in(store) == set(range(20)) - set(IDS)


class KeepingStore(LocalStore):
    """What is in some folder cannot be deleted."""

    def delete(self, key: str) -> None:
        if key.startswith("gallery/"):
            raise StorageAccessError(f"{key}: deleting is forbidden")
        super().delete(key)


def test_a_thumbnail_that_cannot_be_deleted_is_an_error(tmp_path: Path) -> None:
    _, store = make_run(tmp_path)
    with pytest.raises(StorageAccessError, match="deleting is forbidden"):
        remove(KeepingStore(Path(store.uri)), IDS, "asked for")
    assert shown_in(store) >= set(IDS)
    remove(store, IDS, "asked for")
    assert shown_in(store) == set(range(20)) - set(IDS) and found(store) == []


def test_mlflows_copy_of_the_contact_sheet_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, store = make_run(tmp_path)
    for model in (config.model, "models:/digits/1"):
        store.write("manifest.json", store.read("manifest.json").replace(config.model.encode(), model.encode()))
        assert main(["remove", store.uri, "--ids", "1", "--reason", "asked for"]) == 0
        assert ("MLflow may have a contact_sheet.png" in capsys.readouterr().out) is model.startswith("models:/")
