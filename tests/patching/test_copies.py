"""reverted_copy: what is saved whole loads without this package, and as safely as if plain."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.serialization import get_unsafe_globals_in_checkpoint

import ssprop_patch as ssp


def plain():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.Flatten(),
        nn.Linear(128, 4),
    )


def images():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def step(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(images()).pow(2).mean().backward()
    optimizer.step()
    return model


def assert_nothing_of_ours(model):
    for module in model.modules():
        assert not [name for name in vars(module) if "ssprop" in name]
        assert not [cls for cls in type(module).__mro__ if "ssprop" in cls.__module__]
    assert b"ssprop" not in pickle.dumps(model)


def test_the_copy_is_plain_and_the_original_goes_on():
    model = step(ssp.convert(plain(), ssp.BarSchedule(0.5), steps_per_epoch=1))
    controller = ssp.get_controller(model)
    shipped = ssp.reverted_copy(model)
    assert [type(m) for m in shipped] == [type(m) for m in plain()]
    assert_nothing_of_ours(shipped)
    torch.testing.assert_close(shipped.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert ssp.is_converted(model) and ssp.get_controller(model) is controller
    assert controller.t == 1
    step(shipped)  # counts for nobody
    assert controller.t == 1 and controller.drop_rate == 0.5
    step(model)
    assert controller.t == 2
    assert not torch.equal(shipped[0].weight, model[0].weight)


def test_the_files_are_those_of_a_plain_model(tmp_path):
    model = ssp.convert(plain(), 0.5).eval()
    torch.save(plain().eval(), tmp_path / "plain.pt")
    torch.save(ssp.reverted_copy(model), tmp_path / "shipped.pt")
    wanted = get_unsafe_globals_in_checkpoint(tmp_path / "plain.pt")
    assert get_unsafe_globals_in_checkpoint(tmp_path / "shipped.pt") == wanted
    paths = [str(tmp_path / "plain.pt"), str(tmp_path / "shipped.pt")]
    code = f"""
import sys
sys.modules["ssprop_patch"] = None  # importing it is an error
import torch
from torch.serialization import safe_globals, get_unsafe_globals_in_checkpoint
from importlib import import_module
names = (name.rpartition(".") for name in {wanted!r})
with safe_globals([getattr(import_module(module), name) for module, _, name in names]):
    models = [torch.load(p, weights_only=True) for p in {paths!r}]
x = torch.ones(2, 3, 8, 8)
assert torch.equal(models[0](x), models[1](x))
print("loaded")
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert out.stdout.strip() == "loaded", out.stderr


def test_the_hooks_of_a_meter_stay_behind_and_others_go_along():
    model, seen = ssp.convert(plain(), 0.5), []
    handle = model[0].register_forward_hook(lambda *_: seen.append("mine"))
    meter = ssp.Meter(model)
    shipped = ssp.reverted_copy(model)
    assert list(shipped[0]._forward_hooks) == [handle.id]
    shipped(images())
    assert seen == ["mine"]
    assert not shipped[0]._forward_hooks_with_kwargs
    model(images()).sum().backward()
    assert meter.report().layers[0].totals.forwards == 1  # it still counts in the original
    handle.remove()
    meter.close()
    assert_nothing_of_ours(ssp.reverted_copy(model))


class Uncopiable:
    """A schedule that holds what cannot be copied, such as a file or a process group."""

    def __call__(self, t):
        return 0.5

    def __deepcopy__(self, memo):
        raise TypeError("not to be copied")


class UncopiableScores(Uncopiable):
    def __call__(self, dy):
        return dy.abs().sum((0, 2, 3))


def test_schedules_and_scores_need_not_be_copiable():
    model = ssp.convert(plain(), Uncopiable(), selection=UncopiableScores())
    with pytest.raises(TypeError, match="not to be copied"):
        copy.deepcopy(model)
    assert_nothing_of_ours(ssp.reverted_copy(model))
    assert ssp.get_controller(model).drop_rate == 0.5


def test_a_model_that_is_not_converted_is_copied():
    model = plain()
    shipped = ssp.reverted_copy(model)
    assert shipped is not model and torch.equal(shipped[0].weight, model[0].weight)
    with pytest.raises(TypeError, match=r"nn\.Module"):
        ssp.reverted_copy("model.pt")


def test_of_a_compiled_model_the_model():
    model = ssp.convert(plain(), 0.5)
    shipped = ssp.reverted_copy(torch.compile(model, backend="eager"))
    assert type(shipped) is nn.Sequential
    assert_nothing_of_ours(shipped)
    model.compile(backend="eager")
    assert_nothing_of_ours(ssp.reverted_copy(model))


def test_of_a_distributed_model_the_model(tmp_path):
    meet = f"file://{tmp_path}/rendezvous"
    dist.init_process_group("gloo", init_method=meet, rank=0, world_size=1)
    try:
        for wrap in (DistributedDataParallel, DataParallel):
            wrapped = wrap(ssp.convert(plain(), 0.5))
            shipped = ssp.reverted_copy(torch.compile(wrapped, backend="eager"))
            assert type(shipped) is nn.Sequential
            assert_nothing_of_ours(shipped)
            assert ssp.is_converted(wrapped)
    finally:
        dist.destroy_process_group()


def test_of_an_averaged_model_the_whole():
    model = ssp.convert(plain(), 0.5)
    average = AveragedModel(model)
    average.update_parameters(model)
    shipped = ssp.reverted_copy(average)
    assert type(shipped) is AveragedModel and shipped.n_averaged == 1
    assert not ssp.is_converted(shipped) and ssp.is_converted(average)
    assert_nothing_of_ours(shipped.module)


def test_what_was_put_on_after_conversion_has_to_come_off_first():
    model = ssp.convert(plain(), 0.5)
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(ValueError, match="remove_parametrizations"):
        ssp.reverted_copy(model)
    assert ssp.is_converted(model)
