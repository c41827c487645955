"""The registered model's parameters: every option of every sampler, flat, and back."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm import DDIM, SAMPLERS, Ancestral, DPMSolver2M, Heun, Sampler
from pipeline.models.sampler_params import DEFAULT_SAMPLER, is_interval, sampler_of_params, sampler_options

WITHOUT_DEFAULT = [name for name, kind in SAMPLERS.items() if kind is not type(DEFAULT_SAMPLER)]


def test_every_option_of_every_sampler_is_a_parameter() -> None:
    options = sampler_options()
    assert set(options) == {f.name for kind in SAMPLERS.values() for f in dataclasses.fields(kind)} - {"name"}
    shared = [f.name for f in dataclasses.fields(Sampler) if f.name != "name"]
    assert list(options)[: len(shared)] == shared, "those that all samplers share come first"
    for kind in SAMPLERS.values():  # one flat name has one meaning, so one default
        assert {f.name: f.default for f in dataclasses.fields(kind) if f.name != "name"}.items() <= options.items()


@pytest.mark.parametrize(
    "sampler",
    [
        DDIM(num_steps=7, eta=0.25, spacing="trailing", clip_x_0=False),
        Ancestral(variance="fixed_large"),
        DPMSolver2M(guidance_scale=2.0, guidance_interval=(0.5, 5.0), guidance_rescale=0.5),
        Heun(churn=4.0, churn_interval=(0.1, 9.0), dynamic_threshold=0.995),
    ],
    ids=lambda sampler: sampler.name,
)
def test_a_sampler_is_what_its_parameters_say(sampler: Sampler) -> None:
    """As MLflow hands them over: defaults filled in, pairs as lists, a pair that is off as an empty list."""
    given_ = {name: value for name, value in dataclasses.asdict(sampler).items() if name != "name"}
    filled = {"sampler": sampler.name, **sampler_options(), **given_}
    as_mlflow = {
        name: list(value or ()) if is_interval(name) else value for name, value in filled.items() if name != "sampler"
    }
    assert sampler_of_params({"sampler": sampler.name, **as_mlflow}) == sampler
    assert sampler_of_params({"sampler": sampler.name, **given_, **_intervals(given_)}) == sampler, "nothing filled in"


def _intervals(options: dict[str, Any]) -> dict[str, list[float]]:
    return {name: list(value or ()) for name, value in options.items() if is_interval(name)}


@given(name=st.sampled_from(list(SAMPLERS)), num_steps=st.integers(1, 99))
def test_what_is_left_out_has_its_default(name: str, num_steps: int) -> None:
    assert sampler_of_params({"sampler": name, "num_steps": num_steps}) == SAMPLERS[name](num_steps=num_steps)


def test_nothing_asked_for_is_the_default_sampler() -> None:
    assert sampler_of_params({}) == DEFAULT_SAMPLER == DDIM()
    assert sampler_of_params({"eta": 0.0}) == DDIM(eta=0.0)


def test_intervals_are_known_by_their_type() -> None:
    assert {name for name in sampler_options() if is_interval(name)} == {"guidance_interval", "churn_interval"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sampler": "euler"}, r"^sampler: must be ancestral or ddim or .*, got 'euler'; choose one of them"),
        ({"etta": 1.0}, r"^etta: is no parameter of this model, got 1\.0; leave it out"),
        ({"churn": 3.0}, r"^churn: is no option of ddim, got 3\.0; leave it out or choose another sampler"),
        ({"sampler": "heun", "eta": 0.5}, r"^eta: is no option of heun, got 0\.5"),
        ({"sampler": "heun", "variance": "fixed_large"}, r"^variance: is no option of heun, got 'fixed_large'"),
        ({"churn_interval": [0.1, 9.0]}, r"^churn_interval: is no option of ddim"),
        ({"sampler": "heun", "churn_interval": []}, r"^churn_interval: must be two numbers, got None"),
        ({"guidance_interval": [1.0]}, r"^guidance_interval: must be two numbers, got \(1\.0,\)"),
        ({"eta": 2.0}, r"^eta: must be in \[0, 1\], got 2\.0"),
        ({"num_steps": 0}, r"^num_steps: must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sampler_of_params(values)


@pytest.mark.parametrize("name", WITHOUT_DEFAULT)
def test_another_samplers_option_at_its_default_is_no_mistake(name: str) -> None:
    """MLflow fills in every default: it cannot be told from a value that was given."""
    foreign = {
        option: value
        for option, value in sampler_options().items()
        if option not in SAMPLERS[name].__dataclass_fields__
    }
    assert foreign and sampler_of_params({"sampler": name, **foreign}) == SAMPLERS[name]()
