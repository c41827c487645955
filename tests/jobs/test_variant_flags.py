"""Flags that choose a variant, over preset and file: what stays, what starts anew, and what is said of mistakes."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from ddpm import DDIM, NETWORKS, SAMPLERS, Ancestral, DiTConfig, DPMSolver2M, Heun, OwnNetworkConfig
from jobs import evaluate, sample, train
from jobs.cli import Job, run_job
from jobs.variant_flags import describe_variants, take_variants, variant_fields
from pipeline.config_io import variants_of
from pipeline.data.image_formats import Jpeg, Png, WebP
from pipeline.errors import ConfigError
from pipeline.generation.requests.requests import AnyRequest, Generate, Inpaint, Interpolate, Partial
from pipeline.generation.sample_config import SampleConfig
from pipeline.presets import digits, imagenet64
from tests.jobs.every_job import resolve


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)


def with_file(folder: Path, text: str) -> tuple[str, str]:
    (folder / "mine.toml").write_text(text)
    return "--config", str(folder / "mine.toml")


def test_preset_then_file_then_flags(tmp_path: Path) -> None:
    """The preset has ddim with 50 steps: the file swaps it, flags change what the file chose."""
    file = with_file(tmp_path, '[sample]\nseed = 5\n[sample.sampler]\nname = "heun"\nspacing = "trailing"\n')
    assert resolve(sample.JOB, *file).sampler == Heun(num_steps=50, spacing="trailing")
    config = resolve(sample.JOB, *file, "--sampler.churn", "10")
    assert (config.sampler, config.seed) == (Heun(num_steps=50, spacing="trailing", churn=10.0), 5)
    config = resolve(sample.JOB, *file, "--sampler.name", "ddim", "--sampler.eta", "0.5")
    assert (config.sampler, config.seed) == (DDIM(num_steps=50, spacing="trailing", eta=0.5), 5)


@pytest.mark.parametrize(
    "flags",
    [
        ["--sampler.name", "heun", "--sampler.churn", "10", "--seed", "3"],
        ["--sampler.churn", "10", "--seed", "3", "--sampler.name", "heun"],
        ["--sampler.name=heun", "--sampler.churn=10", "--seed=3"],
        ["--sampler.name", "ancestral", "--seed", "3", "--sampler.churn", "10", "--sampler.name=heun"],
    ],
    ids=["before its options", "after its options", "with =", "the last one counts"],
)
def test_a_variant_is_chosen_first_wherever_its_flag_stands(flags: list[str]) -> None:
    config = resolve(sample.JOB, *flags)
    assert (config.sampler, config.seed) == (Heun(num_steps=50, churn=10.0), 3)


def test_the_format_of_the_images_is_a_variant_too(tmp_path: Path) -> None:
    file = with_file(tmp_path, '[sample.format]\nname = "jpeg"\n')
    assert resolve(sample.JOB).format == Png()
    assert resolve(sample.JOB, *file).format == Jpeg(quality=95)
    assert resolve(sample.JOB, *file, "--format.quality", "90").format == Jpeg(quality=90)
    assert resolve(sample.JOB, *file, "--format.name", "webp", "--container", "parquet").format == WebP()
    with pytest.raises(ConfigError, match=r"^format\.quality: is an option of jpeg, got it with webp"):
        take_variants(digits().sample, ["--format.name", "webp", "--format.quality", "90"])


def test_options_of_the_presets_variant_are_no_obstacle() -> None:
    """cifar10 samples by ancestral steps with a variance of their own, imagenet64 with the network's."""
    assert resolve(sample.JOB, "--preset", "cifar10", "--sampler.name", "ddim").sampler == DDIM(num_steps=1000)
    config = resolve(
        sample.JOB, "--preset", "imagenet64", "--sampler.name", "dpm_solver_2m", "--sampler.num-steps", "9"
    )
    assert config.sampler == DPMSolver2M(num_steps=9)
    guided = resolve(sample.JOB, "--preset", "imagenet64_dit", "--sampler.name", "heun").sampler
    assert guided == Heun(num_steps=250, guidance_scale=1.5)


def test_what_both_variants_share_stays_and_their_own_options_start_at_defaults(tmp_path: Path) -> None:
    text = "[sample.sampler]\nnum_steps = 7\neta = 0.25\nguidance_scale = 2.0\nguidance_interval = [0.5, 9.0]\n"
    file = with_file(tmp_path, text)
    shared: dict[str, Any] = {"num_steps": 7, "guidance_scale": 2.0, "guidance_interval": (0.5, 9.0)}
    assert resolve(sample.JOB, *file, "--sampler.name", "ancestral").sampler == Ancestral(**shared)
    assert resolve(sample.JOB, *file, "--sampler.name", "heun").sampler == Heun(**shared)
    assert resolve(sample.JOB, *file, "--sampler.name", "ddim").sampler == DDIM(eta=0.25, **shared), "as it was"
    file = with_file(tmp_path, '[sample.sampler]\nname = "heun"\nchurn = 4.0\n')
    assert resolve(sample.JOB, *file, "--sampler.name", "ddim").sampler == DDIM(), "the preset's eta is two swaps away"


def test_a_request_is_chosen_like_a_sampler(tmp_path: Path) -> None:
    inpaint = ["--request.name", "inpaint", "--request.inputs", "x", "--request.mask", "centre"]
    assert resolve(sample.JOB, *inpaint).request == Inpaint(inputs="x", mask="centre")
    file = with_file(tmp_path, '[sample.request]\nname = "partial"\ninputs = "x"\nlabel = 3\nstrength = 0.2\n')
    assert resolve(sample.JOB, *file).request == Partial(inputs="x", label=3, strength=0.2)
    flags = ["--request.name", "inpaint", "--request.mask", "centre"]
    assert resolve(sample.JOB, *file, *flags).request == Inpaint(inputs="x", label=3, mask="centre")
    assert resolve(sample.JOB, *file, "--request.name", "generate").request == Generate()
    flags = ["--request.name", "interpolate", "--request.weights", "0.5", "0.75", "--sampler.eta", "0"]
    assert resolve(sample.JOB, *file, *flags).request == Interpolate(inputs="x", label=3, weights=(0.5, 0.75))


def test_a_network_is_chosen_like_a_sampler(tmp_path: Path) -> None:
    small = ["--network.patch-size", "4", "--network.depth", "3"]
    assert resolve(train.JOB, "--network.name", "dit", *small).network == DiTConfig(patch_size=4, depth=3)
    own = ["--network.name", "own", "--network.factory", "nets:make", "--network.options", "gain", "0.5"]
    assert resolve(train.JOB, *own).network == OwnNetworkConfig(factory="nets:make", options={"gain": 0.5})
    learned = resolve(train.JOB, "--preset", "imagenet64", "--network.name", "dit").network
    assert learned == DiTConfig(learned_variance=True, embedding_divisor="half"), "what both have is shared"
    assert resolve(train.JOB, "--preset", "imagenet64").network == imagenet64().train.network


def test_every_job_that_has_a_variant_takes_its_flag() -> None:
    config = resolve(evaluate.JOB, "--sample.sampler.name", "heun", "--sample.sampler.churn", "2")
    assert config.sample.sampler == Heun(num_steps=50, churn=2.0)
    config = resolve(train.JOB, "--grid-sampler.name", "ancestral", "--grid_sampler.name", "dpm_solver_2m")
    assert config.grid_sampler == DPMSolver2M(num_steps=20), "with dashes or underscores"


def refused(job: Job[Any], flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that is said of a mistake."""
    capsys.readouterr()
    assert run_job(job, flags) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sampler.name", "hein"], ["error: sampler.name: must be one of ", "got 'hein'; did you mean 'heun'?"]),
        (["--sampler.name", "zzz"], ["error: sampler.name: must be one of ", *SAMPLERS, "got 'zzz'; choose one"]),
        (["--sampler.name="], ["error: sampler.name: must be one of ", "got ''"]),
        (["--request.name", "inpant"], ["error: request.name: must be one of ", "did you mean 'inpaint'?"]),
        (["--sampler.name"], ["error: --sampler.name: needs a name"]),
        (["--request.name", "inpaint"], ["--request.inputs", "--request.mask", "must be given"]),
        (["--request.name", "inpaint", "--request.inputs", "x"], ["--request.mask", "must be given"]),
        (["--request.name", "partial"], ["--request.inputs", "must be given"]),
        (["--sampler.churn", "10"],
         ["error: sampler.churn: is an option of heun, got it with ddim; ", "choose --sampler.name heun"]),
        (["--sampler.name", "heun", "--sampler.eta", "1"],
         ["error: sampler.eta: is an option of ddim, got it with heun"]),
        (["--sampler.name", "heun", "--sampler.churn", "-1"], ["error: sampler.churn: must be at least 0", "-1"]),
        (["--sampler.name", "heun", "--request.name", "inpaint", "--request.inputs", "x", "--request.mask", "centre"],
         ["sampler.name: inpainting walks with ancestral or ddim, got heun"]),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_that_names_the_flag(
    flags: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(sample.JOB, flags, capsys)
    assert line.startswith("error: ") and all(word in line for word in words), line


def test_an_option_that_is_there_already_is_not_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(sample.JOB, ["--request.name", "inpaint", "--request.inputs", "x"], capsys)
    assert "--request.mask" in line and "--request.inputs" not in line and "--request.label" not in line
    line = refused(train.JOB, ["--network.name", "own"], capsys)
    assert "--network.factory" in line and "--network.options" not in line


def test_rules_between_a_variant_and_other_options_hold_once_all_flags_are_read(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Halfway, ten resamplings of length ten do not fit into nine steps; with the last flag they do."""
    flags = [
        "--request.name",
        "inpaint",
        "--request.inputs",
        "x",
        "--request.mask",
        "centre",
        "--sampler.num-steps",
        "9",
    ]
    assert "request.jump_length: must be below sampler.num_steps, 9" in refused(sample.JOB, flags, capsys)
    assert resolve(sample.JOB, *flags, "--request.jump-length", "3").request.jump_length == 3


@pytest.mark.parametrize(
    ("job", "variants"),
    [
        (sample.JOB, {"sampler": SAMPLERS, "request": variants_of(AnyRequest)}),
        (evaluate.JOB, {"sample.sampler": SAMPLERS, "sample.request": variants_of(AnyRequest)}),
        (train.JOB, {"network": NETWORKS, "grid-sampler": SAMPLERS}),
    ],
    ids=["sample", "evaluate", "train"],
)
def test_help_has_a_line_for_every_variant(
    job: Job[Any], variants: dict[str, dict[str, type]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_job(job, ["--help"])
    assert not stop.value.code
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    for flag, options in variants.items():
        after = text.partition(f"--{flag}.name NAME")[2]
        assert after, flag
        listed = re.findall(r"^ *[│ ]*(\w+)  +(\S.*\S)", after, flags=re.MULTILINE)[: len(options)]
        assert [name for name, _ in listed] == list(options)
        for (name, said), option in zip(listed, options.values(), strict=True):
            assert said.strip(" │") == (option.__doc__ or "").partition("\n")[0], name


def test_help_shows_the_options_of_the_variant_that_is_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    def shown(*given: str) -> str:
        with pytest.raises(SystemExit):
            run_job(sample.JOB, [*given, "--help"])
        return capsys.readouterr().out

    ddim, heun = shown(), shown("--sampler.name", "heun", "--request.name", "inpaint")
    assert "--sampler.eta" in ddim and "--sampler.churn" not in ddim
    assert "--sampler.name NAME   (now ddim, whose options are below)" in ddim
    assert "--sampler.churn" in heun and "--sampler.eta" not in heun and "--request.mask" in heun
    assert "--sampler.name NAME   (now heun, whose options are below)" in heun
    assert "--request.name NAME   (now inpaint, whose options are below)" in heun


def test_the_fields_with_variants_are_found_at_every_depth() -> None:
    preset = digits()
    assert [path for path, _, _ in variant_fields(preset.evaluate)] == [
        "sample.request",
        "sample.sampler",
        "sample.format",
    ]
    assert [path for path, _, _ in variant_fields(preset.train)] == ["network", "grid_sampler"]
    assert describe_variants(preset.prepare) == ""


def test_other_flags_are_left_as_they_are() -> None:
    flags = ["--seed", "3", "--sampler.num-steps=7", "--name", "--sampler.name=heun", "positional", "--a=b=c"]
    config, rest = take_variants(digits().sample, flags)
    assert rest == ["--seed", "3", "--sampler.num-steps=7", "--name", "positional", "--a=b=c"]
    assert isinstance(config, SampleConfig) and config.sampler.name == "heun"
    assert take_variants(digits().sample, []) == (digits().sample, [])
    with pytest.raises(ConfigError, match=r"^request\.name: must be one of generate, .* got 'x'"):
        take_variants(digits().sample, ["--request.name=x"])
