"""All ranks go on from one checkpoint, of which each file is read once; three real ranks on two pretended nodes."""

import hashlib
import json
import multiprocessing
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from ddpm import ImportanceSampler, build_network
from pipeline.errors import CheckpointError, FormatVersionError, PipelineError, StorageError
from pipeline.stores.local_store import LocalStore
from pipeline.training.checkpoints.checkpoint_files import FileRecord
from pipeline.training.checkpoints.checkpoint_records import CheckpointRecord
from pipeline.training.checkpoints.checkpoint_store import CheckpointStore
from pipeline.training.checkpoints.state_files import encode_state
from pipeline.training.train_config import OptimizerConfig
from pipeline.training.worker.restore import plan_reads, restore_newest
from pipeline.training.worker.training_state import TrainingState
from tests.pipeline.training.small_runs import CARD, MODEL

pytestmark = pytest.mark.xdist_group("restore")  # the ranks are started once for all

READERS = (True, False, True)
_LATER = (b'"format_version":2', b'"format_version":3')
UNUSABLE = {
    "later state": ("state.json", *_LATER, "state.json: has format_version 3"),
    "another step": ("state.json", b'"step":2', b'"step":1', "state.json: is of step 1, its record of 2"),
    "later card": ("model.json", *_LATER, "model.json: has format_version 3"),
    "later average": ("ema-20.json", *_LATER, "ema-20.json: has format_version 3"),
    "other weights": ("model.json", b'"weights_sha256":"', b'"weights_sha256":"0', "weights.safetensors is not the"),
    "no tensors": ("importance.safetensors", b'"dtype"', b'"dtypo"', "importance.safetensors: is no safetensors file"),
    "other source": ("model.json", b'"source_sha256":null', b'"source_sha256":"0"', "source.json is not the one"),
}
"""Checkpoints that are as their records say: the file that is another, what it says instead, and the line about it."""
OPTIMIZER = OptimizerConfig(
    learning_rate=0.01, warmup_steps=0, ema_halflife_images=100, more_ema_halflives_images=(20,)
)
SHARED = ("train_weights", "optimizer", "importance")


class CountingStore(LocalStore):
    """Notes what is read, and fails where it is told to."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: list[str] = []
        self.failing = ""

    def read(self, key: str) -> bytes:
        self.reads.append(key)
        if self.failing and self.failing in key:
            raise StorageError(f"{key}: no answer")
        return super().read(key)


def make_state(seed: int, *, rank: int = 0, world: int = 1) -> TrainingState:
    return TrainingState(
        build_network(MODEL, seed=seed),
        OPTIMIZER,
        sigma_rels=(0.05,),
        importance=ImportanceSampler(20),
        rank=rank,
        world=world,
    )


def trained(steps: int) -> TrainingState:
    state = make_state(0)
    assert state.importance is not None
    while state.step < steps:
        generator = torch.Generator().manual_seed(state.step)
        for parameter in state.network.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        state.apply_gradient(16)
        state.importance.update(torch.arange(20), torch.full((20,), float(state.step)))
    return state


def save(
    checkpoints: CheckpointStore, steps: int, *, alter: str = "", old: bytes = b"", new: bytes = b""
) -> CheckpointRecord:
    pieces = encode_state(trained(steps).parts(), CARD, None, (), max_file_bytes=8000)
    files = {name: data for piece in pieces for name, data in piece().items()} | {"config.toml": b"x"}
    if alter:
        assert old in files[alter]
        files[alter] = files[alter].replace(old, new)
    return checkpoints.save(steps, [lambda: files])


def summary(state: TrainingState, rank: int = 0) -> dict[str, str]:
    """What a rank has, and rank 0 of the averages, by digests."""
    state.averages.gather()
    tensors = state._shared_tensors() | (state.averages.tensors() if rank == 0 else {})
    found = {"position": str((state.step, state.skipped_steps, state.averages.num_images))}
    for file, named in tensors.items():
        data = b"".join(name.encode() + tensor.numpy().tobytes() for name, tensor in sorted(named.items()))
        found[file] = hashlib.sha256(data).hexdigest()
    return found


def go_on(rank: int, folder: str) -> None:
    """One rank: restores in each of the prepared folders, and writes what came of it."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=3)
    results: dict[str, Any] = {}
    for case in sorted(path.name for path in Path(folder, "cases").iterdir()):
        store, lines = CountingStore(Path(folder, "cases", case)), list[str]()
        if case == "unanswered" and rank == 2:
            store.failing = "step-000000002"
        state, error, step = make_state(9, rank=rank, world=3), "", None
        untouched = summary(make_state(9, rank=rank, world=3), rank)
        try:
            record = restore_newest(
                state,
                CheckpointStore(store, lines.append),
                is_reader=READERS[rank],
                device=torch.device("cpu"),
                may_start_anew=case == "start anew",
            )
            step = None if record is None else record.step
        except PipelineError as raised:
            error = f"{type(raised).__name__}: {raised}"
        results[case] = {
            "step": step, "error": error, "lines": lines, "state": summary(state, rank), "reads": store.reads,
            "is_untouched": summary(state, rank) == untouched and state.step == 0,
        }  # fmt: skip
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What came of it, by rank and case."""
    folder = tmp_path_factory.mktemp("restore")
    for case in ("good", "flipped", "flipped average", "flipped card", "unanswered", "start anew", "all damaged"):
        checkpoints = CheckpointStore(LocalStore(folder / "cases" / case))
        records = [save(checkpoints, steps) for steps in (1, 2)]
        if case == "flipped":
            plan = plan_reads(records[1], trained(2).files, [0, 2])
            flip(folder, case, records[1], next(file.name for _, file, rank in plan if rank == 2))
        elif case == "flipped average":
            flip(folder, case, records[1], "ema-20.safetensors")
        elif case == "flipped card":
            flip(folder, case, records[1], "model.json")
        elif case in ("start anew", "all damaged"):
            for record in records:
                flip(folder, case, record, "state.json")
    (folder / "cases" / "nothing").mkdir()
    for case, (name, old, new, _) in UNUSABLE.items():
        checkpoints = CheckpointStore(LocalStore(folder / "cases" / case))
        save(checkpoints, 1)
        save(checkpoints, 2, alter=name, old=old, new=new)
    # The server of forks imports once what else each rank would.
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    torch.multiprocessing.start_processes(go_on, args=(str(folder),), nprocs=3, start_method="forkserver")
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(3)]


def flip(folder: Path, case: str, record: CheckpointRecord, name: str) -> None:
    path = folder / "cases" / case / record.prefix / name
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def shared_part(state: dict[str, str]) -> dict[str, str]:
    return {name: sha for name, sha in state.items() if name.startswith(SHARED)}


def test_every_rank_has_the_state_and_all_of_them_together_the_averages(results: list[dict[str, Any]]) -> None:
    expected = summary(trained(2))
    for result in results:
        assert result["good"]["step"] == 2 and result["good"]["lines"] == []
        assert shared_part(result["good"]["state"]) == shared_part(expected) != {}
    assert results[0]["good"]["state"] == expected


def test_each_file_is_read_once_and_nothing_that_nobody_needs(results: list[dict[str, Any]]) -> None:
    reads = [[key.partition("/")[2] for key in result["good"]["reads"]] for result in results]
    assert reads[1] == [], "the second rank of a node reads nothing"
    assert reads[2] and all(name.endswith(".safetensors") for name in reads[2])
    assert {"state.json", "ema_snapshots.json"} <= set(reads[0])
    counts = Counter(reads[0] + reads[2])
    assert {"weights.safetensors", "ema-20.safetensors"} <= counts.keys()
    assert any(name.startswith("power-ema-0.05-00001-of-") for name in counts)
    assert set(counts.values()) == {1}
    assert "config.toml" not in counts and {"model.json", "ema-20.json"} <= counts.keys()
    assert len([name for name in counts if name.startswith("optimizer-")]) > 3


@pytest.mark.parametrize(
    ("case", "file"),
    [("flipped", "safetensors"), ("flipped average", "ema-20.safetensors"), ("flipped card", "model.json")],
)
def test_damage_that_one_rank_finds_turns_all_to_the_one_before(
    results: list[dict[str, Any]], case: str, file: str
) -> None:
    expected = summary(trained(1))
    for result in results:
        assert result[case]["step"] == 1
        assert shared_part(result[case]["state"]) == shared_part(expected)
    (line,) = results[0][case]["lines"]
    assert "checkpoint of step 2 is damaged" in line and file in line
    assert results[1][case]["lines"] == results[2][case]["lines"] == [], "rank 0 says it"
    assert results[0][case]["state"] == expected


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_is_whole_and_of_no_use_is_left_out_too(results: list[dict[str, Any]], case: str) -> None:
    assert [result[case]["step"] for result in results] == [1, 1, 1]
    (line,) = results[0][case]["lines"]
    what = "of another version" if "later" in case else "damaged"
    assert f"step 2 is {what}" in line and UNUSABLE[case][3] in line


def test_a_model_that_cannot_be_registered_is_not_gone_on_from(tmp_path: Path) -> None:
    """Else a run at its last step would find nothing to train, and nothing to register, for ever."""
    for case, (name, old, new, _) in UNUSABLE.items():
        checkpoints = CheckpointStore(LocalStore(tmp_path / case), lambda _: None)
        record = save(checkpoints, 2, alter=name, old=old, new=new)
        if name == "model.json":
            assert checkpoints.read_finished(2) is None
            with pytest.raises((CheckpointError, FormatVersionError)):
                checkpoints.check_cards(record)


def test_a_store_that_does_not_answer_one_rank_is_no_damage(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["unanswered"]["error"].startswith("StorageError: step-000000002")
        assert result["unanswered"]["lines"] == []


def test_where_no_checkpoint_can_be_used_nobody_begins_anew_unasked(results: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(results):
        assert result["all damaged"]["error"].startswith("CheckpointError: ")
        assert "--start-over" in result["all damaged"]["error"]
        for case in ("start anew", "nothing"):
            assert result[case]["step"] is None and result[case]["error"] == "" and result[case]["is_untouched"]
        assert len(result["start anew"]["lines"]) == (2 if rank == 0 else 0)


def record_of(**sizes: int) -> CheckpointRecord:
    files = (FileRecord(name=f"{name}.safetensors", size_bytes=size, sha256="0") for name, size in sizes.items())
    return CheckpointRecord(step=1, prefix="step-000000001-0", files=tuple(files))


def test_reading_is_dealt_by_bytes() -> None:
    sizes = {f"optimizer-{k:05d}-of-00006": 10 for k in range(1, 7)}
    record = record_of(train_weights=30, weights=40, **sizes)
    names = ("train_weights.safetensors", "optimizer.safetensors", "weights.safetensors")
    plan = plan_reads(record, names, [0, 4, 8])
    load = Counter[int]()
    for _, file, reader in plan:
        load[reader] += file.size_bytes
    assert max(load.values()) <= 50 and sum(load.values()) == 130 and load.keys() == {0, 4, 8}
    assert {name for name, _, _ in plan} == set(names)
    assert {reader for _, _, reader in plan_reads(record, names, [3])} == {3}
    with pytest.raises(CheckpointError, match=r"has no importance\.safetensors"):
        plan_reads(record, ("importance.safetensors",), [0])


class HangingStore(LocalStore):
    """The first large file that is asked for cannot be read; the others are waited for."""

    def __init__(self, root: Path, error: BaseException) -> None:
        super().__init__(root)
        self.error, self.answers, self.hanging = error, threading.Event(), threading.Event()
        self.first = threading.Lock()

    def read(self, key: str) -> bytes:
        if key.endswith(".safetensors"):
            if self.first.acquire(blocking=False):
                self.hanging.wait()
                raise self.error
            self.hanging.set()
            self.answers.wait()
        return super().read(key)


@pytest.mark.parametrize("error", [StorageError("no answer"), KeyboardInterrupt()], ids=["unanswered", "Ctrl-C"])
def test_a_read_that_has_failed_waits_for_no_other(tmp_path: Path, error: BaseException) -> None:
    save(CheckpointStore(LocalStore(tmp_path / "checkpoints")), 1)
    store = HangingStore(tmp_path / "checkpoints", error)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        with pytest.raises(type(error)):
            restore_newest(make_state(9), CheckpointStore(store), is_reader=True, device=torch.device("cpu"))
        assert not store.answers.is_set()
    finally:
        store.answers.set()
        torch.distributed.destroy_process_group()
