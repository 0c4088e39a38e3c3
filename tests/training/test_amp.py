"""Mixed precision: autocast to bfloat16 and float16, with and without a GradScaler."""

import math
from dataclasses import dataclass

import oracle
import pytest
import torch
from torch import nn

import ssprop_patch as ssp

from .by_hand import batch, compare, loss_of, net, sgd

HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
NETS = ["test_resnet", "test_efficientnet", "test_convnext", "test_nfnet", "test_byobnet"]


def single(name):
    return lambda: net(name, torch.float32)


# --- two steps, bit for bit -------------------------------------------------------------------


@HALVES
@pytest.mark.parametrize("name", NETS)
def test_autocast_trains_as_it_would_on_a_masked_gradient_bit_for_bit(name, half):
    def train(model):
        optimizer = sgd(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=half == torch.float16)
        for i in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=half):
                loss = loss_of(model, i, dtype=torch.float32)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            yield loss.detach(), [p.grad for p in model.parameters()]

    compare(single(name), train, exact=True)


@HALVES
def test_a_backward_inside_of_autocast(half):
    """Not advised by torch, but often met."""

    def train(model):
        optimizer = sgd(model)
        for i in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=half):
                loss = loss_of(model, i, dtype=torch.float32)
                loss.backward()
                optimizer.step()
            yield loss.detach()

    compare(single("test_resnet"), train, exact=True)


def test_a_backward_inside_of_autocast_of_a_forward_outside_stays_in_float32():
    """torch's own backward of a convolution takes no notice of autocast either."""
    model = ssp.convert(net("test_byobnet", torch.float32), 0.5)
    images, grads = batch(0, size=64, dtype=torch.float32)[0], []
    for inside in (False, True):
        model.zero_grad()
        loss = model.forward_features(images).square().mean()  # no Linear: that one does
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert len(grads[0]) > 40
    torch.testing.assert_close(*grads, rtol=0, atol=0)


@HALVES
def test_a_network_that_is_half_itself(half):
    def train(model):
        optimizer = sgd(model, 0.01)
        for i in range(2):
            optimizer.zero_grad()
            loss_of(model, i, dtype=half).backward()
            optimizer.step()
            yield [p.grad for p in model.parameters()]

    compare(lambda: net("test_resnet", half), train, exact=True)


def test_a_part_without_autocast():
    """A head kept in float32, as losses and heads that overflow are."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x):
            x = self.body(x).relu()
            with torch.autocast("cpu", enabled=False):
                y = self.head(x.float())
            assert (x.dtype, y.dtype) == (torch.bfloat16, torch.float32)
            return y.mean((2, 3))

    def train(model):
        optimizer = sgd(model)
        for i in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, i, dtype=torch.float32)
            loss.backward()
            optimizer.step()
            yield loss.detach()

    compare(Net, train, exact=True)


# --- the package's own kernels: one rounding ----------------------------------------------------


@dataclass
class Seen:
    """What went through one convolution, in the dtypes of the network."""

    x: torch.Tensor
    dy: torch.Tensor | None = None
    dx: torch.Tensor | None = None


def watch(model):
    """Record input, output gradient and input gradient of each convolution."""
    seen = {}

    def before(module, args):
        x = args[0].clone()  # its gradient comes from this layer alone
        seen[module] = Seen(x.detach())
        if x.requires_grad:
            x.register_hook(lambda grad: setattr(seen[module], "dx", grad))
        return (x,)

    def after(module, args, output):
        output.register_hook(lambda grad: setattr(seen[module], "dy", grad))

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after)
    return seen


def errors(grads, conv, seen, half, keep):
    """How far dX and dW are off, in units of what one rounding to ``half`` explains."""
    geometry = {n: getattr(conv, n) for n in ("stride", "padding", "dilation", "groups")}
    terms = [
        None if t is None else t.detach().to(half).double()
        for t in (seen.x, conv.weight, conv.bias, seen.dy)
    ]
    exact, size = (
        oracle.gradients(*(None if t is None else change(t) for t in terms), keep, **geometry)
        for change in (torch.clone, torch.abs)
    )
    eps = torch.finfo(half).eps / 2
    for grad, true, bound in zip(grads, exact, size, strict=False):
        if grad is not None:
            allowed = eps * true.abs() + 2.0**-22 * bound + torch.finfo(half).smallest_normal * eps
            yield ((grad.double() - true).abs() / allowed).max().item()


@HALVES
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet"])
def test_in_each_layer_the_gradient_is_right_but_for_one_rounding(name, layout, half):
    model = ssp.convert(net(name, torch.float32), 0.5).to(memory_format=layout)
    seen = watch(model)
    with torch.autocast("cpu", dtype=half):
        loss = loss_of(model, 0, dtype=torch.float32, n=8) * 2.0**8
    loss.backward()
    layers = 0
    for conv, s in seen.items():
        choice = oracle.choose(s.dy, conv.groups, 0.5)
        assert s.dy.dtype == half
        if choice.gap < 1e-5:  # a tie: either channel is right
            continue
        layers += 1
        # What autocast itself would give on the masked gradient.
        leaves = [
            None if t is None else t.detach().requires_grad_()
            for t in (s.x, conv.weight, conv.bias)
        ]
        with torch.autocast("cpu", dtype=half):
            y = nn.functional.conv2d(*leaves, conv.stride, conv.padding, conv.dilation, conv.groups)
        y.backward(oracle.mask(s.dy, choice.keep))
        x, w, b = leaves
        assert not conv.weight.grad[~choice.keep].any()
        assert conv.weight.grad[choice.keep].any(dim=(1, 2, 3)).all()
        assert conv.weight.grad.dtype == torch.float32
        if b is not None:
            assert torch.equal(conv.bias.grad, b.grad)  # it is summed as torch sums it
        usual = errors((x.grad, w.grad), conv, s, half, choice.keep)
        found = errors((s.dx, conv.weight.grad), conv, s, half, choice.keep)
        assert (s.dx is None) == (s.x.shape[1] == 3)  # the stem alone needs none
        if s.dx is None:
            next(usual)
        for error, torchs in zip(found, usual, strict=True):
            # Processors without the dtype, and float16 in general, round more often in torch too.
            assert error <= max(1.001, 2 * torchs)
    assert layers >= len(seen) - 2


# --- GradScaler ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_that_the_gradient_scaler_skips_changes_nothing(cls):
    """Parameters, optimizer and rate wait for the next step that counts."""
    bad = {1, 2, 4}

    def train(model):
        optimizer = cls(model.parameters(), 0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for i in range(6):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = loss_of(model, i, dtype=torch.float32)
            if i in bad:
                loss = loss * math.inf
            before = [p.detach().clone() for p in model.parameters()]
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            same = all(map(torch.equal, before, model.parameters()))
            assert same == (i in bad)
            if i not in bad:
                yield loss.detach(), scaler.get_scale()

    compare(single("test_resnet"), train, steps=3, exact=True)


@pytest.mark.parametrize("hidden", [math.inf, math.nan], ids=str)
def test_an_overflow_in_one_pixel_of_one_layer_reaches_the_scaler(hidden):
    """Wherever it is: the sparse backward does not drop it, so that the step is skipped."""
    for target in ("conv1", "conv2", "conv3"):
        model = nn.Sequential()
        for name, groups in (("conv1", 1), ("conv2", 8), ("conv3", 2)):
            model.add_module(name, nn.Conv2d(3 if name == "conv1" else 8, 8, 3, groups=groups))
        ssp.convert(model, ssp.LambdaSchedule(lambda t: 0.75, interval="step"))

        def spoil(module, args, output):
            def put(grad):
                grad = grad.clone()
                grad[1, 5, 2, 2] = hidden
                return grad

            output.register_hook(put)

        model.get_submodule(target).register_forward_hook(spoil)
        optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=4.0)
        before = [p.detach().clone() for p in model.parameters()]
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(torch.randn(2, 3, 12, 12)).float().sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0
        assert all(map(torch.equal, before, model.parameters()))
        assert ssp.get_controller(model).t == 0


def test_gradients_unscaled_and_clipped():
    def train(model):
        optimizer = sgd(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        for i in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = loss_of(model, i, dtype=torch.float32)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            assert norm > 0.1
            scaler.step(optimizer)
            scaler.update()
            yield norm

    compare(single("test_efficientnet"), train, steps=3, exact=True)
