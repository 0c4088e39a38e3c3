"""The package imported again, reloaded, or under another name, while models are converted."""

import copy
import importlib
import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import ssprop_patch as ssp

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))


def rows(model, call=None):
    model.zero_grad()
    (call or model)(X).pow(2).sum().backward()
    return [int(model[i].weight.grad.flatten(1).ne(0).any(1).sum()) for i in (0, 2)]


def by_step(package):
    return package.LambdaSchedule(lambda t: 0.75 if t % 2 else 0.5, interval="step")


def ours(name="ssprop_patch"):
    return {n for n in sys.modules if n == name or n.startswith(f"{name}.")}


def not_compiling(package):
    """The package, which does not compile its C functions once more; the former one is as it was.

    Not by SSPROP_PATCH_NATIVE: the former one, too, would find no compiler, and remember that.
    """
    build = importlib.import_module(f"{package.__name__}.ops.native.build")
    build.find_compiler = lambda: None
    return package


@pytest.fixture
def again():
    """The package, purged and imported again; at the end all is as it was."""
    for name in ssp.__all__:  # else it would be looked up in the new one when first used
        getattr(ssp, name)
    before = {name: sys.modules[name] for name in ours()}
    for name in before:
        del sys.modules[name]
    yield not_compiling(importlib.import_module("ssprop_patch"))
    for name in ours():
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture
def renamed():
    """A copy of the package under another name."""
    folder = Path(ssp.__file__).parent
    spec = importlib.util.spec_from_file_location(
        "vendored_ssprop", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = sys.modules["vendored_ssprop"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield not_compiling(module)
    for name in ours("vendored_ssprop"):
        del sys.modules[name]


@pytest.fixture(params=["again", "renamed"])
def other(request):
    found = request.getfixturevalue(request.param)
    assert found is not ssp and found.convert is not ssp.convert
    return found


def test_a_model_of_the_former_one_trains_on_and_is_counted_once(other):
    model = ssp.convert(make(), by_step(ssp))
    new = other.convert(make(), by_step(other))
    controllers = [ssp.get_controller(model), other.get_controller(new)]
    optimizers = [torch.optim.SGD(m.parameters(), 0.01) for m in (model, new)]
    for t in range(4):
        assert [c.t for c in controllers] == [t, t]
        for m, optimizer in zip((model, new), optimizers, strict=True):
            assert rows(m) == [2 if t % 2 else 4] * 2
            optimizer.step()


def test_it_is_known_to_be_converted_and_can_be_reverted(other):
    model = ssp.convert(make(), 0.5)
    assert other.is_converted(model) and ssp.is_converted(model)
    assert other.get_controller(model) is ssp.get_controller(model)
    assert [row.action for row in other.plan(model)] == ["convert"] * 2
    with other.sparsity(model, 0.75):
        assert rows(model) == [2, 2]
    controller = ssp.get_controller(model)
    other.revert(model)
    assert not other.is_converted(model) and not ssp.is_converted(model)
    assert [type(m) for m in model] == [nn.Conv2d, nn.ReLU, nn.Conv2d] and rows(model) == [8, 8]
    assert not any(name.startswith("_ssprop") for m in model.modules() for name in vars(m))
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert controller.t == 0 and not len(controller.step_counter._layers)


def test_it_can_be_converted_again(other):
    model = ssp.convert(make(), by_step(ssp))
    old = ssp.get_controller(model)
    other.convert(model, by_step(other))
    new = other.get_controller(model)
    assert type(new) is other.SparsityController and rows(model) == [4, 4]
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert (old.t, new.t) == (0, 1)
    assert rows(copy.deepcopy(model)) == [2, 2]
    ssp.convert(model, 0.75)  # and the other way round
    assert type(ssp.get_controller(model)) is ssp.SparsityController and rows(model) == [2, 2]
    other.revert(model)
    assert type(model[0]) is nn.Conv2d


def test_a_model_converted_again_can_be_pickled(again):
    model = again.convert(ssp.convert(make(), 0.25), 0.5)
    assert rows(pickle.loads(pickle.dumps(model))) == [4, 4]


def test_converted_gives_a_former_conversion_back(other):
    model = ssp.convert(make(), by_step(ssp))
    controller = ssp.get_controller(model)
    with other.converted(model, 0.75):
        assert rows(model) == [2, 2]
    assert other.get_controller(model) is controller and rows(model) == [4, 4]
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert controller.t == 1 and rows(model) == [2, 2]
    assert rows(copy.deepcopy(model)) == [2, 2]


def test_a_meter_counts_a_model_of_the_former_one(other):
    from metering.by_hand import quiet_meter

    model, twin = ssp.convert(make(), 0.5), ssp.convert(make(), 0.5)
    with other.Meter(model, energy=False) as meter, quiet_meter(twin) as wanted:
        for m in (model, twin):
            rows(m)
            torch.optim.SGD(m.parameters(), 0.0).step()
        assert meter.totals.backward_flops == wanted.totals.backward_flops > 0
        assert meter.steps == 1
    assert rows(model) == [4, 4]
    ssp.revert(model)
    assert type(model[0]) is nn.Conv2d


def test_its_schedules_are_schedules_and_its_controllers_are_refused_with_the_reason(other):
    schedule = ssp.BarSchedule(0.5, period=2, interval="step")
    model = other.convert(make(), schedule)
    assert other.get_controller(model).schedule is schedule
    for t in range(3):
        assert other.get_controller(model).t == t
        torch.optim.SGD(model.parameters(), 0.0).step()
    last = ssp.ConstantSchedule(0.25, interval="step")
    assert other.SequentialSchedule([schedule, last], [2])(3) == 0.25
    with pytest.raises(TypeError, match=r"imported again: make a new one"):
        other.convert(make(), controller=ssp.SparsityController(0.5))


def test_compiled_models_of_both(other):
    models = ssp.convert(make(), 0.5), other.convert(make(), 0.75)
    calls = [torch.compile(m, backend="aot_eager") for m in models]
    for _ in range(2):
        assert [rows(m, call) for m, call in zip(models, calls, strict=True)] == [[4, 4], [2, 2]]
    other.convert(models[0], 0.75)
    assert rows(models[0], calls[0]) == [2, 2]


def test_classes_are_made_once_by_each(other):
    """Both may be alive at once; neither takes the other's for its own."""
    one, new = ssp.convert(make(), 0.5), other.convert(make(), 0.5)
    for _ in range(3):
        assert type(ssp.convert(make(), 0.5)[0]) is type(one[0])
        assert type(other.convert(make(), 0.5)[0]) is type(new[0])
    assert type(one[0]) is not type(new[0])


RELOAD = """
import importlib, pickle, sys, warnings, copy
import torch
from torch import nn
import ssprop_patch as ssp
import ssprop_patch.__main__, ssprop_patch.plots, ssprop_patch.functional, ssprop_patch.timing

torch.manual_seed(0)
X = torch.randn(2, 3, 6, 6)
SEQUENCE = [0.5, 0.75]

def make():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))

def rows(model, call=None):
    model.zero_grad()
    (call or model)(X).pow(2).sum().backward()
    return [int(model[i].weight.grad.flatten(1).ne(0).any(1).sum()) for i in (0, 2)]

def steps(package):
    return package.LambdaSchedule(lambda t: SEQUENCE[t % 2], interval="step")

model = ssp.convert(make(), steps(ssp))
compiled_model = ssp.convert(make(), 0.5)
compiled = torch.compile(compiled_model, backend="aot_eager")
assert rows(compiled_model, compiled) == [4, 4]
controller = ssp.get_controller(model)
optimizer = torch.optim.SGD(model.parameters(), 0.0)
names = sorted(n for n in sys.modules if n.startswith("ssprop_patch."))
names = [n for n in names if "plots" not in n or "matplotlib" in sys.modules]
t = 0
for name in ["ssprop_patch", *names, "ssprop_patch"]:
    importlib.reload(sys.modules[name])
    optimizer.step()
    t += 1
    assert controller.t == t, (name, controller.t, t)
    assert rows(model) == [[4, 4], [2, 2]][t % 2], name
    if t % 3 and name != "ssprop_patch":
        continue  # what a module breaks is still broken when the next ones are reloaded
    assert rows(compiled_model, compiled) == [4, 4], name
    assert rows(copy.deepcopy(model)) == rows(model), name
    fresh = ssp.convert(make(), steps(ssp))
    assert rows(fresh) == [4, 4], name
    torch.optim.SGD(fresh.parameters(), 0.0).step()
    assert ssp.get_controller(fresh).t == 1, name
    assert controller.t == t, name
    with ssp.dense(model):
        assert rows(model) == [8, 8], name
    ssp.revert(fresh)
    assert type(fresh[0]) is nn.Conv2d and rows(fresh) == [8, 8], name
    with ssp.converted(fresh, 0.75):
        assert rows(fresh) == [2, 2], name
    assert type(fresh[0]) is nn.Conv2d, name
assert rows(compiled_model, compiled) == [4, 4]
ssp.convert(model, 0.75)
assert rows(model) == [2, 2]
ssp.convert(compiled_model, 0.75)
assert rows(compiled_model, torch.compile(compiled_model, backend="aot_eager")) == [2, 2]
ssp.revert(model)
assert type(model[0]) is nn.Conv2d
print(len(names), "reloaded")
"""


def test_each_module_can_be_reloaded():
    """In a process of its own, as the classes of other tests would be those of before."""
    environment = {**os.environ, "SSPROP_PATCH_NATIVE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", RELOAD], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 40
