"""pipeline/presets.md sets the presets beside their papers: what it says of ours is true, and says it of everything."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import presets
from pipeline.config_io import plain
from pipeline.presets import PRESETS, Preset

PAGE = (Path(presets.__file__).parent / "presets.md").read_text()
OUR_OWN = {"digits", "digits_dit"}
PARTS = ("train.network", "train.schedule", "train.objective", "train.optimizer", "sample.sampler")
FIELDS = (
    "prepare.image_size",
    "prepare.held_out_fraction",
    "train.class_conditional",
    "train.label_drop",
    "train.horizontal_flip",
    "train.steps",
    "train.global_batch",
    "sample.images_per_class",
)
ROW = re.compile(r"^\| `(?P<field>[\w.]+)` \| (?P<paper>.+?) \| (?P<code>.+?) \| (?P<ours>.+?) \|(?P<why>.*)\|$")


def leaves(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= leaves(value, f"{path}{name}.") if isinstance(value, dict) else {f"{path}{name}": value}
    return found


def decides(name: str) -> dict[str, Any]:
    """What of a preset decides what is trained and how images are made; options of later papers are off."""
    preset = PRESETS[name]()
    everything = leaves(plain(preset))
    found = {field: everything[field] for field in FIELDS}
    for part in PARTS:
        found |= {field: value for field, value in everything.items() if field.startswith(f"{part}.")}
    return {field: value for field, value in found.items() if not is_left_out(preset, field)}


def is_left_out(preset: Preset, field: str) -> bool:
    """Options of later papers, at the default that does nothing; the spacing of all steps is no choice."""
    *path, name = field.split(".")
    owner: Any = preset
    for part in path:
        owner = getattr(owner, part)
    later = {"shift", "zero_terminal_snr", "min_snr_gamma", "p2_gamma", "more_ema_halflives_images"}
    later |= {"dynamic_threshold", "guidance_interval", "guidance_rescale"}
    if name in later:
        (default,) = (one.default for one in dataclasses.fields(owner) if one.name == name)
        assert getattr(owner, name) == default, f"{field} is on: it needs a row"
        return True
    if name == "spacing":
        return bool(preset.sample.sampler.num_steps == preset.train.schedule.num_timesteps)
    return name == "vlb_weight" and preset.train.objective.name == "simple"


def written(value: Any) -> str:
    return "none" if value is None else json.dumps(value)


def sections(page: str) -> dict[str, str]:
    return {text.partition(":")[0]: text for text in page.split("\n## ")[1:]}


def faults(page: str) -> list[str]:
    """What the page says that is not so, and what it leaves out."""
    found = []
    tables = sections(page)
    for name in PRESETS.keys() - OUR_OWN:
        rows = [match for line in tables.get(name, "").splitlines() if (match := ROW.match(line))]
        said = {row["field"]: row for row in rows}
        if len(said) < len(rows):
            found.append(f"{name}: a field twice")
        for field, value in decides(name).items():
            if field not in said:
                found.append(f"{name}: no row of {field}")
                continue
            ours, paper, code, why = (said[field][column].strip() for column in ("ours", "paper", "code", "why"))
            if ours != written(value):
                found.append(f"{name}: {field} is {written(value)}, the page says {ours}")
            differs = code != ours or paper not in ("-", ours)
            if differs and not why:
                found.append(f"{name}: {field} differs without a reason")
            if why and not differs:
                found.append(f"{name}: {field} has a reason and does not differ")
        found += [f"{name}: {field} decides nothing" for field in said.keys() - decides(name).keys()]
    return found


def test_the_page_is_true_and_leaves_nothing_out() -> None:
    assert faults(PAGE) == []
    assert sections(PAGE).keys() == PRESETS.keys() - OUR_OWN


def without(line: str) -> Callable[[str], str]:
    return lambda page: "\n".join(one for one in page.splitlines() if not one.startswith(line))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda page: page.replace('"fixed_small" | "fixed_small"', '"fixed_small" | "fixed_large"'), "variance is"),
        (lambda page: page.replace("| 256 | 256 | 256 | |", "| 256 | 256 | 128 | |"), "image_size is 256"),
        (lambda page: page.replace("stopped | 500000 | the paper's |", "stopped | 500000 | |"), "without a reason"),
        (lambda page: page.replace("| - | none | none | |", "| - | none | none | ours |"), "does not differ"),
        (lambda page: page.replace("| - | none | none | |", "| 1.0 | none | none | |"), "without a reason"),
        (without("| `train.label_drop`"), "no row of train.label_drop"),
        (lambda page: page.replace("`train.network.dropout`", "`train.network.dropuot`"), "dropuot decides nothing"),
        (lambda page: page + PAGE.split("\n## imagenet64_dit")[1], "a field twice"),
    ],
)  # fmt: skip
def test_each_fault_of_a_page_is_seen(change: Callable[[str], str], fault: str) -> None:
    changed = change(PAGE)
    assert changed != PAGE
    assert any(fault in one for one in faults(changed)), faults(changed)


def test_a_changed_preset_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    true = PRESETS["imagenet64"]()
    changed = dataclasses.replace(true, train=dataclasses.replace(true.train, horizontal_flip=False))
    monkeypatch.setitem(PRESETS, "imagenet64", lambda: changed)
    assert faults(PAGE) == ["imagenet64: train.horizontal_flip is false, the page says true"]
