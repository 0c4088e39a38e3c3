"""Which networks there are, and how to build each at the smallest input it takes."""

from __future__ import annotations

import functools
import importlib
import inspect
import unittest.mock
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from torch import Tensor, nn

from .weights import LeaveOutLargeDraws, randomise

SIZES = (32, 64, 84, 96, 128, 160, 192, 224, 256)
PACKAGES = {  # of torchvision.models
    "classification": "torchvision.models",
    "quantization": "torchvision.models.quantization",
    "segmentation": "torchvision.models.segmentation",
    "detection": "torchvision.models.detection",
    "video": "torchvision.models.video",
    "optical_flow": "torchvision.models.optical_flow",
}
CLASSES = 10


@dataclass(frozen=True)
class Entry:
    """One network: ``family`` is timm's module or torchvision's sub-package."""

    library: str
    family: str
    name: str


class Sample(NamedTuple):
    """A network and an input of it.

    ``native`` is the shape of a full-sized input, where shares of FLOPs may differ there; ``also``
    are modules whose outputs join the loss.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    native: tuple[int, ...] | None = None
    also: tuple[nn.Module, ...] = ()


class Attempt(NamedTuple):
    """A way to try: the input's size in words, and what makes network and input from a seed."""

    size: str
    make: Callable[[int], Sample]


@functools.cache
def entries() -> tuple[Entry, ...]:
    """Return all networks of both libraries."""
    found = [
        Entry("timm", family, name)
        for family in timm.list_modules()
        for name in timm.list_models(module=family)
    ]
    for family, package in PACKAGES.items():
        module = importlib.import_module(package)
        found += [Entry("torchvision", family, n) for n in torchvision.models.list_models(module)]
    return tuple(found)


def attempts(entry: Entry) -> Iterator[Attempt]:
    """Yield ways to build and feed a network, the cheapest first."""
    if entry.library == "timm":
        return _timm(entry.name)
    if entry.library == "torchvision":
        return {
            "detection": _detection,
            "segmentation": _segmentation,
            "video": _video,
            "optical_flow": _optical_flow,
        }.get(entry.family, _classification)(entry.name)
    raise ValueError(f"no library {entry.library!r}")


def build(seed: int, make: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """Return ``make(...)`` in training mode, with weights drawn by ``randomise``."""
    torch.manual_seed(seed)
    with LeaveOutLargeDraws():
        model = make(*args, **kwargs)
    randomise(model, seed)
    return model.train()


def images(size: int, batch: int | None = None) -> Tensor:
    """Return a batch: of three, as batch norm makes ±1 of two values, without a gradient."""
    return torch.randn(batch or (3 if size < 160 else 2), 3, size, size)


def _timm(name: str) -> Iterator[Attempt]:
    config = timm.get_pretrained_cfg(name)
    channels, native, _ = (config and config.input_size) or (3, 224, 224)
    takes_size = True

    def make(size: int, seed: int) -> Sample:
        nonlocal takes_size
        model = None
        if takes_size:
            try:
                model = build(seed, timm.create_model, name, num_classes=CLASSES, img_size=size)
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
                takes_size = False
        if model is None:
            model = build(seed, timm.create_model, name, num_classes=CLASSES)
        x = images(size)
        if channels != 3:
            x = torch.randn(len(x), channels, size, size)
        return Sample(model, (x,))

    for size in _upto(native):
        yield Attempt(f"{size}", functools.partial(make, size))


def _upto(native: int) -> list[int]:
    return [size for size in SIZES if size < native] + [native]


def _classification(name: str) -> Iterator[Attempt]:
    maker = torchvision.models.get_model_builder(name)
    kwargs: dict[str, Any] = {"weights": None, "num_classes": CLASSES}
    if name.startswith("quantized_"):
        kwargs["quantize"] = False  # the float network that quantization-aware training trains
    if "googlenet" in name or "inception" in name:
        kwargs["init_weights"] = False
    fixed = name.startswith(("vit_", "maxvit"))

    def make(size: int, seed: int) -> Sample:
        if name.startswith("vit_"):
            kwargs["image_size"] = size
        if name.startswith("maxvit"):
            kwargs["input_size"] = (size, size)
        model = build(seed, maker, **kwargs)
        full = 299 if "inception" in name else 224
        return Sample(model, (images(size),), None if fixed else (2, 3, full, full))

    for size in (*SIZES, 299):
        yield Attempt(f"{size}", functools.partial(make, size))


def _segmentation(name: str) -> Iterator[Attempt]:
    kwargs = {"weights": None, "weights_backbone": None, "num_classes": CLASSES}

    def make(seed: int) -> Sample:
        model = build(seed, torchvision.models.get_model, name, **kwargs)
        return Sample(model, (images(48),), (2, 3, 224, 224))

    yield Attempt("48", make)


def _detection(name: str) -> Iterator[Attempt]:
    kwargs: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": 4}
    if not name.startswith("ssd"):  # those have a size of their own
        kwargs |= {"min_size": 64, "max_size": 80}

    def make(seed: int) -> Sample:
        model = build(seed, torchvision.models.get_model, name, **kwargs)
        boxes = torch.tensor([[4.0, 4, 40, 50], [20, 10, 60, 60]])
        targets = [
            {"boxes": boxes, "labels": torch.tensor([1, 2])},
            {"boxes": boxes[:1] + 2, "labels": torch.tensor([3])},
        ]
        if name.startswith("mask"):
            for target in targets:
                n = len(target["boxes"])
                target["masks"] = torch.randint(2, (n, 72, 80), dtype=torch.uint8)
        if name.startswith("keypoint"):
            for target in targets:
                centre = target["boxes"].view(-1, 1, 2, 2).mean(2)
                points = centre + torch.randn(len(centre), 17, 2)
                target["keypoints"] = torch.cat([points, torch.ones(len(centre), 17, 1)], 2)
                target["labels"] = torch.ones_like(target["labels"])
        # The losses of boxes are |difference|, with the gradient 1 or -1 in many channels: ties.
        ends = (nn.Conv2d, nn.ConvTranspose2d)
        heads = [m for n, m in model.named_modules() if "backbone" not in n]
        inputs = [torch.rand(3, 72, 80), torch.rand(3, 72, 80)], targets
        if name == "ssd300_vgg16":  # one image of 300 x 300 is work enough
            inputs = tuple(values[:1] for values in inputs)
        return Sample(model, inputs, also=tuple(m for m in heads if isinstance(m, ends)))

    yield Attempt("72x80", make)


def _video(name: str) -> Iterator[Attempt]:
    maker = torchvision.models.get_model_builder(name)

    def make(frames: int, size: int, seed: int) -> Sample:
        with _mvit_of(frames, size):
            model = build(seed, maker, weights=None, num_classes=CLASSES)
        batch = 2 if size < 160 else 1
        return Sample(model, (torch.randn(batch, 3, frames, size, size),))

    for frames, size in ((4, 32), (8, 64), (16, 224)):
        yield Attempt(f"{frames}x{size}", functools.partial(make, frames, size))


def _mvit_of(frames: int, size: int) -> Any:
    """Make torchvision's MViT functions, whose size is fixed, build one of another size."""
    module = torchvision.models.video.mvit
    original = module._mvit

    def smaller(**kwargs: Any) -> nn.Module:
        return original(**kwargs | {"spatial_size": (size, size), "temporal_size": frames})

    return unittest.mock.patch.object(module, "_mvit", smaller)


def _optical_flow(name: str) -> Iterator[Attempt]:
    def make(seed: int) -> Sample:
        model = build(seed, torchvision.models.get_model, name, weights=None)
        if "num_flow_updates" in inspect.signature(model.forward).parameters:
            model.register_forward_pre_hook(_two_updates, with_kwargs=True)
        return Sample(model, (images(128, 1), images(128, 1)))

    yield Attempt("128", make)


def _two_updates(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return args, {"num_flow_updates": 2}
