"""Figures of nodes and GPUs, as rank 0 gathers them."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pipeline.training.metrics.system_metrics import SystemMetrics
from tests.pipeline.training.step_cases import CPU, single_rank


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with single_rank():
        yield


def test_a_node_without_a_gpu() -> None:
    figures = SystemMetrics(CPU, node=0, is_first=True).gather()
    assert figures.keys() == {
        "system/node_0/cpu_utilization_percentage",
        "system/node_0/system_memory_usage_percentage",
        "system/node_0/network_receive_megabytes_per_s",
        "system/node_0/network_transmit_megabytes_per_s",
    }
    assert 0 < figures["system/node_0/system_memory_usage_percentage"] <= 100
    assert all(value >= 0 for value in figures.values())


def test_one_worker_speaks_for_a_node_and_each_for_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 on node 0; ranks 1 and 2 on node 1, with what they would add."""
    nan = math.nan
    others = [[1.0, 50.0, 25.0, 1.0, 2.0, 90.0, 80.0, 300.0], [1.0, nan, nan, nan, nan, 70.0, 60.0, nan]]

    def add(rows: Any) -> None:
        rows[1:] += torch.tensor(others, dtype=torch.float64)

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "all_reduce", add)
    figures = SystemMetrics(CPU, node=0, is_first=True).gather()
    assert figures["system/node_1/cpu_utilization_percentage"] == 50.0
    of_gpus = {name: value for name, value in figures.items() if "gpu" in name}
    assert of_gpus == {
        "system/gpu_1/gpu_utilization_percentage": 90.0,
        "system/gpu_1/gpu_memory_usage_percentage": 80.0,
        "system/gpu_1/gpu_power_usage_watts": 300.0,
        "system/gpu_2/gpu_utilization_percentage": 70.0,
        "system/gpu_2/gpu_memory_usage_percentage": 60.0,
    }
    assert len(figures) == 4 + 4 + len(of_gpus)
