"""Several backward passes for one optimizer step: accumulation, SAM, closures, several losses."""

import pytest
import torch
from torch import nn

import ssprop_patch as ssp

from .by_hand import batch, compare, loss_of, net, sgd

NETS = pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_nfnet"])


@NETS
def test_gradient_accumulation(name):
    """Each micro-batch chooses its channels; the rate is that of the step they share."""

    def train(model):
        optimizer = sgd(model)
        for i in range(9):
            loss = loss_of(model, i) / 3
            loss.backward()
            if i % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
                yield loss.detach()

    compare(lambda: net(name), train, steps=3)


def test_accumulated_gradients_are_the_sum_of_those_of_the_micro_batches():
    model = ssp.convert(net("test_nfnet"), 0.5)
    total = [torch.zeros_like(p) for p in model.parameters()]
    for i in range(3):
        model.zero_grad()
        loss_of(model, i).backward()
        total = [t + p.grad for t, p in zip(total, model.parameters(), strict=True)]
    model.zero_grad()
    for i in range(3):
        loss_of(model, i).backward()
    for p, want in zip(model.parameters(), total, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-12, atol=1e-14)


@NETS
def test_two_losses_from_one_forward(name):
    """With a retained graph: two backward passes, each with a choice of its own."""

    def train(model):
        optimizer = sgd(model)
        for i in range(2):
            images, labels = batch(i)
            out = model(images)
            optimizer.zero_grad()
            nn.functional.cross_entropy(out, labels).backward(retain_graph=True)
            (0.1 * out.square().sum()).backward()
            optimizer.step()
            yield

    compare(lambda: net(name), train)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation (arXiv 2010.01412), in the form that people copy around."""

    def __init__(self, params, base, rho=0.05, **kwargs):
        super().__init__(params, dict(rho=rho, **kwargs))
        self.base = base(self.param_groups, **kwargs)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self):
        norm = torch.stack([p.grad.norm() for p in self.with_gradient()]).norm()
        for p in self.with_gradient():
            self.state[p]["old"] = p.detach().clone()
            p.add_(p.grad * self.param_groups[0]["rho"] / norm)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p in self.with_gradient():
            p.copy_(self.state[p]["old"])
        self.base.step()
        self.zero_grad()

    def step(self, closure):
        closure = torch.enable_grad()(closure)
        self.first_step()
        closure()
        self.second_step()

    def with_gradient(self):
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]


@pytest.mark.parametrize("style", ["two steps", "closure"])
@NETS
def test_sam(name, style):
    """Two forwards and two backwards at one rate, and one optimizer step."""

    def train(model):
        optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
        for i in range(3):

            def again(i=i):
                loss = loss_of(model, i)
                loss.backward()
                return loss

            loss = again()
            if style == "closure":
                optimizer.step(again)
            else:
                optimizer.first_step()
                again()
                optimizer.second_step()
            yield loss.detach()

    compare(lambda: net(name), train, steps=3)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs(search):
    """Many evaluations a step, all at the rate of that step."""
    evaluations = []

    def train(model):
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, line_search_fn=search)
        for i in range(2):

            def closure(i=i):
                evaluations.append(i)
                optimizer.zero_grad()
                loss = loss_of(model, i)
                loss.backward()
                return loss

            yield optimizer.step(closure).detach()

    compare(net, train)
    assert len(evaluations) >= 2 * 2 * 3


def test_two_optimizers_in_turn():
    """As backbone and head, or layer-wise: one iteration, however many optimizers step in it."""

    def train(model):
        head = list(model.get_classifier().parameters())
        ids = {id(p) for p in head}
        body = [p for p in model.parameters() if id(p) not in ids]
        optimizers = torch.optim.AdamW(body, 1e-3, eps=1e-3), torch.optim.SGD(head, 0.1)
        for i in range(3):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss_of(model, i).backward()
            for optimizer in optimizers:
                optimizer.step()
            yield

    compare(net, train, steps=3)


def test_an_evaluation_between_two_steps_changes_nothing():
    def train(model):
        optimizer = sgd(model)
        for i in range(2):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            model.eval()
            with torch.no_grad():
                loss = loss_of(model, 9)
            model.train()
            optimizer.step()
            yield loss

    compare(net, train)
