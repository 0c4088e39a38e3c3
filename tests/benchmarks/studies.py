"""The smallest study, and the command line."""

import run_study

from . import BENCHMARKS

SMOKE = BENCHMARKS / "studies" / "smoke.toml"


def main(*arguments: object) -> int:
    """Run the command line; return the exit code."""
    return run_study.main(run_study.__doc__, [str(a) for a in arguments])
