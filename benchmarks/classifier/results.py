"""What is known of a finished run: one flat row, and one row for each of its epochs."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision

import ssprop_patch as ssp
from classifier import clock as clocks
from classifier.batches import Batches
from classifier.costs import StepCost
from classifier.options import Options
from classifier.training import Run, Trained, fingerprint
from ssprop_patch._csv_table import CsvTable
from ssprop_patch.timing import device_name


def gather(
    run: Run,
    trained: Trained,
    options: Options,
    batches: Batches,
    schedule: Any,
    cost: StepCost,
) -> dict[str, Any]:
    """Return the result of a run: plain values, that JSON can hold.

    Its FLOPs are those of the drop rates that were in force, step by step, not of the plan.
    """
    clock, history = trained.clock, trained.history
    forward, backward = cost.total(clock.rates)
    sparse = any(rate > 0 for rate in clock.rates)
    row: dict[str, Any] = {"method": run.method, "seed": run.seed}
    row |= options.of_a_run()
    row |= {
        "image_size": batches.data.size,
        "train_images": len(batches.train_set),
        "test_images": len(batches.test_set),
        "schedule": repr(schedule) if sparse else None,
        "selection": options.selection if sparse else None,
        "remainder": options.remainder if sparse else None,
        "epochs": run.steps / batches.steps_per_epoch,
        "steps": run.steps,
        "sparse_steps": sum(rate > 0 for rate in clock.rates),
        "accuracy": history.epochs[-1]["accuracy"],
        "best_accuracy": max(e["accuracy"] for e in history.epochs),
        "test_loss": history.epochs[-1]["test_loss"],
        "train_loss": history.epochs[-1]["train_loss"],
        "forward_flops": forward,
        "backward_flops": backward,
        "total_flops": forward + backward,
    }
    row |= clocks.summary(clock)
    row |= {"weights": fingerprint(trained.model), **machine(batches.device)}
    flops = list(accumulate(cost.forward + cost.backward(rate) for rate in clock.rates))
    elapsed = clocks.seconds(clock).sum(1).cumsum(0).tolist()
    epochs = [
        {"epoch": e["step"] / batches.steps_per_epoch}
        | e
        | {"flops": flops[e["step"] - 1], "seconds": elapsed[e["step"] - 1]}
        for e in history.epochs
    ]
    return {"row": row, "epochs": epochs, "rates": _pieces(clock.rates)}


def machine(device: torch.device) -> dict[str, Any]:
    """Return what a run ran on."""
    return {
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "ssprop_patch": ssp.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _pieces(rates: Sequence[float]) -> list[tuple[int, float]]:
    """Return (first step, rate) of each stretch with one rate."""
    return [(i, r) for i, r in enumerate(rates) if i == 0 or rates[i - 1] != r]


def write_csv(folder: Path, results: Sequence[dict[str, Any]]) -> None:
    """Write runs.csv, a row a run, and history.csv, a row an epoch."""
    _write(folder / "runs.csv", [result["row"] for result in results])
    names = ("method", "seed")
    _write(
        folder / "history.csv",
        [
            {name: result["row"][name] for name in names} | epoch
            for result in results
            for epoch in result["epochs"]
        ],
    )


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    CsvTable(path, list(rows[0])).replace(rows)
