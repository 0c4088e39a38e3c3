"""Every network of timm and torchvision: converted, trained a step, compared, reverted.

python benchmarks/run_zoo.py --jobs 2 --memory 12     # all of them; again: what is missing
python benchmarks/run_zoo.py --only "resnet*"         # some; --list says which there are
python benchmarks/run_zoo.py --table                  # what is in the file, by kind of network

Every network becomes a row of a CSV: how many convolutions it has, which of them get a sparse
backward and why others do not, what share of the FLOPs they are, and whether one training step
is what it should be. The gradients are those of the dense network with the dropped channels
masked, to rounding and in float64 where the network can; outputs and buffers are bit-identical,
and at rate 0 the gradients too; after revert everything is as it was. Weights are random and
images small: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

from ssprop_patch._progress import Progress
from ssprop_patch.cli.options import Parser, count

OUTPUT = Path(__file__).parent / "results" / "zoo.csv"
GOOD = ("ok", "nothing to convert")


def options(arguments: list[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="names or families of networks, with * and ?",
    )
    parser.add_argument("--jobs", type=count, default=2, help="networks at a time")
    parser.add_argument(
        "--memory",
        type=float,
        default=12.0,
        metavar="GIB",
        help="in all; what needs more than its part runs alone",
    )
    parser.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--fresh", action="store_true", help="do again what has a row")
    parser.add_argument("--failed", action="store_true", help="do again what failed")
    parser.add_argument("--list", action="store_true", help="the networks and their results")
    parser.add_argument("--table", action="store_true", help="only print the table (Markdown)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code: 1 if a network failed."""
    args = options(arguments)
    # Imported here, so that --help does not wait for torch.
    from zoo.check import FIELDS, row
    from zoo.models import entries
    from zoo.runner import Results, Runner
    from zoo.table import markdown

    def wanted(entry) -> bool:
        return any(fnmatch(text, p) for p in args.only for text in (entry.name, entry.family))

    chosen = [entry for entry in entries() if wanted(entry)]
    if not chosen:
        print(f"error: no network is called {' or '.join(args.only)}", file=sys.stderr)
        return 2
    results = Results(args.output, FIELDS)
    if args.fresh or args.failed:
        good = {e for e, r in results.done().items() if r["result"] in GOOD and not args.fresh}
        results.keep(lambda e: not wanted(e) or e in good, entries())
    done = results.done()
    if args.list:
        for entry in chosen:
            result = done[entry]["result"] if entry in done else "-"
            print(entry.library, entry.family, entry.name, result)
        return 0
    if not args.table:
        todo = [entry for entry in _small_first(chosen) if entry not in done]
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that workers end, too
        try:
            _run(Runner(row, args.jobs, args.memory, args.timeout), todo, results)
        except KeyboardInterrupt:
            print("interrupted; the same command continues", file=sys.stderr)
            return 130
        results.keep(lambda entry: True, entries())
    rows = [r for e, r in results.done().items() if wanted(e)]
    print(markdown(rows))
    bad = [r for r in rows if r["result"] not in GOOD]
    if bad:
        print(f"\n{len(bad)} of {len(rows)} without a good result:")
    for r in bad:
        print(f"{r['library']} {r['family']} {r['name']}: {r['result']}: {r['reason']}")
    return int(any(r["result"] in ("MISMATCH", "ERROR", "died") for r in bad))


def _small_first(chosen):
    """Return the smallest of each family, then all others, the smaller the earlier.

    So that a part of a run shows something.
    """
    families, others = set(), []
    for entry in sorted(chosen, key=_how_large):
        if (entry.library, entry.family) in families:
            others.append(entry)
        else:
            families.add((entry.library, entry.family))
            yield entry
    yield from others


SIZES = """test atto femto zepto pico nano xxs xxtiny xtiny xxsmall xs tiny ti mini t lite small s
    m medium so150m so400m b base l large xl xlarge xxlarge h huge g giant gigantic e enormous"""
SIZES = {word: i / 4 for i, word in enumerate(SIZES.split())}


def _how_large(entry) -> tuple[float, int, str]:
    """Return how large a network is by its name, very roughly."""
    words = re.split(r"[_.]|(?<=vit)(?=b$)", entry.name)
    size = max((SIZES[w] for w in words if w in SIZES), default=4.0)
    number = min((int(n) for n in re.findall(r"(?<=[a-z])\d+", words[0])), default=0)
    return size, number, entry.name


def _run(runner, todo, results) -> None:
    counts: Counter[str] = Counter()
    with Progress("networks") as progress:
        for row in runner.run(todo):
            results.append(row)
            counts[row["result"]] += 1
            if row["result"] not in GOOD:
                progress.say(f"{row['name']} {row['result']} {row['reason']}")
            said = ", ".join(f"{n} {result}" for result, n in counts.items())
            progress(counts.total(), len(todo), said)


if __name__ == "__main__":
    sys.exit(main())
