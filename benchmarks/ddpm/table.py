"""What is made of finished runs: mean and spread over seeds, and their pictures side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from classifier.table import spread
from PIL import Image
from rich.table import Table
from study.rows import Rows

from ddpm.distance import CAVEAT
from ssprop_patch._files import write_atomically
from ssprop_patch._text import markdown as markdown_table
from ssprop_patch.plots import style

_COLUMNS = (
    ("epochs", "trained_epochs", 1.0, ".4g"),
    ("train loss", "train_loss", 1.0, ".5f"),
    ("held-out loss", "held_out_loss", 1.0, ".5f"),
    ("not averaged", "held_out_loss_not_averaged", 1.0, ".5f"),
    ("distance", "distance", 1.0, ".4g"),
    ("of real images", "distance_of_real", 1.0, ".4g"),
    ("TFLOP", "total_flops", 1e-12, ".4g"),
    ("seconds", "train_s", 1.0, ".1f"),
)
_NAMES = ("method", "seeds", *(name for name, *_ in _COLUMNS))


def build(rows: Sequence[Mapping[str, str]]) -> Table:
    """Return the table, for the terminal, of rows that differ in method and seed only."""
    table = Table(title=_title(rows[0]), caption=_caption(rows[0]), caption_justify="left")
    for number, name in enumerate(_NAMES):
        table.add_column(name, justify="right" if number else "left")
    for line in _lines(rows):
        table.add_row(*line)
    return table


def write(folder: Path, rows: Sequence[Mapping[str, str]], output: Path) -> None:
    """Write the rows, their table as Markdown, and the grids of one seed side by side.

    Args:
        folder: Where to.
        rows: Of one table.
        output: Where the grids lie.
    """
    from ddpm.runs import FIELDS

    folder.mkdir(parents=True, exist_ok=True)
    Rows(folder / "runs.csv", FIELDS).replace(rows)
    text = markdown_table([_NAMES, *_lines(rows)], "lr")
    whole = f"# {_title(rows[0])}\n\n{text}\n\n{_caption(rows[0])}\n"
    write_atomically(folder / "table.md", whole)
    some = [row for row in rows if row["seed"] == rows[0]["seed"]]
    with style.panels(None, len(some), 0.4 + style.WIDTH / len(some)) as (figure, panels):
        for row, axes in zip(some, panels, strict=True):
            axes.imshow(Image.open(output / row["picture"]), cmap="gray", interpolation="nearest")
            title = f"{row['method']}, {float(row['trained_epochs']):.3g} epochs"
            axes.set_title(style.wrapped(title, style.WIDTH / len(some)))
            axes.axis("off")
    style.write(figure, folder / "samples.png")


def _title(row: Mapping[str, str]) -> str:
    return (
        f"DDPM, U-Net {row['channels']}, {row['data']} at {row['image_size']}x"
        f"{row['image_size']}, {row['train_images']} training images, batch {row['batch_size']}, "
        f"{row['device_name']}, threads: {row['threads']}, processes at a time: {row['jobs']}, "
        f"torch {row['torch']}"
    )


def _lines(rows: Sequence[Mapping[str, str]]) -> list[list[str]]:
    lines = []
    for method in dict.fromkeys((row["method"], row["schedule"]) for row in rows):
        some = [row for row in rows if (row["method"], row["schedule"]) == method]
        cells = [
            spread([float(row[column]) * factor for row in some], form)
            for _, column, factor, form in _COLUMNS
        ]
        lines.append([" ".join(method).strip(), str(len(some)), *cells])
    return lines


def _caption(row: Mapping[str, str]) -> str:
    return (
        f"Mean ± sample standard deviation over the seeds. held-out loss: of the averaged weights "
        f"on {row['held_out']} test images at most, always with the same noise and timesteps; not "
        f"averaged: of the last weights.\n"
        f"{CAVEAT}\n"
        f"Here: {row['feature_network']}, {100 * float(row['feature_accuracy']):.1f} % accurate; "
        f"{row['samples']} generated images (in {row['sample_steps']} steps) against "
        f"{row['test_images']} test images; of real images: as many training images."
    )
