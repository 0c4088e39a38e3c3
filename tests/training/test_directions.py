"""Directions and the remainder in trainings: accumulation, checkpointing, AMP, frozen parts."""

import copy

import pytest
import torch
from patching.by_reference import TYPES, images, loss, make, passes, subspaces
from torch import nn
from torch.utils.checkpoint import checkpoint

import ssprop_patch as ssp

BOTH = {"selection": "principal", "remainder": "coarse"}


def converted(model=None, rate=0.7, **more):
    return ssp.convert(make() if model is None else model, rate, types=TYPES, **BOTH, **more)


def grads(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(found, expected, rtol=1e-9):
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=rtol, atol=1e-12, msg=name.__add__)


def covariances(model):
    return {
        f"{name}.{key}": basis.covariance.clone()
        for name, s in subspaces(model).items()
        for key, basis in s.bases.items()
    }


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert not [n for n, t in found.items() if not torch.equal(t, expected[n])]


# --- several backward passes, several calls in one --------------------------------------------


def test_accumulated_gradients_are_those_of_the_passes():
    model, other = converted(), converted()
    for seed in range(3):
        loss(model, images(seed)).backward()
    total = {}
    for seed in range(3):
        other.zero_grad()
        loss(other, images(seed)).backward()
        total = {n: g + total.get(n, 0) for n, g in grads(other).items()}
    assert_close(grads(model), total)
    assert all(s.passes == 3 for s in subspaces(model).values())


def conv(**more):
    torch.manual_seed(0)
    return ssp.convert(nn.Conv2d(3, 12, 3).double(), 0.75, selection="principal", **more)


def test_calls_in_one_pass_sum_their_covariances():
    layer = conv()
    layer.bias.requires_grad_(False)
    dys = {}
    for number in range(2):  # a pass of three calls, and another
        total = 0
        for seed in range(3):
            y = layer(images(seed))
            y.register_hook(lambda dy, at=(number, seed): dys.__setitem__(at, dy))
            total = total + y.pow(2).sum() * (1 + seed)
        total.backward()
    expected = None
    for number in range(2):
        s = sum(torch.einsum("nchw,ndhw->cd", dy, dy) for at, dy in dys.items() if at[0] == number)
        s = s / s.trace()
        expected = s if expected is None else 0.5 * expected + 0.5 * s
    basis = subspaces(layer)[""].bases["dy"]
    torch.testing.assert_close(basis.covariance[0], expected)
    assert subspaces(layer)[""].passes == 2


def test_a_layer_under_two_names_has_one_set_of_directions():
    torch.manual_seed(0)
    shared = nn.Conv2d(3, 3, 3, padding=1).double()
    model = ssp.convert(nn.Sequential(shared, nn.ReLU(), shared), 0.5, selection="principal")
    model(images()).pow(2).sum().backward()
    assert subspaces(model)["0"].passes == 1
    assert list(ssp.get_controller(model).state_dict()["layers"]) == ["0"]


# --- checkpointing ----------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_takes_the_same_directions(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return checkpoint(self.model, x, use_reentrant=reentrant)

    plain, model = make(), make()
    for net in (plain, model):
        net.norm = nn.GroupNorm(4, 16).double()  # the second forward leaves no trace
        converted(net)
    wrapped = Checkpointed(model)
    for seed in range(4):
        for net, run in ((plain, plain), (model, wrapped)):
            net.zero_grad()
            loss(run, images(seed).requires_grad_()).backward()
        assert_close(grads(model), grads(plain))
        assert_equal(covariances(model), covariances(plain))
    assert all(s.passes == 4 for s in subspaces(model).values())


# --- precision --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_directions_are_in_float32(dtype):
    model, exact = converted(make().float()), converted(make().float())
    for seed in range(4):
        model.zero_grad(), exact.zero_grad()
        with torch.autocast("cpu", dtype):
            value = loss(model, images(seed).float())
        value.backward()
        loss(exact, images(seed).float()).backward()
    for subspace in subspaces(model).values():
        for basis in subspace.bases.values():
            assert basis.covariance.dtype == basis.vectors.dtype == torch.float32
    for name, grad in grads(model).items():
        assert grad.dtype == torch.float32, name
        if name != "stem.bias":  # in front of a norm: zero
            other = exact.get_parameter(name).grad
            assert torch.cosine_similarity(grad.flatten(), other.flatten(), 0) > 0.95, name


def test_a_scaler_meets_what_is_not_finite_and_directions_do_not():
    model = converted()
    passes(model, 1)
    before = covariances(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    weights = {n: p.clone() for n, p in model.named_parameters()}
    optimizer.zero_grad()
    scaler.scale(loss(model, images(1)) * torch.inf).backward()
    assert not model.stem.weight.grad.isfinite().all()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert_equal({n: p for n, p in model.named_parameters()}, weights)
    assert_equal(covariances(model), before)
    for subspace in subspaces(model).values():
        assert all(basis.vectors.isfinite().all() for basis in subspace.bases.values())
    # The scale itself changes nothing: samples are divided by their traces.
    optimizer.zero_grad()
    twin = copy.deepcopy(model)
    scaler.scale(loss(model, images(2))).backward()
    loss(twin, images(2)).backward()
    for name, found in covariances(model).items():
        torch.testing.assert_close(found, covariances(twin)[name])


# --- frozen parts -----------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", ["weight", "input"])
@pytest.mark.parametrize("name", ["expand", "grouped", "up", "head"])
def test_frozen_weights_and_lower_stages(frozen, name):
    """What is left of the gradient is as it was; what needs none has none."""
    model, whole = converted(), converted()
    layer = model.get_submodule(name)
    if frozen == "weight":
        layer.weight.requires_grad_(False)
    else:
        for other in model.children():
            if other is layer:
                break
            other.requires_grad_(False)
    found, expected = passes(model, 1), passes(whole, 1)
    assert found.keys() < expected.keys()
    for key in found:
        torch.testing.assert_close(found[key], expected[key], msg=key.__add__)
    if name in ("expand", "head"):
        assert set(subspaces(model)[name].bases) == {{"weight": "dx", "input": "dw"}[frozen]}
    passes(model, 4)


def test_a_stage_that_is_thawed_later():
    model = converted()
    model.stem.requires_grad_(False), model.norm.requires_grad_(False)
    passes(model, 3)
    assert "dx" not in subspaces(model)["expand"].bases
    model.requires_grad_(True)
    found = passes(model, 2)
    assert found["stem.weight"].any()
    assert {"dx", "dw"} == set(subspaces(model)["expand"].bases)


def test_layers_in_eval_mode_are_dense():
    model = converted()
    model.stem.eval(), model.norm.eval()
    passes(model, 2)
    assert subspaces(model)["stem"].passes == 0 and subspaces(model)["expand"].passes == 2


# --- the rest ---------------------------------------------------------------------------------


def test_channels_last():
    plain, model = converted(), converted().to(memory_format=torch.channels_last)
    for seed in range(4):
        plain.zero_grad(), model.zero_grad()
        loss(plain, images(seed)).backward()
        loss(model, images(seed).contiguous(memory_format=torch.channels_last)).backward()
        assert_close(grads(model), grads(plain), 1e-7)


@pytest.mark.parametrize("rule", ["principal", "coarse", "both"])
def test_a_double_backward_differentiates_along_the_directions(rule):
    """As under the paper's choice, which differentiates through the kept channels."""
    torch.manual_seed(0)
    how = {"principal": {"selection": "principal"}, "coarse": {"remainder": "coarse"}, "both": BOTH}
    layer = ssp.convert(nn.Conv2d(2, 8, 3).double(), 0.5, **how[rule])
    x = torch.randn(1, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    layer(x).pow(2).sum().backward()

    def backward(dy, w, x):
        """The gradients that the layer computes, of the directions that it has."""
        if layer._ssprop_policy.rule.subspace is not None:
            layer._ssprop_policy.rule.subspace.passes = 3  # the next one refreshes nothing
        y = torch.func.functional_call(layer, {"weight": w}, (x,))
        return torch.autograd.grad(y, (x, w), dy, create_graph=True)

    leaves = [torch.randn(1, 8, 4, 4).double(), layer.weight.detach().clone(), x.detach()]
    assert torch.autograd.gradcheck(backward, [t.requires_grad_() for t in leaves])


def test_two_models_with_one_controller():
    controller = ssp.SparsityController(0.7)
    first, second = (
        ssp.convert(make(), types=TYPES, controller=controller, **BOTH) for _ in range(2)
    )
    alone = converted()
    passes(first, 2)
    assert_equal(passes(second, 4), passes(alone, 4))
    assert all(s.passes == 2 for s in subspaces(first).values())
    with ssp.dense(first):
        passes(second, 1)
    assert all(s.passes == 4 for s in subspaces(second).values())
