"""The sections of a project's TOML file (project.py shows one), and how a job's configuration is spread over them.

In Python a job's configuration is one object: its fields `dataset`, `tracking` and `cluster` are shared by all jobs and
stand on top of the file, and a field with the name of a section is that section. All else is the job's own section.

Whether a model's code is trusted stands in no file, written or read: files are handed on and lie in stores that others
write to, and one that is read back, perhaps beside the very model, must not trust it unseen. It is said by a flag, for
one run.
"""

import dataclasses
import tomllib
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import tomli_w

from pipeline.config_io import from_tables, to_toml
from pipeline.errors import ConfigError
from pipeline.redact import redact

SHARED = ("dataset", "tracking", "cluster")
"""Names that stand on top of the file, once for all jobs."""
SECTIONS = (
    "prepare",
    "train",
    "sample",
    "evaluate",
    "calibrate",
    "compare_samplers",
    "compare_bounds",
    "compare_models",
    "figures",
    "ema_reconstruct",
    "ema_sweep",
    "benchmark_train",
    "benchmark_sample",
)
"""Names of the sections; the first four are those of a preset."""

FLAGS_ALONE = ("trust_model_code", "start_over", "new_run")
"""Fields of configurations that only a flag sets, for one run."""

_OF_THE_JOB_ALONE = {
    "sample": ("tick", "keep_last", "if_held", "lease_s", "throughput", "price_per_device_hour", "price_per_gb")
}
"""Keys of a section that its own job reads; another one that makes images as the section says has no use for them."""

C = TypeVar("C")


def read_section(config: C, section: str, tables: Mapping[str, Any], where: str, *, beside: Collection[str] = ()) -> C:
    """A job's configuration with what a file says: shared fields, the sections inside it, then its own.

    Args:
        config: What the file starts from.
        section: Its own section.
        tables: The file's tables.
        where: The file's name, for messages.
        beside: Inner sections of another job that this one's configuration has beside it, such as [evaluate.sample]
            where the measures are read alone: they are not read here.

    Raises:
        ConfigError: If a key is unknown, or a value breaks a rule.
    """
    changes: dict[str, Any] = {}
    names = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    inner = [name for name in names if name in SECTIONS]
    for name in names:
        if name in SHARED and name in tables:
            changes[name] = from_tables(type(getattr(config, name)), name, tables[name], where, getattr(config, name))
        elif name in SECTIONS and name in tables:
            changes[name] = read_section(
                getattr(config, name), name, tables, where, beside=[other for other in inner if other != name]
            )
    try:
        config = dataclasses.replace(config, **changes)  # type: ignore[type-var]
    except ValueError as error:  # a rule between fields of two sections
        raise ConfigError(f"{where}: {error}") from None
    own = {name: value for name, value in tables.get(section, {}).items() if name not in beside or name in names}
    unread = [name for name in _OF_THE_JOB_ALONE.get(section, ()) if name not in names]
    own = {name: value for name, value in own.items() if name not in unread}
    for name in own:
        refuse_flag(name, f"{where}: {section}.{name}")
        if name in SHARED:
            raise ConfigError(
                f"{where}: {section}.{name}: is shared by all jobs, got it in [{section}]; write it on top of the file"
            )
    return from_tables(type(config), section, own, where, config)


def refuse_flag(name: str, place: str) -> None:
    """Refuse a key of a file that only a flag may set.

    Raises:
        ConfigError: If it is one.
    """
    if name in FLAGS_ALONE:
        flag = f"--{name.replace('_', '-')}"
        raise ConfigError(f"{place}: is no key of a file, got it there; remove it, and pass {flag} for the run")


def write_section(config: object, section: str, preset: str | None = None) -> str:
    """The project file that gives a job this configuration: shared fields on top, then sections.

    Passwords of URIs are left out, since the file is printed and stored: they have to be given again.

    A section of another job that is inside, such as [sample] in evaluate, is written by itself. Studies, which start
    from [sample] and change it, have it inside their own.

    Args:
        config: The job's configuration.
        section: Its own section.
        preset: Name of the preset that the file is read over; None leaves the line out.
    """
    top: dict[str, Any] = {} if preset is None else {"preset": preset}
    sections: dict[str, Any] = {}
    tree = {name: value for name, value in tomllib.loads(to_toml(config)).items() if name not in FLAGS_ALONE}
    top |= {name: tree.pop(name) for name in SHARED if name in tree}
    if section in SECTIONS[:4]:
        sections = {name: tree.pop(name) for name in SECTIONS if isinstance(tree.get(name), dict)}
    return redact(tomli_w.dumps({**top, **sections, section: tree}))
