"""How busy the machines are: figures of each node and each GPU, gathered by rank 0 under MLflow's names for them."""

import math
import time
from collections.abc import Callable

import psutil
import torch
import torch.distributed

_OF_NODE = (
    "cpu_utilization_percentage",
    "system_memory_usage_percentage",
    "network_receive_megabytes_per_s",
    "network_transmit_megabytes_per_s",
)
_OF_GPU = ("gpu_utilization_percentage", "gpu_memory_usage_percentage", "gpu_power_usage_watts")
_MEGABYTE = 1e6


class SystemMetrics:
    """The figures of this worker's machine, and of its GPU.

    Args:
        device: Where the network lives.
        node: Number of this worker's node among the run's.
        is_first: Whether this worker is the first on its node, which speaks for it.
    """

    def __init__(self, device: torch.device, *, node: int, is_first: bool) -> None:
        """Count from now."""
        self._device, self._node, self._is_first = device, node, is_first
        psutil.cpu_percent()
        self._seen = self._network()

    def gather(self) -> dict[str, float]:
        """Collective: the figures since the last call, such as `system/node_0/cpu_utilization_percentage`."""
        world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        names = (*_OF_NODE, *_OF_GPU)
        rows = torch.zeros(world, 1 + len(names), dtype=torch.float64, device=self._device)
        own = [float(self._node), *self._of_node(), *self._of_gpu()]
        rows[rank] = torch.tensor(own, dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(rows)
        figures: dict[str, float] = {}
        for of, (node, *values) in enumerate(rows.tolist()):
            places = [f"node_{node:.0f}"] * len(_OF_NODE) + [f"gpu_{of}"] * len(_OF_GPU)
            named = zip(places, names, values)
            figures |= {f"system/{place}/{name}": value for place, name, value in named if not math.isnan(value)}
        return figures

    def _of_node(self) -> list[float]:
        if not self._is_first:
            return [math.nan] * len(_OF_NODE)
        (before_s, *before), self._seen = self._seen, self._network()
        now_s, *now = self._seen
        rates = [(end - begin) / _MEGABYTE / max(now_s - before_s, 1e-9) for begin, end in zip(before, now)]
        return [psutil.cpu_percent(), psutil.virtual_memory().percent, *rates]

    def _of_gpu(self) -> list[float]:
        if self._device.type != "cuda":
            return [math.nan] * len(_OF_GPU)
        free, total = torch.cuda.mem_get_info(self._device)
        ask: tuple[Callable[..., int], ...] = (torch.cuda.utilization, torch.cuda.power_draw)
        use, milliwatts = (_or_nan(one, self._device) for one in ask)
        return [use, 100 * (1 - free / total), milliwatts / 1000]

    @staticmethod
    def _network() -> tuple[float, float, float]:
        """When, and the bytes that came and went so far; not those that stayed on the machine."""
        cards = [card for name, card in psutil.net_io_counters(pernic=True).items() if not name.startswith("lo")]
        came, went = sum(card.bytes_recv for card in cards), sum(card.bytes_sent for card in cards)
        return time.perf_counter(), came, went


def _or_nan(ask: Callable[[torch.device], int], device: torch.device) -> float:
    """NaN where nvidia-ml-py is not installed, or the driver does not say."""
    try:
        return float(ask(device))
    except Exception:  # pynvml has an error class for each cause
        return math.nan
