"""Requests: what is refused, what TOML holds, which samplers can do them, and what of them is the spec."""

import dataclasses
from typing import Any, get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ddpm import DDIM, Ancestral, DPMSolver2M, Heun, Sampler
from ddpm.editing.partial import num_partial_steps
from ddpm.editing.repaint import num_repaint_evaluations
from pipeline.config_fields import variants_of
from pipeline.config_io import from_json, read_toml, to_json, to_toml
from pipeline.errors import ConfigError
from pipeline.generation.requests.requests import AnyRequest, Edit, Generate, Inpaint, Interpolate, Partial
from pipeline.generation.spec.edits import InpaintSpec, InterpolateSpec, PartialSpec

INPAINT = Inpaint(inputs="s3://b/x", mask="lower_half")


@pytest.mark.parametrize(
    ("field", "request_", "values"),
    [
        ("jump_length", Inpaint, {"mask": "centre", "jump_length": 0}),
        ("num_resamples", Inpaint, {"mask": "centre", "num_resamples": 0}),
        ("strength", Partial, {"strength": 1.5}),
        ("strength", Partial, {"strength": -0.5}),
        ("weights", Interpolate, {"weights": ()}),
        ("weights", Interpolate, {"weights": (0.5, 1.5)}),
        ("num_images", Partial, {"num_images": 0}),
        ("label", Partial, {"label": -1}),
        ("inputs", Partial, {"inputs": ""}),
        ("split", Partial, {"split": ""}),
        ("mask", Inpaint, {"mask": ""}),
    ],
)
def test_impossible_requests_are_refused_by_name(field: str, request_: type[Edit], values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{field}: .*(got|needs)"):
        request_(**({"inputs": "x"} | values))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    request: AnyRequest = dataclasses.field(default_factory=Generate)


@pytest.mark.parametrize(
    ("toml", "rule"),
    [
        ("name = 'erase'", "name: must be one of generate, inpaint, partial, interpolate, got 'erase'"),
        ("name = 'partial'", "inputs: is required and missing"),
        ("name = 'inpaint'\ninputs = 'x'", "mask: is required and missing"),
        ("inputs = 'x'", "inputs: unknown key of 'generate'"),
        ("name = 'partial'\ninputs = 'x'\nmask = 'centre'", "mask: unknown key of 'partial'"),
        ("name = 'inpaint'\ninputs = 'x'\nmask = 'centre'\nstrength = 0.3", "strength: unknown key of 'inpaint'"),
        ("name = 'interpolate'\ninputs = 'x'\njump_length = 3", "jump_length: unknown key of 'interpolate'"),
        ("name = 'partial'\ninputs = 'x'\nstrength = 2", "strength: must be in [0, 1], got 2.0"),
    ],
)
def test_what_does_not_belong_to_a_request_is_refused_in_a_file(toml: str, rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_toml(Holder, f"[request]\n{toml}", "mine.toml", Holder())
    assert str(caught.value).startswith(f"mine.toml: request.{rule}")


@pytest.mark.parametrize("request_", get_args(AnyRequest))
def test_every_request_has_a_name_and_says_what_it_is(request_: type) -> None:
    assert variants_of(AnyRequest)[request_.__dataclass_fields__["name"].default] is request_
    assert (request_.__doc__ or "").partition("\n")[0].endswith(".")


@given(steps=st.integers(1, 20), jump_length=st.integers(1, 25), num_resamples=st.integers(1, 3))
@example(steps=10, jump_length=10, num_resamples=2)
@example(steps=10, jump_length=9, num_resamples=2)
def test_resampling_that_never_jumps_is_refused(steps: int, jump_length: int, num_resamples: int) -> None:
    """Judged by the walk itself: without a jump it has one evaluation per step."""
    request = dataclasses.replace(INPAINT, jump_length=jump_length, num_resamples=num_resamples)
    jumps = num_repaint_evaluations(steps, jump_length, num_resamples) > steps
    if jumps or num_resamples == 1:
        request.check_sampler(DDIM(num_steps=steps))
    else:
        with pytest.raises(ValueError, match=rf"^request\.jump_length: .* {steps}, .* got {jump_length}"):
            request.check_sampler(DDIM(num_steps=steps))


def test_a_strength_that_takes_no_step_is_refused_unless_it_is_0() -> None:
    def ask(strength: float) -> None:
        Partial(inputs="x", strength=strength).check_sampler(DDIM(num_steps=5))

    assert num_partial_steps(5, 1e-10) == 0 < num_partial_steps(5, 0.01)
    ask(0.0)
    ask(0.01)
    with pytest.raises(ValueError, match=r"^request\.strength: takes none of the 5 steps, got 1e-10"):
        ask(1e-10)


@pytest.mark.parametrize(
    ("request_", "able", "unable", "words"),
    [
        (Generate(), [DDIM(), Ancestral(), DPMSolver2M(), Heun(churn=3.0)], [], ""),
        (
            INPAINT,
            [DDIM(), DDIM(eta=0.0), Ancestral()],
            [DPMSolver2M(), Heun()],
            r"^sampler\.name: inpainting walks with ancestral or ddim, got ",
        ),
        (Partial(inputs="x"), [DDIM(), Ancestral(), DPMSolver2M(), Heun(churn=3.0)], [], ""),
        (
            Interpolate(inputs="x"),
            [DDIM(eta=0.0), DPMSolver2M(), Heun()],
            [DDIM(), Ancestral(), Heun(churn=3.0)],
            r"^sampler\.name: interpolation needs ",
        ),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_request_knows_which_samplers_can_do_it(
    request_: AnyRequest, able: list[Sampler], unable: list[Sampler], words: str
) -> None:
    for sampler in able:
        request_.check_sampler(sampler)
    for sampler in unable:
        with pytest.raises(ValueError, match=words):
            request_.check_sampler(sampler)


REQUESTS = [
    Generate(),
    dataclasses.replace(INPAINT, split="held_out", num_resamples=3),
    Partial(inputs="x", strength=0.25, label=4),
    Interpolate(inputs="x", weights=(0.0, 0.5, 1.0), num_images=9),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: request.name)
def test_toml_and_json_hold_every_request(request_: AnyRequest) -> None:
    holder = Holder(request=request_)
    assert read_toml(Holder, to_toml(holder), "request.toml") == holder
    assert from_json(Holder, to_json(holder), "request.json") == holder


def test_the_spec_has_what_decides_the_images_and_nothing_else() -> None:
    """Where the inputs are and how many images are asked for is no part of it."""
    found: dict[str, Any] = {"inputs_digest": "ab" * 32, "num_inputs": 12}
    shared: dict[str, Any] = {"revision": 1, "label": 4, **found}
    inpaint = Inpaint(inputs="x", mask="centre", label=4, jump_length=7, num_resamples=3)
    assert inpaint.spec(**found, mask_digest="cd" * 32) == InpaintSpec(
        **shared, mask_digest="cd" * 32, jump_length=7, num_resamples=3
    )
    for request, spec in (
        (Partial(inputs="x", strength=0.25, label=4), PartialSpec(**shared, strength=0.25)),
        (Interpolate(inputs="x", weights=(0.5,), label=4), InterpolateSpec(**shared, weights=(0.5,))),
    ):
        assert request.spec(**found, mask_digest=None) == spec
        elsewhere = dataclasses.replace(request, inputs="y", split="held_out", num_images=1)
        assert elsewhere.spec(**found, mask_digest=None) == spec
