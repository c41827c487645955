"""Training for real: worker counts, refusals, forks."""

import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.integration.jobs import ROOT, run_job, run_job_process
from tests.integration.nodes import Nodes
from tests.integration.training_runs import (
    CHECKPOINTS,
    HYBRID,
    NUM_STEPS,
    flags,
    losses,
)

pytestmark = [pytest.mark.services, pytest.mark.timeout(1800), pytest.mark.xdist_group("nodes")]


def test_one_and_two_workers_train_alike(nodes: Nodes, dataset: str, unbroken: Path, tmp_path: Path) -> None:
    """With a learned variance, and t chosen by a state that all ranks share."""
    run_job_process("train", *flags(tmp_path, dataset, steps=50, workers=1), *HYBRID, variables=nodes.variables)
    alone, together = losses(tmp_path, 50), losses(unbroken, NUM_STEPS)[:50]
    difference = np.abs(alone / together - 1).max()
    print(f"largest relative difference of 50 losses: {difference:.2e}")
    assert difference <= 1e-5
    assert alone[-10:].mean() < 0.9 * alone[:10].mean()


def test_a_run_that_is_there_is_gone_on_with_as_it_was_or_not_at_all(dataset: str, unbroken: Path) -> None:
    again = [*flags(unbroken, dataset, steps=NUM_STEPS), *HYBRID, *CHECKPOINTS]
    refused = run_job("train", *again, check=False)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    changed = run_job("train", *again, "--resume", "--seed", "5", check=False)
    assert changed.returncode == 2 and changed.stderr.startswith("error: seed: the run in")


def test_a_fork_begins_with_the_average_of_another_run(
    nodes: Nodes, dataset: str, unbroken: Path, tmp_path: Path
) -> None:
    """With steps too small to change a float32, what the first step leaves is what it began with."""
    (origin,) = list((unbroken / "run" / "checkpoints").glob(f"step-{NUM_STEPS:09d}-*"))
    slow = ["--optimizer.learning-rate", "1e-30", "--seed", "7", "--fork-from", os.path.relpath(origin, ROOT)]
    learned_variance = ["--network.learned-variance", "--objective.name", "hybrid"]
    run_job_process(
        "train", *flags(tmp_path, dataset, steps=1, workers=1), *learned_variance, *slow, variables=nodes.variables
    )
    (made,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    average = safetensors.torch.load_file(origin / "weights.safetensors")
    for name in ("train_weights.safetensors", "weights.safetensors"):
        begun = safetensors.torch.load_file(made / name)
        assert begun.keys() == average.keys()
        assert all(torch.equal(begun[key], average[key]) for key in average), name
    trained = safetensors.torch.load_file(origin / "train_weights.safetensors")
    assert not all(torch.equal(trained[key], average[key]) for key in average), "the average is another model"
