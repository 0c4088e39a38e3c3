"""All runs of a study, in this process or in several that share them."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from classifier import decoded
from classifier.benchmark import open_device
from classifier.options import UserError
from processes import context
from rich.console import Console

from study import labels, runs
from study.grid import Study
from study.rows import Rows, claim
from study.settings import Settings


@dataclass(frozen=True)
class Place:
    """Where a study's data and files lie, and how long it may take.

    Attributes:
        folder: ``runs.csv``, the checkpoints of unfinished runs and the decoded images.
        data_dir, download: As for ``classifier.decoded.load``.
        deadline: Of ``time.time()``; no run begins after it.
    """

    folder: Path
    data_dir: Path | None = None
    cache_dir: Path | None = None
    download: bool = False
    deadline: float = float("inf")

    @property
    def rows(self) -> Rows:
        """Return the finished runs."""
        return Rows(self.folder / "runs.csv", runs.FIELDS, runs.ADDED)

    def source(self, name: str, size: int) -> decoded.Source:
        """Return the images."""
        return decoded.load(
            name,
            data_dir=self.data_dir,
            cache_dir=self.cache_dir or self.folder / "cache",
            size=size,
            download=self.download,
        )

    def checkpoint(self, settings: Settings) -> Path:
        """Return where the state of an unfinished run is kept."""
        return self.folder / "state" / f"{settings.id}.pt"


class ParentGone(Exception):
    """The process that started this one ended without telling it."""


def work(study: Study, place: Place, device_text: str, threads: int | None, jobs: int) -> int:
    """Train what nobody has trained or is training; return how many runs failed.

    A run that fails is reported and left; it will be tried again by the next call.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    device = open_device(device_text)
    if device.type == "cuda":
        # The shapes never change, so the search for the fastest kernels pays.
        torch.backends.cudnn.benchmark = True
    (place.folder / "state").mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, soft_wrap=True)
    failed: set[str] = set()
    sources = functools.cache(place.source)  # read once
    while True:
        trained_one = False
        for settings in study.runs:
            done = place.rows.ids()
            if settings.id in done:
                # Whoever was killed between writing the row and this left its checkpoint.
                place.checkpoint(settings).unlink(missing_ok=True)
                continue
            if time.time() > place.deadline or settings.id in failed:
                continue
            with claim(place.folder / "state" / f"{settings.id}.lock") as mine:
                # Another process may have finished it since the CSV was read.
                if not mine or settings.id in place.rows.ids():
                    continue
                trained_one = True
                try:
                    _train(study, settings, place, sources, device, jobs, console)
                except UserError as error:
                    raise UserError(f"{labels.run(settings)}: {error}") from error
                except ParentGone:
                    return 1
                except Exception:
                    failed.add(settings.id)
                    console.print(
                        f"failed: {labels.run(settings)}\n{traceback.format_exc()}", markup=False
                    )
        # Once more around: a run that another process held may be free again.
        if not trained_one:
            return len(failed)


def _train(
    study: Study,
    settings: Settings,
    place: Place,
    sources: Callable[[str, int], decoded.Source],
    device: torch.device,
    jobs: int,
    console: Console,
) -> None:
    source = sources(settings.data, settings.image_size)
    place.rows.same_images(settings.data, settings.image_size, source.digest, source.origin)
    checkpoint = place.checkpoint(settings)
    label = labels.run(settings)
    parent = multiprocessing.parent_process()
    # Several processes cannot each keep a line of the terminal moving.
    with console.status(label) if parent is None else contextlib.nullcontext() as status:
        shown = 0.0

        def show(done: int, steps: int, text: str) -> None:
            nonlocal shown
            if time.monotonic() < shown + 1:
                return
            shown = time.monotonic()
            if parent is not None and not parent.is_alive():
                raise ParentGone
            if status is not None:
                status.update(f"{label}: step {done} of {steps} {text}")

        row = runs.train(settings, source, device, checkpoint, show, jobs)
    place.rows.append(row)
    checkpoint.unlink(missing_ok=True)
    wanted = {run.id for run in study.runs}
    console.print(
        f"{len(place.rows.ids() & wanted)}/{len(wanted)}  {label}: {100 * row['accuracy']:.2f} % "
        f"after {row['trained_epochs']:.4g} epochs, {row['total_flops']:.3g} FLOP, "
        f"{row['train_s']:.1f} s",
        markup=False,
    )


def share_out(
    study: Study, place: Place, devices: Sequence[str], jobs: int, threads: int | None
) -> int:
    """Train all runs in ``jobs`` processes on each device; return how many failed.

    A process that dies counts as a failure; its unfinished run is left for the next call.
    """
    each = [device for device in devices for _ in range(jobs)]
    if len(each) == 1:
        return work(study, place, each[0], threads, 1)
    # With more processes than one, each has one thread: two would only wait for each other.
    arguments: list[tuple[Any, ...]] = [
        (study, place, device, threads or 1, len(each)) for device in each
    ]
    processes = [context("study.workers").Process(target=_enter, args=some) for some in arguments]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join()
    except KeyboardInterrupt:
        for process in processes:
            process.join()  # the terminal told them, too
        raise
    finally:
        for process in processes:
            process.kill()
    if any(process.exitcode == 2 for process in processes):
        raise UserError("a process refused its settings, as it said above")
    return sum(process.exitcode != 0 for process in processes)


def _enter(*arguments: Any) -> None:
    try:
        failed = work(*arguments)
    except UserError as error:
        print(f"error: {error}", flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    raise SystemExit(1 if failed else 0)
