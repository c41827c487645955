"""All jobs of the command line, found as an operator finds them: in the files of jobs/."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import jobs
from jobs.cli import Job, run_job


def every_job() -> dict[str, Job[Any]]:
    """The jobs by what is typed to run them: `train`, `compare samplers`."""
    found: dict[str, Job[Any]] = {}
    for file in sorted(Path(jobs.__file__).parent.glob("*.py")):
        module = importlib.import_module(f"jobs.{file.stem}")
        if hasattr(module, "JOB"):
            found[file.stem] = module.JOB
        for name, job in getattr(module, "JOBS", {}).items():
            found[f"{file.stem.removesuffix(f'_{name}')} {name}"] = job  # benchmark.py imports what it runs
    return found


EVERY_JOB = every_job()


def resolve(job: Job[Any], *flags: str) -> Any:
    """The configuration that a job would run with; starts nothing."""
    seen: list[Any] = []
    assert run_job(dataclasses.replace(job, run=seen.append), flags) == 0, flags
    return seen[0]


def describes_nothing(job: Job[Any]) -> Job[Any]:
    """The job with a plan that looks nothing up, for dry runs."""
    return dataclasses.replace(job, describe=lambda config: [("plan", "nothing")])
