"""Tools that replace the functions of torch.nn.functional see a converted layer's calls."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ssprop_patch as ssp
from ssprop_patch import functional

from .networks import WSConv2d, assert_equal, assert_same, gradients

NAMES = (
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "linear",
)
TYPES = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)


class Net(nn.Module):
    """A layer of each kind, two with padding of their own, one with a forward of its own."""

    def __init__(self):
        super().__init__()
        self.plane = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
            nn.Conv2d(8, 8, 2, padding="same"),
            nn.Tanh(),
            WSConv2d(8, 8, 3, padding=1),
            nn.ConvTranspose2d(8, 8, 3, padding=1),
            nn.Tanh(),
            nn.Linear(6, 6),
        )
        self.line = nn.Sequential(nn.Conv1d(8, 8, 3), nn.ConvTranspose1d(8, 8, 1))
        self.room = nn.Sequential(nn.Conv3d(8, 8, 1), nn.ConvTranspose3d(8, 8, 1))

    def forward(self, x):
        x = self.plane(x)
        return self.line(x.flatten(2)).mean(-1) + self.room(x[:, :, None]).mean((2, 3, 4))


def net():
    torch.manual_seed(0)
    return Net().double()


def batch():
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1)).double()


CALLS = sorted((*NAMES, *["conv2d"] * 3))


def replace(monkeypatch, change=lambda y: y):
    """Put another function in the place of each; return the list of calls."""
    calls = []

    def replacement(name, original):
        def function(input, weight, *args, **kwargs):
            assert type(input) is torch.Tensor and isinstance(weight, torch.Tensor)
            calls.append(name)
            return change(original(input, weight, *args, **kwargs))

        return function

    for name in NAMES:
        monkeypatch.setattr(F, name, replacement(name, getattr(F, name)))
    return calls


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("rate", [None, 0.0, 0.5])
def test_each_call_of_a_layer_is_seen_once_and_changes_nothing(monkeypatch, rate):
    model = net()
    if rate is not None:
        ssp.convert(model, ssp.ConstantSchedule(rate), types=TYPES)
    expected = gradients(model, batch())
    calls = replace(monkeypatch)
    assert_equal(gradients(model, batch()), expected)
    assert sorted(calls) == CALLS
    if rate:
        rows = [m.weight.grad.flatten(1).any(1).sum() for m in model.plane[:3]]
        assert rows == [4, 4, 4]
    monkeypatch.undo()
    assert_equal(gradients(model, batch()), expected)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("compiled", [False, True])
def test_what_a_replacement_does_is_differentiated(monkeypatch, compiled):
    """An emulator: here all outputs are doubled, as hooks do for comparison."""
    model = ssp.convert(net(), 0.5, types=TYPES)
    hooks = [
        m.register_forward_hook(lambda m, args, y: 2 * y)
        for m in model.modules()
        if isinstance(m, TYPES)
    ]
    expected = gradients(model, batch())
    for hook in hooks:
        hook.remove()
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    gradients(model, batch(), call)
    calls = replace(monkeypatch, lambda y: 2 * y)
    assert_same(gradients(model, batch(), call), expected)
    assert sorted(calls) == CALLS


def test_a_replacement_without_torchs_function_is_dense_and_says_so(monkeypatch):
    def by_unfolding(x, w, b, stride, padding, dilation, groups):
        columns = F.unfold(x, w.shape[2:], dilation, padding, stride)
        return (w.flatten(1) @ columns).view(len(x), len(w), *x.shape[2:]) + b[:, None, None]

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)).double()
    model = ssp.convert(copy.deepcopy(plain), 0.5)
    expected = gradients(plain, batch())
    monkeypatch.setattr(F, "conv2d", by_unfolding)
    with pytest.warns(UserWarning, match="conv2d.*stays dense"):
        found = gradients(model, batch())
    assert_same(found, expected)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_the_functional_form(monkeypatch, rate):
    x, w = batch(), torch.randn(8, 3, 3, 3).double().requires_grad_()

    def gradient():
        y = functional.conv2d(x, w, padding=1, drop_rate=rate)
        return torch.autograd.grad(y.square().sum(), w)[0]

    expected = gradient()
    calls = replace(monkeypatch)
    assert torch.equal(gradient(), expected)
    assert calls == ["conv2d"]
    assert expected.flatten(1).any(1).sum() == (4 if rate else 8)
