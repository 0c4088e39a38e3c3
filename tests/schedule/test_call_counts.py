"""What ran: counts by layer, in the plan and in the status."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import ssprop_patch as ssp
from ssprop_patch.ops import native
from ssprop_patch.schedule import call_counts as calls


class Doubled(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight * 2, self.bias)


LAYERS = {
    "stock": lambda: nn.Conv2d(3, 8, 3),
    "own forward": lambda: Doubled(3, 8, 3),
    "transposed": lambda: nn.ConvTranspose2d(3, 8, 3),
    "linear": lambda: nn.Linear(6, 8),
}
TYPES = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def image():
    return torch.randn(2, 3, 6, 6)


def ran(model):
    (row,) = ssp.plan(model, types=TYPES)
    return row.ran


@pytest.fixture(params=LAYERS)
def layer(request):
    return ssp.convert(LAYERS[request.param](), 0.5, types=TYPES)


def test_a_layer_that_is_not_converted_has_no_count():
    assert ran(nn.Conv2d(3, 8, 3)) is None


def test_each_reason(layer):
    assert not ran(layer) and str(ran(layer)) == "0 sparse"
    for _ in range(2):
        layer(image()).sum().backward()
    assert ran(layer) == calls.Ran(2)
    with ssp.dense(layer):
        layer(image())
    layer.eval()
    for _ in range(3):
        layer(image())
    with torch.no_grad():
        layer(image())
        layer.train()(image())
    layer.requires_grad_(False)(image())
    torch.jit.trace(layer.requires_grad_(True), image(), check_trace=False)
    dense = {"rate 0": 1, "eval()": 3, "no gradient needed": 3}
    found = ran(layer)
    traced = found.dense.get("traced or exported", 0)
    assert traced >= 1
    assert found == calls.Ran(2, {**dense, "traced or exported": traced})
    assert str(found).startswith(f"2 sparse, {7 + traced} dense (rate 0: 1, eval(): 3, no gradient")


def test_a_layer_that_keeps_all_its_channels():
    layer = ssp.convert(nn.Conv2d(3, 4, 3), 0.1)
    layer(image())
    assert ran(layer) == calls.Ran(0, {"keeps every channel": 1})
    layer = ssp.convert(nn.Conv2d(3, 4, 3), 0.5, overrides={".*": 0.0})
    layer(image())
    assert ran(layer) == calls.Ran(0, {"rate 0": 1})


def test_an_input_alone_may_need_the_gradient(layer):
    layer.requires_grad_(False)
    layer(image().requires_grad_()).sum().backward()
    assert ran(layer) == calls.Ran(1)


def test_what_checkpointing_repeats_counts_again():
    layer = ssp.convert(nn.Conv2d(3, 8, 3), 0.5)
    checkpoint(layer, image(), use_reentrant=False).sum().backward()
    assert ran(layer) == calls.Ran(2)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_counts_for_itself(copied):
    layer = ssp.convert(nn.Conv2d(3, 8, 3), 0.5)
    layer(image())
    twin = copied(layer)
    assert not ran(twin)
    for _ in range(3):
        twin(image())
    assert (ran(layer), ran(twin)) == (calls.Ran(1), calls.Ran(3))


def test_counts_are_in_no_state_dict():
    layer = ssp.convert(nn.Conv2d(3, 8, 3), 0.5)
    layer(image())
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_counts_outlast_a_conversion_for_a_while_and_a_meter():
    layer = ssp.convert(nn.Conv2d(3, 8, 3), 0.5)
    layer(image())
    with ssp.converted(layer, 0.75):
        layer(image())
        layer(image())
        assert ran(layer) == calls.Ran(2)
    assert ran(layer) == calls.Ran(1)
    with ssp.Meter(layer):
        layer(image())
    assert ran(layer) == calls.Ran(2)
    assert not ran(ssp.convert(layer, 0.5))  # a conversion of its own


def test_what_the_package_runs_itself_does_not_count():
    model = ssp.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), 0.5)
    ssp.summary(model, input_size=(2, 3, 6, 6))
    assert not any(row.ran for row in ssp.plan(model))


def test_the_plan_prints_what_ran_once_something_has():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(3, 1, 3))
    ssp.convert(model, 0.5)
    assert "ran" not in str(ssp.plan(model)).splitlines()[0].split()
    model[0](image())
    head, first, second, third, _ = str(ssp.plan(model)).splitlines()
    assert head.split() == ["name", "class", "action", "ran", "why"]
    assert "1 sparse" in first and " never " in second and "sparse" not in third


def test_status(monkeypatch):
    monkeypatch.setattr(native, "why_unavailable", lambda: "no C compiler")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 1, 3))
    ssp.convert(model, ssp.BarSchedule(0.8), steps_per_epoch=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(2):
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        optimizer.step()
    ssp.get_controller(model).step(3)
    found = ssp.status(nn.ModuleDict({"module": model}))
    assert str(found) == (
        "2 of 3 convolutions sparse, drop rate 0.8, epoch 3, C functions off: no C compiler; "
        "calls: 2 sparse, 2 dense (rate 0: 2)"
    )
    assert (found.converted, found.t, found.findings, found.saved) == (2, 3, (), None)
    monkeypatch.setattr(native, "why_unavailable", lambda: None)
    with ssp.dense(model), ssp.Meter(model, energy=False) as meter:
        assert str(ssp.status(model)).startswith(
            "2 of 3 convolutions converted, 2 have run sparse, drop rate 0, epoch 3, 0.0 % of the "
            "training's FLOPs saved so far, C functions on; calls: "
        )
        with ssp.sparsity(model, 0.5):
            model(torch.randn(2, 3, 8, 8)).sum().backward()
        saved = meter.report().total_saved
        assert 0 < ssp.status(model[:2]).saved == saved
        assert f"{100 * saved:.1f} % of the training's FLOPs saved" in str(ssp.status(model))
    with pytest.raises(ValueError, match="not converted"):
        ssp.status(nn.Conv2d(3, 8, 3))


def test_the_status_says_why_other_kernels_are_at_work(monkeypatch):
    model = ssp.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(3, 3)), 0.5, types=TYPES)
    assert "2 of 2 layers converted, 0 have run sparse" in str(ssp.status(model))
    said = "C functions off: they take float32 and float64, the weights are bfloat16"
    assert ssp.status(model.bfloat16()).backend == said
    said = "C functions off: they are for CPUs, the model is on meta"
    assert ssp.status(model.to("meta")).backend == said


def test_the_status_repeats_what_was_found():
    model = ssp.convert(nn.Conv2d(3, 8, 3), 0.5).eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with pytest.warns(UserWarning, match="eval"):
        for _ in range(2):
            model(image()).sum().backward()
            optimizer.step()
    (finding,) = ssp.status(model).findings
    assert "eval() mode" in finding
    assert str(ssp.status(model)).splitlines()[1] == f"warning: {finding}"


def test_replicas_of_data_parallel_count_for_the_layer():
    layer = ssp.convert(nn.Conv2d(3, 8, 3), 0.5)
    replica = layer._replicate_for_data_parallel()
    replica.weight, replica.bias = layer.weight, layer.bias
    replica(image())
    assert ran(layer) == calls.Ran(1)
