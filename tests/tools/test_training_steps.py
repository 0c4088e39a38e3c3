"""Compiled optimizers, compiled autograd, whole compiled steps: the rate still advances by itself.

And nothing of it makes a graph, or a break in one, that the plain network does not have.
"""

import gc
from collections import Counter

import oracle
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import ssprop_patch as ssp

from .networks import assert_same, images, loss_of, tiny

STEPS = 12  # more than torch compiles again before it gives up

# One that is never 0, so that there is a sparse graph only.
SCHEDULE = ssp.LinearSchedule(0.1, 0.9, STEPS, interval="step")


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


class Forward:
    """The model alone is compiled."""

    def __init__(self, model, backend):
        self.optimizer = sgd(model)
        self.call = torch.compile(model, backend=backend, fullgraph=True)

    def __call__(self, x):
        self.optimizer.zero_grad()
        loss_of(self.call(x)).backward()
        self.optimizer.step()


class InPlace(Forward):
    """``model.compile()``: no wrapper."""

    def __init__(self, model, backend):
        model.compile(backend=backend, fullgraph=True)
        self.call, self.optimizer = model, sgd(model)


class Optimizer(Forward):
    """The optimizer's step alone is compiled."""

    def __init__(self, model, backend):
        self.model, self.optimizer = model, sgd(model)
        self.update = torch.compile(self.optimizer.step, backend=backend)

    def __call__(self, x):
        self.optimizer.zero_grad()
        loss_of(self.model(x)).backward()
        self.update()


class Whole(Forward):
    """One function from the batch to the updated weights."""

    def __init__(self, model, backend):
        optimizer = sgd(model)

        @torch.compile(backend=backend)
        def step(x):
            optimizer.zero_grad()
            loss_of(model(x)).backward()
            optimizer.step()

        self.step = step

    def __call__(self, x):
        self.step(x)


class CompiledAutograd(Forward):
    """Forward compiled, and the whole backward as one graph."""

    def __init__(self, model, backend):
        super().__init__(model, backend)
        self.backward = torch.compile(lambda loss: loss.backward(), backend=backend)

    def __call__(self, x):
        self.optimizer.zero_grad()
        with torch._dynamo.config.patch(compiled_autograd=True):
            self.backward(loss_of(self.call(x)))
        self.optimizer.step()


def train(model, way, steps=STEPS):
    """Weights after the training, and what torch compiled for it."""
    torch._dynamo.reset()
    counters.clear()
    # Dynamo reads the sets of all models that await collection, those of other tests too, and fails
    # if one is collected while it builds its guards (docs/limits.md).
    gc.collect()
    backend = CompileCounterWithBackend("aot_eager")
    step = way(model, backend)
    for i in range(steps):
        step(images() * (1 + i / steps))
    made = Counter(
        graphs=backend.frame_count,
        breaks=sum(counters["graph_break"].values()),
        captures=counters["compiled_autograd"]["captures"],
    )
    return dict(model.state_dict()), made


def train_by_hand(schedule):
    """Not compiled, not converted: the oracle's gradients."""
    model = tiny()
    optimizer = sgd(model)
    for i in range(STEPS):
        optimizer.zero_grad()
        with oracle.network(model, schedule(i)) as record:
            loss_of(model(images() * (1 + i / STEPS))).backward()
        assert record.gap > 1e-6
        optimizer.step()
    return dict(model.state_dict())


WAYS = [Forward, InPlace, Optimizer, Whole, CompiledAutograd]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_the_rate_advances_and_the_plain_networks_graphs_are_enough(way):
    _, plain = train(tiny(), way)
    model = ssp.convert(tiny(), schedule=SCHEDULE)
    weights, made = train(model, way)
    assert_same(weights, train_by_hand(SCHEDULE))
    controller = ssp.get_controller(model)
    assert (controller.t, controller.drop_rate) == (STEPS, SCHEDULE(STEPS))
    assert made == plain
