"""A user's script, which ``mypy --strict`` has nothing to say about; it is not run.

``# type: ignore`` stands where there has to be an error: one that is missing is an error, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import assert_type

import ssprop_patch as ssp
from ssprop_patch.integrations.lightning import SsPropCallback
from ssprop_patch.integrations.transformers import SsPropCallback as ForTheTrainer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


def amax(dy: Tensor) -> Tensor:
    return dy.abs().amax(dim=(0, 2, 3))


def readme(model: Net, loader: DataLoader[tuple[Tensor, Tensor]], path: Path) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    print(ssp.plan(model))
    print(ssp.summary(model, input_size=(8, 3, 64, 64), drop_rate=0.8).backward_saved)
    ssp.convert(model, schedule=ssp.BarSchedule(0.8, period=2), steps_per_epoch=len(loader))
    meter = ssp.Meter(model)
    meter.log_to("run.csv")
    for x, y in loader:
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        torch.autograd.backward(loss)  # loss.backward() has no types in torch
        optimizer.step()
    report = meter.report()
    print(ssp.status(model), report, report.total_saved, report.to_json())
    meter.close()

    controller = ssp.get_controller(model)
    controller.step(3)
    controller.drop_rate = 0.5
    torch.save({"model": model.state_dict(), "ssprop": controller.state_dict()}, path)
    controller.load_state_dict(torch.load(path)["ssprop"])
    with ssp.dense(model), ssp.sparsity(model, 0.5), ssp.paused(model):
        model(x)
    ssp.revert(model)


def arguments(model: Net) -> None:
    overrides: Mapping[str, float] = {"layer1": 0.5}
    ssp.convert(model, ssp.presets.STEADY, exclude=("^conv1$", "layer4"), overrides=overrides)
    ssp.convert(model, lambda t: min(t, 8) / 10, types=(nn.Conv2d, nn.Linear), selection=amax)
    ssp.convert(model, 0.8, selection="principal", remainder="coarse", align=16)
    ssp.convert(model, **ssp.presets.whole_gradient())
    ssp.convert(model, filter_fn=lambda module, name: module.kernel_size != (7, 7))
    ssp.convert(model, filter_fn=ssp.plan(model, inputs=torch.zeros(1), measure=True).pays)
    ssp.convert(model, ssp.CosineSchedule(0.0, 0.8, total=20, interval="step"))
    ssp.functional.conv2d(torch.zeros(1), model.conv.weight, padding="same", drop_rate=0.8)
    ssp.kernels.benchmark = True
    print(ssp.kernels.table(), ssp.kernels.backends())
    ssp.plots.schedule(ssp.BarSchedule(0.8), epochs=10).savefig("schedule.png")
    SsPropCallback("BarSchedule(0.8)", exclude="^conv1$", meter=True)
    ForTheTrainer(ssp.BarSchedule(0.8)).add_to(object())


def what_comes_back(model: Net) -> None:
    assert_type(ssp.convert(model), Net)
    assert_type(ssp.revert(model), Net)
    assert_type(ssp.reverted_copy(model), Net)
    with ssp.converted(model, schedule=0.8) as inside:
        assert_type(inside, Net)

    @ssp.sparsity(model, 0.5)
    def evaluate(x: Tensor) -> Tensor:
        y: Tensor = model(x)
        return y

    assert_type(evaluate(torch.zeros(1)), Tensor)
    assert_type(ssp.parse_schedule("0.5")(3), float)
    for row in ssp.plan(model):
        assert_type(row.name, str)


def errors(model: Net) -> None:
    ssp.convrt(model)  # type: ignore[attr-defined]
    ssp.convert(model, selection="l3")  # type: ignore[arg-type]
    ssp.convert(model, remainder="fine")  # type: ignore[arg-type]
    ssp.convert(model, exlude="stem")  # type: ignore[call-arg]
    ssp.BarSchedule(0.8, interval="batch")  # type: ignore[arg-type]
    ssp.functional.conv2d(torch.zeros(1), torch.zeros(1), padding="full")  # type: ignore[arg-type]
    SsPropCallback(0.8, exlude="stem")  # type: ignore[call-arg]
    ForTheTrainer(0.8, selection="l3")  # type: ignore[arg-type]
