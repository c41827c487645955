"""A graph's bookkeeping, with a capture that any machine can do; and on a GPU, the answers of a real one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.cuda_graph import GraphedNetwork


class Captured:
    """What a GPU does, done on the CPU: a replay computes from the captured memory, and writes into it."""

    def __init__(self) -> None:
        self.num_captures = self.num_replays = 0

    def __call__(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.num_captures += 1
        answer = compute()

        def replay() -> None:
            self.num_replays += 1
            answer.copy_(compute())

        return replay, answer


def network(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    shift = t if label is None else t + 100 * label
    return x_t + shift[:, None, None, None]


def inputs(batch: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(batch, 1, 2, 2, generator=generator)
    return x_t, torch.full((batch,), seed), torch.arange(batch)


def test_each_shape_is_captured_once_and_every_answer_stays() -> None:
    capture, said = Captured(), list[str]()
    graphed = GraphedNetwork(network, said.append, capture)
    asked = [(inputs(batch, seed), labelled) for seed in (1, 2) for batch in (3, 6) for labelled in (True, False)]
    answers = [graphed(x_t, t, label if labelled else None) for (x_t, t, label), labelled in asked]
    for answer, ((x_t, t, label), labelled) in zip(answers, asked, strict=True):
        assert torch.equal(answer, network(x_t, t, label if labelled else None)), "no replay wrote over it"
    assert (capture.num_captures, capture.num_replays, said) == (4, 8, [])


def test_what_cannot_be_captured_is_said_once_and_evaluated_as_it_was() -> None:
    def capture(compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    said = list[str]()
    graphed = GraphedNetwork(network, said.append, capture)
    for batch in (3, 6, 3):
        assert torch.equal(graphed(*inputs(batch, 1)), network(*inputs(batch, 1)))
    assert said == [
        "CUDA graph: cannot be captured, so that operations are launched one by one: operation not permitted when "
        "stream is capturing"
    ]


def test_too_little_memory_is_no_failure_of_capturing() -> None:
    """The caller says which batch fits, and asks again with a smaller one."""

    def capture(compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        answer = compute()
        if len(answer) > 3:
            raise torch.OutOfMemoryError("6 images")
        return Captured()(compute)

    graphed = GraphedNetwork(network, pytest.fail, capture)
    with pytest.raises(torch.OutOfMemoryError):
        graphed(*inputs(6, 1))
    assert torch.equal(graphed(*inputs(3, 1)), network(*inputs(3, 1)))


@pytest.mark.gpu
def test_a_gpu_replays_the_same_bits() -> None:
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    convolutions = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.Conv2d(32, 3, 3)).to(device)

    def network(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        answer: Tensor = convolutions(x_t)
        return answer + t[:, None, None, None]

    graphed = GraphedNetwork(network, pytest.fail)
    with torch.no_grad():
        for seed in range(4):
            x_t = torch.randn(8, 3, 16, 16, device=device, generator=torch.Generator(device).manual_seed(seed))
            t = torch.full((8,), seed, device=device)
            assert torch.equal(graphed(x_t, t, None), network(x_t, t, None))
