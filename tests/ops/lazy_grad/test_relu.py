"""ReLU after a batch norm whose gradient is lazy: the same gradient, in that norm's passes."""

import copy
import math

import oracle
import pytest
import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import ssprop_patch as ssp
from ssprop_patch.ops import channel_ops, native
from ssprop_patch.ops.lazy_grad import graph as lazy_grad

pytestmark = [
    pytest.mark.skipif(native.build.find_compiler() is None, reason="no C compiler"),
    pytest.mark.usefixtures("however_small"),
]

RATE = 0.6
ORDER = {"l1": 1, "l2": 2}


@pytest.fixture
def passed(monkeypatch):
    """For each backward of a deferring norm, whether it did that of a ReLU on the way."""
    seen, original = [], channel_ops.norm_sums

    def norm_sums(*args):
        seen.append(args[6] is not None)
        return original(*args)

    monkeypatch.setattr(channel_ops, "norm_sums", norm_sums)
    return seen


class Net(nn.Module):
    """Two convolutions, norms and ReLUs; the second ReLU is behind an addition."""

    def __init__(self, inplace=True, residual=False):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 5, 1)
        self.relu = nn.ReLU(inplace)  # one module, as in torchvision's blocks
        self.residual = residual
        for bn in (self.bn1, self.bn2):
            nn.init.uniform_(bn.weight, -2, 2)
            nn.init.normal_(bn.bias)
        self.double()

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.last(self.relu(y + x if self.residual else y)).square()


def inputs():
    return torch.randn(4, 8, 7, 7, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def grads_of(model, x, run=None):
    x = x.clone().requires_grad_()
    out = (run or model)(x)
    weigh = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
    (out * weigh).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters())]


def assert_same(got, expected, tolerance=1e-10):
    largest = max(b.abs().max().item() for b in expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * largest)


def compare_with_oracle(model, selection="l1", x=None, run=None):
    x = inputs() if x is None else x
    dense = copy.deepcopy(model)
    with oracle.network(dense, RATE, order=ORDER[selection]) as record:
        expected = grads_of(dense, x)
    assert record.dropped and record.gap > 1e-9
    ssp.convert(model, RATE, selection=selection)
    got = grads_of(model, x, run and (lambda x: run(model, x)))
    assert torch.equal(got[0], expected[0])  # the forward, to the bit
    assert_same(got, expected)


@pytest.mark.parametrize("selection", ["l1", "l2"])
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_is_that_of_the_masked_dense_network(selection, inplace, layout, passed):
    model = Net(inplace).to(memory_format=layout)
    compare_with_oracle(model, selection, inputs().contiguous(memory_format=layout))
    assert passed == [True, True]


@pytest.mark.parametrize("inplace", [True, False])
def test_behind_an_addition_it_is_torchs_own(inplace, passed):
    compare_with_oracle(Net(inplace, residual=True))
    assert passed == [False, True]  # backwards: of the addition, of the first norm


@pytest.mark.parametrize("name", ["resnet18", "regnety_002", "densenet121"])
def test_in_networks(name, passed):
    model = timm.create_model(name, num_classes=5).double().train()
    x = torch.randn(3, 3, 48, 48, dtype=torch.double)
    other = copy.deepcopy(model)
    ssp.convert(model, RATE)
    ssp.convert(other, RATE, selection=lambda dy: dy.abs().sum((0, 2, 3)))
    got = grads_of(model, x)
    assert sum(passed) >= 7
    assert_same(got, grads_of(other, x), 1e-7)


def test_without_kernels_for_it_it_is_torchs_own(monkeypatch, passed):
    monkeypatch.setattr(native.tensors, "library", lambda *args: None)
    compare_with_oracle(Net(), "l2")  # the norms still defer
    assert passed == [False, False]


def test_for_few_elements_it_is_torchs_own(monkeypatch, passed):
    monkeypatch.setattr(lazy_grad, "_MIN_RELU_ELEMENTS", math.inf)
    compare_with_oracle(Net())
    assert passed == [False, False]


# --- who else reads the gradient ----------------------------------------------------------------


class Branching(Net):
    """Uses what the norm returns beside the ReLU, too."""

    def forward(self, x):
        y = self.bn1(self.conv1(x))
        return self.last(self.relu(y).square() + y)


def test_where_the_norms_output_is_used_twice_the_gradients_add_up(passed):
    model = Branching(inplace=False)
    del model.conv2, model.bn2
    compare_with_oracle(model)
    assert passed == [False]


@pytest.mark.parametrize("which", ["bn1", "relu"])
def test_with_full_backward_hooks(which, passed):
    model, seen = Net(inplace=False), []
    getattr(model, which).register_full_backward_hook(lambda m, gi, go: seen.append(gi[0] + 0))
    compare_with_oracle(model)
    assert seen and all(type(grad) is torch.Tensor for grad in seen)


def test_a_hook_of_the_norms_output_sees_and_changes_the_gradient(passed):
    model, seen = Net(inplace=False), {}
    other = copy.deepcopy(model)
    for side, m in (("deferred", model), ("ordinary", other)):

        def hook(grad, side=side):
            seen[side] = grad.clone()
            return grad * 2

        m.bn1.register_forward_hook(lambda _, args, y, hook=hook: y.register_hook(hook) and None)
    ssp.convert(model, RATE)
    ssp.convert(other, RATE, selection=lambda dy: dy.abs().sum((0, 2, 3)))
    assert_same(grads_of(model, inputs()), grads_of(other, inputs()))
    torch.testing.assert_close(seen["deferred"], seen["ordinary"], rtol=1e-10, atol=1e-12)
    assert passed == [True, False]


def test_a_gradient_changed_in_place_by_a_hook_stays_changed():
    model = Net(inplace=False)
    other = copy.deepcopy(model)

    def triple(grad):
        grad.mul_(3)

    def forward_hook(module, args, y):
        y.register_hook(triple)

    for m in (model, other):
        m.bn1.register_forward_hook(forward_hook)
    ssp.convert(model, RATE)
    ssp.convert(other, RATE, selection=lambda dy: dy.abs().sum((0, 2, 3)))
    got, expected = grads_of(model, inputs()), grads_of(other, inputs())
    assert_same(got, expected)


# --- ways of training ---------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(reentrant, passed):
    compare_with_oracle(Net(), run=lambda model, x: checkpoint(model, x, use_reentrant=reentrant))
    assert passed == [True, True]


def test_double_backward():
    model = Net()
    other = copy.deepcopy(model)
    ssp.convert(model, RATE)
    ssp.convert(other, RATE, selection=lambda dy: dy.abs().sum((0, 2, 3)))
    grads = []
    for m in (model, other):
        x = inputs().requires_grad_()
        (dx,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
        dx.square().sum().backward()
        grads.append([x.grad, *(p.grad for p in m.parameters())])
    assert_same(*grads)


def test_batched_gradients_are_a_clear_error():
    model, x = ssp.convert(Net(), RATE), inputs().requires_grad_()
    y = model(x)
    with pytest.raises(RuntimeError, match=r"does not work inside torch\.func.*is_grads_batched"):
        torch.autograd.grad(y, x, torch.ones(2, *y.shape).double(), is_grads_batched=True)


def test_a_change_in_place_of_its_output_is_an_error_as_ever():
    model = ssp.convert(Net(), RATE)
    y = model.relu(model.bn1(model.conv1(inputs())))
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("selection", ["l1", "l2"])
def test_in_eval_mode_all_is_dense(selection, passed):
    model = Net()
    expected = grads_of(copy.deepcopy(model).eval(), inputs())
    got = grads_of(ssp.convert(model, RATE, selection=selection).eval(), inputs())
    assert all(map(torch.equal, got, expected)) and not passed


def test_without_gradients_nothing_is_kept():
    model = ssp.convert(Net(), RATE)
    with torch.no_grad():
        assert torch.equal(model(inputs()), copy.deepcopy(ssp.revert(model))(inputs()))
