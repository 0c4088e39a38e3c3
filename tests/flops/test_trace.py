"""Counting leaves the model bit for bit as it was."""

import random

import pytest
import torch
import torchvision
from torch import nn

import ssprop_patch as ssp

from .networks import rows, small


def state_of(model):
    """Everything a summary might disturb, comparable with ==; tensors by identity and value."""

    def value(t):
        return t if t is None else (id(t), t.detach().numpy().tobytes())

    return {
        "tensors": [(n, value(t)) for n, t in model.state_dict(keep_vars=True).items()],
        "grads": [value(p.grad) for p in model.parameters()],
        "flags": [(m.training, type(m)) for m in model.modules()],
        "attributes": [
            {k: id(v) for k, v in vars(m).items() if k != "training"} for m in model.modules()
        ],
        "content": [
            [k, *map(id, v.values() if isinstance(v, dict) else v)]
            for m in model.modules()
            for k, v in vars(m).items()
            if isinstance(v, (dict, list))
        ],
        "random": (torch.get_rng_state().tolist(), random.getstate()),
    }


class Tricky(nn.Module):
    """Does in its forward what models do: keeps things, counts, draws, updates buffers."""

    def __init__(self, look_at_values=False):
        super().__init__()
        self.body = small()
        self.rnn = nn.LSTM(4, 4, batch_first=True)
        self.normed = nn.utils.spectral_norm(nn.Conv2d(4, 4, 1))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))
        self.cache, self.outputs, self.look_at_values = {}, [], look_at_values

    def forward(self, x):
        random.random()
        y = self.normed(self.body(x)) + torch.rand(1)
        self.seen += 1
        self.last = y.mean()
        self.calls = getattr(self, "calls", 0) + 1
        self.cache["y"] = y
        self.outputs.append(y)
        if self.look_at_values and y.sum().item() == 0.5:
            raise AssertionError
        return self.rnn(y.flatten(2).mT)[0]


@pytest.mark.parametrize("look_at_values", [False, True], ids=["fake", "real"])
@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_bit_for_bit_as_it_was(look_at_values, converted, training):
    model = Tricky(look_at_values).train(training)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    model.body.norm.eval()
    seen = []
    model.body.stem.register_forward_hook(lambda *a: seen.append(a))
    if converted:
        ssp.convert(model, 0.5)
    x = torch.randn(2, 3, 8, 8)
    kept, before = x.clone(), state_of(model)
    s = ssp.summary(model, inputs=x, drop_rate=0.5)
    assert state_of(model) == before
    assert torch.equal(x, kept) and x.grad is None
    assert [r.name for r in s.layers] == ["body.stem", "body.body", "body.head", "normed"]
    assert len(seen) == look_at_values  # an observer notices the one pass with real data only


def test_the_model_is_left_as_it_was_when_it_fails():
    class Broken(Tricky):
        def forward(self, x):
            super().forward(x)
            raise KeyError("at the very end")

    model = Broken(True)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"input_size \(2, 3, 8, 8\): KeyError: 'at the very end'"):
        ssp.summary(model, input_size=(2, 3, 8, 8), drop_rate=0.5)
    assert state_of(model) == before


def test_a_model_that_looks_at_values_is_run_for_real():
    class ByValue(nn.Module):
        def __init__(self):
            super().__init__()
            self.few, self.many = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 8, 1)

        def forward(self, x):
            return self.many(x) if x.mul_(2).mean() > 0 else self.few(x)

    for x, expected in ((torch.ones(1, 3, 4, 4), "many"), (-torch.ones(1, 3, 4, 4), "few")):
        kept = x.clone()
        assert list(rows(ssp.summary(ByValue(), inputs=x, drop_rate=0.5))) == [expected]
        assert torch.equal(x, kept)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_scripted_part_keeps_its_training_flag():
    part = torch.jit.script(nn.Sequential(nn.Dropout(0.5)))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), part).eval()
    assert len(ssp.summary(model, input_size=(2, 3, 8, 8), drop_rate=0.5).layers) == 1
    assert not part.training and not model.training


def test_a_detection_model():
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    )
    image = torch.rand(3, 64, 48)
    before = state_of(model)
    s = ssp.summary(model, inputs=([image],), drop_rate=0.8)
    assert len(s.layers) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert 0.7 < s.backward_saved < 0.8
    assert state_of(model) == before


def test_compiled_and_wrapped_models_and_grad_mode():
    expected = ssp.summary(small(), input_size=(2, 3, 8, 8), drop_rate=0.5).layers
    ran = []
    compiled = torch.compile(small(), backend=lambda graph, inputs: ran.append(1) or graph)
    with torch.no_grad():
        found = ssp.summary(compiled, input_size=(2, 3, 8, 8), drop_rate=0.5).layers
    assert not ran and [r.sparse_backward for r in found] == [r.sparse_backward for r in expected]
    wrapped = nn.DataParallel(small())
    with torch.inference_mode():
        assert ssp.summary(wrapped, input_size=(2, 3, 8, 8), drop_rate=0.5).layers == expected
