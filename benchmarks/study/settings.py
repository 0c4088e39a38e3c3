"""What decides how one run ends, checked and resolved, and the run's id."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from classifier.options import Options, UserError
from torch import nn

import ssprop_patch as ssp

METHODS = ("dense", "dense-equal-compute", "ssprop")
# Of a setting that came after the first studies, see ``digest``.
_ADDED = {"added": True}


@dataclass(frozen=True)
class Settings:
    """One run. The defaults are those of a study's file.

    Attributes:
        method: One of METHODS. ``dense-equal-compute`` is a dense training of as many steps as
            cost the FLOPs of the ``ssprop`` run that has its other settings; its learning-rate
            schedule is shortened to them.
        schedule: Of the drop rate, as text; here resolved, so without braces.
        types, exclude, overrides: As for ``ssp.convert``; types by their names in ``torch.nn``.
        remainder: As for ``ssp.convert``, with "none" for None.
        steps_share: Of the steps that the epochs are; the learning-rate schedule is shortened to
            them.
        pretrained: Whether training begins with ImageNet weights, see ``classifier.pretrained``.
        frozen: Patterns of layers that are not trained.
        test_share: Of the test images, by class: the same for all seeds.
        resize_to: Pixels to which the batches are enlarged; 0: as they are.
        share: Of the training images, by class; which ones depends on the seed.
        eval_every: Epochs between two evaluations on the test images.
    """

    method: str = "dense"
    schedule: str = "BarSchedule({drop_rate}, period=2)"
    selection: str = "l1"
    types: tuple[str, ...] = ("Conv1d", "Conv2d", "Conv3d")
    exclude: tuple[str, ...] = ()
    overrides: tuple[tuple[str, float], ...] = ()
    dropout: float = 0.0
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    network: str = "resnet18"
    data: str = "cifar10"
    image_size: int = 32
    share: float = 1.0
    augment: bool = True
    epochs: int = 30
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.1
    lr_schedule: str = "one-cycle"
    amp: str = "off"
    channels_last: bool = False
    compile: bool = False
    eval_every: int = 1
    seed: int = 0
    remainder: str = field(default="none", metadata=_ADDED)
    steps_share: float = field(default=1.0, metadata=_ADDED)
    pretrained: bool = field(default=False, metadata=_ADDED)
    frozen: tuple[str, ...] = field(default=(), metadata=_ADDED)
    test_share: float = field(default=1.0, metadata=_ADDED)
    resize_to: int = field(default=0, metadata=_ADDED)

    @property
    def id(self) -> str:
        """Return what its row is called: a digest of all settings, the same everywhere."""
        return digest(self)

    def options(self, device: str) -> Options:
        """Return what ``classifier`` is told to do."""
        same = {f.name for f in dataclasses.fields(Options)} & set(NAMES)
        return Options(
            **{name: getattr(self, name) for name in same},
            model=self.network,
            device=device,
            # What a run of a study does not depend on, or has its own words for.
            stem="auto",
            data_dir=None,
            download=False,
            train_images=None,
            stream=False,
            workers=0,
            seeds=1,
            methods=(),
            output=Path(),
            resume=False,
            overwrite=False,
            traceback=False,
        )

    @classmethod
    def of_row(cls, row: Mapping[str, str]) -> Settings:
        """Return the settings of a row of the CSV."""
        values: dict[str, Any] = {}
        for one in dataclasses.fields(cls):
            text, kind = row[one.name], type(one.default)
            if kind is tuple:
                items = json.loads(text)
                values[one.name] = tuple(tuple(i) if isinstance(i, list) else i for i in items)
            else:
                values[one.name] = text == "True" if kind is bool else kind(text)
        return cls(**values)


def digest(settings: Any) -> str:
    """Return twelve digits that are the same exactly for the same values of a dataclass."""
    values = dataclasses.asdict(settings)
    for added in dataclasses.fields(settings):
        # Rows that are older than a setting keep their ids: they were trained with its default.
        if added.metadata.get("added") and values[added.name] == added.default:
            del values[added.name]
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def cells(settings: Any) -> dict[str, Any]:
    """Return the values of a dataclass as a CSV holds them, tuples as JSON."""
    values = dataclasses.asdict(settings)
    return {n: json.dumps(v) if isinstance(v, tuple) else v for n, v in values.items()}


NAMES = tuple(f.name for f in dataclasses.fields(Settings))
#: Columns that rows of older studies lack, with what stands for them.
ADDED = {
    name: str(cell)
    for name, cell in cells(Settings()).items()
    if Settings.__dataclass_fields__[name].metadata.get("added")
}
#: Of a study's file only: they are resolved into ``schedule``.
EXTRA: dict[str, Any] = {"drop_rate": 0.8}
LISTS = ("types", "exclude", "frozen")  # one value of these is a list

_CHOICES = {
    "method": METHODS,
    "selection": ("l1", "l2", "random", "principal", "ahead"),
    "remainder": ("none", "coarse"),
    "optimizer": ("sgd", "adam", "adamw"),
    "lr_schedule": ("one-cycle", "warm-cosine"),
    "amp": ("off", "bf16", "fp16"),
}
# low <= value < below, and whether low itself is excluded
_RANGES = {
    "drop_rate": (0, 1, False),
    "dropout": (0, 1, False),
    "weight_decay": (0, 1e9, False),
    "label_smoothing": (0, 1, False),
    "share": (0, 1 + 1e-9, True),
    "test_share": (0, 1 + 1e-9, True),
    "steps_share": (0, 1 + 1e-9, True),
    "lr": (0, 1e9, True),
    "image_size": (1, 1e9, False),
    "epochs": (1, 1e9, False),
    "batch_size": (1, 1e9, False),
    "eval_every": (1, 1e9, False),
    "resize_to": (0, 1e9, False),
    "seed": (0, 2**31, False),
}
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(Settings)} | EXTRA


def resolve(given: Mapping[str, Any]) -> Settings:
    """Return the settings of one run from what a study's file says of it.

    In ``schedule``, ``{drop_rate}`` is that setting, and ``{epochs}``, ``{0.25 epochs}``,
    ``{epochs - 1}`` are whole numbers of epochs, at least 1. What cannot change a run is left out:
    a dense one has no schedule, and so the same id whatever the others have.

    Raises:
        UserError: If a name or a value is wrong.
    """
    values = dict(_DEFAULTS)
    for name, value in given.items():
        values[name] = _checked(name, value)
    rate = values.pop("drop_rate")
    if values["method"] == "dense":
        values |= dict.fromkeys(("types", "exclude", "overrides"), ()) | {"schedule": ""}
    else:
        values["schedule"] = schedule_text(values["schedule"], rate, values["epochs"])
    if values["method"] != "ssprop":
        values |= {"selection": "", "remainder": "none"}
    return Settings(**values)


def _checked(name: str, value: Any) -> Any:
    if name not in _DEFAULTS:
        near = difflib.get_close_matches(name, _DEFAULTS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(_DEFAULTS)}"
        raise UserError(f"a run has no setting {name!r}; {hint}")
    default = _DEFAULTS[name]
    if name == "overrides":
        return _overrides(value)
    if name in LISTS:
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
            raise UserError(f"{name} must be a list of texts, got {value!r}")
        classes = [getattr(nn, text, None) for text in value] if name == "types" else []
        for text, cls in zip(value, classes, strict=False):
            if not isinstance(cls, type):
                raise UserError(f"types: torch.nn has no class {text!r}")
        return tuple(value)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise UserError(f"{name} must be a {type(default).__name__}, got {value!r}")
    if name in _CHOICES and value not in _CHOICES[name]:
        raise UserError(f"{name} must be one of {', '.join(_CHOICES[name])}, got {value!r}")
    low, below, above = _RANGES.get(name, (0, 0, False))
    if name in _RANGES and (not low <= value < below or (above and value == low)):
        most = 1 if name in ("share", "test_share", "steps_share") else f"below {below:g}"
        raise UserError(f"{name} must be {'above' if above else 'from'} {low} to {most}: {value!r}")
    return value


def _overrides(value: Any) -> tuple[tuple[str, float], ...]:
    rates = value.values() if isinstance(value, Mapping) else [None]
    if not all(type(rate) in (int, float) and 0 <= rate < 1 for rate in rates):
        raise UserError(f"overrides must be {{pattern = drop rate in [0, 1)}}, got {value!r}")
    # In the file's order: the first pattern that matches a layer counts.
    return tuple((pattern, float(rate)) for pattern, rate in value.items())


def schedule_text(text: str, rate: float, epochs: int) -> str:
    """Return a schedule's repr from a text with {drop_rate}, {epochs}, {0.25 epochs} in it.

    {epochs - 1} is the last epoch's number: the total of a ramp whose end is reached.

    Raises:
        UserError: If it is not a schedule.
    """

    def fill(match: re.Match[str]) -> str:
        share, word, last = match.groups()
        if word == "drop_rate":
            return repr(rate)
        return str(max(1, round(float(share or 1) * epochs) - bool(last)))

    words = r"\{\s*(?:([\d.]+)\s+)?(?:(drop_rate)|epochs(\s*-\s*1)?)\s*\}"
    filled = re.sub(words, fill, text)
    try:
        return repr(ssp.parse_schedule(filled))
    except ValueError as error:
        raise UserError(f"schedule {error}") from error
