"""The whole pipeline on scikit-learn's digits, for real: `make demo`.

Digits -> shards -> two DDP workers -> registered model -> 1,000 images -> figures, in one Ray session on this machine,
with a local folder as the object store and SQLite behind MLflow: the code paths of a cluster.
"""

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from jobs.exits import run_guarded
from pipeline.cluster import ray_session
from pipeline.data.prepare import prepare
from pipeline.errors import ConfigError
from pipeline.evaluation.evaluate import evaluate
from pipeline.generation.sample import sample
from pipeline.presets import digits
from pipeline.progress import format_duration, say
from pipeline.training.train import train

T = TypeVar("T")


def _stage(title: str, work: Callable[[], T]) -> T:
    say(f"\n== {title}")
    started_s = time.perf_counter()
    result = work()
    say(f"   {format_duration(time.perf_counter() - started_s)}")
    return result


def main() -> None:
    """Run every stage and say where to look."""
    started_s = time.perf_counter()
    preset = digits()
    root = next(p for n in itertools.count(1) if not (p := Path(f"artifacts/demo/{n:03d}")).exists())
    train_config = dataclasses.replace(preset.train, output=str(root / "train"))
    with ray_session(preset.train.cluster):
        _stage("scikit-learn's digits -> WebDataset shards", lambda: prepare(preset.prepare))
        trained = _stage("training: two DDP workers", lambda: train(train_config))
        sampling = dataclasses.replace(preset.sample, model=trained.version.uri, output=str(root / "samples"))
        made = _stage("sampling: 1,000 images, 100 per class", lambda: sample(sampling))
        config = dataclasses.replace(preset.evaluate, sample=sampling.images)
        report = _stage("evaluation", lambda: evaluate(config))
    say(f"\n{report.table()}\n")
    say(f"model          {trained.version.uri}, alias candidate")
    say(f"contact sheet  {made.contact_sheet_uri or 'could not be made'}")
    say(f"figures        {report.uri}")
    # Without these words MLflow's pages open as those of prompts and traces.
    say("MLflow         make mlflow, then http://127.0.0.1:5000/#/experiments?workflowType=machine_learning")
    say(f"done in {format_duration(time.perf_counter() - started_s)}")


def start(flags: list[str]) -> None:
    """Say what this is, or run it."""
    if flags and flags[0] in ("-h", "--help"):
        say(f"usage: jobs/demo.py [--traceback]\n\n{__doc__}")
    elif flags not in ([], ["--traceback"]):
        raise ConfigError(
            f"jobs/demo.py: takes no flags but --traceback, got {' '.join(flags)}; --help says what it does"
        )
    else:
        main()


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: start(sys.argv[1:]), show_traceback="--traceback" in sys.argv))
