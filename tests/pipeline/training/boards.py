"""A board in this process, in the place of the actor."""

from types import SimpleNamespace
from typing import Any

from pipeline.training.train_board import Board


class Direct:
    """`board.method.remote(...)` does it at once; `ray.get` must give back what it is given."""

    def __init__(self, board: Board) -> None:
        self.board = board

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.board, name))
