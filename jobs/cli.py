"""What all jobs share: preset < file < flags, one line per error; exits.py has the exit codes."""

import argparse
import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import tyro

from jobs.alternative_flags import make_room
from jobs.exits import run_guarded
from jobs.repeated_flags import gather
from jobs.variant_flags import describe_variants, take_variants
from pipeline.config_fields import fields_of
from pipeline.config_sections import FLAGS_ALONE, SECTIONS, read_section, write_section
from pipeline.errors import ConfigError
from pipeline.presets import PRESETS, Preset
from pipeline.progress import say
from pipeline.project import parse_project, read_preset
from pipeline.redact import redact, redact_fields
from pipeline.stores.patience import patience_s

C = TypeVar("C")
_DEFAULT_PRESET = "digits"

_COMMON = """

Before these flags come, in this order, a preset and a file:
  --preset NAME     one of {presets} (default: the file's, else {default})
  --config FILE     the project's TOML file; this job reads {reads}; unknown keys are refused
  --dry-run         print the file that would do the same, and the plan; start nothing, write no output
  --traceback       show where an error came from"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job(Generic[C]):
    """A job of the command line."""

    section: str
    """Its section of the project's file."""
    reads: tuple[str, ...]
    """The preset's sections that its configuration is made of."""
    of_preset: Callable[[Preset], C]
    """Its configuration, made of a preset."""
    run: Callable[[C], None]
    """The job."""
    describe: Callable[[C], list[tuple[str, str]]]
    """The plan of a --dry-run, as names and values."""


def run_job(job: Job[C], argv: Sequence[str], *, program: str | None = None) -> int:
    """Resolve the configuration and run the job, or with --dry-run print what it would do.

    Args:
        job: The job.
        argv: The flags, without the program's name.
        program: What --help calls the job; None: the file that was started.

    Returns:
        The exit code.
    """
    sys.path.insert(0, str(Path.cwd()))  # a network of your own lies where you started the job
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--traceback", action="store_true")
    show_traceback = own.parse_known_args(argv)[0].traceback

    def work() -> None:
        dry_run, preset, config = _resolve(job, argv, program)
        if dry_run:
            with _no_bytecode():  # a network of your own is imported to look at it
                plan = [*_flags_alone(config), *job.describe(config)]
            _print_plan(write_section(config, job.section, preset), plan)
        else:
            patience_s()  # else found when it is first needed, which may be after hours
            job.run(config)

    return run_guarded(work, show_traceback=show_traceback)


def run_subcommand(jobs: Mapping[str, Job[Any]], argv: Sequence[str], *, program: str, doc: str | None) -> int:
    """Run one of several jobs in a file by its name, the first of the flags.

    Args:
        jobs: The jobs by name.
        argv: The name and the flags, without the program's name.
        program: The file, such as jobs/ema.py.
        doc: What --help says before the list of names: the file's docstring.

    Returns:
        The exit code.
    """
    name = argv[0] if argv else ""
    if name in jobs:
        return run_job(jobs[name], argv[1:], program=f"{program} {name}")

    def work() -> None:
        if not argv or name in ("-h", "--help"):
            say(_overview(program, jobs, doc))
        if name not in ("-h", "--help"):
            names, got = " or ".join(jobs), repr(name) if argv else "nothing"
            raise ConfigError(f"{program}: must be followed by {names}, got {got}; --help says what they do")

    return run_guarded(work, show_traceback=False)


def _overview(program: str, jobs: Mapping[str, Job[Any]], doc: str | None) -> str:
    width = max(len(name) for name in jobs)
    lines = [f"usage: {program} {{{','.join(jobs)}}} [-h] [FLAGS]", "", (doc or "").strip(), ""]
    for name, job in jobs.items():
        about = (type(job.of_preset(PRESETS[_DEFAULT_PRESET]())).__doc__ or "").strip().partition("\n")[0]
        lines.append(f"  {program} {name:<{width}}  {about}")
    return "\n".join(lines)


def _resolve(job: Job[C], argv: Sequence[str], program: str | None) -> tuple[bool, str, C]:
    """Whether it is a dry run, the preset's name, and the configuration."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset", action="append")
    parser.add_argument("--config", action="append")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--traceback", action="store_true")
    try:
        common, flags = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error
    asked, file = _only("--preset", common.preset), _only("--config", common.config)
    tables = {} if file is None else parse_project(_read(file), file)
    name = asked or tables.get("preset", _DEFAULT_PRESET)
    if name not in PRESETS:
        where = "--preset" if asked else f"{file}: preset"
        raise ConfigError(f"{where}: one of {', '.join(PRESETS)}, got {name!r}")
    preset = read_preset(PRESETS[name](), tables, str(file), job.reads)
    try:
        config = job.of_preset(preset)
    except ValueError as error:  # a rule of the job's about what other sections say
        raise ConfigError(f"{file}: {error}") from None
    if job.section not in job.reads:  # what it builds on is read already, and may have been changed by of_preset
        own = {name: table for name, table in tables.items() if name not in SECTIONS or name == job.section}
        config = read_section(config, job.section, own, str(file))
    return common.dry_run, name, _parse_flags(job, preset, config, flags, program)


def _only(flag: str, given: list[str] | None) -> str | None:
    """The value of a flag that is given once at most; of two, one would be lost without a word."""
    if given is None:
        return None
    if len(given) > 1:
        raise ConfigError(f"{flag}: must be given once, got {' and '.join(map(repr, given))}; keep one of them")
    if not given[0]:
        raise ConfigError(f"{flag}: must not be empty, got ''; give a value or leave it out")
    return given[0]


def _read(file: str) -> bytes:
    try:
        return Path(file).expanduser().read_bytes()
    except (OSError, RuntimeError, ValueError) as error:  # of the system; of "~nobody"; of a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"--config: cannot read {file} ({reason}); name a TOML file") from error


def _sections(job: Job[C], preset: Preset, config: C) -> Iterator[str]:
    """The sections of the file that a job reads, those inside others first."""
    for section in job.reads:
        yield from (name for name in fields_of(type(getattr(preset, section))) if name in SECTIONS)
        yield section
    yield from (name for name in fields_of(type(config)) if name in SECTIONS)
    yield job.section


def _parse_flags(job: Job[C], preset: Preset, config: C, flags: Sequence[str], program: str | None) -> C:
    reads = ", ".join(f"[{section}]" for section in dict.fromkeys(_sections(job, preset, config)))
    start, rest = take_variants(config, flags)
    start, rest = make_room(start, rest), gather(start, rest)
    description = (type(config).__doc__ or "") + describe_variants(start)
    description += _COMMON.format(presets=", ".join(PRESETS), default=_DEFAULT_PRESET, reads=reads)

    def parse(default: C, args: Sequence[str]) -> C:
        return tyro.cli(
            type(config),
            prog=program,
            args=args,
            default=default,
            description=description,
            config=(tyro.conf.AvoidSubcommands,),
        )

    unseen, complaint = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(unseen), contextlib.redirect_stderr(unseen):
            return parse(start, rest)
    except SystemExit as stop:
        is_help = not stop.code
        # It prints values, broken where the line ends, where no password can be told: asked again without them.
        start, rest = redact_fields(start), [redact(flag) for flag in rest]
    try:
        with contextlib.redirect_stderr(complaint), contextlib.nullcontext() if is_help else _endless_lines():
            parse(start, rest)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    raise ConfigError(_first_sentence(complaint.getvalue(), type(config).__name__))


def _first_sentence(box: str, owner: str) -> str:
    """The sentence inside the framed message of the flag parser, without its frame and its help text.

    Args:
        box: What the parser printed.
        owner: Name of the class that all flags belong to.
    """
    lines = [re.sub(r"[│╭╮╰╯─]|\x1b\[[0-9;]*m", "", line).strip() for line in box.splitlines()]
    sentence = " ".join(line for line in lines[1:] if line and not set(line) <= {"-"})
    sentence = re.split(r"Argument helptext:|For full helptext|Got errors:", sentence)[0].strip()
    if sentence.startswith("Missing from"):
        missing = ", ".join(re.findall(r"--[\w.-]+", sentence))
        return f"{missing}: must be given, got nothing (--help lists every flag)"
    field = re.match(rf"Error parsing (?:{owner}|(?P<path>\w[\w.-]*)): (?P<rule>.+)", sentence)
    if field is not None:  # a rule of a config class, which knows its own fields, but not where it hangs
        path = field["path"]
        sentence = field["rule"] if path is None else f"{path.replace('-', '_')}.{field['rule']}"
    return f"{sentence} (--help lists every flag)"


@contextlib.contextmanager
def _endless_lines() -> Iterator[None]:
    """The flag parser breaks its lines where the terminal ends, also inside a path or a value."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


@contextlib.contextmanager
def _no_bytecode() -> Iterator[None]:
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def _flags_alone(config: object) -> list[tuple[str, str]]:
    """What the file of a plan leaves out, since only a flag sets it."""
    return [
        (f"--{name.replace('_', '-')}", "is no part of the file")
        for name in FLAGS_ALONE
        if getattr(config, name, False)
    ]


def _print_plan(file: str, plan: list[tuple[str, str]]) -> None:
    say(file)
    width = max(len(name) for name, _ in plan)
    for name, value in plan:
        say(f"# {name:<{width}}  {value}")
