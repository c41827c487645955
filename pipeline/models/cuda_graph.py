"""A network whose operations a GPU is given all at once, as a CUDA graph, instead of one by one.

A graph is captured at the first evaluation of each shape, and replayed at the others: the same operations on the same
memory, so that nothing of the answers changes; inputs are copied in, and the answer out. What is captured must not look
at a tensor's values. Where capturing fails, the network is evaluated as it was.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddpm import Network

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""capture(compute) -> (replay, answer): replay does again what compute did, and writes the answer anew."""
_WARM_UP_EVALUATIONS = 3
"""PyTorch's own number: libraries make their workspaces, and a compiler its code, before anything is captured."""


class GraphedNetwork:
    """A network(x_t, t, label) -> prediction, captured once for each shape; without gradients.

    Args:
        network: What is captured.
        say: Takes the line that is said where capturing fails.
        capture: How; on the GPU of this process unless given.
    """

    def __init__(self, network: Network, say: Callable[[str], object], capture: Capture | None = None) -> None:
        """Nothing is captured yet."""
        self._network, self._say = network, say
        self._capture = _captures_on_gpu() if capture is None else capture
        self._graphs: dict[tuple[object, ...], _Graph] = {}
        self._works = True

    def __call__(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """The prediction.

        Raises:
            torch.OutOfMemoryError: If the shape is new and does not fit.
        """
        inputs = (x_t, t) if label is None else (x_t, t, label)
        shapes = tuple((one.shape, one.dtype) for one in inputs)
        if self._works and shapes not in self._graphs:
            try:
                self._graphs[shapes] = _Graph(self._network, inputs, self._capture)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # CUDA's own errors of capturing have no class of their own
                self._works = False
                reason = " ".join(str(error).split())[:300]
                self._say(f"CUDA graph: cannot be captured, so that operations are launched one by one: {reason}")
        graph = self._graphs.get(shapes)
        return self._network(x_t, t, label) if graph is None else graph(inputs)


class _Graph:
    """The evaluation of one shape."""

    def __init__(self, network: Network, inputs: tuple[Tensor, ...], capture: Capture) -> None:
        self._inputs = x_t, t, *rest = tuple(one.clone() for one in inputs)
        self._replay, self._answer = capture(lambda: network(x_t, t, rest[0] if rest else None))

    def __call__(self, inputs: tuple[Tensor, ...]) -> Tensor:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._replay()
        return self._answer.clone()  # the next replay writes over it


def _captures_on_gpu() -> Capture:
    """Graphs of this process's GPU, in one pool of memory: they run one by one, and keep nothing but answers."""
    make_stream: Any = torch.cuda.Stream  # it is not typed
    pool = torch.cuda.graph_pool_handle()

    def capture(compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        aside = make_stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP_EVALUATIONS):
                compute()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread may copy finished images meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            answer = compute()
        return graph.replay, answer

    return capture
