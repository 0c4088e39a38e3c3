"""Draws again what meter_run.py counted, without training: FLOPs of each layer, kept channels.

python benchmarks/plot_meter.py benchmarks/results/meter    # flops.png and channels.png there
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import ssprop_patch as ssp
from ssprop_patch.cli.options import Parser
from ssprop_patch.plots import style


def draw(folder: Path) -> None:
    """Write flops.png and channels.png beside the report.json and channels.json of a run.

    Raises:
        KeyError, OSError, TypeError, ValueError: If these are not there, or something else.
    """
    report, channels = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("report", "channels")
    )
    figures = {
        "flops": ssp.plots.flops_per_layer(ssp.MeterReport.from_dict(report)),
        "channels": ssp.plots.channels(ssp.metering.ChannelHistory.from_dict(channels)),
    }
    for name, figure in figures.items():
        style.write(figure, folder / f"{name}.png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the --output of meter_run.py")
    folder = parser.parse_args(arguments).folder
    try:
        draw(folder)
    except (KeyError, OSError, TypeError, ValueError) as error:
        parser.error(f"{folder}: {error}")
    print(f"wrote {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
