"""What a worker does beside training for the sake of its group: signs of life, and orders that all ranks follow alike.

A thread tells the board every second where the worker stands, and where its threads stand when the driver asks because
no step was made for long. Rank 0 fetches the driver's orders there. That all ranks follow an order between the same two
steps is agreed on with every step: a sum over ranks of a few bits that travels on the host, beside the step, and is
looked at one step later, so that nobody waits for it.
"""

import contextlib
import os
import sys
import threading
import time
import traceback
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import ray
import ray.train
import torch
import torch.distributed as dist

from pipeline.ray_errors import innermost, own_error
from pipeline.redact import redact
from pipeline.stores.object_store import one_line
from pipeline.stores.patience import num_waits
from pipeline.training.hang_timeout import peer_timeout_s
from pipeline.training.train_board import Divergence, Member, Orders, Phase, WorkerFailure
from pipeline.training.train_task import TrainTask

_BEAT_INTERVAL_S = 1.0
_PREEMPTION_INTERVAL_S = 5.0
_ANSWER_TIMEOUT_S = 10.0


class GroupControl:
    """One rank's part in its group; collective to make, and to use.

    Args:
        task: What the worker was given.
        rank: Its rank.
    """

    def __init__(self, task: TrainTask, rank: int) -> None:
        """Join the group on the board; signs of life begin."""
        self._board, self._group, self._rank = task.board, task.group, rank
        self._step = -1
        self._phase: Phase = "starting"
        self._wanted, self._wanted_lock = Orders.NONE, threading.Lock()
        self._sent: tuple[dist.Work, torch.Tensor] | None = None
        self._closed = threading.Event()
        context = ray.get_runtime_context()
        member = Member(node_id=context.get_node_id(), pid=os.getpid(), actor=context.current_actor)
        ray.get(self._board.join.remote(self._group, rank, member))
        self._thread = threading.Thread(target=self._beat, name="group-control", daemon=True)
        self._thread.start()
        try:
            # On the host whatever the network trains on: looking at it must not wait for a device.
            self._ranks = dist.new_group(backend="gloo", timeout=timedelta(seconds=peer_timeout_s(task.config.workers)))
        except BaseException as error:
            self.failed(error)
            self.close()
            raise

    def is_to_leave(self) -> bool:
        """Collective, before anything is read: whether the driver has changed its mind since it started the group."""
        orders, _ = ray.get(self._beat_once(), timeout=_ANSWER_TIMEOUT_S)
        bits = torch.tensor([int(orders)], dtype=torch.int64)
        dist.all_reduce(bits, group=self._ranks)
        return Orders.LEAVE in Orders(int(bits.item()))

    def begin(self, step: int) -> None:
        """Everything is made and restored; the first step may still wait for the data's readers to start."""
        self._step = step

    def agreed(self, step: int) -> Orders:
        """Collective, once before every step: the orders that all ranks follow now.

        Args:
            step: Steps that are behind this worker.
        """
        if step > self._step:
            self._phase, self._step = "training", step  # in this order: signs of life read the step first
        orders = self._received()
        if Orders.LEAVE not in orders:
            with self._wanted_lock:
                wanted, self._wanted = self._wanted, Orders.NONE
            bits = torch.tensor([int(wanted)], dtype=torch.int64)
            work = dist.all_reduce(bits, group=self._ranks, async_op=True)
            assert work is not None
            self._sent = work, bits
        return orders

    def end(self) -> None:
        """Collective: no more steps will be made; what is left to do may take its time."""
        self._received()
        self._show("ending")

    def failed(self, error: BaseException) -> None:
        """Tell the driver what ends this worker, before Ray does, and with its step."""
        own = own_error(error)
        reason = innermost(error)
        failure = WorkerFailure(
            rank=self._rank,
            step=self._step,
            error=own,
            kind=type(reason).__name__,
            message=redact(one_line(reason)),
        )
        with contextlib.suppress(Exception):  # the driver may be what has gone
            ray.get(self._board.fail.remote(self._group, failure), timeout=_ANSWER_TIMEOUT_S)

    def diverged(self, divergence: Divergence) -> None:
        """Tell the driver why the group leaves off."""
        ray.get(self._board.diverge.remote(self._group, divergence))

    def look_for_preemption(self) -> None:
        """Collective: tell the driver of a node that is about to go."""
        info = ray.train.get_preemption_info()
        if info is not None and self._rank == 0:
            self._board.drain.remote(self._group, info.deadline_ms or 0, tuple(info.preempted_node_ids))

    def close(self) -> None:
        """No more signs of life."""
        self._closed.set()
        self._thread.join(_ANSWER_TIMEOUT_S)
        self._show("returned")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.failed(error)
        self.close()

    def _show(self, phase: Phase) -> None:
        """Say at once what this worker does now: the next sign of life may never come."""
        self._phase = phase
        with contextlib.suppress(Exception):
            ray.get(self._beat_once(), timeout=_ANSWER_TIMEOUT_S)

    def _beat_once(self) -> Any:
        return self._board.beat.remote(self._group, self._rank, self._step, self._phase, num_waits())

    def _received(self) -> Orders:
        if self._sent is None:
            return Orders.NONE
        (work, bits), self._sent = self._sent, None
        work.wait()
        return Orders(int(bits.item()))

    def _beat(self) -> None:
        looked_s = time.monotonic()
        while not self._closed.wait(_BEAT_INTERVAL_S):
            with contextlib.suppress(Exception):  # no sign of life is never a reason to end
                orders, is_dump_wanted = ray.get(self._beat_once(), timeout=_ANSWER_TIMEOUT_S)
                if is_dump_wanted:
                    self._board.put_stacks.remote(self._group, self._rank, stacks())
                if self._rank == 0 and time.monotonic() - looked_s >= _PREEMPTION_INTERVAL_S:
                    looked_s = time.monotonic()
                    orders |= Orders.LOOK_FOR_PREEMPTION
                with self._wanted_lock:
                    self._wanted |= orders


def stacks() -> str:
    """Where the threads of this process stand, but for the one that asks; the training thread last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = [item for item in sys._current_frames().items() if item[0] != threading.get_ident()]
    frames.sort(key=lambda item: names.get(item[0], "").startswith("TrainingThread"))
    texts = [(names.get(ident, str(ident)), "".join(traceback.format_stack(frame))) for ident, frame in frames]
    return "\n".join(f"thread {name}:\n{text.rstrip()}" for name, text in texts)
