"""fastai: its own optimizers, and torch's in its wrapper."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ssprop_patch as ssp

from . import compare


def checks() -> Iterator[tuple[str, str]]:
    """Yield what was compared, and how it came out."""
    from fastai.optimizer import SGD, OptimWrapper

    torchs = partial(OptimWrapper, opt=torch.optim.SGD)
    for name, opt_func in (("fastai's SGD", SGD), ("OptimWrapper(opt=torch.optim.SGD)", torchs)):
        for what, result in compare.in_all(partial(train, opt_func=opt_func), steps=6):
            yield f"{name}: {what}", result
    yield "fastai's SGD, told of epochs by a callback: rates", str(rates_by_callback())


def network() -> nn.Module:
    """Return the same network each time."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    ).double()


def learner(model: nn.Module, opt_func: object):
    """Return a Learner with three batches an epoch."""
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 3, 8, 8, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 4, (12,), generator=generator)
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    loss = nn.CrossEntropyLoss()
    return Learner(DataLoaders(loader, loader), model, loss_func=loss, opt_func=opt_func, lr=0.1)


@contextlib.contextmanager
def quietly(found) -> Iterator[None]:
    """Print nothing."""
    import fastai.callback.progress  # noqa: F401 - gives a Learner no_bar
    from fastai.learner import Recorder

    found.remove_cb(Recorder)  # which takes no float64
    with found.no_bar():
        yield


def train(prepare: Callable[[nn.Module], object], opt_func: object) -> dict[str, Tensor]:
    """Train for two epochs."""
    model = network()
    prepare(model)
    found = learner(model, opt_func)
    with quietly(found):
        found.fit(2)
    return {name: t.clone() for name, t in model.state_dict().items()}


def rates_by_callback() -> list[float]:
    """Return the rates of four epochs, as a callback tells the controller of them."""
    from fastai.callback.core import Callback
    from fastai.optimizer import SGD

    model = ssp.convert(network(), ssp.BarSchedule(0.8))
    found, rates = learner(model, SGD), []

    class Epochs(Callback):
        def before_epoch(self) -> None:
            controller = ssp.get_controller(self.model)
            controller.step(self.epoch)
            rates.append(controller.drop_rate)

    with quietly(found):
        found.fit(4, cbs=Epochs())
    return rates
