"""The output folder: whose results stand in it, and which runs are done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from classifier.checkpoint import read_json, write_json
from classifier.options import Options, UserError


class Store:
    """Results and checkpoints under the folder ``--output``.

    ``state/benchmark.json`` says what is measured; ``state/RUN.json`` is a finished run and
    ``state/RUN.pt`` the checkpoint of one that is not.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state"

    def open(self, options: Options, facts: dict[str, Any]) -> None:
        """Make the folder ready, or refuse it.

        Args:
            options: What is asked for now.
            facts: What else a result depends on: the number of images, the device.

        Raises:
            UserError: If the folder holds something that neither --resume nor --overwrite
                settles.
        """
        # Through JSON and back, so that it compares with what was read.
        wanted = json.loads(
            json.dumps(
                {
                    "of_a_run": options.of_a_run() | facts,
                    "methods": options.methods,
                    "seeds": options.seeds,
                }
            )
        )
        file = self.state / "benchmark.json"
        try:
            if options.overwrite:
                self._clear()
            elif (found := read_json(file)) is not None:
                self._settle(found, wanted, options.resume)
            self.state.mkdir(parents=True, exist_ok=True)
            write_json(file, wanted)
        except OSError as error:
            raise UserError(f"--output {self.folder}: {error.strerror or error}") from error

    def _settle(self, found: dict[str, Any], wanted: dict[str, Any], resume: bool) -> None:
        old, new = found["of_a_run"], wanted["of_a_run"]
        differ = [
            f"{name} was {old.get(name)!r}, now {new.get(name)!r}"
            for name in {**old, **new}
            if old.get(name) != new.get(name)
        ]
        if resume:
            if differ:
                raise UserError(
                    f"{self.folder} cannot be resumed with other options: {'; '.join(differ)}"
                )
            return
        runs = [f"{m}-seed{s}" for m in found["methods"] for s in range(found["seeds"])]
        done = sum(self.result(run) is not None for run in runs)
        if done < len(runs):
            raise UserError(
                f"{self.folder} holds an unfinished benchmark ({done} of {len(runs)} runs done): "
                f"--resume continues it, --overwrite starts over"
            )
        for name in ("methods", "seeds"):
            if found[name] != wanted[name]:
                differ.append(f"{name} was {found[name]}, now {wanted[name]}")
        if differ:
            raise UserError(
                f"{self.folder} holds a finished benchmark with other options "
                f"({'; '.join(differ)}): pass another --output, or --overwrite"
            )
        self._clear()

    def _clear(self) -> None:
        """Delete what this program wrote, and nothing else."""
        for name in ("runs.csv", "history.csv", "results.png"):
            (self.folder / name).unlink(missing_ok=True)
        for pattern in ("*.json", "*.pt", "*.tmp"):
            for file in self.state.glob(pattern):
                file.unlink()

    def checkpoint(self, run: str) -> Path:
        """Return where the state of an unfinished run is kept."""
        return self.state / f"{run}.pt"

    def result(self, run: str) -> dict[str, Any] | None:
        """Return the result of a run, None if it is not finished."""
        return read_json(self.state / f"{run}.json")

    def finish(self, run: str, result: dict[str, Any]) -> None:
        """Keep a result; its checkpoint is then of no more use."""
        write_json(self.state / f"{run}.json", result)
        self.checkpoint(run).unlink(missing_ok=True)
