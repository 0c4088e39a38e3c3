"""The command line. Imports nothing heavy, so that ``--help`` and a typing error answer at once."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ssprop_patch as ssp  # torch comes only with what is used of it
from ssprop_patch.cli.options import Parser, add_rate, add_selection, count, number


class UserError(Exception):
    """Something the user can put right. Printed in one line, without a traceback; exit code 2."""


@dataclass(frozen=True)
class Method:
    """One of the ways in which the model is trained."""

    label: str  # in tables and plots
    short: str  # where dense is named beside it
    sparse: bool = False  # converted by ssprop_patch
    equal_compute: bool = False  # the steps are cut to the FLOPs of ssProp
    # Instead of what the options say of these.
    schedule: str | None = None
    selection: str | None = None
    remainder: str | None = None

    def options(self, options: Options) -> Options:
        """Return the options of this method's runs."""
        own = {name: getattr(self, name) for name in ("schedule", "selection", "remainder")}
        return dataclasses.replace(options, **{n: v for n, v in own.items() if v is not None})


METHODS = {
    "dense": Method("dense", "dense"),
    "ssprop": Method("ssProp", "ssProp", sparse=True),
    "dense-equal": Method("dense, equal compute", "equal compute", equal_compute=True),
    "whole-gradient": Method(
        "whole gradient",
        "whole gradient",
        sparse=True,
        schedule="ConstantSchedule(0.8)",
        selection="principal",
        remainder="coarse",
    ),
}

# Epochs and batch size where the user gives none. The digits are for a first look on a laptop.
_DEFAULTS = {"digits": (10, 64)}
_OTHER_DEFAULTS = (30, 128)
_LEARNING_RATES = {"sgd": 0.1, "adam": 1e-3, "adamw": 1e-3}
DATA = ("digits", "mnist", "fashionmnist", "cifar10", "cifar100", "imagefolder")


@dataclass(frozen=True)
class Options:
    """What the user asked for, with the defaults that depend on other options filled in."""

    model: str
    stem: str
    dropout: float
    data: str
    data_dir: str | None
    download: bool
    image_size: int | None
    train_images: int | None
    augment: bool
    stream: bool
    workers: int
    schedule: str
    selection: str
    remainder: str
    epochs: int
    batch_size: int
    optimizer: str
    lr: float
    weight_decay: float
    device: str
    amp: str
    channels_last: bool
    compile: bool
    seeds: int
    methods: tuple[str, ...]
    output: Path
    resume: bool
    overwrite: bool
    traceback: bool
    # What run_study.py varies beside these; the command line has no words for them.
    types: tuple[str, ...] = ("Conv1d", "Conv2d", "Conv3d")  # converted classes of torch.nn
    exclude: tuple[str, ...] = ()
    overrides: tuple[tuple[str, float], ...] = ()  # pattern, drop rate
    label_smoothing: float = 0.0
    lr_schedule: str = "warm-cosine"  # or one-cycle
    eval_every: int = 1  # epochs; the last one is evaluated in any case

    def of_a_run(self) -> dict[str, Any]:
        """Return the options that decide how one run ends, as plain values.

        A run may be continued only with all of these unchanged. What is left out decides which
        runs there are (more seeds may be added to a finished benchmark), where the files are, or
        how they are read.
        """
        values = dataclasses.asdict(self)
        for name in (
            "data_dir",
            "download",
            "stream",
            "workers",
            "seeds",
            "methods",
            "output",
            "resume",
            "overwrite",
            "traceback",
        ):
            del values[name]
        return values


_DESCRIPTION = """\
Train an image classifier four ways and compare what it costs and what it reaches:
  dense           the ordinary training
  ssprop          converted by ssprop_patch, with the paper's default schedule unless --schedule
  dense-equal     the ordinary training, cut to as many steps as cost the FLOPs (forward and
                  backward, whole training) of ssprop; its learning-rate schedule is compressed
  whole-gradient  converted at a constant drop rate of 0.8, with selection="principal" and
                  remainder="coarse"
All methods see, for a seed, the same initial weights, the same images in the same order and the
same crops. Seed by seed the methods take turns, so that a drift of the machine hits all alike.
"""

_EPILOG = """\
output folder:
  runs.csv (one row a run), history.csv (one row an epoch), results.png, and a folder state/ with
  what --resume needs. A folder that holds an unfinished benchmark, or a finished one with other
  options, is refused unless --resume or --overwrite; a finished one with the same options is
  measured again and replaced.
resuming:
  each run is saved at the end of each epoch, so a kill at any time costs at most one epoch.
  Finished runs are not repeated. On the CPU the continued run ends with exactly the weights of
  an uninterrupted one; on a GPU up to what its kernels repeat. More --seeds or --methods may be
  added this way; an option that would change a run's result is refused.
exit codes:
  0 done, 1 something failed while running, 2 an option or a file is wrong, 130 interrupted
examples:
  python benchmarks/train_classifier.py
  python benchmarks/train_classifier.py --model resnet18 --data cifar10 --download --device cuda
  python benchmarks/train_classifier.py --model torchvision:resnet50 --data imagefolder \\
      --data-dir photos --amp bf16 --channels-last --device cuda --output runs/photos
"""


def _parser() -> Parser:
    parser = Parser(prog="train_classifier.py", description=_DESCRIPTION, epilog=_EPILOG)
    # fmt: off
    add = parser.add_argument_group("what is trained").add_argument
    add("--model", default="resnet10", metavar="NAME",
        help="a timm or torchvision name: timm:NAME, torchvision:NAME, or NAME (timm first); "
        "default: %(default)s, timm's ResNet with one block in each of its four stages")
    add("--stem", choices=("auto", "own", "small"), default="auto",
        help="small: a ResNet's 7x7 stem with stride 2 and its max-pool become one 3x3 "
        "convolution, as is usual for CIFAR; auto (default): small for a ResNet on images up "
        "to 64 pixels; own: the model as it is")
    add("--dropout", type=number(float, 0, 1), default=0.0, metavar="P",
        help="dropout in front of the classifier (default: 0)")
    add("--data", choices=DATA, default="digits",
        help="default: digits, scikit-learn's 1797 scans of 8x8, which come with its wheel")
    add("--data-dir", metavar="PATH",
        help="where the data lie (default: ./data); for imagefolder a folder with train/CLASS/* "
        "and val/CLASS/*, or with CLASS/* alone, of which a fifth is then held out")
    add("--download", action="store_true", help="let torchvision download the data")
    add("--image-size", type=count, metavar="PIXELS",
        help="default: the data's own; imagefolder: 224")
    add("--train-images", type=count, metavar="N", help="train on N images only")
    add("--no-augment", dest="augment", action="store_false",
        help="no random crops and flips (crops only for digits and mnist)")
    add("--stream", action="store_true",
        help="imagefolder: decode in each epoch, by --workers processes; default only where the "
        "decoded images would not fit into half of the free memory")
    add("--workers", type=number(int, 0), default=min(4, os.cpu_count() or 1),
        metavar="N", help="default: %(default)s")

    group = parser.add_argument_group("ssProp")
    add_rate(group,
        "of the default schedule, BarSchedule(D, period=2), dense and sparse epochs in turn "
        "(default: 0.8)",
        'for example "CosineSchedule(0, 0.8, total=20)", "0.5", "paper", or "SequentialSchedule('
        '[ConstantSchedule(0), BarSchedule(0.8)], milestones=[5])"; never evaluated as code')
    add_selection(group)

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=count, metavar="N", help="default: 10 for digits, else 30")
    add("--batch-size", type=count, metavar="N", help="default: 64 for digits, else 128")
    add("--optimizer", choices=tuple(_LEARNING_RATES), default="sgd",
        help="default: %(default)s, with Nesterov momentum 0.9")
    add("--lr", type=number(float, 0, above=True),
        help="peak of a cosine with a short warm-up (default: 0.1 for sgd, 0.001 for others)")
    add("--weight-decay", type=number(float, 0), default=5e-4, metavar="X",
        help="default: %(default)s")
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1, mps, ...")
    add("--amp", choices=("off", "bf16", "fp16"), default="off",
        help="autocast; fp16 with a GradScaler (default: %(default)s)")
    add("--channels-last", action="store_true", help="the channels_last memory format")
    add("--compile", action="store_true", help="train through torch.compile")

    add = parser.add_argument_group("the benchmark").add_argument
    add("--seeds", type=count, default=3, metavar="N", help="0 to N-1 (default: %(default)s)")
    add("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS), metavar="METHOD",
        help="any of: " + ", ".join(METHODS) + " (default: all)")
    add("--output", type=Path, default=Path("runs/train_classifier"), metavar="PATH",
        help="default: %(default)s")
    add("--resume", action="store_true", help="continue what stands in --output, if anything")
    add("--overwrite", action="store_true", help="replace what stands in --output")
    add("--traceback", action="store_true", help="show the whole traceback of an error")
    # fmt: on
    return parser


def parse(arguments: list[str] | None = None) -> Options:
    """Read the command line; leaves the process with code 2 and one line where it is wrong."""
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    rate, schedule = given.pop("drop_rate"), given["schedule"]
    if schedule is None:
        schedule = ssp.BarSchedule(0.8 if rate is None else rate, period=2)
    given["schedule"] = repr(schedule)
    if given["resume"] and given["overwrite"]:
        parser.error("--resume continues and --overwrite starts over: give one of them")
    epochs, batch_size = _DEFAULTS.get(given["data"], _OTHER_DEFAULTS)
    given["epochs"] = given["epochs"] or epochs
    given["batch_size"] = given["batch_size"] or batch_size
    given["lr"] = given["lr"] or _LEARNING_RATES[given["optimizer"]]
    # In the table's order, each once, however they were typed.
    given["methods"] = tuple(m for m in METHODS if m in given["methods"])
    return Options(**given)
