"""benchmarks/classifier: networks by their names, fitted to the images."""

from __future__ import annotations

import torch
from classifier import models
from classifier.options import parse
from study.settings import resolve
from torch import nn


def test_models_of_both_libraries():
    assert models.resolve("resnet18") == models.resolve("timm:resnet18") == ("timm", "resnet18")
    assert models.resolve("torchvision:resnet18") == ("torchvision", "resnet18")
    assert models.resolve("googlenet") == ("torchvision", "googlenet")  # timm has none
    options = parse(["--model", "torchvision:resnet18", "--dropout", "0.3"])
    model, channels = models.build(options, classes=7, channels=1, size=32)
    assert channels == 3 and model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert model.conv1.kernel_size == (3, 3) and model.conv1.stride == (1, 1)
    assert [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)] == [0.3]
    model, channels = models.build(parse([]), classes=10, channels=1, size=8)
    assert channels == 1 and model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert models.build(parse(["--stem", "own"]), classes=10, channels=1, size=8)[
        0
    ].conv1.kernel_size == (7, 7)


def test_a_network_narrower_than_timm_s_stem_has_a_narrow_stem():
    net, _ = models.build(
        resolve({"network": "resnet8_narrow"}).options("cpu"), classes=10, channels=3, size=32
    )
    shapes = [tuple(m.weight.shape) for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert shapes[:3] == [(24, 3, 3, 3), (24, 24, 3, 3), (24, 24, 3, 3)]
    assert max(shape[0] for shape in shapes) == 96
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
