"""Train a classifier dense, with ssProp, and dense at equal compute; compare cost and accuracy.

python benchmarks/train_classifier.py            # scikit-learn's digits, a small ResNet
python benchmarks/train_classifier.py --help
"""

from __future__ import annotations

import shlex
import sys

from classifier.options import UserError, parse


def main(arguments: list[str] | None = None) -> int:
    """Run the command line (default: the process's); return the exit code."""
    options = parse(arguments)
    try:
        # Imported here, so that --help does not wait for torch, and Ctrl-C during it is caught.
        from classifier.benchmark import Benchmark

        benchmark = Benchmark(options)
        benchmark.run()
        benchmark.report()
        return 0
    except KeyboardInterrupt:
        given = sys.argv[1:] if arguments is None else arguments
        words = [w for w in given if w not in ("--overwrite", "--resume")]
        command = shlex.join(["python", sys.argv[0], *words, "--resume"])
        return _complain(f"interrupted; to continue: {command}", 130)
    except UserError as error:
        if options.traceback:
            raise
        return _complain(f"error: {error}", 2)
    except ModuleNotFoundError as error:
        if options.traceback:
            raise
        return _complain(f'error: {error}; pip install -e ".[bench]" brings what is needed', 1)
    except Exception as error:
        if options.traceback:
            raise
        line = (str(error).strip() or "no message").splitlines()[0]
        return _complain(f"error: {type(error).__name__}: {line} (--traceback shows where)", 1)


def _complain(line: str, code: int) -> int:
    print(line.replace("\n", " "), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
