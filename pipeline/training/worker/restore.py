"""Going on from a checkpoint on all ranks: each file is read once, by one reader per node, and sent to the others.

Rank 0 chooses the checkpoint by the records and the files' lengths. The first rank of each node reads and verifies its
share of the files. When everybody knows that all was good, the tensors are broadcast; when anybody found damage, all
turn to the checkpoint before.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from pipeline.errors import CheckpointError, FormatVersionError, PipelineError
from pipeline.stores.object_store import one_line
from pipeline.training.checkpoints.checkpoint_files import FileRecord
from pipeline.training.checkpoints.checkpoint_records import CheckpointRecord
from pipeline.training.checkpoints.checkpoint_store import CheckpointStore
from pipeline.training.checkpoints.ema_snapshots import SnapshotRecord, parse_snapshots
from pipeline.training.checkpoints.state_files import (
    SNAPSHOTS_JSON,
    Position,
    decode_tensors,
    parts_of,
)
from pipeline.training.worker.training_state import TrainingState

_IN_PARALLEL = 3


ReadPlan = tuple[tuple[str, FileRecord, int], ...]
"""What ranks need: its name in `StateParts.tensors`, the file, the rank that reads it for all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Chosen:
    """What rank 0 tells the others to read."""

    record: CheckpointRecord
    plan: ReadPlan
    position: Position


def plan_reads(record: CheckpointRecord, wanted: Sequence[str], readers: Sequence[int]) -> ReadPlan:
    """Deal the files over the readers, so that each reads about as many bytes.

    Args:
        record: The checkpoint.
        wanted: What is needed, by its names in `StateParts.tensors`.
        readers: Ranks that read for all.

    Raises:
        CheckpointError: If the checkpoint has not got something.
    """
    files = {file.name: file for file in record.files}
    found: list[tuple[str, FileRecord]] = []
    for name in wanted:
        parts = parts_of(name, files)
        if not parts:
            raise CheckpointError(f"{record.prefix}: has no {name}")
        found += [(name, files[part]) for part in parts]
    load = dict.fromkeys(readers, 0)
    dealt: dict[str, int] = {}
    for _, file in sorted(found, key=lambda pair: (-pair[1].size_bytes, pair[1].name)):
        reader = min(load, key=lambda rank: (load[rank], rank))
        load[reader] += file.size_bytes
        dealt[file.name] = reader
    return tuple((name, file, dealt[file.name]) for name, file in found)


def restore_newest(
    state: TrainingState,
    checkpoints: CheckpointStore,
    *,
    is_reader: bool,
    device: torch.device,
    may_start_anew: bool = False,
) -> CheckpointRecord | None:
    """Collective: every rank goes on from the newest checkpoint that all of them could read.

    Args:
        state: This rank's state.
        checkpoints: The run's checkpoints; its lines are those of rank 0.
        is_reader: Whether this rank reads for all: one per node.
        device: The state's device, through which tensors are sent.
        may_start_anew: Begin at step 0 where there are checkpoints and none can be used.

    Returns:
        What the state now is; None if there is no checkpoint, and the state is untouched.

    Raises:
        CheckpointError: If there are checkpoints and none can be used, or one belongs to another network.
        StorageError: If the store does not answer.
    """
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        flags = [False] * dist.get_world_size()
        dist.all_gather_object(flags, is_reader)
        choices = _choices(state, checkpoints, [rank for rank, reads in enumerate(flags) if reads], may_start_anew)
        while True:
            chosen = _from_rank_0(choices)
            if chosen is None:
                return None
            held, fault = _read(checkpoints, chosen, state)
            faults: list[PipelineError | None] = [None] * len(flags)
            dist.all_gather_object(faults, fault)
            if not any(faults):
                state.restore(chosen.position, _share(chosen.plan, held, device), held.snapshots)
                return chosen.record
            first = next(fault for fault in faults if fault is not None)
            if not isinstance(first, CheckpointError | FormatVersionError):
                raise first
            if dist.get_rank() == 0:
                checkpoints.leave_out(chosen.record.step, first)


def _choices(
    state: TrainingState, checkpoints: CheckpointStore, readers: Sequence[int], may_start_anew: bool
) -> Iterator[_Chosen | None]:
    """What to read, the newest first, and None where training begins at step 0; for rank 0, which alone asks."""
    for record in checkpoints.candidates():
        try:
            plan = plan_reads(record, state.files, readers)
            position = checkpoints.read_position(record)
            yield _Chosen(record=record, plan=plan, position=position)
        except (CheckpointError, FormatVersionError) as error:
            checkpoints.leave_out(record.step, error)
    if not checkpoints.is_empty() and not may_start_anew:
        raise CheckpointError(
            f"{checkpoints.root}: there are checkpoints and none can be used, as the lines above say; bring one back "
            "from a copy, or begin at step 0 with --start-over"
        )
    yield None


def _from_rank_0(choices: Iterator[_Chosen | None]) -> _Chosen | None:
    """Collective: rank 0's next choice; what goes wrong there is raised everywhere."""
    box: list[_Chosen | PipelineError | None] = [None]
    if dist.get_rank() == 0:
        try:
            box = [next(choices)]
        except PipelineError as error:
            box = [error]
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], PipelineError):
        raise box[0]
    return box[0]


@dataclass(kw_only=True, slots=True)
class _Held:
    """What one rank has read and verified."""

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """By file."""
    snapshots: tuple[SnapshotRecord, ...] = ()


def _read(checkpoints: CheckpointStore, chosen: _Chosen, state: TrainingState) -> tuple[_Held, PipelineError | None]:
    """This rank's share, or why it could not be read."""
    held, rank = _Held(), dist.get_rank()

    def tensors_of(file: FileRecord) -> dict[str, Tensor]:
        data = checkpoints.read(chosen.record, file.name)
        try:
            return decode_tensors(data)
        except SafetensorError as error:  # whole, and written so: other ranks must hear of it
            where = f"{checkpoints.uri(chosen.record)}/{file.name}"
            raise CheckpointError(f"{where}: is no safetensors file ({one_line(error)})") from error

    mine = [file for _, file, reader in chosen.plan if reader == rank]
    try:
        with _reading() as pool:
            held.tensors = dict(zip((file.name for file in mine), pool.map(tensors_of, mine)))
            if rank == 0:
                checkpoints.check_cards(chosen.record)  # what cannot be registered at the end is not gone on from
                if state.averages.is_tracking:
                    held.snapshots = parse_snapshots(checkpoints.read(chosen.record, SNAPSHOTS_JSON), SNAPSHOTS_JSON)
    except PipelineError as error:
        return held, error
    return held, None


@contextlib.contextmanager
def _reading() -> Iterator[ThreadPoolExecutor]:
    """A pool for reads that nobody waits for once one has failed, or at Ctrl-C: each may be patient for minutes."""
    pool = ThreadPoolExecutor(_IN_PARALLEL, thread_name_prefix="restore")
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _share(plan: ReadPlan, held: _Held, device: torch.device) -> dict[str, dict[str, Tensor]]:
    """Collective: the tensors of all files on every rank."""
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, file, reader in plan:
        tensors.setdefault(name, {}).update(_broadcast(held.tensors.pop(file.name, {}), reader, device))
    return tensors


def _broadcast(tensors: Mapping[str, Tensor], reader: int, device: torch.device) -> dict[str, Tensor]:
    """Collective: a reader's tensors on every rank, bit by bit."""
    box = [[(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]]
    dist.broadcast_object_list(box, src=reader)
    sent: dict[str, Tensor] = {}
    for name, shape, dtype in box[0]:
        if reader == dist.get_rank():
            tensor = tensors[name].to(device)
        else:
            tensor = torch.empty(shape, dtype=dtype, device=device)
        # As bytes: not every backend knows every type.
        dist.broadcast(tensor.reshape(-1).view(torch.uint8), src=reader)
        sent[name] = tensor
    return sent
