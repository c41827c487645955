"""Charts: bytes that a viewer opens, equal for equal arguments, with every line in them."""

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.evaluation.charts import Line, Panel, line_charts


def panel(**changes: object) -> Panel:
    lines = [Line(label="a", x=[1, 10, 100], y=[3.0, 2.0, 1.0]), Line(label="b", x=[1, 10], y=[1.0, 0.5])]
    return Panel(title="quality", lines=lines, **changes)  # type: ignore[arg-type]


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def test_equal_arguments_give_equal_bytes() -> None:
    first = line_charts([panel(), panel(log_y=True)], x_label="evaluations", log_x=True, markers=True)
    assert first == line_charts([panel(), panel(log_y=True)], x_label="evaluations", log_x=True, markers=True)
    assert pixels(first).shape[1] > pixels(line_charts([panel()], x_label="evaluations")).shape[1]


@pytest.mark.parametrize("change", [{"log_y": True}, {"limits_y": (0.0, 9.0)}, {"levels": {"real": 2.5}}])
def test_each_option_shows(change: dict[str, object]) -> None:
    plain, changed = (pixels(line_charts([p], x_label="x")) for p in (panel(), panel(**change)))
    assert plain.shape != changed.shape or (plain != changed).any()


def test_a_line_looks_the_same_in_every_panel() -> None:
    """matplotlib's first two colours: b keeps the second where a is missing."""
    only_b = Panel(title="b alone", lines=panel().lines[1:])
    whole = pixels(line_charts([panel(), only_b], x_label="x"))
    right = whole[:, whole.shape[1] // 2 :]
    orange, blue = np.array([255, 127, 14]), np.array([31, 119, 180])
    assert (np.abs(right - orange).sum(axis=2) < 30).any()
    assert not (np.abs(right - blue).sum(axis=2) < 30).any()


def test_a_logarithmic_panel_without_positive_values_is_drawn_plainly() -> None:
    zeros = [Line(label="exact", x=[1, 2], y=[0.0, 0.0])]
    plain, log = (line_charts([Panel(title="x", lines=zeros, log_y=log_y)], x_label="x") for log_y in (False, True))
    assert plain == log


def test_empty_lines_are_left_out() -> None:
    empty = Panel(title="x", lines=[Line(label="nothing", x=[], y=[]), *panel().lines])
    assert pixels(line_charts([empty], x_label="x")).size
