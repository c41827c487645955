"""Requests: what is refused, what TOML holds, and which inputs an image belongs to."""

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pipeline.generation.sample_config import SampleConfig

from ddpm import SamplerConfig, num_partial_steps, num_repaint_evaluations
from pipeline.config_io import read_toml, to_toml
from pipeline.generation.requests import EditSpec, RequestConfig, check_steps


def spec_of(kind: Any, num_inputs: int, weights: tuple[float, ...] = ()) -> EditSpec:
    return EditSpec(kind=kind, inputs_digest="ab" * 32, num_inputs=num_inputs, label=None, weights=weights)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("kind", {"kind": "erase"}),
        ("inputs", {"inputs": "x"}),
        ("split", {"split": "train"}),
        ("num_images", {"num_images": 3}),
        ("label", {"label": 3}),
        ("inputs", {"kind": "partial"}),
        ("mask", {"kind": "inpaint", "inputs": "x"}),
        ("mask", {"kind": "partial", "inputs": "x", "mask": "centre"}),
        ("strength", {"kind": "inpaint", "inputs": "x", "mask": "centre", "strength": 0.3}),
        ("jump_length", {"kind": "interpolate", "inputs": "x", "jump_length": 3}),
        ("weights", {"weights": (0.5,)}),
        ("jump_length", {"kind": "inpaint", "inputs": "x", "mask": "centre", "jump_length": 0}),
        ("num_resamples", {"kind": "inpaint", "inputs": "x", "mask": "centre", "num_resamples": 0}),
        ("strength", {"kind": "partial", "inputs": "x", "strength": 1.5}),
        ("weights", {"kind": "interpolate", "inputs": "x", "weights": ()}),
        ("weights", {"kind": "interpolate", "inputs": "x", "weights": (0.5, 1.5)}),
        ("num_images", {"kind": "partial", "inputs": "x", "num_images": 0}),
        ("label", {"kind": "partial", "inputs": "x", "label": -1}),
        ("inputs", {"kind": "partial", "inputs": ""}),
        ("split", {"kind": "partial", "inputs": "x", "split": ""}),
        ("mask", {"kind": "inpaint", "inputs": "x", "mask": ""}),
        ("mask", {"mask": ""}),
    ],
)
def test_impossible_requests_are_refused_by_name(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{field}: .*(got|needs)"):
        RequestConfig(**values)


@pytest.mark.parametrize("field", ["model", "output", "guide_model", "calibration"])
def test_empty_places_are_refused_by_name(field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: must not be empty"):
        SampleConfig(**{"model": "m", "output": "o", field: ""})


@given(steps=st.integers(1, 20), jump_length=st.integers(1, 25), num_resamples=st.integers(1, 3))
@example(steps=10, jump_length=10, num_resamples=2)
@example(steps=10, jump_length=9, num_resamples=2)
def test_resampling_that_never_jumps_is_refused(steps: int, jump_length: int, num_resamples: int) -> None:
    """Judged by the walk itself: without a jump it has one evaluation per step."""
    request = RequestConfig(
        kind="inpaint", inputs="x", mask="centre", jump_length=jump_length, num_resamples=num_resamples
    )
    jumps = num_repaint_evaluations(steps, jump_length, num_resamples) > steps
    if jumps or num_resamples == 1:
        check_steps(request, SamplerConfig(num_steps=steps))
    else:
        with pytest.raises(ValueError, match=rf"^request\.jump_length: .* {steps}, .* got {jump_length}"):
            check_steps(request, SamplerConfig(num_steps=steps))


def test_a_strength_that_takes_no_step_is_refused_unless_it_is_0() -> None:
    def asked(strength: float) -> SampleConfig:
        request = RequestConfig(kind="partial", inputs="x", strength=strength)
        return SampleConfig(model="m", output="o", request=request, sampler=SamplerConfig(num_steps=5))

    assert num_partial_steps(5, 1e-10) == 0 < num_partial_steps(5, 0.01)
    assert asked(0.0).request.strength == 0.0 and asked(0.01).request.strength == 0.01
    with pytest.raises(ValueError, match=r"^request\.strength: takes none of the 5 steps, got 1e-10"):
        asked(1e-10)


@pytest.mark.parametrize(
    "request_",
    [
        RequestConfig(),
        RequestConfig(kind="inpaint", inputs="s3://b/x", split="held_out", mask="lower_half", num_resamples=3),
        RequestConfig(kind="partial", inputs="x", strength=0.25, label=4),
        RequestConfig(kind="interpolate", inputs="x", weights=(0.0, 0.5, 1.0), num_images=9),
    ],
    ids=lambda request: request.kind,
)
def test_toml_holds_every_kind(request_: RequestConfig) -> None:
    assert read_toml(RequestConfig, to_toml(request_), "request.toml") == request_


def test_an_edit_has_one_image_for_each_input() -> None:
    edit = spec_of("inpaint", 5)
    assert edit.num_images == 5 and [edit.rows(i) for i in range(7)] == [(0,), (1,), (2,), (3,), (4,), (0,), (1,)]


def test_an_interpolation_has_each_weight_for_each_pair() -> None:
    edit = spec_of("interpolate", 5, (0.0, 0.5, 1.0))
    assert edit.num_images == 6, "the fifth image has no partner"
    assert [edit.rows(i) for i in range(7)] == [(0, 1)] * 3 + [(2, 3)] * 3 + [(0, 1)]
    assert [edit.weight(i) for i in range(7)] == [0.0, 0.5, 1.0, 0.0, 0.5, 1.0, 0.0]


@given(
    kind=st.sampled_from(["inpaint", "partial", "interpolate"]),
    num_inputs=st.integers(2, 50),
    num_weights=st.integers(1, 5),
    sample_id=st.integers(0, 2**48 - 1),
)
def test_every_id_has_inputs(kind: str, num_inputs: int, num_weights: int, sample_id: int) -> None:
    edit = spec_of(kind, num_inputs, tuple(k / 10 for k in range(num_weights)) if kind == "interpolate" else ())
    assert all(0 <= row < num_inputs for row in edit.rows(sample_id))
    assert edit.rows(sample_id) == edit.rows(sample_id % edit.num_images)
