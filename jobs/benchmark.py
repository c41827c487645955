"""Speed: `train` measures training beside bare DDP processes, `sample` the sampling job, `gpu` networks on a GPU.

`gpu` has flags of its own (`jobs/benchmark.py gpu --help`) and needs torch and jaxtyping alone, so that it runs on a
machine that has little else.
"""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run one of the three; returns the exit code."""
    # Imported here: each is to do without what the other needs.
    if argv[:1] == ["gpu"]:
        from jobs.benchmark_gpu import run

        return run(argv[1:])
    from jobs import benchmark_sample, benchmark_train
    from jobs.cli import run_subcommand

    return run_subcommand(benchmark_train.JOBS | benchmark_sample.JOBS, argv, program="jobs/benchmark.py", doc=__doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
