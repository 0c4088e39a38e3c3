"""The training that every trainer must do: a small network, its data, and the loop by hand."""

import oracle
import torch
import torch.nn.functional as F
from torch import nn

import ssprop_patch as ssp

BAR = ssp.BarSchedule(0.6)  # by epochs: 0, 0.6, 0, 0.6, ...


def tenths(t):
    return min(t, 9) / 10


def by_step():
    """t counts optimizer steps, and the rate shows t."""
    return ssp.LambdaSchedule(tenths, interval="step")


class Net(nn.Module):
    """Convolutions of each kind, in float64 for the oracle's sake."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.last = nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12, 4)
        self.double()

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        return self.head(F.relu(self.last(self.depthwise(x))).mean((2, 3)))


def data(batches=5, size=4):
    """(x, y) batches."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 3, 8, 8, generator=generator, dtype=torch.float64),
            torch.randint(4, (size,), generator=generator),
        )
        for _ in range(batches)
    ]


def sgd(*modules):
    parameters = [p for module in modules for p in module.parameters()]
    return torch.optim.SGD(parameters, 0.05, momentum=0.9)


def steps(batches, epochs, accumulate=1):
    """The batches of every optimizer step; what is left at an epoch's end is a step of its own."""
    groups = [batches[i : i + accumulate] for i in range(0, len(batches), accumulate)]
    return groups * epochs


def rates(schedule, epochs, steps_in_epoch):
    """The drop rate of every optimizer step, from the schedule alone."""
    if schedule.interval == "step":
        return [schedule(t) for t in range(epochs * steps_in_epoch)]
    return [schedule(epoch) for epoch in range(epochs) for _ in range(steps_in_epoch)]


def train(model, groups, drop_rates, optimizer=None, loss_of=None):
    """Plain PyTorch on an unconverted model, whose gradients the oracle masks."""
    optimizer = optimizer or sgd(model)
    loss_of = loss_of or (lambda x, y: F.cross_entropy(model(x), y))
    for group, rate in zip(groups, drop_rates, strict=True):
        optimizer.zero_grad()
        for x, y in group:
            with oracle.network(model, rate) as record:
                loss = loss_of(x, y) / len(group)
            loss.backward()
            assert record.gap > 1e-9  # no tie: else the comparison means nothing
        optimizer.step()
    return model


def watch(model):
    """Record the drop rate in force at every forward in training mode; None when unconverted."""
    seen = []

    def note(module, *_):
        if module.training:
            converted = ssp.is_converted(module)
            seen.append(ssp.get_controller(module).drop_rate if converted else None)

    model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def assert_close(model, reference):
    """Equal weights and buffers, within float64's rounding."""
    states = model.state_dict(), reference.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-9, atol=1e-11, msg=name)


def assert_same(model, reference):
    """Equal weights and buffers, to the bit."""
    states = model.state_dict(), reference.state_dict()
    assert states[0].keys() == states[1].keys()
    assert [n for n, v in states[0].items() if not torch.equal(v, states[1][n])] == []
