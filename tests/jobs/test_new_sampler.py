"""A new sampler is a file and a line in the registry: help, flags, records and images follow from them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ddpm import DDIM
from pipeline.data.shard_parts import PartRecord
from pipeline.data.shards import decode_png, read_shard
from pipeline.generation.output.manifest import read_shards
from pipeline.generation.sample_config import SampleConfig
from pipeline.generation.sample_job import resolve_job
from pipeline.stores.storage import open_store
from tests.pipeline.generation.spec.test_sampling_plan import GOLDEN
from tests.pipeline.runs_in_process import run
from tests.pipeline.tiny_models import write_model

ROOT = Path(__file__).parents[2]
HALFWAY = '''
"""Halfway: with a share of the noise of ancestral sampling."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ddpm.process.denoiser import Denoiser
from ddpm.process.interpolation import Table
from ddpm.process.schedules import NoiseSchedule
from ddpm.samplers.ddim import ddim_step
from ddpm.samplers.sampler import SingleStepSampler
from ddpm.shapes import Images, Labels, Steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Halfway(SingleStepSampler):
    """Between deterministic and ancestral, by a share."""

    order: ClassVar[int] = 1

    name: Literal["halfway"] = "halfway"
    """Between deterministic and ancestral."""
    share: float = 0.5
    """Share of the noise of ancestral sampling in every step, in [0, 1]."""

    def check(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"share: must be in [0, 1], got {self.share}; 0.5 is halfway")

    @property
    def is_deterministic(self) -> bool:
        return self.share == 0.0

    def step(
        self,
        chain: NoiseSchedule,
        denoise: Denoiser,
        x_t: Images,
        t: Steps,
        label: Labels | None,
        *,
        eps: Images,
        x_0_error: Table | None = None,
    ) -> Images:
        return ddim_step(chain, denoise, x_t, t, label, eta=self.share, eps=eps)
'''
IMPORT = "from ddpm.samplers.heun import Heun\n"
LINE = "    | Heun  # Karras et al.\n"

INSIDE = """
import json
import ddpm
from ddpm import SAMPLERS
from pipeline.generation.requests.requests import Inpaint
from pipeline.models.sampler_params import sampler_of_params, sampler_options
from tests.pipeline.generation.spec.test_sampling_plan import make_spec

assert sampler_of_params({"sampler": "halfway", "share": 0.25}) == SAMPLERS["halfway"](share=0.25)
Inpaint(inputs="x", mask="centre").check_sampler(SAMPLERS["halfway"]())
digests = {name: make_spec(kind()).digest for name, kind in SAMPLERS.items()}
print(json.dumps([ddpm.__file__, sampler_options()["share"], digests]))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This project with the sampler in it."""
    folder = tmp_path_factory.mktemp("project")
    for package in ("ddpm", "pipeline", "jobs"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "ddpm/samplers/halfway.py").write_text(HALFWAY.lstrip())
    registry = folder / "ddpm/samplers/registry.py"
    text = registry.read_text()
    assert text.count(IMPORT) == text.count(LINE) == 1
    text = text.replace(IMPORT, "from ddpm.samplers.halfway import Halfway\n" + IMPORT)
    registry.write_text(text.replace(LINE, LINE + "    | Halfway\n"))
    return folder


def python(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process that finds the copy before anything that is installed."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(copy), str(ROOT)])
    return subprocess.run(
        [sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True, timeout=300
    )


def test_help_offers_it_with_its_options(copy: Path) -> None:
    shown = python(copy, "jobs/sample.py", "--sampler.name", "halfway", "--help")
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^ *halfway +Between deterministic and ancestral, by a share\.$", shown.stdout, re.MULTILINE)
    assert "(now halfway, whose options are below)" in shown.stdout
    assert "--sampler.share FLOAT" in shown.stdout and "--sampler.eta" not in shown.stdout
    wrong = python(copy, "jobs/sample.py", "--sampler.name", "halfway", "--sampler.share", "2")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: sampler.share: must be in [0, 1], got 2.0")
    assert "halfway" not in python(ROOT, "jobs/sample.py", "--help").stdout, "but only there"


def test_no_run_of_another_sampler_moves(copy: Path) -> None:
    shown = python(copy, "-c", INSIDE)
    assert shown.returncode == 0, shown.stderr
    where, default, digests = json.loads(shown.stdout)
    assert Path(where).is_relative_to(copy) and default == 0.5
    own = digests.pop("halfway")
    assert digests == GOLDEN and own not in GOLDEN.values()


@pytest.mark.usefixtures("ray_session")  # the process below has a Ray of its own
def test_it_samples_like_any_other(copy: Path, tmp_path: Path) -> None:
    """With half the noise it is ddim with eta 0.5: the same pixels, and yet a run of its own."""
    config = SampleConfig(
        model=write_model(tmp_path / "model", answers=True),
        output=str(tmp_path / "out"),
        images_per_class=4,
        sampler=DDIM(num_steps=4, eta=0.5),
        shard_size=6,
        batch_size=6,
    )
    flags = ["--model", config.model, "--output", config.output, "--images-per-class", "4", "--shard-size", "6"]
    flags += ["--batch-size", "6", "--num-actors", "1", "--cluster.num-cpus", "1", "--sampler.num-steps", "4"]
    made = python(copy, "jobs/sample.py", *flags, "--sampler.name", "halfway")
    assert made.returncode == 0, made.stdout + made.stderr
    assert "done: 12 images (12 made now)" in made.stdout
    (folder,) = (path.parent for path in (tmp_path / "out").glob("*/manifest.json"))
    manifest = json.loads((folder / "manifest.json").read_text())
    stored = manifest["spec"]["sampler"]
    assert (stored["name"], stored["share"], stored["num_steps"], "eta" in stored) == ("halfway", 0.5, 4, False)
    assert 'name = "halfway"' in (folder / "config.toml").read_text()

    store = resolve_job(config).store
    assert Path(store.uri) != folder and Path(store.uri).parent == folder.parent
    _, like_ddim = run(config)
    made_there = open_store(str(folder))
    parts = [PartRecord(**part) for part in manifest["parts"]]
    samples = [one for shard in read_shards(made_there, parts) for one in read_shard(made_there, shard)]
    assert [one.meta["sampler"] for one in samples] == ["halfway"] * 12
    assert (np.stack([decode_png(one.image) for one in samples]) == like_ddim.images).all()
    again = python(copy, "jobs/sample.py", "--config", str(folder / "config.toml"))
    assert again.returncode == 0 and "all of them there already, nothing written" in again.stdout, again.stderr
