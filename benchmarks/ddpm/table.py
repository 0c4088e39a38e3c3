"""The table of finished runs: mean and spread over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from classifier.table import spread
from rich.table import Table

from ddpm.distance import CAVEAT

_COLUMNS = (
    ("epochs", "trained_epochs", 1.0, ".4g"),
    ("train loss", "train_loss", 1.0, ".5f"),
    ("held-out loss", "held_out_loss", 1.0, ".5f"),
    ("distance", "distance", 1.0, ".4g"),
    ("of real images", "distance_of_real", 1.0, ".4g"),
    ("PFLOP", "total_flops", 1e-15, ".4g"),
    ("seconds", "train_s", 1.0, ".1f"),
)


def build(rows: Sequence[Mapping[str, str]]) -> Table:
    """Return the table of rows that differ in method and seed only."""
    first = rows[0]
    table = Table(
        title=f"DDPM, U-Net {first['channels']}, {first['data']} at {first['image_size']}x"
        f"{first['image_size']}, batch {first['batch_size']}, {first['device_name']}, torch "
        f"{first['torch']}",
        caption=_caption(first, len({row["seed"] for row in rows})),
        caption_justify="left",
    )
    table.add_column("method")
    for name, *_ in _COLUMNS:
        table.add_column(name, justify="right")
    for method in dict.fromkeys((row["method"], row["schedule"]) for row in rows):
        some = [row for row in rows if (row["method"], row["schedule"]) == method]
        cells = [
            spread([float(row[column]) * factor for row in some], form)
            for _, column, factor, form in _COLUMNS
        ]
        table.add_row(" ".join(method).strip(), *cells)
    return table


def _caption(row: Mapping[str, str], seeds: int) -> str:
    return (
        f"Mean ± sample standard deviation, seeds: {seeds}. held-out loss: of the averaged weights "
        f"on {row['held_out']} test images at most, always with the same noise and timesteps.\n"
        f"{CAVEAT}\n"
        f"Here: {row['feature_network']}, {100 * float(row['feature_accuracy']):.1f} % accurate; "
        f"{row['samples']} generated images (in {row['sample_steps']} steps) against "
        f"{row['test_images']} test images; of real images: as many training images."
    )
