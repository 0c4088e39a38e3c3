"""A meter of the whole network: what runs beside the layers, whoever calls it."""

import warnings

import pytest
import torch
from flops.networks import Mixed
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ssprop_patch as ssp
from metering import by_hand
from metering.by_hand import counted, quiet_meter


def image(n=2, size=32):
    return torch.randn(n, 3, size, size)


def optimizer_of(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)


def step(call, optimizer, x):
    call(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_linear_layers_attention_and_functional_calls_count_at_each_step():
    model = Mixed()
    one, rates = image(), (0.5, 0.0, 0.75)
    dense = ssp.summary(model, inputs=one, drop_rate=0.0)
    assert dense.others.forward > 2 * dense.layers[0].forward
    expected = by_hand.by_summary(model, one, rates)
    ssp.convert(model, ssp.LambdaSchedule(lambda t: rates[t % 3], interval="step"))
    optimizer = optimizer_of(model)
    with quiet_meter(model) as meter:
        for _ in rates:
            step(model, optimizer, one)
        assert counted(meter) == expected
        report = meter.report()
    saved = expected[1] - expected[2]
    assert report.backward_saved == saved / expected[1] < 0.2 < report.converted.backward_saved
    assert meter.total_saved == report.total_saved == saved / (expected[0] + expected[1])


def test_inputs_of_other_shapes_and_what_is_frozen_later_cost_what_they_do(monkeypatch):
    monkeypatch.setattr("ssprop_patch.metering.other_work._AGAIN", 3)
    model = ssp.convert(Mixed(), 0.5)
    shapes = [(2, 32), (4, 32), (2, 24), (4, 32), (4, 32), (4, 32)]
    expected = [by_hand.by_summary(model, image(*shape), [0.5]) for shape in shapes]
    optimizer = optimizer_of(model)
    with quiet_meter(model) as meter:
        for shape in shapes:
            step(model, optimizer, image(*shape))
        assert counted(meter) == tuple(map(sum, zip(*expected, strict=True)))
        before = counted(meter)
        model.proj.requires_grad_(False)
        model.head.requires_grad_(False)
        for _ in range(6):  # of which the third is watched again, and the last
            step(model, optimizer, image(4))
        frozen = by_hand.by_summary(model, image(4), [0.5])
        after = counted(meter)
        assert after[0] == before[0] + 6 * frozen[0]
        assert before[1] + 6 * frozen[1] < after[1] < before[1] + 6 * expected[1][1]


class Trained(nn.Module):
    """As a LightningModule: the trainer calls a method, which calls parts."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3))
        self.head = nn.Linear(8, 5)

    def training_step(self, x):
        return self.head(self.backbone(x).mean((2, 3)))

    def forward(self, x):
        raise AssertionError("nobody calls this")


def hooked(model):
    return {name for name, m in model.named_modules() if m._forward_pre_hooks}


@pytest.mark.parametrize("convert", ["before", "after"])
def test_parts_that_a_trainer_calls_are_found_and_a_later_conversion_is_followed(convert):
    model, x, steps = Trained(), image(), 3
    whole = nn.Sequential(model.backbone, nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.head)
    expected = by_hand.by_summary(whole, x, [0.5] * steps)
    if convert == "before":
        ssp.convert(model, 0.5)
    with quiet_meter(model) as meter:
        if convert == "after":
            ssp.convert(model, 0.5)
        optimizer = optimizer_of(model)
        for _ in range(steps):
            step(model.training_step, optimizer, x)
        assert counted(meter) == expected
        assert hooked(model) == {"", "backbone", "head"}
        assert meter.report().seconds.keys() == {"forward", "backward", "optimizer"}
        assert [row.totals.sparse for row in meter.report().layers] == [steps] * 2
    assert not hooked(model)


def test_of_a_model_that_is_called_itself_only_it_is_watched_on():
    model = ssp.convert(by_hand.net(), 0.5)
    with quiet_meter(model) as meter:
        by_hand.train(model, 1)
        assert hooked(model) == {""}
        by_hand.train(model, 1, call=lambda x: model[1:](model[:1](x)))  # as nobody has before
        assert meter.network is None and "no call of the model" in meter.report().unknown


def test_steps_without_any_layer_that_runs_are_said():
    model = ssp.convert(by_hand.net(), 0.5).eval()
    with quiet_meter(model) as meter:
        with pytest.warns(UserWarning) as said:
            by_hand.train(model, 2)
        assert any("but none of its layers ran in training mode" in str(w.message) for w in said)
        assert "nothing was counted: no layer ran" in str(meter.report())
    with quiet_meter(model.train()) as meter, warnings.catch_warnings():
        warnings.simplefilter("error")
        by_hand.train(model, 3)
        assert meter.network.forward > 0


class Stops(nn.Module):
    """Is left by an exception, once."""

    def __init__(self, error):
        super().__init__()
        self.conv, self.head, self.error = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), error

    def forward(self, x):
        x = self.conv(x).mean((2, 3))
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return self.head(x)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_forward_that_is_interrupted_while_it_is_watched(error):
    """An interrupt calls no hook of a module: what it left is put right at the next call."""
    model, x = Stops(error()), image()
    with quiet_meter(ssp.convert(model, 0.5)) as meter:
        with pytest.raises(error):
            model(x)
        optimizer = optimizer_of(model)
        layers = meter.totals.forward_flops
        for _ in range(2):
            step(model, optimizer, x)
        assert torch._C._len_torch_dispatch_stack() == 0
        expected = by_hand.by_summary(model, x, [0.5, 0.5])
        assert counted(meter) == (expected[0] + layers, *expected[1:])


def test_the_mode_of_somebody_else_is_left_in_its_place():
    class Counts(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.convolutions = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.convolutions += func is torch.ops.aten.convolution.default
            return func(*args, **(kwargs or {}))

    model = ssp.convert(Mixed(), 0.5)
    expected = by_hand.by_summary(model, image(), [0.5, 0.5])
    with quiet_meter(model) as meter:
        step(model, optimizer_of(model), image())
        with Counts() as mode:  # what such inputs cost is known by now
            step(model, optimizer_of(model), image())
        assert mode.convolutions >= 3
        assert counted(meter) == expected


def test_a_model_that_is_partly_compiled_is_not_known_as_a_whole():
    model = ssp.convert(by_hand.net(), 0.5)
    model[6].compile(backend="eager")
    with quiet_meter(model) as meter:
        by_hand.train(model, 1)
        assert meter.network is None and meter.totals.backwards == 3
        assert "not known of the whole network: what torch.compile has" in str(meter.report())


def test_a_compiled_function_in_the_model_counts_and_is_compiled_all_the_same():
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.weight = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(8, 8))
            self.product = torch.compile(lambda x, w: x @ w, backend=backend)

        def forward(self, x):
            return self.product(self.conv(x).mean((2, 3)), self.weight)

    model, x = ssp.convert(Net(), 0.5), image()
    expected = by_hand.by_summary(model, x, [0.5] * 3)
    assert not made
    with quiet_meter(model) as meter:
        for _ in range(3):
            step(model, optimizer_of(model), x)
        assert counted(meter) == expected
    assert len(made) == 1
    torch.compiler.reset()


def test_outputs_in_an_object_of_the_models_own():
    class Output:
        def __init__(self, logits):
            self.logits = logits

    class Net(Trained):
        def forward(self, x):
            return Output(self.training_step(x))

    model, x = ssp.convert(Net(), 0.5), image()
    expected = by_hand.by_summary(model, x, [0.5])
    with quiet_meter(model) as meter:
        model(x)
        assert counted(meter)[1] == 0
        step(lambda x: model(x).logits, optimizer_of(model), x)
        assert counted(meter) == (2 * expected[0], *expected[1:])
