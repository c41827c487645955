"""One TOML file for a project: what all jobs share on top, and a section for each job.

    preset = "cifar10"                    what everything starts from
    dataset = "s3://images/cats"          prepare makes it, the others read it
    [tracking]                            MLflow
    [cluster]                             Ray
    [prepare]                             jobs/prepare_data.py
    [train]                               jobs/train.py
    [sample]                              jobs/sample.py, and the images that evaluate and the studies measure
    [evaluate]                            jobs/evaluate.py
    [compare_samplers] ...                one for each further job

A job reads what is shared, its own section and those that it builds on; of the others only the names are checked. What
a file leaves out is the preset's. In Python a job's configuration is one object (config_sections.py).
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from pipeline.config_io import parse_toml
from pipeline.config_sections import SECTIONS, SHARED, read_section, refuse_flag
from pipeline.errors import ConfigError
from pipeline.presets import Preset


def parse_project(text: str | bytes, where: str) -> dict[str, Any]:
    """The tables of a project file, their names checked.

    Args:
        text: The file's content.
        where: The file's name, for messages.

    Raises:
        ConfigError: If the text is not TOML, or a name on top is none of a project file's.
    """
    tables = parse_toml(text, where)
    for name, value in tables.items():
        refuse_flag(name, f"{where}: {name}")
        if name in SECTIONS and not isinstance(value, dict):
            raise ConfigError(f"{where}: {name}: must be a section, [{name}], got {value!r}; write a table")
        if name not in (*SECTIONS, *SHARED, "preset"):
            raise ConfigError(f"{where}: {name}: {_where_it_belongs(name)}")
    if not isinstance(tables.get("preset", ""), str):
        raise ConfigError(f"{where}: preset: must be a name in quotes, got {tables['preset']!r}; see --help")
    return tables


def read_preset(preset: Preset, tables: Mapping[str, Any], where: str, sections: tuple[str, ...]) -> Preset:
    """A preset with what a file says in some of its sections.

    Args:
        preset: What the file starts from.
        tables: What parse_project gave.
        where: The file's name, for messages.
        sections: Which of the preset's sections to read.

    Raises:
        ConfigError: If a key is unknown, or a value breaks a rule.
    """
    read = {name: read_section(getattr(preset, name), name, tables, where) for name in sections}
    return dataclasses.replace(preset, **read)


_MOVED = {
    **dict.fromkeys(("unet", "dit", "prediction_type", "learned_variance"), "[train.network]"),
    "model_options": "[train.network], as options",
}
"""Names of files from before there were sections, which sections have no more."""


def _where_it_belongs(name: str) -> str:
    """What to do about a name that does not stand on top."""
    if name in _MOVED:
        return f"stands in a section, got it on top; write it below {_MOVED[name]}"
    homes = [
        section
        for section, hint in Preset.__annotations__.items()
        if isinstance(hint, type) and name in {field.name for field in dataclasses.fields(hint)}
    ]
    if homes:
        return f"stands in a section, got it on top; write it below {' or '.join(f'[{home}]' for home in homes)}"
    near = difflib.get_close_matches(name, (*SECTIONS, *SHARED, "preset"), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: preset, {', '.join((*SHARED, *SECTIONS))}"
    return f"unknown name; {hint}"
