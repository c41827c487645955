"""What the driver does every second while a group of workers runs: shows how it stands, and asks it to leave off.

A group is asked to leave, after a checkpoint, when there is room for more workers, when a node of it is about to go, or
when the driver itself is to end. A group that makes no step for long is asked where it stands, and ended.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray

from pipeline.cluster_nodes import silent_nodes
from pipeline.progress import Progress, format_duration, say
from pipeline.redact import redact
from pipeline.training.driver.places import Places
from pipeline.training.side_work import SideWork
from pipeline.training.stop_request import StopRequest
from pipeline.training.train_board import BoardState, Orders, Phase

_LOOK_INTERVAL_S = 1.0
_ANSWER_TIMEOUT_S = 10.0
_NO_DEADLINE_S = 120.0  # what Ray Train assumes of a drain without one
_LAST_MOMENT_S = 20.0
_NUM_STACK_LINES = 24
_START_AND_END_FACTOR = 2
_ASK_AGAIN_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupTerms:
    """Under which terms a group works."""

    number: int
    """The group's number in this driver, from 1."""
    num_workers: int
    """Its workers."""
    min_workers: int
    """Fewest workers that training goes on with."""
    max_workers: int
    """Most workers."""
    resources: Mapping[str, float]
    """What one worker needs, by Ray's names."""
    resize_interval_s: float
    """Least seconds between the start of a group and the end that makes room for a larger one."""
    hang_timeout_s: float
    """Seconds without a step after which a group counts as hung."""


class GroupWatch:
    """Watches one group.

    Args:
        board: Handle of the run's board.
        progress: Shows the steps.
        stop: Whether the driver is to end.
        keep_stacks: Takes the stacks of a hung group, as text.
        on_read: Told what was read, every second.
        terms: Of the group.
        shown_step: Steps that `progress` has shown.
    """

    def __init__(
        self,
        board: Any,
        progress: Progress,
        stop: StopRequest,
        keep_stacks: Callable[[str], None],
        on_read: Callable[[BoardState], object],
        terms: GroupTerms,
        shown_step: int,
    ) -> None:
        """Nothing is watched before `begin`."""
        self._board, self._progress, self._stop, self._keep_stacks = board, progress, stop, keep_stacks
        self._terms, self._shown_step, self._on_read = terms, shown_step, on_read
        self.state = BoardState(step=shown_step)
        """As last read."""
        self.leaving: str | None = None
        """Why the group was asked to leave; None: it was not."""
        self.hang: str | None = None
        """What was found of the group, if it made no step for long and was ended."""
        self._drain: tuple[int, tuple[str, ...]] | None = None
        self._room: Places | None = None
        self._started_s = self._asked_s = time.monotonic()
        self._side_work = SideWork("watching the workers", say)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="group-watch", daemon=True)

    def begin(self) -> None:
        """The group is about to start."""
        ray.get(self._board.begin_group.remote(self._terms.number))
        self._thread.start()

    def end(self) -> None:
        """The group has ended: read what it left, and give back what was reserved for the next."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(ray.exceptions.RayError):  # what was read last must do then
            self._read()
        if self._room is not None:
            self._room.release()

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_INTERVAL_S):
            for look in (self._look_for_stop, self._read, self._tell, self._look):
                with self._side_work.attempt(self.state.step):  # whatever goes wrong once, the next look may succeed
                    look()

    def _read(self) -> None:
        self.state = state = ray.get(self._board.read.remote(), timeout=_ANSWER_TIMEOUT_S)
        for line in state.lines:
            say(line)
        self._progress.advance(state.step - self._shown_step, state.note)
        self._shown_step = state.step

    def _tell(self) -> None:
        self._on_read(self.state)

    def _look(self) -> None:
        if self.leaving is None:
            self._look_for_drain(self._terms)
        if self.leaving is None:
            self._look_for_room(self._terms)
        # A start imports, restores, compiles and waits for the first batch, and an end writes: longer than a step.
        limit_s = self._terms.hang_timeout_s * (1 if "training" in self._phases() else _START_AND_END_FACTOR)
        if self.hang is None and self._phases() and self.state.stuck_s > limit_s:
            self._end_hung()

    def _look_for_stop(self) -> None:
        if self.leaving is None and (reason := self._stop.reason) is not None:
            self._leave(reason)

    def _phases(self) -> set[Phase]:
        """What the workers do that have not returned yet."""
        return {member.phase for member in self.state.members.values()} - {"returned"}

    def _leave(self, reason: str) -> None:
        ray.get(self._board.order.remote(Orders.LEAVE), timeout=_ANSWER_TIMEOUT_S)
        self.leaving = reason

    def _look_for_room(self, terms: GroupTerms) -> None:
        """Growing costs a restart: not before the group has trained for a while."""
        missing = terms.max_workers - terms.num_workers
        now_s = time.monotonic()
        # While it starts it has not got its own places yet; and what is reserved nobody else can use.
        is_time = "training" in self._phases() and now_s - self._started_s >= terms.resize_interval_s
        if missing == 0 or self.state.drain_deadline_ms is not None or not is_time:
            return
        if self._room is not None and now_s - self._asked_s >= _ASK_AGAIN_S and not self._room.num_given():
            self._room.release()  # a node that did not answer then may answer now
            self._room = None
        if self._room is None:
            self._room, self._asked_s = Places(terms.resources, missing, silent_nodes()), now_s
        if given := self._room.num_given():
            self._leave(f"there is room for {terms.num_workers + given} workers")

    def _look_for_drain(self, terms: GroupTerms) -> None:
        """Save at once; leave as soon as others can go on, and in the last moment in any case."""
        deadline_ms = self.state.drain_deadline_ms
        if deadline_ms is None:
            return
        drain = (deadline_ms, self.state.draining_nodes)
        if drain != self._drain:  # the first, or another node too
            left_s = deadline_ms / 1000 - time.time() if deadline_ms else _NO_DEADLINE_S
            self._leave_at_s = time.monotonic() + left_s - _LAST_MOMENT_S
            ray.get(self._board.order.remote(Orders.SAVE), timeout=_ANSWER_TIMEOUT_S)
            if self._room is not None:
                self._room.release()
            self._room = Places(terms.resources, terms.max_workers, silent_nodes())
            say(f"a node of the workers goes in {left_s:.0f} s: saving a checkpoint")
            self._drain = drain
        assert self._room is not None
        staying = terms.num_workers - self._num_draining()
        if staying + self._room.num_given() >= terms.min_workers or time.monotonic() >= self._leave_at_s:
            self._leave("a node of the workers goes")

    def _num_draining(self) -> int:
        nodes = set(self.state.draining_nodes)
        return sum(member.node_id in nodes for member in self.state.members.values())

    def _end_hung(self) -> None:
        """Ask each worker where it stands, say it, and end all of them."""
        members = self.state.members
        step = max(member.step for member in members.values())
        stuck_s = self.state.stuck_s
        ray.get(self._board.want_stacks.remote(), timeout=_ANSWER_TIMEOUT_S)
        asked_s = time.monotonic()
        while len(self.state.stacks) < len(members) and time.monotonic() - asked_s < _ANSWER_TIMEOUT_S:
            time.sleep(_LOOK_INTERVAL_S)
            self._read()
        if self.state.stuck_s < stuck_s:
            return  # it goes on after all
        self.hang = f"no step for {format_duration(stuck_s)} after step {step}"
        say(f"{self.hang}: ending the workers; this is where they stand")
        texts = []
        for rank, member in sorted(members.items()):
            head = f"worker {rank}, process {member.pid} on node {member.node_id[:8]}, {member.phase}"
            text = self.state.stacks.get(rank)
            if text is None:
                say(f"{head}: gives no answer")
            else:
                say("\n".join([f"{head}:", *(f"    {line}" for line in text.splitlines()[-_NUM_STACK_LINES:])]))
            texts.append(f"{head}:\n{text or 'gives no answer'}\n")
        self._keep_stacks(redact("\n".join([self.hang, "", *texts])))
        for member in members.values():
            ray.kill(member.actor)
