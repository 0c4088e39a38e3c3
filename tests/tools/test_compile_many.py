"""torch.compile of many: models, layers with a rate each, conversions share few graphs."""

import gc
from weakref import ref

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import ssprop_patch as ssp
from ssprop_patch.schedule import settings

from .compiling import INDUCTOR
from .networks import WSConv2d, assert_same, gradients, loss_of

TYPES = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
BACKENDS = pytest.mark.parametrize("backend", sorted({"aot_eager", INDUCTOR}))
# Settings that leave the same layers sparse.
SETTINGS = [
    {},
    {"overrides": {"first": 0.25}},
    {"selection": "l2"},
    {"align": 2},
    {"selection": lambda dy: dy.abs().flatten(2).amax((0, 2)) if dy.dim() > 2 else dy.sum(0)},
    {"overrides": {"first": 0.25, "own": 0.75, "linear": 0.5}},
    {"selection": "random"},
]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.own = WSConv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 3, padding=1)
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return self.linear(self.up(self.own(self.first(x).tanh()).tanh()).tanh()) + x


def blocks(n=1):
    torch.manual_seed(n)
    made = [Block().double() for _ in range(n)]
    return made[0] if n == 1 else nn.Sequential(*made)


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 8, 6, 6, generator=generator, dtype=torch.float64)


def eager(rate, n=1, **settings):
    """Gradients of a model that is not compiled."""
    return gradients(ssp.convert(blocks(n), rate, types=TYPES, **settings), batch())


def seeded(model):
    ssp.get_controller(model).manual_seed(torch.initial_seed())
    return model


# --- one graph --------------------------------------------------------------------------------


def test_ten_models_of_one_class():
    counter = CompileCounterWithBackend("aot_eager")
    for i in range(10):
        rate, settings = 0.08 * (i + 1), SETTINGS[i % len(SETTINGS)]
        model = seeded(ssp.convert(blocks(), rate, types=TYPES, **settings))
        call = torch.compile(model, backend=counter, fullgraph=True)
        expected = eager(rate, **settings)
        assert_same(gradients(seeded(model), batch(), call), expected)
    assert counter.frame_count <= 6  # torch.compile gives up after 8


def test_twelve_blocks_with_a_rate_each():
    def frames(model):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        for block in model:
            block.compile(backend=counter, fullgraph=True)
        found = gradients(model, batch())
        return counter.frame_count, found

    overrides = {rf"^{i}\..*": 0.07 * (i + 1) for i in range(12)}
    plain, _ = frames(blocks(12))
    found, grads = frames(ssp.convert(blocks(12), 0.5, types=TYPES, overrides=overrides))
    assert found == plain == 2  # the first block's input needs no gradient
    assert_same(grads, eager(0.5, 12, overrides=overrides))


def test_rates_for_some_layers_of_some_blocks():
    model = ssp.convert(
        blocks(4), 0.5, types=TYPES, overrides={"0.first": 0.25, "2.up": 0.75, r"3\..*": 0.25}
    )
    counter = CompileCounterWithBackend("aot_eager")
    for block in model:
        block.compile(backend=counter, fullgraph=True)
    gradients(model, batch())
    # Of the block whose input needs no gradient, without rates of its layers' own, and with some.
    assert counter.frame_count <= 4


def test_conversions_of_one_compiled_model():
    model, counter = blocks(), CompileCounterWithBackend("aot_eager")
    call = torch.compile(model, backend=counter, fullgraph=True)
    for i in range(12):
        rate, settings = 0.08 * (i % 11 + 1), SETTINGS[i % len(SETTINGS)]
        ssp.convert(call, rate, types=TYPES, **settings)
        expected = eager(rate, **settings)
        assert_same(gradients(seeded(model), batch(), call), expected)
        if i % 2:
            ssp.revert(model)
    assert counter.frame_count <= 6


def test_a_meter_makes_one_graph_more_at_most():
    model = ssp.convert(blocks(), 0.5, types=TYPES)
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(model, backend=counter, fullgraph=True)
    gradients(model, batch(), call)
    with ssp.Meter(model) as meter:
        for rate in (0.25, 0.5, 0.75):
            ssp.get_controller(model).drop_rate = rate
            assert_same(gradients(model, batch(), call), eager(rate))
        kept = {row.name: row.totals.kept for row in meter.report().layers}
    assert kept == {"first": 12, "own": 12, "up": 12, "linear": 5 + 3 + 2}
    gradients(model, batch(), call)
    # One for the rate of the schedule, one metered, one for other rates.
    assert counter.frame_count <= 3


def test_temporary_rates_inside_of_compiled_code():
    model = ssp.convert(blocks(), 0.5, types=TYPES)

    def loss(x):
        with ssp.sparsity(model, 0.25):
            inside = model(x)
        return inside, model(x)

    call = torch.compile(loss, backend="aot_eager")
    for _ in range(2):
        for i, rate in enumerate((0.25, 0.5)):
            found = gradients(model, batch(), lambda x, i=i: call(x)[i])
            assert_same(found, eager(rate))
        assert ssp.get_controller(model).drop_rate == 0.5
    assert_same(gradients(model, batch()), eager(0.5))


# --- a backward goes by what its forward recorded -----------------------------------------------


def late_gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@BACKENDS
def test_a_loss_goes_back_after_its_context(backend):
    model = blocks()
    call = torch.compile(model, backend=backend, fullgraph=True)
    with ssp.converted(model, 0.5, types=TYPES):
        loss = loss_of(call(batch()))
    gc.collect()
    assert_same(late_gradients(model, loss), eager(0.5))

    ssp.convert(model, 0.5, types=TYPES)
    for rate in (0.25, 0.0, 0.75):
        with ssp.sparsity(model, rate):
            loss = loss_of(call(batch()))
        assert_same(late_gradients(model, loss), eager(rate))

    loss = loss_of(call(batch()))
    ssp.convert(model, 0.75, types=TYPES, selection="l2")
    gc.collect()
    assert_same(late_gradients(model, loss), eager(0.5))


@BACKENDS
def test_two_losses_of_different_rates_go_back_in_any_order(backend):
    model = ssp.convert(blocks(), 0.5, types=TYPES)
    call = torch.compile(model, backend=backend, fullgraph=True)
    losses = {}
    for rate in (0.25, 0.75, 0.5):
        ssp.get_controller(model).drop_rate = rate
        losses[rate] = loss_of(call(batch()))
    for rate in (0.75, 0.5, 0.25):
        assert_same(late_gradients(model, losses[rate]), eager(rate))


@BACKENDS
def test_a_model_that_nobody_holds(backend):
    def loss():
        model = ssp.convert(blocks(), 0.5, types=TYPES, selection=lambda dy: opaque_scores(dy))
        call = torch.compile(model, backend=backend, fullgraph=True)
        return loss_of(call(batch())), dict(model.named_parameters()), ref(model)

    def opaque_scores(dy):
        return -dy.abs().flatten(2).sum((0, 2)) if dy.dim() > 2 else -dy.abs().sum(0)

    value, parameters, model = loss()
    gc.collect()
    assert model() is None
    value.backward()
    found = {name: p.grad for name, p in parameters.items()}
    assert_same(found, eager(0.5, selection=opaque_scores))


def test_checkpointing_in_the_graph_keeps_the_rate_of_the_forward():
    model = blocks()
    layers = nn.Sequential(model.first, nn.Tanh(), model.linear)

    def run(x):
        return checkpoint(layers, x, use_reentrant=False)

    ssp.convert(layers, 0.5, types=TYPES)
    expected = gradients(layers, batch(), run)
    call = torch.compile(run, backend="aot_eager", fullgraph=True)
    loss = loss_of(call(batch()))
    ssp.get_controller(layers).drop_rate = 0.25
    assert_same(late_gradients(layers, loss), expected)


def test_compiled_autograd_is_told_the_rate_of_the_forward():
    def graphs(model, rates):
        torch._dynamo.reset()
        call = torch.compile(model, backend="aot_eager", fullgraph=True)
        counter = CompileCounterWithBackend("aot_eager")
        for rate in rates:
            if rate:
                ssp.get_controller(model).drop_rate = rate
            loss = loss_of(call(batch()))
            if rate:
                ssp.get_controller(model).drop_rate = 0.4
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend=counter)):
                found = late_gradients(model, loss)
            assert_same(found, eager(rate))
        return counter.frame_count

    rates = (0.25, 0.75, 0.5)
    # One more for the schedule's own rate.
    assert graphs(ssp.convert(blocks(), 0.5, types=TYPES), rates) == graphs(blocks(), (0, 0, 0)) + 1


def test_what_autograd_saved_may_be_copied_while_the_model_is_converted():
    model = ssp.convert(blocks(), 0.5, types=TYPES)
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        loss = loss_of(call(batch()))
    ssp.get_controller(model).drop_rate = 0.25
    assert_same(late_gradients(model, loss), eager(0.5))
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        loss = loss_of(call(batch()))
    ssp.revert(model)
    gc.collect()
    with pytest.raises(RuntimeError, match="saved were copied"):
        loss.backward()


# --- nothing accumulates ------------------------------------------------------------------------


def test_nothing_of_rates_and_conversions_stays():
    model = blocks()
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    gc.collect()
    before, gone = len(settings._settings), []
    for i in range(100):
        ssp.convert(model, 0.5, types=TYPES)
        controller = ssp.get_controller(model)
        for rate in (0.25, 0.75):
            controller.drop_rate = rate
            gone.append(ref(controller.rate_tensor))
        gone += [ref(m._ssprop_policy.token) for m in model.children()]
        if i % 25 == 0:
            gradients(model, batch(), call)
    ssp.revert(model)
    del controller
    gc.collect()
    assert not [tensor for tensor in gone if tensor() is not None]
    assert len(settings._settings) <= before


@pytest.mark.parametrize("made", [torch.inference_mode, lambda: torch.device("meta")])
def test_rates_set_where_tensors_are_of_another_kind(made):
    model = ssp.convert(blocks(), 0.25, types=TYPES)
    with made():
        ssp.get_controller(model).drop_rate = 0.5
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(gradients(model, batch(), call), eager(0.5))
