"""Copies, pickles, whole-model files and state dicts of converted models."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import ssprop_patch as ssp
from ssprop_patch.schedule import settings


def tenths(t):
    return min(t, 9) / 10


def by_step():
    return ssp.LambdaSchedule(tenths, interval="step")


def least(dy):
    return -dy.abs().sum((0, 2, 3))


class Doubled(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight * 2, self.bias, padding=self.padding)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.own = Doubled(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 8, 1)
        self.alias = self.last
        self.order = [self.own, self.stem]

    def forward(self, x):
        return self.last(F.relu(self.norm(self.own(self.stem(x)))))


NAMES = ["stem", "own", "last"]
COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.fixture(params=COPIES)
def copied(request):
    return COPIES[request.param]


def make():
    torch.manual_seed(0)
    return Net()


def image():
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def backward(model):
    model.zero_grad()
    model(image()).pow(2).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def kept(model):
    grads = backward(model)
    return {n: int(grads[f"{n}.weight"].flatten(1).ne(0).any(1).sum()) for n in NAMES}


def optimizer_step(model):
    torch.optim.SGD(model.parameters(), 0.0).step()


def assert_same(grads, others):
    assert grads.keys() == others.keys()
    for name, grad in grads.items():
        assert torch.equal(grad, others[name]), name


# --- a copy -------------------------------------------------------------------------------------


def test_a_copy_computes_the_same(copied):
    model = make()
    ssp.convert(model, 0.5, exclude="stem", overrides={"last": 0.75}, selection=least)
    twin = copied(model)
    assert kept(twin) == {"stem": 8, "own": 4, "last": 2}
    assert_same(backward(twin), backward(model))
    assert {n: type(m) for n, m in twin.named_modules()} == {
        n: type(m) for n, m in model.named_modules()
    }
    assert twin.alias is twin.last and twin.order[0] is twin.own


def test_a_copy_has_a_controller_of_its_own(copied):
    model = ssp.convert(make(), 0.5)
    ssp.get_controller(model).step(3)
    twin = copied(model)
    controller, own = ssp.get_controller(model), ssp.get_controller(twin)
    assert own is not controller
    assert own.state_dict() == controller.state_dict() and own.schedule == controller.schedule
    own.drop_rate = 0.75
    assert (kept(model), kept(twin)) == (dict.fromkeys(NAMES, 4), dict.fromkeys(NAMES, 2))
    controller.drop_rate = 0.25
    assert (kept(model), kept(twin)) == (dict.fromkeys(NAMES, 6), dict.fromkeys(NAMES, 2))
    with ssp.dense(model):
        assert kept(twin) == dict.fromkeys(NAMES, 2)
    own.step(9)
    assert (controller.t, own.t) == (3, 9)


def test_a_copy_counts_the_steps_of_its_own_optimizer(copied):
    model = ssp.convert(make(), by_step())
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    optimizer.step()
    twin = copied(model)
    controller, own = ssp.get_controller(model), ssp.get_controller(twin)
    own_optimizer = torch.optim.SGD(twin.parameters(), 0.0)
    for _ in range(3):
        own_optimizer.step()
    assert (controller.t, own.t) == (1, 4)
    optimizer.step()
    assert (controller.t, own.t) == (2, 4)


def test_a_copy_within_an_epoch_goes_on_from_there(copied):
    model = ssp.convert(make(), ssp.BarSchedule(0.8), steps_per_epoch=3)
    optimizer_step(model)
    twin = copied(model)
    optimizer = torch.optim.SGD(twin.parameters(), 0.0)
    optimizer.step()
    assert ssp.get_controller(twin).t == 0
    optimizer.step()
    assert ssp.get_controller(twin).t == 1


def test_a_copy_counts_where_all_convolutions_are_frozen(copied):
    model = make()
    for name in NAMES:
        model.get_submodule(name).requires_grad_(False)
    ssp.convert(model, by_step())
    twin = copied(model)
    torch.optim.SGD(twin.norm.parameters(), 0.0).step()
    assert (ssp.get_controller(model).t, ssp.get_controller(twin).t) == (0, 1)


@pytest.mark.parametrize("before", [True, False], ids=["before conversion", "after"])
def test_a_copy_counts_where_all_convolutions_are_parametrized(before):
    """torch makes such copies without __reduce_ex__ and __setstate__; pickling it refuses."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    if before:
        parametrizations.spectral_norm(model[0])
    ssp.convert(model, by_step())
    if not before:
        parametrizations.spectral_norm(model[0])
    twin = copy.deepcopy(model)
    assert ssp.get_controller(twin) is not ssp.get_controller(model)
    optimizer_step(twin)
    assert (ssp.get_controller(model).t, ssp.get_controller(twin).t) == (0, 1)
    optimizer_step(model)
    assert (ssp.get_controller(model).t, ssp.get_controller(twin).t) == (1, 1)


def test_a_copy_draws_its_own_random_channels(copied):
    model = ssp.convert(make(), 0.75, selection="random")
    backward(model)
    twin = copied(model)
    draws = [backward(twin) for _ in range(3)]
    for drawn in draws:  # the copy went on where the model stood, and the model was not moved
        assert_same(backward(model), drawn)
    assert any(not torch.equal(draws[0][n], draws[1][n]) for n in draws[0])


def test_a_copy_of_a_part(copied):
    model = nn.ModuleDict({"a": ssp.convert(make(), by_step()), "b": make()})
    twin = copied(model["a"].own)
    own = ssp.get_controller(twin)
    assert own is not ssp.get_controller(model)
    optimizer_step(twin)
    assert (own.t, ssp.get_controller(model).t) == (1, 0)


def test_a_copy_keeps_as_many_controllers(copied):
    model = nn.ModuleList([ssp.convert(make(), 0.5), ssp.convert(make(), 0.75)])
    twin = copied(model)
    assert kept(twin[0]) == dict.fromkeys(NAMES, 4)
    assert kept(twin[1]) == dict.fromkeys(NAMES, 2)
    shared = ssp.SparsityController(0.5)
    model = nn.ModuleList([ssp.convert(make(), controller=shared) for _ in range(2)])
    twin = copied(model)
    assert ssp.get_controller(twin) is ssp.get_controller(twin[0]) is not shared


def test_a_copy_can_be_reverted_and_converted(copied):
    model = ssp.convert(make(), 0.5)
    twin = ssp.revert(copied(model))
    assert type(twin.stem) is nn.Conv2d and type(twin.own) is Doubled
    assert set(vars(twin.stem)) == set(vars(make().stem))
    assert kept(twin) == dict.fromkeys(NAMES, 8) and kept(model) == dict.fromkeys(NAMES, 4)
    ssp.convert(twin, 0.75)
    assert kept(twin) == dict.fromkeys(NAMES, 2) and kept(model) == dict.fromkeys(NAMES, 4)
    ssp.revert(model)
    assert kept(twin) == dict.fromkeys(NAMES, 2)


def test_a_copy_of_a_converted_root(copied):
    for cls in (nn.Conv2d, Doubled):
        model = ssp.convert(cls(3, 8, 3), 0.5)
        twin = copied(model)
        twin(image()).pow(2).sum().backward()
        assert int(twin.weight.grad.flatten(1).ne(0).any(1).sum()) == 4


def test_tokens_are_fresh(copied):
    """Compiled code knows a layer's settings by its token."""
    model = ssp.convert(make(), 0.5)
    twin = copied(model)
    policies = [m.get_submodule(n)._ssprop_policy for m in (model, twin) for n in NAMES]
    assert len({int(policy.token) for policy in policies}) == 2 * len(NAMES)
    for policy in policies:
        assert settings.settings_of(policy.token) is policy.settings


def test_a_compiled_copy_follows_its_own_controller(copied):
    model = ssp.convert(make(), 0.5)
    twin = copied(model)
    compiled = [torch.compile(m, backend="aot_eager") for m in (model, twin)]
    for rates in ((0.5, 0.75), (0.75, 0.5)):
        for m, rate in zip((model, twin), rates, strict=True):
            ssp.get_controller(m).drop_rate = rate
        for m, run, rate in zip((model, twin), compiled, rates, strict=True):
            m.zero_grad()
            run(image()).pow(2).sum().backward()
            for name in NAMES:
                grad = m.get_submodule(name).weight.grad
                assert int(grad.flatten(1).ne(0).any(1).sum()) == 8 * (1 - rate)
    torch._dynamo.reset()


def test_a_shallow_copy_is_still_sparse():
    model = ssp.convert(make(), 0.5)
    twin = copy.copy(model.stem)
    assert ssp.get_controller(twin) is ssp.get_controller(model)
    twin(image()).pow(2).sum().backward()
    assert int(twin.weight.grad.flatten(1).ne(0).any(1).sum()) == 4


def test_a_copied_controller_counts_nothing():
    model = ssp.convert(make(), by_step())
    twin = copy.deepcopy(ssp.get_controller(model))
    optimizer_step(model)
    assert (ssp.get_controller(model).t, twin.t) == (1, 0)


# --- files --------------------------------------------------------------------------------------

CHILD = """
import json, sys
import torch
from patching import test_persistence as t
import ssprop_patch as ssp

model = torch.load(sys.argv[1], weights_only=False)
controller = ssp.get_controller(model)
found = {"state": controller.state_dict(), "kept": t.kept(model)}
torch.save(t.backward(model), sys.argv[2])
t.optimizer_step(model)
found["after"] = [controller.t, controller.drop_rate]
controller.drop_rate = 0.75
found["set"] = t.kept(model)
model.eval()
found["eval"] = t.kept(model)
ssp.revert(model)
found["classes"] = [type(model.stem) is torch.nn.Conv2d, type(model.own) is t.Doubled]
print(json.dumps(found))
"""


def test_a_whole_model_file_in_another_process(tmp_path):
    model = make()
    ssp.convert(model, by_step(), overrides={"last": 0.25})
    controller = ssp.get_controller(model)
    for _ in range(5):
        optimizer_step(model)
    controller.step()
    controller.load_state_dict({**controller.state_dict(), "by_hand": False})
    file, gradients = tmp_path / "model.pt", tmp_path / "gradients.pt"
    torch.save(model, file)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, file, gradients],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout)
    assert found["state"] == controller.state_dict()
    assert found["kept"] == kept(model) == {"stem": 3, "own": 3, "last": 6}
    assert_same(torch.load(gradients, weights_only=True), backward(model))
    assert found["after"] == [7, 0.7]
    assert found["set"] == {"stem": 2, "own": 2, "last": 6}
    assert found["eval"] == dict.fromkeys(NAMES, 8)
    assert found["classes"] == [True, True]


def test_a_whole_model_file_in_this_process(tmp_path):
    model = ssp.convert(make(), 0.75)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert kept(loaded) == dict.fromkeys(NAMES, 2)
    assert ssp.get_controller(loaded) is not ssp.get_controller(model)


def test_a_state_dict_goes_both_ways(tmp_path):
    converted, dense = ssp.convert(make(), 0.5), make()
    names = list(dense.state_dict())
    assert list(converted.state_dict()) == names
    for source, target in ((converted, dense), (dense, converted)):
        optimizer = torch.optim.SGD(source.parameters(), 1e-4)
        backward(source)
        optimizer.step()
        torch.save(source.state_dict(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        assert any(not torch.equal(v, target.state_dict()[k]) for k, v in state.items())
        report = target.load_state_dict(state, strict=True)
        assert (report.missing_keys, report.unexpected_keys) == ([], [])
        for name, value in target.state_dict().items():
            assert torch.equal(value, state[name]), name
    assert kept(converted) == dict.fromkeys(NAMES, 4) and kept(dense) == dict.fromkeys(NAMES, 8)


def test_an_optimizer_state_goes_both_ways():
    models = ssp.convert(make(), 0.5), make()
    for source, target in (models, models[::-1]):
        optimizers = [torch.optim.AdamW(m.parameters()) for m in (source, target)]
        backward(source)
        optimizers[0].step()
        optimizers[1].load_state_dict(optimizers[0].state_dict())
        saved, loaded = (o.state_dict()["state"] for o in optimizers)
        assert len(saved) == len(list(source.parameters()))
        for i, moments in saved.items():
            assert torch.equal(moments["exp_avg"], loaded[i]["exp_avg"])
