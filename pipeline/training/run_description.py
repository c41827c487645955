"""What somebody who opens the MLflow run of a training is told: what it is, on what, and how to sample from it."""

import importlib.metadata
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from ddpm.networks.cost import num_parameters
from pipeline.redact import redact
from pipeline.tracking import run_requests
from pipeline.tracking.tracking import TrackingRun
from pipeline.training.train_config import TrainConfig
from pipeline.training.train_plan import TrainPlan

_GIT_TIMEOUT_S = 5.0


def description_tags(config: TrainConfig, plan: TrainPlan) -> dict[str, str]:
    """Tags of a new run that MLflow's pages show as its description and its version of the code."""
    commit = _git_commit(Path(sys.argv[0]).resolve().parent)
    described = {"mlflow.note.content": _description(config, plan)}
    return described if commit is None else described | {"mlflow.source.git.commit": commit}


def log_inputs(run: TrackingRun, config: TrainConfig, plan: TrainPlan) -> None:
    """Queue what a run works with: the dataset as an input of the run, and the installed versions as a file."""
    manifest = plan.manifest
    profile = {"image_shape": list(manifest.image_shape), "num_classes": manifest.num_classes} | {
        f"num_{split}": records.num_samples for split, records in manifest.splits.items()
    }
    run.put(
        "the dataset",
        lambda client: run_requests.log_dataset(
            client,
            run.require_id(),
            name=manifest.name,
            digest=manifest.digest,
            uri=config.dataset,
            context="training",
            profile=profile,
        ),
    )
    run.log_text(_environment(), "environment.txt")


def _description(config: TrainConfig, plan: TrainPlan) -> str:
    manifest, train = plan.manifest, plan.manifest.splits["train"]
    (height, width), channels = manifest.image_size, manifest.channels
    images = f"{train.num_samples:,} images of {height} x {width}, {channels} channel{'s' if channels > 1 else ''}"
    if config.class_conditional:
        images += f", {manifest.num_classes} classes"
    network = f"a `{config.network.name}` of {num_parameters(plan.model_config):,} parameters"
    model = f"models:/{config.register_as}@candidate"
    return redact(
        f"""{config.steps:,} steps of {config.global_batch} images for {network}, on **{manifest.name}**: {images}.

| | |
|---|---|
| dataset | `{config.dataset}`, digest `{manifest.digest[:16]}` |
| output | `{config.output}` |
| model | `{model}`: the weights averaged over training |

Samples, from the registry and, while it trains, from the newest checkpoint (the tag `ddpm.checkpoint`):

    python jobs/sample.py --model {model} --output samples

The same command with `--resume` goes on with this run.
"""
    )


def _environment() -> str:
    """The machine of the driver, and the version of everything that is installed there."""
    installed = {f"{one.metadata['Name']}=={one.version}" for one in importlib.metadata.distributions()}
    head = f"# Python {platform.python_version()} on {platform.platform()}, {platform.machine()}"
    return "\n".join([head, *sorted(installed, key=str.lower)]) + "\n"


def _git_commit(folder: Path) -> str | None:
    """The commit that a folder is at, with a mark if files differ from it; None where that is not known."""
    git = shutil.which("git")
    if git is None:
        return None

    def ask(*words: str) -> str:
        done = subprocess.run(
            [git, "-C", str(folder), *words], capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=True
        )
        return done.stdout.strip()

    try:
        commit = ask("rev-parse", "HEAD")
        return f"{commit}-modified" if ask("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return None
