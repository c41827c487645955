"""Snapshots of power-function averages, taken during training, from which an average of any length is made afterwards.

The files of a snapshot lie in a folder whose name holds their digest, `step-SSSSSSSSS-<digest>/`, and are read back and
compared before the snapshot counts. Which snapshots a run consists of stands in its checkpoints, each of which names
all that were taken on the way to it: what a killed attempt took after its last checkpoint is named by none and is never
mixed with what the next attempt takes at the same steps, whether or not the bytes are equal.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor

from ddpm import PowerProfile
from pipeline.progress import say
from pipeline.stores.remover import Remover
from pipeline.stores.storage import ObjectStore, join_uri, open_store
from pipeline.training.checkpoints.checkpoint_files import FileRecord, PieceWriter, encode_tensors, read_file
from pipeline.training.checkpoints.checkpoint_records import parse_stored

SNAPSHOTS_FOLDER = "ema_snapshots"
_DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class PostHocEmaConfig:
    """Moving averages whose length is chosen after training (Karras et al. 2024); jobs/ema.py makes them."""

    snapshot_interval_steps: int = 0
    """Steps between snapshots; the last step takes one too. 0: none. Some hundreds in all are plenty, 32 are enough."""
    sigma_rels: tuple[float, ...] = (0.05, 0.10)
    """Lengths of the averages that are tracked, as shares of the training so far; each is a copy of the network beside
    the first worker's, and one file per snapshot."""
    dtype: Literal["float32", "float16"] = "float32"
    """Precision of the snapshots. float16 halves them, and what is made of them has about 300 times the error."""

    def __post_init__(self) -> None:
        if self.snapshot_interval_steps < 0:
            raise ValueError(f"snapshot_interval_steps: at least 0, got {self.snapshot_interval_steps}; 0 takes none")
        if not self.sigma_rels or len(set(self.sigma_rels)) < len(self.sigma_rels):
            raise ValueError(f"sigma_rels: distinct and at least one, got {self.sigma_rels}; 0.05 and 0.10 are usual")
        for sigma_rel in self.sigma_rels:
            PowerProfile(num_images=1, sigma_rel=sigma_rel)

    @property
    def tracked(self) -> tuple[float, ...]:
        """The lengths that a run tracks; none where it takes no snapshots."""
        return self.sigma_rels if self.snapshot_interval_steps else ()


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotRecord:
    """One snapshot."""

    step: int
    """Global batches behind it."""
    num_images: int
    """Images that its averages have taken in."""
    prefix: str
    """Its folder, relative to the store of snapshots."""
    sigma_rels: tuple[float, ...]
    """Lengths of its averages."""
    files: tuple[FileRecord, ...]
    """Their files, in the same order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotList:
    """The snapshots behind a checkpoint."""

    format_version: int = 2
    """Version of this record's form."""
    snapshots: tuple[SnapshotRecord, ...]
    """In the order of the steps."""


def parse_snapshots(data: bytes, where: str) -> tuple[SnapshotRecord, ...]:
    """The snapshots that a `SnapshotList` names.

    Args:
        data: Its JSON.
        where: The file's name, for messages.

    Raises:
        CheckpointError: If it is damaged.
        FormatVersionError: If it is of another version.
    """
    return parse_stored(SnapshotList, data, where).snapshots


class SnapshotStore:
    """The snapshots of one training run.

    Args:
        store: Object store rooted at the run's folder of snapshots.
        report: Takes the line about what cannot be deleted.
    """

    def __init__(self, store: ObjectStore, report: Callable[[str], None] = say) -> None:
        """Use the folder that `store` is rooted at."""
        self._store, self._report = store, report

    @classmethod
    def of_run(cls, output: str, report: Callable[[str], None] = say) -> "SnapshotStore":
        """The snapshots of the run in an output folder."""
        return cls(open_store(join_uri(output, SNAPSHOTS_FOLDER)), report)

    def save(
        self, step: int, num_images: int, averages: Mapping[float, Mapping[str, Tensor]], dtype: str
    ) -> SnapshotRecord:
        """Write a snapshot and read it back; it counts once a checkpoint names it.

        Args:
            step: Global batches behind it.
            num_images: Images that the averages have taken in.
            averages: State dicts by length.
            dtype: "float32" or "float16", for what is floating-point.

        Raises:
            CheckpointError: If what was read back differs from what was written.
        """
        files = {_file_name(s): _encode(state, _DTYPES[dtype]) for s, state in averages.items()}
        content = hashlib.sha256("".join(hashlib.sha256(data).hexdigest() for data in files.values()).encode())
        prefix = f"step-{step:09d}-{content.hexdigest()[:16]}"
        written = {file.name: file for file in PieceWriter(self._store, prefix).write([lambda: files])}
        return SnapshotRecord(
            step=step,
            num_images=num_images,
            prefix=prefix,
            sigma_rels=tuple(averages),
            files=tuple(written[_file_name(sigma_rel)] for sigma_rel in averages),
        )

    def read(self, record: SnapshotRecord, sigma_rel: float) -> dict[str, Tensor]:
        """One average of a snapshot.

        Raises:
            CheckpointError: If its file is missing, cut short or altered.
        """
        file = record.files[record.sigma_rels.index(sigma_rel)]
        return safetensors.torch.load(read_file(self._store, record.prefix, file))

    def remove_all_but(self, records: Collection[SnapshotRecord]) -> int:
        """Remove what killed attempts left; returns how many files. What cannot be deleted is said.

        Args:
            records: The snapshots of the finished run.
        """
        kept = {f"{record.prefix}/{file.name}" for record in records for file in record.files}
        left = [info.key for info in self._store.list() if info.key not in kept]
        return Remover(self._store, self._report).remove(left)


def _file_name(sigma_rel: float) -> str:
    return f"sigma_rel-{sigma_rel}.safetensors"


def _encode(state: Mapping[str, Tensor], dtype: torch.dtype) -> bytes:
    """Copies, because tied weights share their memory and safetensors refuses that."""
    return encode_tensors(
        {
            name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None, copy=True).contiguous()
            for name, tensor in state.items()
        }
    )
