"""Which sides of which networks are compared, in which order, and the rows that come of it."""

from __future__ import annotations

import argparse
import copy
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from networks import Network
from rows import Setting

import ssprop_patch as ssp
from ssprop_patch._csv_table import CsvTable
from ssprop_patch._progress import Progress
from ssprop_patch._text import one_line

from .kernels import triton
from .report import COLUMNS
from .steps import (
    LEAST,
    MODES,
    OutOfTime,
    Quartiles,
    Side,
    budget,
    find_gpu_counter,
    joules_per_step,
    make_step,
    peak_mib,
    take_turns,
)

#: By name: selection and remainder.
RULES = {
    "l1": ("l1", None),
    "principal": ("principal", None),
    "l1+coarse": ("l1", "coarse"),
    "principal+coarse": ("principal", "coarse"),
}
#: MiB and joules of a side's step, as far as they are known.
_Extra = tuple[float | None, float | None]


class Way(NamedTuple):
    """How a side trains: by which rule, if any, compiled or not, with Triton kernels or not."""

    rule: str = "dense"
    compiled: bool = False
    triton: bool = False

    def __str__(self) -> str:
        words = [self.rule, *["compiled"] * self.compiled, *["Triton"] * self.triton]
        return " ".join(words)


DENSE, DENSE_COMPILED = Way(), Way(compiled=True)


class Bench:
    """A network, its input, and its sides; the dense ones are kept for the next comparison."""

    def __init__(self, network: Network, args: argparse.Namespace) -> None:
        self._rate, device = args.drop_rate, torch.device(args.device)
        self._sides: dict[Way, Side] = {}
        torch.manual_seed(0)
        self._model = network.build().to(device, memory_format=torch.channels_last).train()
        x = torch.randn(network.shape, device=device)
        self._x = x.contiguous(memory_format=torch.channels_last)
        self._loss = network.loss(x)

    def side(self, way: Way) -> Side:
        """Return a side that has trained a step: what it compiles is compiled."""
        if way in self._sides:
            return self._sides[way]
        model = copy.deepcopy(self._model)
        if way.rule != DENSE.rule:
            selection, remainder = RULES[way.rule]
            ssp.convert(model, self._rate, selection=selection, remainder=remainder)
        running = torch.compile(model) if way.compiled else model
        plain = make_step(running, self._x, self._loss, amp=True)

        def step() -> list[float]:
            with triton(way.triton):
                return plain()

        step()
        side = Side(step, model)
        if way.rule == DENSE.rule:
            self._sides[way] = side
        return side


def comparisons(args: argparse.Namespace, kernels: bool) -> Iterator[list[Way]]:
    """Yield what is compared with dense, of all networks: what matters most first.

    Args:
        args: Of the command line.
        kernels: Whether to time the Triton kernels.
    """
    yield [Way(rule) for rule in args.rules] + [Way("l1", triton=True)] * kernels
    if args.compile:
        yield from ([Way(rule, compiled=True)] for rule in args.rules)


class Run:
    """What was measured so far.

    Args:
        args: Of the command line.
        seconds: After these it stops.
        kernels: Whether to time the Triton kernels.

    Attributes:
        rows: All that was measured, as in the CSV.
        failed: A line for each thing that raised an error.
    """

    def __init__(self, args: argparse.Namespace, seconds: float, kernels: bool) -> None:
        self.args, self.rows, self.failed = args, list[dict[str, str]](), list[str]()
        self._device, self._kernels = torch.device(args.device), kernels
        self._counter = find_gpu_counter(self._device)
        self._benches: dict[Network, Bench] = {}
        self._end = time.monotonic() + seconds

    def measure(self) -> bool:
        """Measure until all is measured or the time is up; return whether all is."""
        plan = [
            (network, ways)
            for ways in comparisons(self.args, self._kernels)
            for network in self.args.network
        ]
        try:
            with budget(self._end - time.monotonic()), Progress("comparisons") as progress:
                for done, (network, ways) in enumerate(plan):
                    progress(done, len(plan), f"now {network.name}")
                    self._compare(network, ways)
        except OutOfTime:
            return False
        return True

    def _compare(self, network: Network, ways: Sequence[Way]) -> None:
        """Measure sides of one network in turns with the dense ones."""
        sides: dict[str, Side] = {}
        for way in (DENSE, *[DENSE_COMPILED] * self.args.compile, *ways):
            try:
                if network not in self._benches:
                    self._benches[network] = Bench(network, self.args)
                sides[str(way)] = self._benches[network].side(way)
            except Exception as error:  # the others are worth having
                self._fail(network, str(way), error)
        taken, is_over, errors = take_turns(sides, self.args.iterations)
        for side, error in errors.items():
            self._fail(network, side, error)
        if taken and len(next(iter(taken.values()))) >= min(LEAST, self.args.iterations):
            self._write(network, {side: sides[side] for side in taken}, taken, is_over)
        if is_over:
            raise OutOfTime

    def _write(
        self,
        network: Network,
        sides: Mapping[str, Side],
        taken: Mapping[str, Sequence[Sequence[float]]],
        is_over: bool,
    ) -> None:
        extra: dict[str, _Extra] = {}
        try:
            for side, one in sides.items() if not is_over else ():
                joules = joules_per_step(one, self._counter, self.args.energy_seconds)
                extra[side] = peak_mib(one, self._device), joules
        except Exception as error:
            self._fail(network, "memory and joules", error)
        finally:  # what was timed is written, even if time is up meanwhile
            found = list(self._rows(network, taken, extra))
            self.rows += found
            if self.args.output is not None:
                CsvTable(self.args.output, COLUMNS).append(found)

    def _rows(
        self,
        network: Network,
        taken: Mapping[str, Sequence[Sequence[float]]],
        extra: Mapping[str, _Extra],
    ) -> Iterator[dict[str, str]]:
        setting = Setting.here(
            self._device,
            name=network.name,
            shape=network.shape,
            dtype=torch.float32,
            amp=True,
            memory_format=torch.channels_last,
            drop_rate=self.args.drop_rate,
            selection="",
            options="",
            iterations=len(next(iter(taken.values()))),
        )
        times = {
            side: [Quartiles.of(column) for column in zip(*rows, strict=True)]
            for side, rows in taken.items()
        }
        for side, quartiles in times.items():
            for i, (mode, q) in enumerate(zip(MODES, quartiles, strict=True)):
                peak, joules = extra.get(side, (None, None)) if mode == "step" else (None, None)
                row: dict[str, Any] = {
                    **asdict(setting),
                    "side": side,
                    "mode": mode,
                    **{f"{name}_ms": f"{1e3 * s:.4f}" for name, s in q._asdict().items()},
                    "peak_memory_mib": "" if peak is None else f"{peak:.1f}",
                    "joules": "" if joules is None else f"{joules:.3f}",
                    "cuda": torch.version.cuda or "",
                }
                for column, way in (("of_dense", DENSE), ("of_compiled", DENSE_COMPILED)):
                    base = times.get(str(way))
                    row[column] = "" if base is None else f"{q.p50 / base[i].p50:.4f}"
                yield {name: str(row[name]) for name in COLUMNS}

    def _fail(self, network: Network, what: str, error: Exception) -> None:
        if time.monotonic() >= self._end:  # what OutOfTime has become on its way
            raise OutOfTime from error
        line = f"{network.name}, {what}: {type(error).__name__}: {one_line(error, 300)}"
        self.failed.append(line)
        traceback.print_exception(error, limit=-5)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
