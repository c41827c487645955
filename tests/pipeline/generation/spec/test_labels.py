"""Labels and noise follow from the sample id alone, of padding too."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.generation.spec.labels import (
    AnyLabelRule,
    CallerIds,
    IdModuloChosenClasses,
    IdModuloClasses,
    LabelPlan,
    PlannedLabels,
)

CALLER_IDS = CallerIds(text=np.frombuffer("äbc".encode(), dtype=np.uint8), ends=np.array([2, 2, 4]))
PLAN = LabelPlan(labels=np.array([2, 0, 2], dtype=np.int32), noise_ids=np.array([9, 1, 9]), caller_ids=CALLER_IDS)
PLANNED = PlannedLabels(file_sha256="ab" * 32, num_rows=3)
RULES: list[tuple[AnyLabelRule, LabelPlan | None]] = [
    (IdModuloClasses(), None),
    (IdModuloChosenClasses(classes=(7, 3)), None),
    (PLANNED, PLAN),
]


def test_all_classes_take_turns() -> None:
    assert IdModuloClasses().labels(range(4, 9), 3, None) == [1, 2, 0, 1, 2]
    assert IdModuloClasses().labels(range(4, 6), None, None) == [None, None]
    assert (IdModuloClasses().turn(3), IdModuloClasses().turn(None)) == (3, None)


def test_chosen_classes_take_turns_in_their_order() -> None:
    rule = IdModuloChosenClasses(classes=(7, 3))
    assert rule.labels(range(5, 9), 10, None) == [3, 7, 3, 7] and rule.turn(10) == 2
    for classes in ((), (3, 3), (-1,)):
        with pytest.raises(ValueError, match=r"^classes: at least one, each once"):
            IdModuloChosenClasses(classes=classes)


def test_a_plan_goes_row_by_row_and_padding_goes_round() -> None:
    assert PLANNED.labels(range(1, 7), 3, PLAN) == [0, 2, 2, 0, 2, 2]
    assert PLANNED.noise_ids(range(1, 7), PLAN) == [1, 9, 9, 1, 9, 9]
    without = dataclasses.replace(PLAN, noise_ids=None, caller_ids=None)
    assert PLANNED.noise_ids(range(1, 7), without) == [1, 2, 0, 1, 2, 0]
    assert [PLANNED.meta(i, PLAN) for i in range(3)] == [
        {"noise_id": 9, "id": "ä"},
        {"noise_id": 1, "id": ""},
        {"noise_id": 9, "id": "bc"},
    ]
    assert PLANNED.meta(2, without) == {"noise_id": 2} and PLANNED.turn(3) is None
    assert PLAN.repeats_noise and not without.repeats_noise
    assert not dataclasses.replace(PLAN, noise_ids=np.array([9, 1, 8])).repeats_noise


@given(start=st.integers(0, 50), length=st.integers(1, 20), cut=st.integers(0, 20))
def test_an_image_does_not_depend_on_its_batch(start: int, length: int, cut: int) -> None:
    ids = range(start, start + length)
    for rule, plan in RULES:
        labels, noise_ids = rule.labels(ids, 10, plan), list(rule.noise_ids(ids, plan))
        assert labels == rule.labels(ids[:cut], 10, plan) + rule.labels(ids[cut:], 10, plan)
        assert noise_ids == [*rule.noise_ids(ids[:cut], plan), *rule.noise_ids(ids[cut:], plan)]
