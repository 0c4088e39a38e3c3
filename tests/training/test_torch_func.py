"""functional_call; and what the sparse backward cannot be part of, which must say so."""

import copy
import functools

import oracle
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call

import ssprop_patch as ssp

from .by_hand import assert_same, batch, by_step, falling, net, run, run_by_hand, tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # by torch.func itself
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # on the way to the error
]

# --- functional_call ----------------------------------------------------------------------------


def loss_of(model, parameters, i):
    images, labels = batch(i)
    return nn.functional.cross_entropy(functional_call(model, parameters, (images,)), labels)


def other_parameters(model):
    with torch.no_grad():
        return {name: (1.1 * p).requires_grad_() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["test_resnet", "test_nfnet"])
def test_training_of_parameters_that_are_not_the_models_own(name):
    """The gradients go to those; the steps, which no optimizer takes, are told by hand."""

    def train(model):
        parameters = other_parameters(model)
        own = copy.deepcopy(list(model.parameters()))
        for i in range(2):
            grads = torch.autograd.grad(loss_of(model, parameters, i), list(parameters.values()))
            with torch.no_grad():
                for p, grad in zip(parameters.values(), grads, strict=True):
                    p.sub_(grad, alpha=0.1)
            if ssp.is_converted(model):
                assert ssp.get_controller(model).t == i
                ssp.get_controller(model).step()
            yield [p.detach().clone() for p in parameters.values()]
        assert all(map(torch.equal, own, model.parameters()))
        assert all(p.grad is None for p in model.parameters())

    plain = net(name)
    model = ssp.convert(copy.deepcopy(plain), by_step())
    expected = run_by_hand(plain, train)
    assert_same(run(model, train), expected)


def test_an_optimizer_over_other_parameters_is_not_the_models_own():
    """Its steps do not advance the rate."""
    model = ssp.convert(net(), by_step())
    parameters = other_parameters(model)
    optimizer = torch.optim.SGD(parameters.values(), 0.1)
    loss_of(model, parameters, 0).backward()
    optimizer.step()
    assert ssp.get_controller(model).t == 0


def test_a_fast_weight_step_and_the_gradient_through_it():
    """MAML: the outer gradient runs through the sparse backward of the inner one."""

    def outer_gradient(model):
        parameters = dict(model.named_parameters())
        grads = torch.autograd.grad(
            loss_of(model, parameters, 0), list(parameters.values()), create_graph=True
        )
        fast = {n: p - 0.5 * g for (n, p), g in zip(parameters.items(), grads, strict=True)}
        return torch.autograd.grad(loss_of(model, fast, 1), list(parameters.values()))

    plain = tiny()
    model = ssp.convert(copy.deepcopy(plain), 0.5)
    with oracle.network(plain, 0.5) as record:
        expected = outer_gradient(plain)
    # Each of the four layers: in the inner backward, the outer one, and that of the inner.
    assert record.gap > 1e-9 and record.dropped == 12
    torch.testing.assert_close(outer_gradient(model), expected, rtol=1e-9, atol=1e-11)


# --- what is refused ----------------------------------------------------------------------------


def logits(model, images):
    return model(images).sum(0)


def tangent(model, images):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(images, torch.ones_like(images))
        return forward_ad.unpack_dual(logits(model, dual)).tangent


def tangent_of_parameters(model, images):
    with forward_ad.dual_level():
        duals = {n: forward_ad.make_dual(p, p.detach()) for n, p in model.named_parameters()}
        out = functional_call(model, duals, (images,))
        return forward_ad.unpack_dual(out).tangent


def per_sample(model, images):
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(parameters, image):
        return functional_call(model, parameters, (image[None],)).square().sum()

    return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, images)


def batched_gradients(model, images):
    y = logits(model, images.requires_grad_())
    return torch.autograd.grad(y, images, torch.eye(5).double(), is_grads_batched=True)[0]


def vmapped_gradients(model, images):
    y = logits(model, images.requires_grad_())

    def row(v):
        return torch.autograd.grad(y, images, v, retain_graph=True)[0]

    return torch.func.vmap(row)(torch.eye(5).double())


TINT = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64).view(3, 1, 1)


def of_tint(transform):
    """Of a function of three numbers, as jacobians of images would be large."""

    def call(model, images):
        return transform(lambda tint: logits(model, images + tint))(TINT.clone())

    return call


TRANSFORMS = {
    "grad": of_tint(lambda f: torch.func.grad(lambda x: f(x).sum())),
    "jacrev": of_tint(torch.func.jacrev),
    "jacfwd": of_tint(torch.func.jacfwd),
    "hessian": of_tint(lambda f: torch.func.hessian(lambda x: f(x).square().sum())),
    "vmap": of_tint(lambda f: lambda x: torch.func.vmap(f)(torch.stack([x, -x]))),
    "jvp": of_tint(lambda f: lambda x: torch.func.jvp(f, (x,), (x,))),
    "vjp": of_tint(lambda f: lambda x: torch.func.vjp(f, x)[1](torch.ones(5).double())),
    "per-sample gradients": per_sample,
    "forward-mode AD of the input": tangent,
    "forward-mode AD of the parameters": tangent_of_parameters,
    "is_grads_batched": batched_gradients,
    "vmap over autograd.grad": vmapped_gradients,
    "vectorized jacobian": of_tint(
        lambda f: lambda x: torch.autograd.functional.jacobian(f, x, vectorize=True)
    ),
    "forward-mode jacobian": of_tint(
        lambda f: (
            lambda x: torch.autograd.functional.jacobian(
                f, x, vectorize=True, strategy="forward-mode"
            )
        )
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("name", ["test_convnext", "test_nfnet"])  # stock and own forwards
def test_a_transform_is_refused_and_each_way_out_works(name, transform):
    model, images = net(name), batch(0, n=2)[0]
    expected = transform(model, images.clone())
    ssp.convert(model, 0.5)
    with pytest.raises(RuntimeError, match=r"dense\(model\).*eval\(\)"):
        transform(model, images.clone())
    with ssp.dense(model):
        torch.testing.assert_close(transform(model, images.clone()), expected, rtol=0, atol=0)
    model.eval()
    torch.testing.assert_close(transform(model, images.clone()), expected, rtol=0, atol=0)


# --- what works ---------------------------------------------------------------------------------


def rows_of_jacobian(model, images):
    """One backward after another, each with a choice of its own."""
    y = logits(model, images.requires_grad_())
    return [torch.autograd.grad(y, images, v, retain_graph=True) for v in torch.eye(5).double()]


def with_torch(function):
    def call(model, images):
        def loss(x):
            return logits(model, x).square().sum()

        return function(loss, images)

    return call


DERIVATIVES = {
    "rows of a jacobian": rows_of_jacobian,
    "jacobian": lambda model, images: torch.autograd.functional.jacobian(
        functools.partial(logits, model), images
    ),
    "vhp": with_torch(lambda f, x: torch.autograd.functional.vhp(f, x, x.cos())),
    "vjp": lambda model, images: torch.autograd.functional.vjp(
        functools.partial(logits, model), images, torch.arange(5).double()
    ),
}


@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_nfnet"])
def test_derivatives_that_work_are_those_of_the_masked_network(name, derivative):
    plain = net(name)
    model = ssp.convert(copy.deepcopy(plain), 0.5)
    images = batch(0, n=2)[0]
    with oracle.network(plain, 0.5) as record:
        expected = derivative(plain, images.clone())
    assert record.gap > 1e-9 and record.dropped
    found = derivative(model, images.clone())
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_a_gradient_penalty_trains():
    """WGAN-GP's second term: the norm of the input's gradient."""

    def train(model):
        optimizer = torch.optim.Adam(model.parameters(), 1e-3, eps=1e-3)
        for i in range(2):
            images = batch(i)[0].requires_grad_()
            optimizer.zero_grad()
            (grad,) = torch.autograd.grad(model(images).sum(), images, create_graph=True)
            penalty = (grad.flatten(1).norm(dim=1) - 1).square().mean()
            penalty.backward()
            optimizer.step()
            yield penalty.detach()

    plain = tiny()
    model = ssp.convert(copy.deepcopy(plain), by_step())
    expected = run_by_hand(plain, train, falling)
    assert_same(run(model, train), expected)
