"""torch.compile with directions and the remainder: the gradients of eager mode, step by step."""

import copy

import pytest
import torch
from patching.by_reference import TYPES, Net, images, loss, subspaces

import ssprop_patch as ssp

RULES = {
    "coarse": {"remainder": "coarse"},
    "principal": {"selection": "principal"},
    "both": {"selection": "principal", "remainder": "coarse"},
}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("rule", RULES)
def test_compiled_steps_are_the_eager_ones(rule):
    torch.manual_seed(0)
    eager = ssp.convert(Net().double(), 0.7, types=TYPES, **RULES[rule])
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for seed in range(4):
        for net, call in ((eager, eager), (model, compiled)):
            net.zero_grad()
            loss(call, images(seed)).backward()
        for name, p in model.named_parameters():
            expected = eager.get_parameter(name).grad
            torch.testing.assert_close(p.grad, expected, rtol=1e-9, atol=1e-12, msg=name.__add__)
        for name, subspace in subspaces(eager).items():
            assert subspaces(model)[name].passes == subspace.passes == seed + 1
            for key, basis in subspace.bases.items():
                found = subspaces(model)[name].bases[key]
                torch.testing.assert_close(found.covariance, basis.covariance)


def test_a_part_of_the_weight_keeps_channels_in_compiled_code_too():
    class Slim(torch.nn.Conv2d):
        def forward(self, x):
            return torch.nn.functional.conv2d(x, self.weight[:8], self.bias[:8])

    torch.manual_seed(0)
    layer = ssp.convert(Slim(3, 16, 3), 0.75, selection="principal")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(torch.randn(2, 3, 8, 8)).square().mean().backward()
    assert int(layer.weight.grad.flatten(1).any(1).sum()) == 2
    assert subspaces(layer)[""].passes == 0


def test_functional_remainder():
    x, w = torch.randn(2, 3, 9, 9).double(), torch.randn(10, 3, 3, 3).double().requires_grad_()

    def call(x, w):
        return ssp.functional.conv2d(x, w, drop_rate=0.7, remainder="coarse")

    grads = []
    for run in (call, torch.compile(call, backend="aot_eager")):
        grads += torch.autograd.grad(run(x, w).pow(2).sum(), w)
    torch.testing.assert_close(*grads)
