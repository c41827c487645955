"""Speed: `train` measures the pipeline beside bare DDP processes, `gpu` the presets' networks on a GPU.

`gpu` has flags of its own (`jobs/benchmark.py gpu --help`) and needs torch and jaxtyping alone, so that it runs on a
machine that has little else.
"""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run one of the two; returns the exit code."""
    # Imported here: each is to do without what the other needs.
    if argv[:1] == ["gpu"]:
        from jobs.benchmark_gpu import run

        return run(argv[1:])
    from jobs.benchmark_train import JOBS
    from jobs.cli import run_subcommand

    return run_subcommand(JOBS, argv, program="jobs/benchmark.py", doc=__doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
