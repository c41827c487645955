"""The figures of a GPU as a page and as JSON, with everything that they depend on."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.benchmarks.gpu_benchmark import Figures, Limits
from pipeline.benchmarks.gpu_sampling import SAMPLING_MODES, SamplingFigures

_HEADER = (
    "| case | batch | network | mode | img/s (least to most) | beside diffusers | TFLOP/s | of the matrix rate | peak "
    "memory | first steps |"
)
_SAMPLING_HEADER = (
    "| case | batch | network | mode | img·NFE/s (least to most) | "
    + " | ".join(f"beside diffusers' {mode}" for mode in SAMPLING_MODES)
    + " | TFLOP/s | images' distance | first batches |"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """A whole run of the benchmark."""

    machine: Mapping[str, str]
    """Device, driver, versions and date."""
    limits: Limits
    """What the device can do at most."""
    figures: Sequence[Figures]
    """Of every contender."""
    tables_of_time: Mapping[str, Sequence[tuple[str, float]]]
    """By case: the operations of ours in the last mode that took most time, and their shares."""
    sampling: Sequence[SamplingFigures] = ()
    """Of every contender in sampling."""

    def to_json(self) -> str:
        """Everything, with the ratios spelled out."""
        rows = [
            dataclasses.asdict(one) | {"images_per_s_median": one.median, "model_flops_utilisation": self._use(one)}
            for one in self.figures
        ]
        whole: dict[str, Any] = {
            "machine": dict(self.machine),
            "limits": dataclasses.asdict(self.limits),
            "figures": rows,
            "time": {case: dict(table) for case, table in self.tables_of_time.items()},
            "sampling": [
                dataclasses.asdict(one) | {"evaluations_per_s_median": one.median, "beside": self._beside(one)}
                for one in self.sampling
            ],
        }
        return json.dumps(whole, indent=2) + "\n"

    def to_markdown(self) -> str:
        """A page."""
        lines = [f"# Training and sampling on {self.machine['device']}", ""]
        lines += [f"- {name}: {value}" for name, value in self.machine.items()]
        lines += [
            f"- bf16 matrix products, measured: {self.limits.matrix_flops_per_s / 1e12:.4g} TFLOP/s",
            f"- copies in memory, measured: {self.limits.memory_bytes_per_s / 1e9:.4g} GB/s",
            "",
            "Of each contender the median of its rounds, in which all take turns. TFLOP/s: three forward passes per "
            "image, convolutions and matrix products alone. First steps: with the compiler's time.",
            "",
            _HEADER,
            "|" + "---|" * (_HEADER.count("|") - 1),
            *(self._row(one) for one in self.figures),
            "",
        ]
        lines += [f"- {one.case}, {one.network}, {one.mode}: {one.note}" for one in self.figures if one.note]
        for case, table in self.tables_of_time.items():
            lines += [
                "",
                f"Where the time of {case} went, ours in its last mode:",
                "",
                "| operation | share |",
                "|---|---|",
            ]
            lines += [f"| `{name[:80].replace('|', '/')}` | {share:.1%} |" for name, share in table]
        if self.sampling:
            lines += [
                "",
                "Sampling, each at the batch at which it is fastest; img·NFE are images times network evaluations of "
                "each. The distance is that of compiled images from interpreted ones.",
                "",
                _SAMPLING_HEADER,
                "|" + "---|" * (_SAMPLING_HEADER.count("|") - 1),
                *(self._sampling_row(one) for one in self.sampling),
                "",
            ]
            lines += [f"- {one.case}, {one.network}, {one.mode}: {one.note}" for one in self.sampling if one.note]
        return "\n".join(lines) + "\n"

    def _sampling_row(self, one: SamplingFigures) -> str:
        rates = one.evaluations_per_s or (0.0,)
        beside = self._beside(one)
        columns = (
            one.case,
            f"{one.batch}",
            one.network,
            one.mode,
            f"{one.median:.4g} ({min(rates):.4g} to {max(rates):.4g})",
            *(f"{beside[mode]:.2f}" if mode in beside else "" for mode in SAMPLING_MODES),
            f"{one.median * one.flops_per_evaluation / 1e12:.4g}",
            "-" if one.distance is None else f"{one.distance:.1e}",
            f"{one.start_s:.0f} s",
        )
        return "| " + " | ".join(columns) + " |"

    def _beside(self, one: SamplingFigures) -> dict[str, float]:
        """By mode of diffusers': how many times as fast it is."""
        peers = [other for other in self.sampling if (other.case, other.network) == (one.case, "diffusers")]
        return {peer.mode: one.median / peer.median for peer in peers if peer is not one and peer.median}

    def _row(self, one: Figures) -> str:
        peers = [other for other in self.figures if (other.case, other.mode) == (one.case, one.mode)]
        peer = next((other for other in peers if other.network != "ours"), None)
        columns = (
            one.case,
            f"{one.batch}",
            one.network,
            one.mode,
            f"{one.median:.4g} ({min(one.images_per_s):.4g} to {max(one.images_per_s):.4g})",
            "" if peer in (None, one) else f"{one.median / peer.median:.2f}",
            f"{one.median * one.flops_per_image / 1e12:.4g}",
            f"{self._use(one):.1%}",
            "-" if one.peak_bytes is None else f"{one.peak_bytes / 2**30:.1f} GiB",
            f"{one.start_s:.0f} s",
        )
        return "| " + " | ".join(columns) + " |"

    def _use(self, one: Figures) -> float:
        return one.median * one.flops_per_image / self.limits.matrix_flops_per_s


def describe_machine(device: torch.device) -> dict[str, str]:
    """The device, its driver, versions and today's date."""
    versions = {"torch": torch.__version__, "Python": platform.python_version()}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["diffusers"] = importlib.metadata.version("diffusers")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        cudnn: Any = torch.backends.cudnn
        versions |= {"CUDA": str(torch.version.cuda), "cuDNN": str(cudnn.version())}
    else:
        name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "versions": ", ".join(f"{library} {version}" for library, version in versions.items()),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
