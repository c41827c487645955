"""Look after a finished run: `verify` it, `repair` it, `remake` images of it, show its `status`, `remove` images.

`python jobs/output.py verify PREFIX`, where PREFIX is the folder of 16 digits below the output of jobs/sample.py, local
or s3://. What the run is stands in its manifest, so that no configuration is read but the run's own config.toml.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from jobs.exits import run_guarded
from pipeline.errors import ConfigError, PipelineError
from pipeline.generation.upkeep.ids import parse_ids
from pipeline.generation.upkeep.remake import remake
from pipeline.generation.upkeep.remove import remove
from pipeline.generation.upkeep.repair import repair
from pipeline.generation.upkeep.status import read_status
from pipeline.generation.upkeep.stored_run import ModelAccess, load_run, open_prefix, require_run
from pipeline.generation.upkeep.verify import Finding, verify
from pipeline.progress import say
from pipeline.stores.lease import hold_lease

_MAX_LINES = 20  # of each kind of finding
_MAX_KEPT = 10_000  # findings in a file
_LEASE_S = 60.0  # nobody samples into a run while it is changed


class _Parser(argparse.ArgumentParser):
    """Whose mistakes are errors of this project's."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message} (--help lists every flag)")


def _verify(flags: argparse.Namespace) -> None:
    store = open_prefix(flags.prefix)
    counts: Counter[str] = Counter()
    kept: list[Finding] = []
    for found in verify(store, quick=flags.quick):
        counts[found.kind] += 1
        if len(kept) < _MAX_KEPT:
            kept.append(found)
        if counts[found.kind] <= _MAX_LINES:
            say(f"{found.kind}: {found.key} {found.text}")
        elif counts[found.kind] == _MAX_LINES + 1:
            say(f"{found.kind}: more of these are only counted")
    if flags.json is not None:
        findings = [{"kind": one.kind, "key": one.key, "text": one.text, "index": one.index} for one in kept]
        report = {"prefix": store.uri, "quick": flags.quick, "counts": dict(sorted(counts.items()))}
        Path(flags.json).write_text(json.dumps({**report, "findings": findings}, indent=1) + "\n")
    if counts:
        told = ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()))
        advice = (
            "strangers are nobody's: delete them yourself"
            if set(counts) == {"stranger"}
            else f"jobs/output.py repair {store.uri} mends what can be mended"
        )
        raise PipelineError(f"{store.uri}: {counts.total()} findings ({told}); {advice}")
    say(f"done: {store.uri} is as it was made{', by sizes alone' if flags.quick else ''}")


def _repair(flags: argparse.Namespace) -> None:
    store = open_prefix(flags.prefix)
    require_run(store)
    with hold_lease(store, duration_s=_LEASE_S):
        done = repair(store, _access(flags), use_gpu=flags.use_gpu, orphan_age_s=flags.orphan_age_s)
    for number, key in enumerate(done.mended):
        if number == _MAX_LINES:
            say(f"and {len(done.mended) - number} more")
            break
        say(f"made again: {key}")
    for line in done.unmended[:_MAX_LINES]:
        say(line)
    if done.unmended:
        raise PipelineError(f"{store.uri}: {len(done.mended)} objects made again, {len(done.unmended)} could not be")
    say(f"done: {len(done.mended)} objects made again, {done.num_orphans} orphans removed in {store.uri}")


def _remake(flags: argparse.Namespace) -> None:
    store, ids = open_prefix(flags.prefix), parse_ids(flags.ids)
    to = None if flags.to is None else open_prefix(flags.to)
    num_different = 0
    for made in remake(store, ids, _access(flags), use_gpu=flags.use_gpu):
        num_different += made.fault is not None
        say(f"image {made.sample_id}: {'made again, the same bytes' if made.fault is None else made.fault}")
        if to is not None:
            to.write(f"{made.sample_id:012d}.{made.extension}", made.image)
    where = "" if to is None else f" in {to.uri}"
    if num_different:
        raise PipelineError(
            f"{store.uri}: {num_different} of {len(ids)} images are not stored as they are made here{where}; other "
            "hardware or software rounds otherwise, and jobs/output.py verify tells whether shards were altered"
        )
    say(f"done: {len(ids)} images made again, the same bytes{where}")


def _status(flags: argparse.Namespace) -> None:
    store = open_prefix(flags.prefix)
    for name, value in read_status(store, num_images=flags.num_images).rows():
        say(f"{name:<14} {value}")


def _remove(flags: argparse.Namespace) -> None:
    store = open_prefix(flags.prefix)
    ids = parse_ids(flags.ids)
    require_run(store)
    with hold_lease(store, duration_s=_LEASE_S):
        done = remove(store, ids, flags.reason)
    before = f" ({done.num_gone} had been before)" if done.num_gone else ""
    if store.stat("completions.png") is not None:
        say(f"{store.uri}/completions.png may still show them: look, and delete it or run jobs/evaluate.py again")
    if load_run(store).model_uri.startswith("models:/"):
        say(f"MLflow may have a contact_sheet.png that still shows them: put that of {store.uri} in its place there")
    say(f"done: {done.num_removed} images removed for good{before} from {store.uri}")


def _access(flags: argparse.Namespace) -> ModelAccess:
    return ModelAccess(tracking_uri=flags.tracking_uri, trust_model_code=flags.trust_model_code)


_RUNS: dict[str, tuple[Callable[[argparse.Namespace], None], str]] = {
    "verify": (_verify, "find what is missing, altered, edited or foreign; writes nothing"),
    "repair": (_repair, "make again what is wrong, to the bytes that were recorded, or not at all"),
    "remove": (_remove, "take images down for good; they are never made again"),
    "status": (_status, "how far a run is, how fast it goes, and who works there; reads listings"),
    "remake": (_remake, "make images again and compare them with those that are stored"),
}


def make_parser() -> argparse.ArgumentParser:
    """Its flags."""
    parser = _Parser(prog="jobs/output.py", description=__doc__, allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="name", required=True, metavar="|".join(_RUNS), parser_class=_Parser)
    for name, (_, about) in _RUNS.items():
        one = subparsers.add_parser(name, help=about, description=about, allow_abbrev=False)
        one.add_argument("prefix", help="the run's prefix: the folder of 16 digits below the output, local or s3://")
        one.add_argument("--traceback", action="store_true", help="show where an error came from")
        if name == "verify":
            one.add_argument("--quick", action="store_true", help="compare sizes by listing, read no shard, no record")
            one.add_argument("--json", metavar="FILE", help="write the findings into a file too")
        if name in ("repair", "remake"):
            one.add_argument("--tracking-uri", help="where the model registry is; default: as config.toml says")
            one.add_argument(
                "--trust-model-code", action="store_true", help="run the code that a model brings, with your rights"
            )
            one.add_argument(
                "--use-gpu",
                action=argparse.BooleanOptionalAction,
                help="make images on a GPU; default: as config.toml says",
            )
        if name == "repair":
            one.add_argument(
                "--orphan-age-s",
                type=_age_s,
                help="age from which tars that no record names are removed, seconds; default: as config.toml says",
            )
        if name in ("remake", "remove"):
            one.add_argument("--ids", required=True, help="sample ids, such as 4711,4712 or 100-199")
        if name == "remove":
            one.add_argument("--reason", required=True, metavar="TEXT", help="why; kept beside the run")
        if name == "status":
            one.add_argument(
                "--num-images", type=int, help="images that are wanted; default: as plan.json or manifest say"
            )
        if name == "remake":
            one.add_argument("--to", metavar="FOLDER", help="write the images there, local or s3://")
    return parser


def _age_s(text: str) -> float:
    try:
        age_s = float(text)
    except ValueError:
        age_s = -1.0
    if not age_s >= 0:
        raise argparse.ArgumentTypeError(f"must be at least 0 seconds, got {text!r}")
    return age_s


def main(argv: Sequence[str]) -> int:
    """Run one of them; returns the exit code."""
    sys.path.insert(0, str(Path.cwd()))  # a network of your own lies where you started the job

    def work() -> None:
        flags = make_parser().parse_args(argv)
        _RUNS[flags.name][0](flags)

    return run_guarded(work, show_traceback="--traceback" in argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
