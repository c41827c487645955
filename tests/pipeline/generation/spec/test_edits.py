"""Specs of edits: which inputs an image belongs to, what changes the digest, and what an edit costs."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm import (
    DDIM,
    Ancestral,
    DiffusionModel,
    DPMSolver2M,
    Heun,
    Sampler,
    ScheduleConfig,
    interpolate_images,
    make_schedule,
    partial_diffusion,
    repaint,
)
from pipeline.config_io import digest, from_json, to_json
from pipeline.generation.spec.edits import (
    AnyEditSpec,
    EditTools,
    InpaintSpec,
    InterpolateSpec,
    LabelledInputs,
    PartialSpec,
)
from tests.pipeline.generation.spec.test_sampling_plan import make_spec

SHARED: dict[str, Any] = {"revision": 1, "inputs_digest": "ab" * 32, "label": None}
KNOWN = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
KNOWN[:, :, :4] = True
SPECS: dict[str, AnyEditSpec] = {
    "inpaint": InpaintSpec(**SHARED, num_inputs=5, mask_digest="cd" * 32, jump_length=2, num_resamples=2),
    "partial": PartialSpec(**SHARED, num_inputs=5, strength=0.5),
    "interpolate": InterpolateSpec(**SHARED, num_inputs=5, weights=(0.0, 0.5, 1.0)),
}


@pytest.mark.parametrize("name", ["inpaint", "partial"])
def test_an_edit_has_one_image_for_each_input(name: str) -> None:
    edit = SPECS[name]
    assert edit.num_images == 5 and [edit.rows(i) for i in range(7)] == [(0,), (1,), (2,), (3,), (4,), (0,), (1,)]


def test_an_interpolation_has_each_weight_for_each_pair() -> None:
    edit = SPECS["interpolate"]
    assert isinstance(edit, InterpolateSpec)
    assert edit.num_images == 6, "the fifth image has no partner"
    assert [edit.rows(i) for i in range(7)] == [(0, 1)] * 3 + [(2, 3)] * 3 + [(0, 1)]
    assert [edit.weight(i) for i in range(7)] == [0.0, 0.5, 1.0, 0.0, 0.5, 1.0, 0.0]


@given(
    name=st.sampled_from(list(SPECS)),
    num_inputs=st.integers(2, 50),
    num_weights=st.integers(1, 5),
    sample_id=st.integers(0, 2**48 - 1),
)
def test_every_id_has_inputs(name: str, num_inputs: int, num_weights: int, sample_id: int) -> None:
    weights = {"weights": tuple(k / 10 for k in range(num_weights))} if name == "interpolate" else {}
    edit = dataclasses.replace(SPECS[name], num_inputs=num_inputs, **weights)
    assert all(0 <= row < num_inputs for row in edit.rows(sample_id))
    assert edit.rows(sample_id) == edit.rows(sample_id % edit.num_images)


CHANGES: dict[str, list[dict[str, Any]]] = {
    "inpaint": [{"mask_digest": "ef" * 32}, {"jump_length": 5}, {"num_resamples": 5}],
    "partial": [{"strength": 0.6}],
    "interpolate": [{"weights": (0.5,)}],
}


@pytest.mark.parametrize("name", SPECS)
def test_everything_that_decides_an_edit_changes_the_digest(name: str) -> None:
    edit = SPECS[name]
    changes = [{"revision": 2}, {"inputs_digest": "cd" * 32}, {"num_inputs": 4}, {"label": 1}, *CHANGES[name]]
    assert {next(iter(change)) for change in changes} == {f.name for f in dataclasses.fields(edit)} - {"name"}
    specs = [make_spec(request=dataclasses.replace(edit, **change)) for change in [{}, *changes]]
    assert len({spec.digest for spec in specs}) == len(specs)


def test_edits_differ_from_each_other_and_from_none() -> None:
    digests = {make_spec(request=edit).digest for edit in (None, *SPECS.values())}
    assert len(digests) == 4


# What decides the images of an edit names its prefix for ever, as the spec of plain generation does.
GOLDEN = {
    "inpaint": "13edbcd430157706329f2af11faf642a319a808ef39c9a403c5fad8cb990ebed",
    "partial": "3701e74f256107a4ddafc925fbc4ef8c32acfed0fcfa56a9188332761d0de946",
    "interpolate": "e190857b021b164a10c9235ae464c571e11f701975bca464a9493c7855df1cc9",
}


@pytest.mark.parametrize("name", SPECS)
def test_digests_are_golden_and_records_are_read_back(name: str) -> None:
    edit = SPECS[name]
    assert digest(edit) == GOLDEN[name]
    assert from_json(type(edit), to_json(edit), "spec.json") == edit


def test_labels_are_a_tensor_where_the_model_has_classes() -> None:
    x_0 = torch.zeros(2, 1, 8, 8)
    label = LabelledInputs(x_0=x_0, labels=[3, 0]).label
    assert label is not None and label.tolist() == [3, 0]
    assert LabelledInputs(x_0=x_0, labels=[None, None]).label is None


class Counting:
    """A network that knows a class for each image, and counts its evaluations."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        self.num_calls += 1
        assert label is not None
        return 0.3 * x_t + 0.1 * label[:, None, None, None]


def tools(network: Counting, sampler: Sampler) -> EditTools:
    schedule = make_schedule(ScheduleConfig(name="cosine", num_timesteps=50))
    model = DiffusionModel(network=network, schedule=schedule, image_shape=(1, 8, 8), null_label=7)
    return EditTools(model=model, sampler=sampler, seed=3, guide=None, x_0_error=None, known=KNOWN)


def inputs(first: int) -> LabelledInputs:
    x_0 = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(first)) * 2 - 1
    return LabelledInputs(x_0=x_0, labels=[first, first + 1, first + 2])


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("inpaint", DDIM(num_steps=5)),
        ("inpaint", Ancestral(num_steps=6)),
        ("partial", DDIM(num_steps=5)),
        ("partial", Heun(num_steps=9, spacing="trailing")),
        ("interpolate", DDIM(num_steps=5, eta=0.0)),
        ("interpolate", DPMSolver2M(num_steps=5)),
        ("interpolate", Heun(num_steps=6)),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_cost_is_what_the_network_is_asked(name: str, sampler: Sampler) -> None:
    """Per image; both images of a pair are walked up, by calls of their own."""
    edit, network = SPECS[name], Counting()
    used = tools(network, sampler)
    given_ = (inputs(0), inputs(3)) if name == "interpolate" else (inputs(0),)
    edit.edit(used, torch.arange(3), given_)
    assert network.num_calls == edit.num_evaluations(used.model.schedule, sampler)


def test_an_edit_is_the_librarys_with_the_labels_that_were_given() -> None:
    ids, first, second = torch.tensor([3, 1, 4]), inputs(0), inputs(3)
    used = tools(Counting(), DDIM(num_steps=5))
    made, labels = SPECS["inpaint"].edit(used, ids, (first,))
    by_hand = repaint(
        used.model, used.sampler, first.x_0, KNOWN, first.label, jump_length=2, num_resamples=2, seed=3, sample_ids=ids
    )
    assert torch.equal(made, by_hand) and labels == [0, 1, 2]

    made, labels = SPECS["partial"].edit(used, ids, (first,))
    by_hand = partial_diffusion(used.model, used.sampler, first.x_0, first.label, strength=0.5, seed=3, sample_ids=ids)
    assert torch.equal(made, by_hand) and labels == [0, 1, 2]

    used = tools(Counting(), DDIM(num_steps=5, eta=0.0))
    made, labels = SPECS["interpolate"].edit(used, ids, (first, second))
    by_hand = interpolate_images(
        used.model,
        used.sampler,
        first.x_0,
        second.x_0,
        torch.tensor([0.0, 0.5, 0.5]),  # of the ids 3, 1 and 4
        first_label=first.label,
        second_label=second.label,
        sample_ids=ids,
    )
    assert torch.equal(made, by_hand) and labels == [0, 1, 2], "the nearer one's, the first one's in the middle"
    _, labels = SPECS["interpolate"].edit(used, torch.tensor([2, 5, 0]), (first, second))
    assert labels == [3, 4, 2]
