"""What the driver of a training run and its workers tell each other: a small actor on the driver's node.

Workers write where they stand, what they want to be said, and what went wrong; the driver reads it every second, and
leaves orders that each worker fetches with its next sign of life. Ray can forward what workers print, but only together
with everything else that they print.
"""

import contextlib
import enum
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.errors import PipelineError

Phase = Literal["starting", "training", "ending", "returned"]
"""What a worker does: it starts until its first step is behind it, and ends, and may have to write, after its last."""


class Orders(enum.IntFlag):
    """What a group of workers is asked to do between two steps; all ranks do it at the same one."""

    NONE = 0
    LOOK_FOR_PREEMPTION = 1
    SAVE = 2
    LEAVE = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One worker of a group, as it last was."""

    node_id: str
    """Its node."""
    pid: int
    """Its process there."""
    actor: Any
    """Its handle, to end it by."""
    step: int = -1
    """Steps that it has behind it; -1: it has not begun."""
    phase: Phase = "starting"
    """What it does."""
    num_waits: int = 0
    """How often it has waited for a server."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerFailure:
    """What a worker said that ended it."""

    rank: int
    """Which worker."""
    step: int
    """Steps that it had behind it."""
    error: PipelineError | None
    """The error, if it is one of this project's."""
    kind: str
    """Class of the error."""
    message: str
    """In one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """That too many steps were left out because something was not finite."""

    steps: tuple[int, ...]
    """Those steps."""
    message: str
    """In one line, with the samples."""


@dataclass(kw_only=True, slots=True)
class BoardState:
    """What the driver reads."""

    step: int
    """Steps done, as last shown."""
    note: str = ""
    """The latest loss, in words."""
    lines: list[str] = field(default_factory=list)
    """Lines to print, in order; each is handed out once."""
    members: dict[int, Member] = field(default_factory=dict)
    """The present group, by rank."""
    stuck_s: float = 0.0
    """Seconds since any worker of the group has made a step or changed its phase."""
    stacks: dict[int, str] = field(default_factory=dict)
    """Where the threads of a worker stood when it was asked, by rank."""
    failure: WorkerFailure | None = None
    """The first in the present group."""
    divergence: Divergence | None = None
    """Why the present group has left off."""
    drain_deadline_ms: int | None = None
    """When a node of the group goes, Unix time; 0: soon. None: no node goes, as far as is known."""
    draining_nodes: tuple[str, ...] = ()
    """Ids of the nodes that go."""
    checkpoint_step: int = -1
    """Of the newest checkpoint that a group has told of; -1: of none."""


class Board:
    """The actor's class; see `training_board`."""

    def __init__(self, step: int) -> None:
        """Begin at a step."""
        self._state, self._group = BoardState(step=step), 0
        self._orders, self._is_dump_wanted = Orders.NONE, False
        self._changed_s = time.monotonic()

    # ---- for workers; a group that was given up may still have living ones

    def update(self, group: int, step: int, note: str) -> None:
        """Show how far training has come."""
        if group == self._group:
            self._state.step, self._state.note = step, note

    def checkpointed(self, group: int, step: int) -> None:
        """Tell that a checkpoint stands."""
        if group == self._group:
            self._state.checkpoint_step = step

    def say(self, line: str) -> None:
        """Show a line."""
        self._state.lines.append(line)

    def join(self, group: int, rank: int, member: Member) -> None:
        """Be one of a group."""
        if group == self._group:
            self._state.members[rank] = member
            self._changed_s = time.monotonic()

    def beat(self, group: int, rank: int, step: int, phase: Phase, num_waits: int = 0) -> tuple[Orders, bool]:
        """A sign of life.

        Args:
            group: The worker's group.
            rank: Its rank.
            step: Steps that it has behind it.
            phase: What it does.
            num_waits: How often it has waited for a server so far: while it waits, it does not hang.

        Returns:
            Orders, for rank 0 to pass on; whether the stacks of all threads are wanted.
        """
        member = self._state.members.get(rank)
        if group != self._group or member is None:
            return Orders.NONE, False
        if (member.step, member.phase, member.num_waits) != (step, phase, num_waits):
            self._state.members[rank] = replace(member, step=step, phase=phase, num_waits=num_waits)
            self._changed_s = time.monotonic()
        orders = Orders.NONE
        if rank == 0:
            orders, self._orders = self._orders, self._orders & Orders.LEAVE
        return orders, self._is_dump_wanted and rank not in self._state.stacks

    def put_stacks(self, group: int, rank: int, text: str) -> None:
        """Answer the question for stacks."""
        if group == self._group:
            self._state.stacks[rank] = text

    def fail(self, group: int, failure: WorkerFailure) -> None:
        """Say what ends this worker; of several the first is kept, the others may follow from it."""
        if group == self._group and self._state.failure is None:
            self._state.failure = failure

    def diverge(self, group: int, divergence: Divergence) -> None:
        """Say why the group leaves off."""
        if group == self._group:
            self._state.divergence = divergence

    def drain(self, group: int, deadline_ms: int, nodes: tuple[str, ...]) -> None:
        """Say that nodes of the group go."""
        if group == self._group:
            self._state.drain_deadline_ms, self._state.draining_nodes = deadline_ms, nodes

    # ---- for the driver

    def begin_group(self, group: int) -> None:
        """Forget the group before."""
        self._group, self._orders, self._is_dump_wanted = group, Orders.NONE, False
        old = self._state
        self._state = BoardState(step=old.step, note=old.note, lines=old.lines, checkpoint_step=old.checkpoint_step)
        self._changed_s = time.monotonic()

    def order(self, orders: Orders) -> None:
        """Ask something of the group."""
        self._orders |= orders

    def want_stacks(self) -> None:
        """Ask each worker where its threads stand."""
        self._is_dump_wanted = True
        self._state.stacks = {}

    def read(self) -> BoardState:
        """Everything, and each line once."""
        state = replace(self._state, stuck_s=time.monotonic() - self._changed_s)
        self._state.lines = []
        return state


@contextlib.contextmanager
def training_board(step: int) -> Iterator[Any]:
    """The board of a run, for the duration of the block.

    Args:
        step: Steps done by earlier attempts.

    Yields:
        The actor's handle: methods of `Board`, with `.remote`.
    """
    # The driver's own node: the board must not be lost with a worker's.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board: Any = ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote(step)
    try:
        yield board
    finally:
        ray.kill(board)
