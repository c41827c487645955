"""The commands that the pages tell a reader to type, found as a reader finds them: in blocks and in the text."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "ddpm/README.md",
    "ddpm/measurements.md",
    "pipeline/README.md",
    "CONTRIBUTING.md",
    "pipeline/presets.md",
]
_JOB = r"(?:(?:\.venv/bin/)?python )?jobs/\w+\.py"
_COMMAND = rf"{_JOB} |(?:\.venv/bin/)?python -m|make |pytest|ray |\.ci/"


def code_of(text: str) -> tuple[list[str], list[str]]:
    """The lines of all blocks, continued ones joined and without comments, and every span of code in the text."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.split("  #")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(line.split()) for line in lines], [" ".join(s.split()) for s in re.findall(r"`([^`]+)`", prose)]


def commands(text: str) -> list[str]:
    """Everything that is to be typed whole, once each; a job without flags in the text is the name of a file."""
    lines, spans = code_of(text)
    lines += [line.split(" -- ", 1)[1] for line in lines if " -- " in line]  # what a submitted job runs
    lines = [line for line in lines if re.match(rf"{_COMMAND}|{_JOB}$", line)]
    return list(dict.fromkeys([*lines, *(span for span in spans if re.match(_COMMAND, span))]))


def flags(text: str) -> list[str]:
    """Spans of flags without a program, which the text around them names."""
    return list(dict.fromkeys(span for span in code_of(text)[1] if span.startswith("--")))


def job_words(command: str) -> list[str]:
    """The file's name without .py, and the words behind it; of what is no job, nothing."""
    found = re.match(_JOB, command)
    return [] if found is None else [Path(found[0].split()[-1]).stem, *shlex.split(command[found.end() :])]


def page_texts() -> dict[str, str]:
    """The pages, and what each job says of itself at the top of its file."""
    texts = {page: (ROOT / page).read_text() for page in PAGES}
    for file in sorted((ROOT / "jobs").glob("*.py")):
        texts[f"jobs/{file.name}"] = file.read_text().split('"""')[1]
    return texts
