"""The watchdog says once that no step is counted or that a layer is never called."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import ssprop_patch as ssp

from .watched import Foreign, by_bar, forward_and_backward, image, make, said, sgd, train


class Flat:
    """A torch optimizer over one flat copy of the weights, as of DeepSpeed."""

    def __init__(self, model):
        self.parameters = list(model.parameters())
        self.master = self.flat(p.detach() for p in self.parameters).requires_grad_()
        self.optimizer = torch.optim.AdamW([self.master])

    def flat(self, tensors):
        return torch.cat([t.float().flatten() for t in tensors])

    @torch.no_grad()
    def step(self):
        self.master.grad = self.flat(p.grad for p in self.parameters)
        self.optimizer.step()
        parts = self.master.split([p.numel() for p in self.parameters])
        for p, part in zip(self.parameters, parts, strict=True):
            p.copy_(part.view_as(p))


# --- no step is counted ----------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [Foreign, Flat])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_that_are_not_seen(optimizer, dtype):
    model = by_bar(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)).to(dtype))
    own = optimizer(model)

    def run():
        for _ in range(12):
            model.zero_grad()
            model(image().to(dtype)).float().square().sum().backward()
            own.step()

    (text,) = said(run)
    for part in ("BarSchedule(0.8, period=2)", "t=0", ".step(epoch)", "torch.optim.Optimizer"):
        assert part in text
    assert ("AdamW" in text) == (optimizer is Flat)
    assert said(run) == [] and ssp.get_controller(model).t == 0


def test_steps_that_are_not_seen_in_eval_mode():
    model = by_bar().eval()
    (text,) = said(train, model, 9, Foreign(model))
    assert "the weights of this model change" in text


def test_it_says_how_to_tell_steps_where_the_schedule_counts_those():
    model = ssp.convert(make(), ssp.BarSchedule(0.8, interval="step"))
    (text,) = said(train, model, 4, Foreign(model))
    assert ".step() after every step" in text


def test_an_optimizer_over_parameters_that_are_no_longer_the_models():
    model = make()
    optimizer = sgd(model)
    model.load_state_dict(make().state_dict(), assign=True)
    (text,) = said(train, by_bar(model), 9, optimizer)
    assert "gets gradients" in text and "SGD: 8" in text


def test_accumulated_gradients_are_no_change():
    model = by_bar()

    def run():
        for _ in range(70):
            model(image()).square().mean().backward()
        sgd(model).step()

    assert said(run) == []


def test_a_checkpoint_loaded_between_two_passes_is_no_training():
    model = by_bar()

    def run():
        forward_and_backward(model)
        model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
        for _ in range(40):
            forward_and_backward(model)

    assert said(run) == []


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_an_optimizer_that_trains_inside_of_its_step(search):
    model = by_bar()
    optimizer = torch.optim.LBFGS(model.parameters(), 1e-3, max_iter=9, line_search_fn=search)

    def closure():
        optimizer.zero_grad()
        loss = model(image()).square().mean()
        loss.backward()
        return loss

    assert said(optimizer.step, closure) == []


@pytest.mark.parametrize("constant", [0.0, 0.8])
def test_a_constant_rate_needs_no_steps(constant):
    model = ssp.convert(make(), constant)
    assert said(train, model, 12, Foreign(model)) == []


def test_steps_told_by_hand():
    model = by_bar()
    ssp.get_controller(model).step(0)
    assert said(train, model, 12, Foreign(model)) == []


def test_a_model_that_is_cast_is_not_trained():
    model = by_bar(nn.Conv2d(3, 8, 3, dtype=torch.float64))

    def run():
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.bfloat16):
            model.to(dtype)(image().to(dtype)).float().sum().backward()

    assert said(run) == []


# --- a layer is never called -------------------------------------------------------------------


class Reads(nn.Module):
    """As Mamba's mixer: the weight goes to a kernel of its own."""

    def __init__(self):
        super().__init__()
        self.stem, self.read = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        read = dict(self.named_parameters())  # which nobody can tell from the code
        return F.conv2d(self.stem(x), read["read.weight"], read["read.bias"])


@pytest.mark.parametrize("rate", [0.5, ssp.BarSchedule(0.8, interval="step")])
def test_a_layer_whose_weight_is_read(rate):
    model = ssp.convert(Reads(), rate)
    (text,) = said(train, model, 3)
    assert "'read'" in text and "read by other code" in text and "'stem'" not in text
    assert said(train, model, 20) == []


def test_the_plan_says_that_a_weight_is_read_after_the_first_backward():
    model = ssp.convert(Reads(), 0.5)
    assert not any("never called" in row.reason for row in ssp.plan(model))
    forward_and_backward(model)
    stem, read = ssp.plan(model)
    assert "never called: its weight is read by others" in read.reason
    assert "never" not in stem.reason and (str(stem.ran), bool(read.ran)) == ("1 sparse", False)


def test_a_layer_that_gets_no_gradient_is_merely_unused():
    model = nn.ModuleDict({"used": nn.Conv2d(3, 8, 3), "unused": nn.Conv2d(3, 8, 3)})
    ssp.convert(model, 0.5)
    optimizer = sgd(model)

    def run():
        for _ in range(9):
            optimizer.zero_grad()
            model["used"](image()).sum().backward()
            optimizer.step()

    assert said(run) == []


def test_a_gradient_from_before_the_conversion_is_no_sign():
    model = nn.ModuleDict({"used": nn.Conv2d(3, 8, 3), "unused": nn.Conv2d(3, 8, 3)})
    for layer in model.values():
        layer(image()).sum().backward()
    ssp.convert(model, 0.5)
    assert said(train, model["used"], 9, sgd(model["used"])) == []


def test_tied_weights():
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1))
    model[1].weight = model[0].weight
    ssp.convert(model, 0.5)
    optimizer = sgd(model)

    def run():
        for _ in range(4):
            optimizer.zero_grad()
            model[0](image()).sum().backward()
            optimizer.step()

    assert said(run) == []


def test_reentrant_checkpointing_calls_a_layer():
    model = ssp.convert(make(), 0.5)
    optimizer = sgd(model)

    def run():
        for _ in range(4):
            checkpoint(model, image().requires_grad_(), use_reentrant=True).sum().backward()
            optimizer.step()

    assert said(run) == []
