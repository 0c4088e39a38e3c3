"""A whole network with some of its layers converted, timed: what runs, and what stays as it was."""

import copy

import pytest
import torch
from torch import nn

import ssprop_patch as ssp
from ssprop_patch.timing import networks, time_networks


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 4, 1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.seen = []

    def forward(self, x):
        self.calls += 1
        self.seen.append((type(self.conv1), type(self.conv2)))
        return {"out": self.conv2(torch.dropout(self.norm(self.conv1(x)), 0.1, self.training))}


X = torch.randn(2, 3, 6, 6)


def choices(model):
    return {"none": [], "one": [model.conv2], "all": [model.conv1, model.conv2]}


def test_each_choice_runs_with_its_layers_converted(monkeypatch):
    ran = []
    model = Net()

    def forward_and_backward(model, inputs, autocast):
        def run():
            ran.append(tuple(ssp.is_converted(m) for m in (model.conv1, model.conv2)))
            return {(False, False): 3.0, (False, True): 2.0, (True, True): 1.0}[ran[-1]]

        return run

    monkeypatch.setattr(networks, "_forward_and_backward", forward_and_backward)
    ms = time_networks(model, X, choices(model), 0.5, iterations=2)
    assert {name: q.p50 for name, q in ms.items()} == {"none": 3.0, "one": 2.0, "all": 1.0}
    assert ran.count((False, True)) == ran.count((True, True)) == ran.count((False, False)) == 2 + 3


def test_each_choice_is_converted_with_all_settings(monkeypatch):
    policies = []
    model = Net()

    def forward_and_backward(model, inputs, autocast):
        def run():
            if ssp.is_converted(model.conv2):
                policies.append(vars(model.conv2)["_ssprop_policy"])
            return 1.0

        return run

    monkeypatch.setattr(networks, "_forward_and_backward", forward_and_backward)
    settings = dict(overrides={"conv2": 0.25}, align=2, selection="l2")
    time_networks(model, X, choices(model), 0.5, **settings, iterations=1)
    ssp.convert(model, 0.5, **settings)
    for policy in policies:
        own = model.conv2._ssprop_policy
        assert (policy.override, policy.align) == (own.override, own.align) == (0.25, 2)
        assert policy.rule.score_fn is own.rule.score_fn
    assert len(policies) == 2 * (1 + 3)


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_stays_as_it_was(converted, training):
    model = Net().train(training)
    if converted:
        ssp.convert(model, 0.5, exclude="conv1")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
        p.register_post_accumulate_grad_hook(lambda p: pytest.fail("a gradient was accumulated"))
    before = copy.deepcopy(model.state_dict())
    classes = [type(m) for m in model.modules()]
    controller = ssp.get_controller(model) if converted else None
    random = torch.get_rng_state()
    ms = time_networks(model, {"x": X}, choices(model), 0.5, iterations=1)
    assert set(ms) == {"none", "one", "all"} and all(q.p50 > 0 for q in ms.values())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is not None and (p.grad == 1).all() for p in model.parameters())
    assert [type(m) for m in model.modules()] == classes and model.training is training
    assert torch.equal(torch.get_rng_state(), random) and not model.seen
    if converted:
        assert ssp.get_controller(model) is controller and controller.drop_rate == 0.5


def test_the_model_stays_as_it_was_when_it_fails():
    class Fails(Net):
        def forward(self, x):
            super().forward(x)
            if ssp.is_converted(self):
                raise RuntimeError("out of memory")
            return self.conv1(x)

    model = ssp.convert(Fails(), 0.25)
    controller = ssp.get_controller(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        time_networks(model, X, choices(model), 0.5)
    assert ssp.get_controller(model) is controller and controller.drop_rate == 0.25
    assert model.calls == 0 and not model.seen and ssp.is_converted(model.conv1)


def test_a_compiled_network_runs_compiled():
    model = Net()
    del model.seen  # a growing list would be compiled again in every call
    model.forward = lambda x: model.conv2(model.conv1(x))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    time_networks(torch.compile(model, backend=backend), X, choices(model), 0.5, iterations=4)
    assert len(graphs) == 3


def test_bad_input():
    model = Net()
    with pytest.raises(ValueError, match="drop_rate"):
        time_networks(model, X, choices(model), 1.5)
    with pytest.raises(ValueError, match="iterations"):
        time_networks(model, X, choices(model), iterations=0)
    with pytest.raises(TypeError, match="inputs must be"):
        time_networks(model, [X], choices(model))
    with pytest.raises(ValueError, match="nothing that needs a gradient"):
        time_networks(nn.Flatten(), X, {"none": []})
