"""Conversions, copies, meters, compilations, over and over: nothing is left of them."""

import collections
import copy
import gc
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from metering.by_hand import quiet_meter
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim import optimizer as optimizers

import ssprop_patch as ssp
from ssprop_patch import class_swap
from ssprop_patch.metering import optimizer_steps
from ssprop_patch.patching import layers as modules
from ssprop_patch.schedule import settings, step_counter

X = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def make():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1))


@pytest.fixture(autouse=True, scope="module")
def only_what_is_made_here():
    """Leave out what was there before: to look through it all takes seconds each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def train(model):
    model(X).sum().backward()
    torch.optim.SGD(model.parameters(), 0.01).step()


def convert_and_revert(model):
    ssp.revert(ssp.convert(model, 0.5))


def convert_again(model):
    ssp.convert(model, ssp.BarSchedule(0.5, interval="step"))
    train(model)


def fresh(model):
    train(ssp.convert(make(), 0.5))


def deepcopy(model):
    train(copy.deepcopy(ssp.convert(model, 0.5)))


def pickled(model):
    train(pickle.loads(pickle.dumps(ssp.convert(model, 0.5))))


def parametrized(model):
    model = make()
    parametrizations.weight_norm(model[0])
    train(ssp.convert(model, 0.5))
    ssp.revert(model)


def converted(model):
    with ssp.converted(model, 0.5):
        train(model)


def temporary(model):
    ssp.convert(model, 0.5)
    with ssp.sparsity(model, 0.75), ssp.dense(model):
        train(model)


def rates(model):
    controller = ssp.get_controller(ssp.convert(model, 0.5))
    for rate in (0.1, 0.2, 0.3):
        controller.drop_rate = rate
        controller.step()


def metered(model):
    with quiet_meter(ssp.convert(model, 0.5)) as meter:
        train(model)
        meter.report()


def a_meter_that_nobody_closed(model):
    model = ssp.convert(make(), 0.5)
    meter = ssp.Meter(model, energy=False)
    train(model)
    assert meter.steps == 1


def a_class_of_its_own(model):
    class Conv(nn.Conv2d):
        """Made anew each time, as in a notebook."""

        def forward(self, x):
            return nn.functional.conv2d(x, self.weight, self.bias)

    train(ssp.convert(nn.Sequential(Conv(3, 8, 3)), 0.5))


def refused(model):
    with pytest.raises(ValueError):
        ssp.convert(model, 0.5, exclude="nothing like it")
    with pytest.raises(ValueError):
        ssp.convert(nn.Sequential(nn.ReLU()))


def planned(model):
    ssp.plan(model)
    ssp.summary(model, inputs=X, drop_rate=0.5)


ACTIONS = [
    convert_and_revert,
    convert_again,
    fresh,
    deepcopy,
    pickled,
    parametrized,
    converted,
    temporary,
    rates,
    metered,
    a_meter_that_nobody_closed,
    a_class_of_its_own,
    refused,
    planned,
]


def registries():
    """Sizes of what outlives a model, by name."""
    gc.collect()
    ours = {
        f"{module.__name__}.{name}": len(value)
        for module in (step_counter, settings, class_swap, modules, optimizer_steps)
        for name, value in vars(module).items()
        if not name.startswith("__")
        and isinstance(value, (dict, list, set, weakref.WeakSet, weakref.WeakValueDictionary))
    }
    hooks = {
        name: len(value)
        for name, value in vars(optimizers).items()
        if name.startswith("_global_optimizer") and isinstance(value, dict)
    }
    assert ours and hooks
    return ours | hooks


def living():
    """How many objects there are of this package's classes, and of layers' classes."""
    gc.collect()
    counts = collections.Counter()
    for found in gc.get_objects():
        kind = type(found)
        if issubclass(kind, type) and issubclass(found, nn.Module):
            counts["classes of modules"] += 1
        elif str(kind.__module__).startswith("ssprop_patch") or kind is weakref.finalize:
            counts[kind.__qualname__] += 1
        elif issubclass(kind, (nn.Module, torch.optim.Optimizer)):
            counts["modules and optimizers"] += 1
    return counts


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.__name__)
def test_nothing_accumulates(action):
    model = make()
    for _ in range(3):  # what is made once
        action(model)
    objects, sizes = living(), registries()
    for _ in range(30):
        action(model)
    assert registries() == sizes
    assert not living() - objects  # what other tests left may go meanwhile


def test_the_class_of_a_parametrized_layer_goes_with_it():
    model = make()
    parametrizations.weight_norm(model[0])
    plain = weakref.ref(type(model[0]))
    ssp.convert(model, 0.5)
    patched = weakref.ref(type(model[0]))
    assert patched()._ssprop_original is plain()
    ssp.revert(model)
    assert type(model[0]) is plain()
    gc.collect()
    assert patched() is not None  # as long as its class: torch.compile guards on it
    ssp.convert(model, 0.5)
    assert type(model[0]) is patched()
    del model
    gc.collect()
    assert plain() is None and patched() is None


def test_the_patched_class_of_a_class_is_one():
    """Over conversions, copies, pickles, collections, subclasses and threads."""
    from concurrent.futures import ThreadPoolExecutor

    class Conv(nn.Conv2d):
        pass

    class Sub(Conv):
        pass

    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(modules.patched_class, [Conv] * 64))
    assert len(made) == 1
    (patched,) = made
    sub = modules.patched_class(Sub)
    assert sub is not patched and modules.patched_class(Sub) is sub
    kept = weakref.ref(patched)
    del made, patched
    gc.collect()
    assert modules.patched_class(Conv) is kept()


def test_a_class_pickled_by_value_leaves_its_patched_class_behind(tmp_path):
    cloudpickle = pytest.importorskip("cloudpickle")

    class Conv(nn.Conv2d):
        pass

    ssp.revert(ssp.convert(nn.Sequential(Conv(3, 8, 3)), 0.5))
    sent = cloudpickle.dumps(Conv)
    assert b"ssprop_patch." not in sent  # it loads where this package is not installed
    path = tmp_path / "class.pkl"
    path.write_bytes(sent)
    code = (
        "import sys, pickle; cls = pickle.load(open(sys.argv[1], 'rb')); "
        "assert cls.__name__ == 'Conv' and 'ssprop_patch' not in sys.modules; cls(3, 8, 3)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


def test_torchs_own_classes_look_as_before():
    ssp.revert(ssp.convert(make(), 0.5))
    changed = [name for name in vars(nn.Conv2d) if "ssprop" in name]
    assert changed == ["_ssprop_patched"] and not hasattr(nn.Conv2d, "_ssprop_original")
    assert not ssp.is_converted(make())


def test_a_compiled_model_goes():
    def compiled():
        model = ssp.convert(make(), 0.5)
        call = torch.compile(model, backend="aot_eager")
        call(X).sum().backward()
        return weakref.ref(model), weakref.ref(ssp.get_controller(model))

    found = [compiled() for _ in range(3)]
    torch._dynamo.reset()
    gc.collect()
    assert [[ref() for ref in pair] for pair in found] == [[None, None]] * 3
