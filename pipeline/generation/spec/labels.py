"""Which label, and whose noise, each image from nothing has: a rule that the spec names. Pure: no storage, no Ray.

A rule is a function of the sample id, never of how many images there are, so that growing a run relabels nothing. The
rows of a label plan are too many for a spec, which names them by the digest of their file; they travel beside it.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32, Int64, UInt8


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CallerIds:
    """Texts that the caller knows the images by, one behind the other: millions of them are two arrays."""

    text: UInt8[np.ndarray, " bytes"]
    """All of them, UTF-8."""
    ends: Int64[np.ndarray, " n"]
    """Where each ends in the text, bytes."""

    def __getitem__(self, row: int) -> str:
        """The text of a row; empty where it has none."""
        start = 0 if row == 0 else int(self.ends[row - 1])
        return self.text[start : int(self.ends[row])].tobytes().decode()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LabelPlan:
    """The rows of a label plan: image i is made as row i says."""

    labels: Int32[np.ndarray, " n"]
    """Class of each [N], N >= 1."""
    noise_ids: Int64[np.ndarray, " n"] | None = None
    """The id whose noise each has [N], in [0, 2^48); None: its own."""
    caller_ids: CallerIds | None = None
    """What the caller calls each; None: nothing."""

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.labels)

    def row(self, sample_id: int) -> int:
        """The row of an image. Ids beyond the last, which fill batches, go round."""
        return sample_id % len(self.labels)

    def noise_id(self, sample_id: int) -> int:
        """The id whose noise an image has."""
        row = self.row(sample_id)
        return row if self.noise_ids is None else int(self.noise_ids[row])

    @property
    def repeats_noise(self) -> bool:
        """Whether two images have the same noise, so that they were not drawn independently of each other."""
        return self.noise_ids is not None and len(np.unique(self.noise_ids)) < len(self.noise_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelRule(abc.ABC):
    """How an image's label follows from its id."""

    name: str
    """Which rule."""

    @abc.abstractmethod
    def turn(self, num_classes: int | None) -> int | None:
        """How many labels come one after the other, over and over; None where none do.

        Args:
            num_classes: Classes of the model; None for a model without.
        """

    @abc.abstractmethod
    def labels(self, ids: range, num_classes: int | None, plan: LabelPlan | None) -> list[int | None]:
        """The class to make for each id.

        Args:
            ids: Sample ids; of a plan also ids beyond its last.
            num_classes: Classes of the model; None for a model without.
            plan: The rows, for a label plan.

        Returns:
            Classes [B]; None for models without classes.
        """

    def noise_ids(self, ids: range, plan: LabelPlan | None) -> Sequence[int]:
        """The id [B] whose noise each image has; arguments as `labels`."""
        return ids

    def meta(self, sample_id: int, plan: LabelPlan | None) -> dict[str, Any]:
        """What the metadata of an image says beside its label; arguments as `labels`."""
        return {}


@dataclass(frozen=True, kw_only=True, slots=True)
class IdModuloClasses(LabelRule):
    """All classes in turn."""

    name: Literal["id_modulo_classes"] = "id_modulo_classes"
    """All classes in turn: the label is the id modulo their number."""

    def turn(self, num_classes: int | None) -> int | None:
        """See LabelRule.turn."""
        return num_classes

    def labels(self, ids: range, num_classes: int | None, plan: LabelPlan | None) -> list[int | None]:
        """See LabelRule.labels."""
        return [None if num_classes is None else sample_id % num_classes for sample_id in ids]


@dataclass(frozen=True, kw_only=True, slots=True)
class IdModuloChosenClasses(LabelRule):
    """Some classes in turn."""

    name: Literal["id_modulo_chosen_classes"] = "id_modulo_chosen_classes"
    """Some classes in turn: the label is classes[id modulo their number]."""
    classes: tuple[int, ...]
    """Which, in the order in which they take turns."""

    def __post_init__(self) -> None:
        """Refuse a choice of nothing, or of one class twice."""
        if not self.classes or len(set(self.classes)) < len(self.classes) or min(self.classes) < 0:
            raise ValueError(f"classes: at least one, each once and at least 0, got {self.classes}; choose others")

    def turn(self, num_classes: int | None) -> int | None:
        """See LabelRule.turn."""
        return len(self.classes)

    def labels(self, ids: range, num_classes: int | None, plan: LabelPlan | None) -> list[int | None]:
        """See LabelRule.labels."""
        return [self.classes[sample_id % len(self.classes)] for sample_id in ids]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedLabels(LabelRule):
    """Each label, and the noise that it goes with, as the rows of a file say."""

    name: Literal["label_plan"] = "label_plan"
    """Each label as a row of a file says."""
    file_sha256: str
    """Digest of the file's bytes, 64 hex digits."""
    num_rows: int
    """Rows, and so images, of a run; padding begins again at the first."""

    def turn(self, num_classes: int | None) -> int | None:
        """See LabelRule.turn."""
        return None

    def labels(self, ids: range, num_classes: int | None, plan: LabelPlan | None) -> list[int | None]:
        """See LabelRule.labels."""
        rows = self._rows_of(plan)
        return [int(rows.labels[rows.row(sample_id)]) for sample_id in ids]

    def noise_ids(self, ids: range, plan: LabelPlan | None) -> Sequence[int]:
        """See LabelRule.noise_ids."""
        return [self._rows_of(plan).noise_id(sample_id) for sample_id in ids]

    def meta(self, sample_id: int, plan: LabelPlan | None) -> dict[str, Any]:
        """See LabelRule.meta: the id of the noise, and the caller's own if the file has such a column."""
        rows = self._rows_of(plan)
        meta: dict[str, Any] = {"noise_id": rows.noise_id(sample_id)}
        if rows.caller_ids is not None:
            meta["id"] = rows.caller_ids[rows.row(sample_id)]
        return meta

    def _rows_of(self, plan: LabelPlan | None) -> LabelPlan:
        assert plan is not None and len(plan) == self.num_rows, "the rows travel beside the spec"
        return plan


AnyLabelRule = IdModuloClasses | IdModuloChosenClasses | PlannedLabels
"""One of the rules."""
