"""Hooks on gradients have the effect that they have in torch, whatever is formed when.

A network whose hooks change the gradients of one tensor, against the oracle with the same hooks.
"""

import copy

import numpy as np
import oracle
import pytest
import torch
from torch import nn

import ssprop_patch as ssp
from ssprop_patch.ops import native

RATE = 0.6
ORDER = {"l1": 1, "l2": 2}
SMALL, LARGE = (3, 7), (4, 96)  # of the latter gradients are lazy with the thresholds as they are

needs_compiler = pytest.mark.skipif(native.build.find_compiler() is None, reason="no C compiler")


class Net(nn.Module):
    """A residual block with a convolution in its shortcut, between two convolutions.

    Each of its tensors is given to ``hooked`` under its name.
    """

    NAMES = ("x", "y0", "z0", "r0", "y1", "z1", "r1", "y2", "z2", "y3", "z3", "sum", "r2", "out")

    def __init__(self, inplace=False, shortcut_first=False):
        super().__init__()
        self.conv = nn.ModuleList(
            [nn.Conv2d(3, 8, 1), *(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))]
        )
        self.norm = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))
        self.last, self.relu = nn.Conv2d(8, 5, 1), nn.ReLU(inplace)
        self.shortcut_first = shortcut_first
        for norm in self.norm:
            nn.init.uniform_(norm.weight, -2, 2)
            nn.init.normal_(norm.bias)
        self.double()
        self.hooked = lambda name, t: t

    def block(self, i, x):
        y = self.hooked(f"y{i}", self.conv[i](x))
        return self.hooked(f"z{i}", self.norm[i](y))

    def forward(self, x):
        x = self.hooked("x", x * 1)
        x = self.hooked("r0", self.relu(self.block(0, x)))
        if self.shortcut_first:
            shortcut = self.block(3, x)
        z = self.block(2, self.hooked("r1", self.relu(self.block(1, x))))
        if not self.shortcut_first:
            shortcut = self.block(3, x)
        r = self.hooked("r2", self.relu(self.hooked("sum", z + shortcut)))
        return self.hooked("out", self.last(r))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def inputs(size):
    n, side = size
    generator = torch.Generator().manual_seed(2)
    return torch.randn(n, 3, side, side, dtype=torch.double, generator=generator)


def weigh(out):
    return torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)


def train(model, x, hook_name, hook):
    seen = []

    def hooked(name, t):
        if name == hook_name:
            t.register_hook(lambda grad: hook(grad, seen))
        return t

    model.hooked = hooked
    x = x.clone().requires_grad_()
    out = model(x)
    (out * weigh(out)).sum().backward()
    model.hooked = lambda name, t: t
    return [x.grad, *(p.grad for p in model.parameters())], seen


def assert_same(got, expected):
    largest = max(b.abs().max().item() for b in expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * largest)


def compare(model, size, selection, hook_name, hook):
    dense, x = copy.deepcopy(model), inputs(size)
    with oracle.network(dense, RATE, order=ORDER[selection]) as record:
        expected, expected_seen = train(dense, x, hook_name, hook)
    assert record.dropped and record.gap > 1e-9
    ssp.convert(model, RATE, selection=selection)
    got, seen = train(model, x, hook_name, hook)
    assert_same(got, expected)
    assert seen or not expected_seen
    for a, b in zip(seen, expected_seen, strict=True):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-9, atol=1e-9)


def pattern(grad):
    """Factors that change which channels are the largest."""
    return torch.linspace(3, 0.1, grad.shape[1], dtype=grad.dtype).view(-1, 1, 1)


def returns_another(grad, seen):
    return grad * pattern(grad)


def changes_it(grad, seen):
    grad.mul_(pattern(grad))


def changes_its_data(grad, seen):
    grad.data.mul_(pattern(grad))


def changes_a_part(grad, seen):
    grad[:, 2:5] *= pattern(grad)[2:5]
    grad[0].neg_()


def keeps_it(grad, seen):
    seen.append(grad)


def reads_its_memory(grad, seen):
    seen += [grad.tolist(), grad.numpy().copy(), np.from_dlpack(grad).copy(), copy.deepcopy(grad)]
    assert grad.data_ptr() and grad.untyped_storage().nbytes() >= grad.numel() * 8


HOOKS = (
    returns_another,
    changes_it,
    changes_its_data,
    changes_a_part,
    keeps_it,
    reads_its_memory,
)
over_hooks = pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.__name__)
over_tensors = pytest.mark.parametrize("name", Net.NAMES)
over_selections = pytest.mark.parametrize("selection", ["l1", "l2"])


@needs_compiler
@over_selections
@over_tensors
@over_hooks
def test_of_each_tensor(however_small, selection, name, hook):
    compare(Net(), SMALL, selection, name, hook)


@over_tensors
@pytest.mark.parametrize("hook", [returns_another, changes_it])
def test_without_c(however_small, monkeypatch, name, hook):
    monkeypatch.setattr(native.tensors, "library", lambda *args: None)
    compare(Net(), SMALL, "l2", name, hook)


@needs_compiler
@over_selections
@pytest.mark.parametrize("name", ["y1", "z1", "r1", "z2", "sum"])
@pytest.mark.parametrize("hook", [returns_another, changes_it])
def test_of_large_tensors(selection, name, hook):
    compare(Net(), LARGE, selection, name, hook)


@needs_compiler
@pytest.mark.parametrize("name", ["z2", "y3", "z3", "sum"])
@pytest.mark.parametrize("hook", [returns_another, changes_it])
def test_of_branches_that_are_given_the_same_tensor(however_small, name, hook):
    # An addition passes the same gradient to both sides: what one changes in place the other sees
    # where it runs later, and only there.
    compare(Net(shortcut_first=True), SMALL, "l1", name, hook)


@needs_compiler
@over_selections
@pytest.mark.parametrize("name", ["y1", "r1", "z2", "sum"])
@pytest.mark.parametrize("hook", [returns_another, changes_it])
def test_with_inplace_activations(however_small, selection, name, hook):
    compare(Net(inplace=True), SMALL, selection, name, hook)


# --- other ways to see a gradient ---------------------------------------------------------------


def both(run, selection="l1"):
    """What ``run`` returns of a converted network and of the oracle."""
    model, dense = Net(), Net()
    dense.load_state_dict(model.state_dict())
    with oracle.network(dense, RATE, order=ORDER[selection]):
        expected = run(dense)
    return run(ssp.convert(model, RATE, selection=selection)), expected


def tensors_of(model, names):
    found = {}

    def hooked(name, t):
        if name in names:
            found[name] = t
        return t

    model.hooked = hooked
    out = model(inputs(SMALL))
    return (out * weigh(out)).sum(), [found[name] for name in names]


@needs_compiler
@over_selections
@pytest.mark.parametrize("names", [["y1"], ["z1"], ["y1", "z1"], ["y2", "z2", "r1", "y0"]], ids=str)
def test_gradients_that_are_asked_for_are_ordinary_tensors(however_small, selection, names):
    def run(model):
        loss, wanted = tensors_of(model, names)
        return torch.autograd.grad(loss, wanted)

    got, expected = both(run, selection)
    assert all(type(grad) is torch.Tensor for grad in got)
    assert_same(got, expected)


@needs_compiler
@pytest.mark.parametrize("names", [["y1", "z1"], ["z3", "z2", "y2"]], ids=str)
def test_retained_gradients_are_ordinary_tensors(however_small, names):
    def run(model):
        loss, wanted = tensors_of(model, names)
        for t in wanted:
            t.retain_grad()
        loss.backward()
        return [t.grad for t in wanted] + [p.grad for p in model.parameters()]

    got, expected = both(run)
    assert all(type(grad) is torch.Tensor for grad in got)
    assert_same(got, expected)


@needs_compiler
def test_hooks_of_nodes_and_of_several_tensors(however_small):
    def run(model):
        seen = []
        loss, tensors = tensors_of(model, ["y1", "z1", "r1"])
        tensors[0].grad_fn.register_prehook(lambda grads: (grads[0] * pattern(grads[0]),))
        tensors[1].grad_fn.register_hook(lambda gi, go: seen.extend([gi[0] + 0, go[0] + 0]))
        torch.autograd.graph.register_multi_grad_hook(
            tensors, lambda grads: seen.extend(g.clone() for g in grads)
        )
        loss.backward()
        return seen + [p.grad for p in model.parameters()]

    assert_same(*both(run))


@needs_compiler
def test_a_gradient_that_can_no_longer_be_formed_says_so(however_small):
    kept = []
    model = ssp.convert(Net(), RATE)
    loss, (z, r) = tensors_of(model, ["z1", "r1"])
    r.register_hook(lambda grad: kept.append(grad))
    z.register_hook(lambda grad: kept.append(grad))
    loss.backward()
    kept[0].zero_()
    with pytest.raises(RuntimeError, match=r"changed in place.*grad\.clone"):
        kept[1] + 0
