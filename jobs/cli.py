"""What all jobs share: preset < file < flags, one line per error, exit codes.

Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted.
"""

import argparse
import contextlib
import io
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from pipeline.config_io import read_toml, to_toml
from pipeline.errors import ConfigError, PipelineError
from pipeline.presets import PRESETS, Preset
from pipeline.progress import say

C = TypeVar("C")
Subcommand = tuple[Callable[[Preset], Any], Callable[[Any], None], Callable[[Any], list[tuple[str, str]]]]
"""What `run_job` takes: the part of a preset, the job, the plan."""

_COMMON = """

Before these flags come, in this order, a preset and a file:
  --preset NAME     one of {presets} (default: digits)
  --config FILE     TOML with any of the fields below; unknown keys are refused
  --dry-run         print the resolved configuration and the plan, touch nothing
  --traceback       show where an error came from"""


def run_job(
    argv: Sequence[str],
    of_preset: Callable[[Preset], C],
    run: Callable[[C], None],
    describe: Callable[[C], list[tuple[str, str]]],
    *,
    program: str | None = None,
) -> int:
    """Resolve the configuration and run the job, or with --dry-run print what it would do.

    Args:
        argv: The flags, without the program's name.
        of_preset: This job's part of a preset.
        run: The job.
        describe: The plan of a --dry-run, as names and values.
        program: What --help calls the job; None: the file that was started.

    Returns:
        The exit code.
    """
    sys.path.insert(0, str(Path.cwd()))  # a network of your own lies where you started the job
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--traceback", action="store_true")
    show_traceback = own.parse_known_args(argv)[0].traceback
    try:
        dry_run, config = _resolve(argv, of_preset, program)
        if dry_run:
            _print_plan(config, describe(config))
        else:
            run(config)
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if show_traceback:
            traceback.print_exc()
        print(f"error: {one_line(error)}", file=sys.stderr)
        return error.exit_code if isinstance(error, PipelineError) else 1


def run_subcommand(
    argv: Sequence[str],
    program: str,
    subcommands: Mapping[str, Subcommand],
    doc: str | None,
) -> int:
    """Run one of several jobs in a file by its name, the first of the flags.

    Args:
        argv: The name and the flags, without the program's name.
        program: The file, such as jobs/ema.py.
        subcommands: The jobs by name.
        doc: What --help says before the list of names: the file's docstring.

    Returns:
        The exit code.
    """
    name = argv[0] if argv else ""
    if name in subcommands:
        return run_job(argv[1:], *subcommands[name], program=f"{program} {name}")
    if not argv or name in ("-h", "--help"):
        say(_overview(program, subcommands, doc))
    if name in ("-h", "--help"):
        return 0
    names, got = " or ".join(subcommands), repr(name) if argv else "nothing"
    print(f"error: {program}: must be followed by {names}, got {got}; --help says what they do", file=sys.stderr)
    return ConfigError.exit_code


def _overview(program: str, subcommands: Mapping[str, Subcommand], doc: str | None) -> str:
    width = max(len(name) for name in subcommands)
    lines = [f"usage: {program} {{{','.join(subcommands)}}} [-h] [FLAGS]", "", (doc or "").strip(), ""]
    for name, (of_preset, _, _) in subcommands.items():
        about = (type(of_preset(PRESETS["digits"]())).__doc__ or "").strip().partition("\n")[0]
        lines.append(f"  {program} {name:<{width}}  {about}")
    return "\n".join(lines)


def _resolve(argv: Sequence[str], of_preset: Callable[[Preset], C], program: str | None) -> tuple[bool, C]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--traceback", action="store_true")
    try:
        common, flags = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error
    if common.preset not in PRESETS:
        raise ConfigError(f"--preset: one of {', '.join(PRESETS)}, got {common.preset!r}")
    config = of_preset(PRESETS[common.preset]())
    if common.config is not None:
        try:
            text = common.config.read_bytes()
        except OSError as error:
            raise ConfigError(f"--config: cannot read {common.config} ({error.strerror})") from error
        config = read_toml(type(config), text, str(common.config), base=config)
    return common.dry_run, _parse_flags(config, flags, program)


def _parse_flags(config: C, flags: Sequence[str], program: str | None) -> C:
    description = (type(config).__doc__ or "") + _COMMON.format(presets=", ".join(PRESETS))
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(type(config), prog=program, args=list(flags), default=config, description=description)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise ConfigError(_first_sentence(complaint.getvalue(), type(config).__name__)) from None


def _first_sentence(box: str, owner: str) -> str:
    """The sentence inside the framed message of the flag parser, without its frame and its help text.

    Args:
        box: What the parser printed.
        owner: Name of the class that all flags belong to.
    """
    lines = [re.sub(r"[│╭╮╰╯─]|\x1b\[[0-9;]*m", "", line).strip() for line in box.splitlines()]
    sentence = " ".join(line for line in lines[1:] if line and not set(line) <= {"-"})
    sentence = re.split(r"Argument helptext:|For full helptext|Got errors:", sentence)[0].strip()
    field = re.match(rf"Error parsing (?:{owner}|(?P<path>\w[\w.-]*)): (?P<rule>.+)", sentence)
    if field is not None:  # a rule of a config class, which knows its own fields, but not where it hangs
        path = field["path"]
        sentence = field["rule"] if path is None else f"{path.replace('-', '_')}.{field['rule']}"
    return f"{sentence} (--help lists every flag)"


def one_line(error: Exception) -> str:
    """An error as one line for the terminal."""
    text = " ".join(str(error).split())
    return text if isinstance(error, PipelineError) else f"{type(error).__name__}: {text} (--traceback shows where)"


def _print_plan(config: object, plan: list[tuple[str, str]]) -> None:
    say(to_toml(config))
    width = max(len(name) for name, _ in plan)
    for name, value in plan:
        say(f"# {name:<{width}}  {value}")
