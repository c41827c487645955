"""What `python jobs/benchmark.py gpu` runs."""

import argparse
import sys
from collections.abc import Callable, Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import torch

from pipeline.benchmarks.gpu_benchmark import Figures, contend, measure_limits
from pipeline.benchmarks.gpu_cases import CASES, MODES
from pipeline.benchmarks.gpu_report import Report, describe_machine
from pipeline.benchmarks.gpu_sampling import SAMPLING_CASES, SamplingFigures, contend_sampling

_ABOUT = """Training speed and memory, and sampling speed, of the presets' networks on one GPU, beside diffusers'
networks of the same shape and its pipelines where diffusers is installed, and beside the card's measured limits. Needs
torch and jaxtyping alone."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line."""
        self.exit(2, f"error: {message} (--help lists every flag)\n")


def run(argv: Sequence[str]) -> int:
    """Measure, and write `gpu.md` and `gpu.json`; returns the exit code."""
    flags = make_parser().parse_args(argv)
    device, folder = torch.device(flags.device), Path(flags.output)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: --device: this torch finds no GPU; --device cpu --cases tiny tries it without", file=sys.stderr)
        return 2
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"error: --output: cannot make {folder} ({error.strerror}); name another folder", file=sys.stderr)
        return 2
    try:
        _measure(flags, device, folder)
    except KeyboardInterrupt:
        print("interrupted; what was measured of whole cases is written", file=sys.stderr)
        return 130
    return 0


def _measure(flags: argparse.Namespace, device: torch.device, folder: Path) -> None:
    with_peer = not flags.no_peer and find_spec("diffusers") is not None
    if not with_peer:
        print("without a peer: " + ("as asked for" if flags.no_peer else "diffusers is not installed"))
    limits = measure_limits(device)
    figures, sampling = list[Figures](), list[SamplingFigures]()
    tables = dict[str, list[tuple[str, float]]]()

    def write() -> Report:
        # After each case: what was measured is not lost with a later one.
        report = Report(
            machine=describe_machine(device), limits=limits, figures=figures, tables_of_time=tables, sampling=sampling
        )
        (folder / "gpu.json").write_text(report.to_json())
        (folder / "gpu.md").write_text(report.to_markdown())
        return report

    for name in () if flags.only == "sampling" else flags.cases:
        modes = {mode: MODES[mode] for mode in flags.modes}
        some, tables[name] = contend(
            name,
            CASES[name],
            modes,
            device,
            rounds=flags.rounds,
            steps=flags.steps,
            with_peer=with_peer,
            say=lambda line: print(line, flush=True),
        )
        figures += some
        write()
    for name in () if flags.only == "training" else flags.sampling_cases:
        sampling += contend_sampling(
            name,
            SAMPLING_CASES[name],
            device,
            rounds=flags.rounds,
            steps=flags.steps,
            with_peer=with_peer,
            say=lambda line: print(line, flush=True),
        )
        write()
    print(write().to_markdown())
    print(f"done: {folder}/gpu.md and {folder}/gpu.json")


def make_parser() -> argparse.ArgumentParser:
    """Its flags."""
    parser = _Parser(prog="jobs/benchmark.py gpu", description=_ABOUT, allow_abbrev=False)
    real = [name for name in CASES if name != "tiny"]
    parser.add_argument(
        "--cases", type=_names(CASES), default=real, help=f"of {', '.join(CASES)}; default: the presets'"
    )
    parser.add_argument("--modes", type=_names(MODES), default=list(MODES), help=f"of {', '.join(MODES)}; default: all")
    real = [name for name in SAMPLING_CASES if name != "tiny"]
    parser.add_argument(
        "--sampling-cases",
        type=_names(SAMPLING_CASES),
        default=real,
        help=f"of {', '.join(SAMPLING_CASES)}; default: the presets'",
    )
    parser.add_argument("--only", choices=("training", "sampling"), help="leave the other out")
    parser.add_argument("--rounds", type=_positive, default=5, help="turns of each network (default: 5)")
    parser.add_argument(
        "--steps", type=_positive, default=20, help="steps of a turn, or of a sampled batch (default: 20)"
    )
    parser.add_argument("--output", default="artifacts/benchmark_gpu", help="folder for gpu.md and gpu.json")
    parser.add_argument("--no-peer", action="store_true", help="leave diffusers' networks out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    return parser


def _names(known: Collection[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"names of {', '.join(known)}, comma between them, got {unknown[0]!r}")
        return names

    return parse


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"at least 1, got {text!r}")
    return int(text)
