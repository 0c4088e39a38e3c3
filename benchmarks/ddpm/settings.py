"""What decides how one run ends, and the command line that asks for runs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from study.settings import METHODS, digest, schedule_text

from ssprop_patch.cli.options import D, Parser, count, drop_rate, number


@dataclass(frozen=True)
class Settings:
    """One run.

    Attributes:
        method: dense, ssprop, or dense-equal-compute: as many dense steps as cost the FLOPs of
            the ssprop run with its other settings, the learning rate's schedule shortened to them.
        schedule: Of the drop rate; "" for a dense run.
        exclude: Layers that stay dense, as for ``ssp.convert``.
        channels: Of each resolution of the U-Net, the finest first.
        share: Of the training images, by class; which ones depends on the seed.
        ema: Decay of the exponential moving average of the weights, per step.
        held_out: Test images on which the loss is taken.
        samples: Images generated for the distance.
        sample_steps: Denoising steps of each, of the 1000 it was trained on.
        feature_network, feature_epochs: The classifier whose features the distance is in.
    """

    method: str
    schedule: str
    selection: str
    exclude: tuple[str, ...]
    channels: tuple[int, ...]
    blocks: int
    data: str
    image_size: int
    share: float
    epochs: int
    batch_size: int
    lr: float
    ema: float
    amp: str
    channels_last: bool
    compile: bool
    held_out: int
    samples: int
    sample_steps: int
    feature_network: str
    feature_epochs: int
    seed: int

    @property
    def id(self) -> str:
        """Return what its row is called: a digest of all settings."""
        return digest(self)

    @property
    def name(self) -> str:
        """Return what its files are called."""
        return f"{self.method}-seed{self.seed}-{self.id}"


NAMES = tuple(field.name for field in fields(Settings))


def parse(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; leaves the process with code 2 where it is wrong."""
    parser = Parser(prog="train_ddpm.py", description=description)
    # fmt: off
    add = parser.add_argument_group("methods").add_argument
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD",
        help="any of: " + ", ".join(METHODS) + " (default: all)")
    add("--schedule", default="BarSchedule({drop_rate}, period=2)", metavar="TEXT",
        help="of the drop rate; {drop_rate}, {epochs}, {0.25 epochs} are filled in "
        "(default: %(default)s)")
    add("--drop-rate", type=drop_rate, default=0.8, metavar="D", help=f"default: %(default)s; {D}")
    add("--selection", choices=("l1", "l2", "random"), default="l1")
    add("--exclude", nargs="*", default=["conv_out"], metavar="PATTERN",
        help="layers that stay dense (default: conv_out, whose outputs are the colours)")
    add("--seeds", type=count, default=1, metavar="N", help="0 to N-1 (default: %(default)s)")

    add = parser.add_argument_group("data and model").add_argument
    add("--data", default="cifar10", metavar="NAME",
        help="digits, cifar10, cifar100, or any name for the images in --data-dir")
    add("--data-dir", type=Path, metavar="PATH",
        help="torchvision's folder (default: data), or a folder or tar archive with "
        "train/CLASS/*.jpg and test/CLASS/*.jpg")
    add("--cache-dir", type=Path, metavar="PATH",
        help="where decoded images are kept (default: cache in the output folder)")
    add("--download", action="store_true", help="let torchvision download the data")
    add("--image-size", type=count, default=32, metavar="PIXELS")
    add("--share", type=float, default=1.0, help="of the training images (default: 1)")
    add("--channels", type=int, nargs="+", default=[64, 128, 128], metavar="C",
        help="of each resolution of the U-Net (default: 64 128 128); attention from the second on")
    add("--blocks", type=count, default=2, help="residual blocks a resolution (default: 2)")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=count, default=50)
    add("--batch-size", type=count, default=128)
    add("--lr", type=number(float, 0, above=True), default=4e-4,
        help="peak of a cosine, AdamW (default: %(default)s)")
    add("--ema", type=number(float, 0, 1), default=0.999, metavar="DECAY")
    add("--device", default="cpu")
    add("--jobs", type=count, default=1, metavar="N", help="processes that share the runs")
    add("--threads", type=count, metavar="N",
        help="of each process (default: 1 if there are several, else torch's)")
    add("--amp", choices=("off", "bf16"), default="off")
    add("--channels-last", action="store_true")
    add("--compile", action="store_true")

    add = parser.add_argument_group("what is measured").add_argument
    add("--held-out", type=count, default=2000, metavar="N", help="test images for the loss")
    add("--samples", type=number(int, 2), default=2000, metavar="N",
        help="generated for the distance")
    add("--sample-steps", type=count, default=250, metavar="N", help="denoising steps of each")
    add("--feature-network", default="resnet18", metavar="NAME",
        help="of timm, or resnet8_narrow; trained here on the same images (default: resnet18)")
    add("--feature-epochs", type=count, default=20, metavar="N")
    add("--output", type=Path, default=Path("runs/train_ddpm"), metavar="FOLDER")
    add("--results", type=Path, metavar="FOLDER",
        help="also write there: runs.csv with these runs alone, table.md, samples.png of seed 0")
    add("--table", action="store_true", help="only print what is finished")
    # fmt: on
    args = parser.parse_args(arguments)
    if not 0 < args.share <= 1:
        parser.error(f"--share {args.share} is not a number > 0 and <= 1")
    return args


def runs(args: argparse.Namespace) -> Iterator[Settings]:
    """Yield the runs asked for, seed by seed.

    Raises:
        UserError: If the schedule is not one.
    """
    schedule = schedule_text(args.schedule, args.drop_rate, args.epochs)
    common = {name: getattr(args, name) for name in NAMES if hasattr(args, name)}
    common["channels"] = tuple(args.channels)
    for seed in range(args.seeds):
        for method in METHODS:
            if method not in args.methods:
                continue
            # What cannot change a run is left out of its id.
            dense = method == "dense"
            own = {
                "method": method,
                "seed": seed,
                "schedule": "" if dense else schedule,
                "selection": args.selection if method == "ssprop" else "",
                "exclude": () if dense else tuple(args.exclude),
            }
            yield Settings(**common | own)
