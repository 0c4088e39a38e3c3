"""Runs many networks in worker processes, and keeps a row of each as soon as it is known."""

from __future__ import annotations

import contextlib
import gc
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from processes import context

from ssprop_patch._csv_table import CsvTable

from .models import Entry

Row = dict[str, Any]
GIB = 2**30
MODELS_PER_WORKER = 25  # then a fresh one, so that what leaks does not grow


# --- the file ---------------------------------------------------------------------------------


class Results:
    """A CSV of rows, a network each: a killed run leaves whole rows only."""

    def __init__(self, path: Path, fields: tuple[str, ...]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._table = CsvTable(path, fields)

    def rows(self) -> list[Row]:
        """Return what is there."""
        return self._table.read()

    def done(self) -> dict[Entry, Row]:
        """Return the rows by network."""
        return {Entry(r["library"], r["family"], r["name"]): r for r in self.rows()}

    def append(self, row: Row) -> None:
        """Add one row."""
        self._table.append([row])

    def keep(self, wanted: Callable[[Entry], bool], order: Iterable[Entry]) -> None:
        """Rewrite the file with the wanted rows, in the given order."""
        done = self.done()
        self._table.replace(done[entry] for entry in order if entry in done and wanted(entry))


# --- a worker ---------------------------------------------------------------------------------


def serve(connection: Connection, check: Callable[[Entry], Row], memory: int) -> None:
    """Answer every network that arrives with its row, until None does, or nobody is left."""
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # what was imported is never garbage: do not look through it again and again
    _limit(memory)
    connection.send("ready")
    while True:
        try:
            entry = connection.recv()
        except EOFError:
            return  # who asked is gone
        if entry is None:
            return
        try:
            answer = check(entry)
        except MemoryError as error:
            answer = {"result": "memory", "reason": str(error)}
        connection.send(answer)
        gc.collect()  # networks are full of cycles


def _limit(memory: int) -> None:
    """Make the allocation that goes beyond ``memory`` fail, where the system can."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))


@dataclass
class _Worker:
    process: Any
    connection: Connection
    entry: Any = None
    deadline: float = 0.0
    models: int = 0
    started: float = field(default_factory=time.monotonic)

    def give(self, entry: Entry, timeout: float) -> None:
        self.entry, self.models = entry, self.models + 1
        self.started = time.monotonic()
        self.deadline = self.started + timeout
        self.connection.send(entry)

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.send(None)
        self.process.join(1)
        self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


# --- the run ----------------------------------------------------------------------------------


@dataclass
class Runner:
    """What runs networks in ``jobs`` processes.

    Attributes:
        check: Returns the row of a network; importable, as workers are fresh processes.
        jobs: Workers at a time.
        memory: GiB in all: each worker gets its part, and what needs more runs alone at last.
        timeout: Seconds for a network; four times as many for one that runs alone.
    """

    check: Callable[[Entry], Row]
    jobs: int = 2
    memory: float = 16.0
    timeout: float = 300.0

    def run(self, todo: Iterable[Entry]) -> Iterator[Row]:
        """Yield a row for every network, in the order in which they finish."""
        too_big: list[Entry] = []
        for entry, row in self._phase(todo, self.jobs, self.timeout):
            if row["result"] == "memory" and self.jobs > 1:
                too_big.append(entry)
            else:
                yield _named(entry, row)
        for entry, row in self._phase(too_big, 1, 4 * self.timeout):
            yield _named(entry, row)

    def _phase(
        self, todo: Iterable[Entry], jobs: int, timeout: float
    ) -> Iterator[tuple[Entry, Row]]:
        queue, workers = deque(todo), []
        limit = self.memory / jobs
        try:
            while queue or workers:
                while queue and len(workers) < jobs:
                    workers.append(self._start(int(limit * GIB)))
                    workers[-1].give(queue.popleft(), timeout)
                first = min(worker.deadline for worker in workers) - time.monotonic()
                ready = wait([w.connection for w in workers], timeout=max(first, 0))
                for worker in list(workers):
                    row = self._outcome(worker, worker.connection in ready, timeout, limit)
                    if row is None:
                        continue
                    yield worker.entry, row
                    fresh = worker.models < MODELS_PER_WORKER and worker.process.is_alive()
                    if fresh and queue:
                        worker.give(queue.popleft(), timeout)
                    else:
                        workers.remove(worker)
                        worker.stop()
        finally:
            for worker in workers:
                worker.kill()

    def _outcome(self, worker: _Worker, ready: bool, timeout: float, limit: float) -> Row | None:
        """Return the row of a worker's network, None while it is at it."""
        seconds = f"{time.monotonic() - worker.started:.1f}"
        if ready:
            try:
                row = worker.connection.recv()
            except (EOFError, OSError):
                worker.process.join()
                code = worker.process.exitcode
                why = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
                return {"result": "died", "reason": f"its process: {why}", "seconds": seconds}
            if row["result"] == "memory":
                row |= {"reason": f"needs more than {limit:g} GiB", "seconds": seconds}
            return row
        if time.monotonic() < worker.deadline:
            return None
        worker.process.kill()
        worker.process.join()
        return {"result": "timeout", "reason": f"over {timeout:g} s", "seconds": seconds}

    def _start(self, memory: int) -> _Worker:
        started_from = context("zoo.check", "torch._dynamo")
        ours, theirs = started_from.Pipe()
        process = started_from.Process(target=serve, args=(theirs, self.check, memory), daemon=True)
        process.start()
        theirs.close()
        ours.recv()  # imports are no network's time
        return _Worker(process, ours)


def _named(entry: Entry, row: Row) -> Row:
    return row | {"library": entry.library, "family": entry.family, "name": entry.name}
