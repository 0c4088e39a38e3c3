"""All runs of a benchmark, one after another, and the report on them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

import ssprop_patch as ssp
from classifier import costs, data, models, plot, results, table, training
from classifier.batches import Batches
from classifier.options import METHODS, Options, UserError
from classifier.store import Store
from classifier.training import Run


class Benchmark:
    """What the options ask for, checked; nothing is trained yet.

    Raises:
        UserError: If an option is wrong; nothing was written then.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        # A pipe or a file has no width; wide enough for the table.
        self.console = Console(width=None if sys.stdout.isatty() else 140)
        self.device = open_device(options.device)
        try:
            self.schedule = ssp.parse_schedule(options.schedule)
        except ValueError as error:
            raise UserError(f"--schedule {error}") from error
        models.resolve(options.model)
        with self.console.status("reading the images"):
            self.data = data.load(options)
        model, self.channels = self._build_with_channels()
        self.batches = Batches(
            self.data,
            batch_size=options.batch_size,
            device=self.device,
            channels=self.channels,
            augment=options.augment,
            channels_last=options.channels_last,
        )
        shape = (options.batch_size, self.channels, self.data.size, self.data.size)
        costs.check(model, shape, options.model)
        self.costs = {
            name: costs.StepCost(model, shape, selection=o.selection, remainder=o.remainder)
            for name, method in METHODS.items()
            for o in [method.options(options)]
        }
        self.plan = costs.plan(
            self.costs["ssprop"], self.schedule, options.epochs, self.batches.steps_per_epoch
        )
        self.store = Store(options.output)
        self.store.open(
            options,
            {
                "image_size": self.data.size,
                "train_images": len(self.data.train),
                "test_images": len(self.data.test),
                "schedule": repr(self.schedule),
                "device_name": results.device_name(self.device),
            },
        )

    def _build_with_channels(self) -> tuple[nn.Module, int]:
        return models.build(
            self.options,
            classes=self.data.classes,
            channels=self.data.channels,
            size=self.data.size,
        )

    def runs(self) -> Iterator[Run]:
        """Yield the runs; the methods take turns, so that drift of the machine hits all alike."""
        for seed in range(self.options.seeds):
            for method in self.options.methods:
                yield Run(method, seed, self.plan.steps[method])

    def run(self) -> None:
        """Train what is not yet trained."""
        if self.device.type == "cuda":
            # The shapes never change, so the search for the fastest kernels pays.
            torch.backends.cudnn.benchmark = True
        if not any(self.plan.rates) and "ssprop" in self.options.methods:
            self.console.print(f"note: {self.schedule} drops nothing in these epochs")
        todo = [run for run in self.runs() if self.store.result(run.name) is None]
        if not todo:
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        # Drawn by a thread of its own, which should not take time from the training.
        with Progress(*columns, console=self.console, refresh_per_second=2) as progress:
            total = sum(run.steps for run in todo)
            overall = progress.add_task("all runs, steps", total=total, text="")
            before = 0
            for number, run in enumerate(todo, 1):
                label = f"{METHODS[run.method].label}, seed {run.seed}"
                bar = progress.add_task(label, total=run.steps, text="")

                def show(done: int, text: str, bar: int = bar, before: int = before) -> None:
                    progress.update(bar, completed=done, text=text)
                    progress.update(overall, completed=before + done)

                result = self._train(run, show)
                before += run.steps
                progress.remove_task(bar)
                row = result["row"]
                progress.console.print(
                    f"{number}/{len(todo)}  {label}: {100 * row['accuracy']:.2f} % after "
                    f"{row['epochs']:.4g} epochs, {row['train_s']:.1f} s",
                    highlight=False,
                )

    def _train(self, run: Run, show: Callable[[int, str], None]) -> dict[str, Any]:
        options = METHODS[run.method].options(self.options)
        schedule = ssp.parse_schedule(options.schedule)
        trained = training.train(
            run,
            options,
            self.batches,
            lambda: self._build_with_channels()[0],
            schedule,
            self.store.checkpoint(run.name),
            show,
        )
        cost = self.costs[run.method]
        result = results.gather(run, trained, options, self.batches, schedule, cost)
        self.store.finish(run.name, result)
        return result

    def report(self) -> None:
        """Print the table, write the CSVs and the picture, and say where they are."""
        found = [self.store.result(run.name) for run in self.runs()]
        self.console.print(table.build([result["row"] for result in found]))
        folder = self.options.output
        results.write_csv(folder, found)
        plot.draw(folder / "results.png", folder / "runs.csv", folder / "history.csv")
        for name in ("runs.csv", "history.csv", "results.png"):
            self.console.print(f"wrote {folder / name}", highlight=False, soft_wrap=True)


def open_device(name: str) -> torch.device:
    """Return the device of that name; UserError where there is none."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        line = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here: {line}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)  # whom random states and synchronisation then mean
    return device
