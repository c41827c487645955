"""What is tried before the first step: how many images fit, and whether the network compiles."""

import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from ddpm import count_parameters
from pipeline.errors import ConfigError
from pipeline.training.trial import largest_fitting, train_on_nothing
from pipeline.training.worker import network_setup
from pipeline.training.worker.loss_watch import LossWatch
from pipeline.training.worker.network_setup import set_up
from pipeline.training.worker.training_state import TrainingState
from pipeline.training.worker.training_step import LossTotals, TrainingStep
from tests.pipeline.training.small_runs import MODEL
from tests.pipeline.training.step_cases import (
    CPU,
    batch_of,
    make_network,
    make_state,
    make_task,
    single_rank,
    small_network,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")  # in what the compiler imports
META = torch.device("meta")


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with single_rank():
        yield


@pytest.fixture
def quiet() -> Iterator[None]:
    """Forgets what was compiled before; the compiler's diary of thousands of lines is not captured."""
    diary = logging.getLogger("torch.__trace")
    level = diary.level
    diary.setLevel(logging.ERROR)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    diary.setLevel(level)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(network_setup, "say", said.append)
    return said


def memory_of(num_images: int) -> Callable[[int], None]:
    """An attempt on a device that holds so many images."""

    def attempt(size: int) -> None:
        if size > num_images:
            raise torch.OutOfMemoryError(f"{size} images")

    return attempt


@pytest.mark.parametrize(
    ("num_rows", "room", "expected"),
    [(128, 128, 128), (128, 100, 64), (12, 5, 4), (7, 6, 1), (96, 50, 48), (8, 0, None)],
)
def test_the_largest_divisor_that_fits(num_rows: int, room: int, expected: int | None) -> None:
    assert largest_fitting(num_rows, memory_of(room)) == expected


def test_what_fits_here_alone_does_not_fit() -> None:
    asked: list[bool] = []

    def agree(here: bool) -> bool:  # another rank has room for 3 images
        asked.append(here)
        return here and len(asked) >= 3

    assert largest_fitting(8, memory_of(4), agree) == 2
    assert asked == [False, True, True], "each rank asks for every size, whatever it has room for"


def test_other_errors_are_no_lack_of_room() -> None:
    def attempt(_: int) -> None:
        raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match="no kernel"):
        largest_fitting(8, attempt)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Gives the accelerator, for which `meta` stands in, memory for so many images; without, the whole batch fits."""

    def hold(num_images: int) -> None:
        def attempt(network: object, module: object, config: object, size: int, **_: object) -> None:
            memory_of(num_images)(size)

        monkeypatch.setattr(network_setup, "train_on_nothing", attempt)

    monkeypatch.setattr(network_setup, "everywhere", lambda device: bool)
    return hold


def parts_of(state: TrainingState, device: torch.device, given: int | None, num_rows: int) -> list[int]:
    _, parts = set_up(make_task(micro_batch=given), state, device, rank=0, rows=[num_rows])
    return [part.stop - part.start for part in parts]


def test_the_size_is_chosen_said_and_kept(room: Callable[[int], None], lines: list[str]) -> None:
    state = make_state(make_task())
    room(3)
    assert parts_of(state, META, None, 8) == [2, 2, 2, 2]
    assert lines == ["micro-batches of 2 images: the most, of a worker's 8, that fit into memory"]
    assert state.parts().position.micro_batch == 2
    room(8)
    assert parts_of(state, META, None, 8) == [2, 2, 2, 2] and len(lines) == 1, "kept"
    assert parts_of(state, META, None, 24) == [2] * 12 and len(lines) == 1, "by fewer workers too"
    assert parts_of(state, META, 4, 8) == [4, 4]
    assert lines[1:] == ["micro-batches of 4 images; the run has had 2 before"]
    room(1)
    assert parts_of(state, META, None, 8) == [1] * 8, "on a smaller device"
    assert lines[2:] == ["micro-batches of 1 images; the run has had 4 before"]
    room(0)
    with pytest.raises(ConfigError, match=r"^micro_batch: not even 1 image"):
        parts_of(state, META, None, 8)


def test_cpus_take_the_whole_batch_and_try_nothing(room: Callable[[int], None], lines: list[str]) -> None:
    room(0)
    state = make_state(make_task())
    assert parts_of(state, CPU, None, 8) == [8] and state.micro_batch is None
    assert parts_of(state, CPU, 4, 8) == [4, 4] and parts_of(state, CPU, None, 8) == [4, 4] and lines == []


def test_a_trial_changes_nothing_and_holds_what_the_optimiser_will() -> None:
    state, held = make_state(make_task()), list[int]()
    before = {name: tensor.clone() for name, tensor in state.network.state_dict().items()}

    class Watching(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            if function is torch.empty_like:
                held.append(result.numel())
            return result

    def plain(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        assert (x_t.shape, t.shape) == ((5, 1, 8, 8), (5,)) and label is not None and len(label) == 5
        prediction: Tensor = state.network(x_t, t, label)
        return prediction

    with Watching():
        train_on_nothing(plain, state.network, MODEL, 5, holds_moments=False)  # type: ignore[arg-type]
        assert sum(held) == 2 * count_parameters(state.network)
        train_on_nothing(plain, state.network, MODEL, 5, holds_moments=True)  # type: ignore[arg-type]
        assert sum(held) == 2 * count_parameters(state.network)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.network.state_dict().items())
    assert all(parameter.grad is None for parameter in state.network.parameters())


def unet() -> torch.nn.Module:
    network = dataclasses.replace(MODEL.network, dropout=0.0)  # type: ignore[type-var]  # its masks are others
    return make_network(dataclasses.replace(MODEL, network=network))


def gradient_of_a_step(make: Callable[[], torch.nn.Module], **changes: object) -> Tensor:
    """The gradient of one step, before it is clipped."""
    task = make_task(**changes)
    state = TrainingState(make(), task.config.optimizer)
    apply, seen = state.apply_gradient, list[Tensor]()

    def watch(num_images: int) -> Tensor:
        gradients = [parameter.grad for parameter in state.network.parameters()]
        seen.append(torch.cat([gradient.flatten() for gradient in gradients if gradient is not None]).clone())
        return apply(num_images)

    state.apply_gradient = watch  # type: ignore[method-assign]
    TrainingStep(task, state, CPU)(batch_of(0), LossTotals(20, CPU), LossWatch())
    return seen[0]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on CPUs needs g++")
@pytest.mark.parametrize("make", [small_network, pytest.param(unet, marks=[pytest.mark.slow, pytest.mark.services])])
def test_the_compiled_network_has_the_same_gradient(
    make: Callable[[], torch.nn.Module], lines: list[str], quiet: None
) -> None:
    """With two sizes of micro-batches, to 1e-5 in norm."""
    eager, compiled = (gradient_of_a_step(make, micro_batch=3, compile=asked) for asked in (False, True))
    difference = float((compiled - eager).norm() / eager.norm())
    print(f"compiled against eager: relative difference of the gradients {difference:.1e}")
    assert difference < 1e-5 and lines == []
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "one for each size"


def test_what_does_not_compile_is_said_and_interpreted(
    lines: list[str], quiet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setattr("torch._inductor.config.fx_graph_cache", False)
    monkeypatch.setattr("torch._functorch.config.enable_autograd_cache", False)
    eager, interpreted = gradient_of_a_step(small_network), gradient_of_a_step(small_network, compile=True)
    assert torch.equal(eager, interpreted)
    (line,) = lines
    assert line.startswith("compile: does not work here, so that the network is interpreted: ")
    assert "no-such-compiler" in line, line


def test_a_compiled_network_that_does_not_fit_is_no_failed_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_setup, "train_on_nothing", lambda *_, **__: memory_of(0)(1))
    with pytest.raises(torch.OutOfMemoryError):
        set_up(make_task(compile=True), make_state(make_task()), CPU, rank=0, rows=[8])


def test_stays_interpreted_where_another_worker_cannot_compile(
    lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network_setup, "train_on_nothing", lambda *_, **__: None)
    monkeypatch.setattr(network_setup, "everywhere", lambda device: lambda here: False)
    state = make_state(make_task())
    set_up(make_task(compile=True), state, CPU, rank=0, rows=[8])
    assert lines == [
        "compile: does not work here, so that the network is interpreted: another worker could not compile it"
    ]
    assert state.network._compiled_call_impl is None


def test_stored_weights_have_the_network_s_own_names() -> None:
    """A compiled network's do not begin with its wrapper's."""
    network = make_network(MODEL)
    before = list(network.state_dict())
    network.compile()
    assert list(network.state_dict()) == before
