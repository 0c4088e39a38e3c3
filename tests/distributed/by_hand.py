"""Training on two ranks, done by hand in one process: each rank's gradient, averaged.

The data of a rank are a function of rank and step, so that any process can compute what all do.
"""

import copy

import oracle
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import ssprop_patch as ssp

RANKS = 2
RATES = (0.5, 0.75, 0.0, 0.9)


def rate_at(t):
    return RATES[t % len(RATES)]


def by_step():
    """A schedule with another rate after every optimizer step."""
    return ssp.LambdaSchedule(rate_at, interval="step")


class WSConv2d(nn.Conv2d):
    """A forward of its own: the weight is standardised, then convolved with."""

    def forward(self, x):
        mean, std = self.weight.mean((1, 2, 3), True), self.weight.std((1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / (std + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, groups=self.groups)


class Net(nn.Module):
    """One of each: with batch norm or a bias, grouped, depthwise, own forward, pointwise."""

    def __init__(self, norm=True):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=not norm)
        self.norm = nn.BatchNorm2d(16) if norm else nn.Identity()
        self.grouped = nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=4)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.own = WSConv2d(16, 12, 3, padding=1)
        self.last = nn.Conv2d(12, 20, 1)
        self.head = nn.Linear(20, 5)

    def forward(self, x):
        x = self.grouped(self.norm(self.stem(x)).relu()).tanh()
        x = self.own(self.depthwise(x).tanh()).tanh()
        return self.head(self.last(x).tanh().mean((2, 3)))


def make(norm=True, dtype=torch.float64):
    torch.manual_seed(0)
    return Net(norm).to(dtype)


def make_small():
    """Quick to compile."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.Tanh(),
        WSConv2d(16, 12, 3, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(48, 5),
    ).double()


def batch(rank, step, dtype=torch.float64):
    """Images and labels of one rank; of other classes on the other, so that channels differ."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    images = torch.randn(3, 3, 8, 8, generator=generator, dtype=torch.float64)
    return images.to(dtype), torch.randint(2, (3,), generator=generator) + 3 * rank


def my_batch(step, dtype=torch.float64):
    return batch(dist.get_rank(), step, dtype)


def whole_batch(step):
    images, labels = zip(*(batch(rank, step) for rank in range(RANKS)), strict=True)
    return torch.cat(images), torch.cat(labels)


def loss_of(model, data):
    images, labels = data
    return F.cross_entropy(model(images), labels)


def optimizer_for(model):
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def full(tensor):
    """A copy of all of a tensor of which this rank may hold a part."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def state_of(model):
    """Gradients and parameters now, by name."""
    parameters = dict(model.named_parameters())
    grads = {f"{n}.grad": full(p.grad) for n, p in parameters.items() if p.grad is not None}
    return grads | {name: full(p) for name, p in parameters.items()}


def train(model, module, steps=2):
    """Train a wrapped model on this rank's data; return the state of ``module`` at each step."""
    optimizer, states = optimizer_for(model), []
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, my_batch(step)).backward()
        optimizer.step()
        states.append(state_of(module))
    return states


def train_by_hand(model, rates, whole=False):
    """Train an unconverted model as all ranks together would; return its state at each step.

    Args:
        model: Left as it is: a copy is trained.
        rates: The drop rate of each step.
        whole: Choose the channels from the whole batch, not from each rank's part.
    """
    model = copy.deepcopy(model)
    optimizer, states = optimizer_for(model), []
    for step, rate in enumerate(rates):
        optimizer.zero_grad()
        parts = [whole_batch(step)] if whole else [batch(rank, step) for rank in range(RANKS)]
        for part in parts:
            masked_backward(model, part, rate, share=len(parts))
        optimizer.step()
        states.append(state_of(model))
    return states


def masked_backward(model, data, rate, share=1):
    """Add to the gradients of an unconverted model what a sparse backward is to give."""
    with oracle.network(model, rate) as record:
        loss = loss_of(model, data) / share
    loss.backward()
    assert record.calls > 0 and record.gap > 1e-9, "a tie: the choice would be a matter of rounding"
    assert (record.dropped > 0) == (rate > 0)


def assert_same(states, expected):
    """Compare two trainings, step by step and name by name, as closely as float64 allows."""
    assert len(states) == len(expected)
    for step, (state, want) in enumerate(zip(states, expected, strict=True)):
        assert state.keys() == want.keys()
        for name in state:
            at = f"step {step}, {name}: "
            torch.testing.assert_close(
                state[name], want[name], rtol=1e-9, atol=1e-12, msg=lambda m, at=at: at + m
            )


def assert_bit_equal(states, expected):
    assert len(states) == len(expected)
    for step, (state, want) in enumerate(zip(states, expected, strict=True)):
        assert state.keys() == want.keys()
        for name in state:
            assert torch.equal(state[name], want[name]), f"step {step}, {name}"
