"""Stored samples of what is kept about a generation run's cost, for test_stored_formats.py."""

from typing import Any

from pipeline.generation.output.ledger import DeviceCost, Ledger
from pipeline.models.sampling_rate import SamplingRate

COST_RECORDS: dict[str, Any] = {
    "ledger": Ledger(
        num_attempts=2,
        num_broken=1,
        making_s=10.0,
        images_per_s=0.7,
        evaluations_per_s=35.0,
        num_retries=1,
        num_lost=2,
        devices={
            "NVIDIA H100": DeviceCost(device_s=25.5, busy_s=12.5, num_images=7, num_evaluations=350, num_bytes=10240)
        },
        last_attempt="0123456789abcdef",
    ),
    "sampling_rate": SamplingRate(
        device="NVIDIA H100",
        cpus_per_actor=4,
        batch_size=125,
        precision="bf16",
        channels_last=True,
        compile=True,
        evaluations_per_s=28.0,
        busy_s=12.5,
    ),
}
