"""Meetings with tools that look at modules: fx, TorchScript, export, parametrizations, wrappers."""

import copy
import functools
import gc
import inspect
import io
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import timm
import timm.models
import torch
import torch.fx
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torchvision.models.feature_extraction import create_feature_extractor

import ssprop_patch as ssp


class Doubled(nn.Conv2d):
    """A forward of its own, readable by TorchScript."""

    def forward(self, x):
        weight = self.weight * 2
        return F.conv2d(
            x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class ThroughConvForward(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight * 2, self.bias)


class OnlyInit(nn.Conv2d):
    """Stock but for its name: torch.fx traces through it, as it is none of torch's own."""


KINDS = [nn.Conv2d, OnlyInit, Doubled, ThroughConvForward]
OWN = [Doubled, ThroughConvForward]


def tenths(t):
    return min(t, 9) / 10


def by_step():
    return ssp.LambdaSchedule(tenths, interval="step")


def make(cls):
    torch.manual_seed(0)
    return nn.Sequential(cls(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), cls(8, 8, 3))


def image(size=6):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def rows(grad):
    return int(grad.flatten(1).ne(0).any(1).sum())


def kept(model, x=None):
    """Of each 4-d weight the channels that a pass keeps; by name."""
    model.zero_grad()
    out = model(image() if x is None else x)
    out = list(out.values()) if isinstance(out, dict) else out
    out = out if isinstance(out, list) else [out]
    sum(o.pow(2).sum() for o in out).backward()
    return {
        n: rows(p.grad) for n, p in model.named_parameters() if p.dim() == 4 and p.grad is not None
    }


def assert_same_in_eval(model, dense):
    for m in (model, dense):
        kept(m.eval(), image(32))
    expected = dict(dense.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, expected[name].grad), name


# --- torch.fx -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", KINDS)
def test_a_traced_graph_is_sparse_in_training_and_dense_in_eval(cls):
    model = ssp.convert(make(cls), 0.5)
    graph = torch.fx.symbolic_trace(model)
    names = {n for n, p in graph.named_parameters() if p.dim() == 4}
    assert torch.equal(graph(image()), model(image()))
    assert kept(graph) == dict.fromkeys(names, 4)
    assert kept(graph.eval()) == dict.fromkeys(names, 8)
    assert kept(graph.train()) == dict.fromkeys(names, 4)


@pytest.mark.parametrize("cls", KINDS)
def test_a_traced_graph_follows_the_controller(cls):
    model = ssp.convert(make(cls), 0.5)
    controller = ssp.get_controller(model)
    graph = torch.fx.symbolic_trace(model)
    controller.drop_rate = 0.75
    assert set(kept(graph).values()) == {2}
    with ssp.dense(model):
        assert set(kept(graph).values()) == {8}


@pytest.mark.parametrize("cls", KINDS)
def test_a_graph_traced_in_a_dense_epoch_is_sparse_later(cls):
    model = ssp.convert(make(cls), ssp.BarSchedule(0.5))
    graph = torch.fx.symbolic_trace(model)
    assert set(kept(graph).values()) == {8}
    ssp.get_controller(model).step(1)
    assert set(kept(graph).values()) == {4}


@pytest.mark.parametrize("cls", KINDS)
def test_a_traced_graph_outlives_its_model(cls):
    model = ssp.convert(make(cls), by_step())
    controller = ssp.get_controller(model)
    controller.drop_rate = 0.5
    graph = torch.fx.symbolic_trace(model)
    del model
    gc.collect()
    assert set(kept(graph).values()) == {4}
    optimizer = torch.optim.SGD(graph.parameters(), 0.0)
    for _ in range(2):
        optimizer.step()
    assert (controller.t, controller.drop_rate) == (2, 0.2)
    assert set(kept(graph).values()) == {6}
    assert ssp.get_controller(graph) is controller


@pytest.mark.parametrize("cls", KINDS)
def test_a_copy_of_a_traced_graph(cls):
    graph = torch.fx.symbolic_trace(ssp.convert(make(cls), 0.5))
    twin = copy.deepcopy(graph)
    ssp.get_controller(twin).drop_rate = 0.75
    assert set(kept(graph).values()) == {4} and set(kept(twin).values()) == {2}


LOAD = """
import sys, torch, test_tools as t
for file in sys.argv[1:]:
    print(set(t.kept(torch.load(file, weights_only=False)).values()))
"""


def test_traced_graphs_go_through_files_into_another_process(tmp_path):
    files = [tmp_path / f"{cls.__name__}.pt" for cls in KINDS]
    for cls, file in zip(KINDS, files, strict=True):
        torch.save(torch.fx.symbolic_trace(ssp.convert(make(cls), 0.5)), file)
    child = subprocess.run(
        [sys.executable, "-c", LOAD, *files],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == ["{4}"] * len(KINDS)


def test_stock_layers_stay_leaves_of_a_trace():
    model = ssp.convert(torchvision.models.resnet18(num_classes=3), 0.5)
    graph = torch.fx.symbolic_trace(model)
    convolutions = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert convolutions <= {n.target for n in graph.graph.nodes if n.op == "call_module"}
    assert all(graph.get_submodule(n) is model.get_submodule(n) for n in convolutions)


def test_torchvision_feature_extractor():
    model = torchvision.models.resnet18(num_classes=3)
    dense = copy.deepcopy(model)
    ssp.convert(model, 0.75)
    features, expected = (
        create_feature_extractor(m, {"layer1": "low", "layer3": "high"}) for m in (model, dense)
    )
    found = kept(features, image(32))
    widths = {n: m.out_channels for n, m in features.named_modules() if isinstance(m, nn.Conv2d)}
    assert found == {f"{n}.weight": w // 4 for n, w in widths.items()} and len(found) == 15
    expected.load_state_dict(features.state_dict())
    assert_same_in_eval(features, expected)


@pytest.mark.parametrize("delete", [False, True], ids=["model kept", "model deleted"])
def test_timm_feature_extractor_with_own_forwards(delete):
    """tf_efficientnet pads in forwards of its own (Conv2dSame), beside stock layers."""
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_b0", num_classes=3).train()
    own = {n for n, m in model.named_modules() if type(m).__name__ == "Conv2dSame"}
    assert own
    dense = copy.deepcopy(model)
    ssp.convert(model, 0.5)
    features, expected = (
        timm.models.create_feature_extractor(m, ["blocks.2", "blocks.4"]) for m in (model, dense)
    )
    widths = {n: p.shape[0] for n, p in model.named_parameters() if p.dim() == 4}
    if delete:
        del model
        gc.collect()
    found = kept(features, image(32))
    names = {n.split("graph_module.")[-1].removesuffix(".weight") for n in found}
    assert own & names and names - own
    for name, n in found.items():
        width = widths[name.split("graph_module.")[-1]]
        assert n == max(1, int(width * 0.5 + 0.5)), name
    expected.load_state_dict(features.state_dict())
    assert_same_in_eval(features, expected)


# --- TorchScript and export ---------------------------------------------------------------------

script_warnings = pytest.mark.filterwarnings("ignore:.*torch.jit.*")


@script_warnings
@pytest.mark.parametrize("cls", [nn.Conv2d, OnlyInit, Doubled])
def test_scripting_gives_the_dense_network(cls):
    model, dense = ssp.convert(make(cls), 0.5), make(cls)
    scripted = torch.jit.script(model)
    assert "ssprop_patch::" not in str(scripted.inlined_graph)
    for train in (True, False):
        assert torch.equal(scripted.train(train)(image()), model.train(train)(image()))
        assert kept(scripted) == kept(dense.train(train)) == {"0.weight": 8, "3.weight": 8}
    assert set(kept(model.train()).values()) == {4}  # and the model stays converted


@script_warnings
def test_a_scripted_model_goes_through_a_file():
    model = ssp.convert(make(nn.Conv2d), 0.5).eval()
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(image()), model(image()))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@script_warnings
@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize("train", [True, False])
def test_tracing_gives_the_dense_network(cls, train):
    model = ssp.convert(make(cls), 0.5).train(train)
    traced = torch.jit.trace(model, image(), check_trace=False)
    text = str(traced.inlined_graph)
    assert text.count("aten::_convolution") == 2
    assert "ssprop_patch::" not in text and "prim::PythonOp" not in text
    assert torch.equal(traced(image()), model(image()))
    assert set(kept(traced).values()) == {8}
    assert set(kept(model.train()).values()) == {4}


@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize("train", [True, False])
def test_export_gives_the_dense_network(cls, train):
    model = ssp.convert(make(cls), 0.5).train(train)
    exported = torch.export.export(model, (image(),))
    targets = [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]
    # torch 2.6 names the same dense operator aten.convolution
    assert sum(t.startswith(("aten.conv2d", "aten.convolution.")) for t in targets) == 2
    assert not [t for t in targets if "ssprop" in t]
    module = exported.module()
    assert torch.equal(module(image()), model(image()))
    assert set(kept(module).values()) == {8}
    assert set(kept(model.train()).values()) == {4}


# --- what changes the weight --------------------------------------------------------------------

PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
}


def weight_rows(conv):
    """Channels kept, by the gradient of the weight that comes out of the parametrization."""
    with parametrize.cached():
        weight = conv.weight
        weight.retain_grad()
        conv(image()).pow(2).sum().backward()
    return rows(weight.grad)


@pytest.mark.parametrize("put_on", PARAMETRIZATIONS.values(), ids=PARAMETRIZATIONS)
@pytest.mark.parametrize("cls", KINDS)
def test_parametrized_before_conversion(cls, put_on):
    torch.manual_seed(0)
    conv = put_on(cls(3, 8, 3))
    parametrized = type(conv)
    x = conv.eval()(image())
    assert ssp.plan(conv).converted
    ssp.convert(conv, 0.5)
    assert torch.equal(conv(image()), x)
    assert weight_rows(conv.train()) == 4
    assert set(conv.state_dict()) == set(put_on(cls(3, 8, 3)).state_dict())
    assert weight_rows(conv.eval()) == 8
    ssp.revert(conv)
    assert type(conv) is parametrized
    parametrize.remove_parametrizations(conv, "weight")
    assert type(conv) is cls


@pytest.mark.parametrize("put_on", PARAMETRIZATIONS.values(), ids=PARAMETRIZATIONS)
@pytest.mark.parametrize("cls", KINDS)
def test_parametrized_after_conversion(cls, put_on):
    torch.manual_seed(0)
    conv = ssp.convert(cls(3, 8, 3), 0.5)
    put_on(conv)
    assert ssp.is_converted(conv)
    assert weight_rows(conv) == 4
    for refused in (ssp.revert, ssp.convert):
        with pytest.raises(ValueError, match=r"(?s)remove_parametrizations.*then"):
            refused(conv)
    assert weight_rows(conv) == 4
    parametrize.remove_parametrizations(conv, "weight")
    assert ssp.is_converted(conv)
    ssp.revert(conv)
    assert type(conv) is cls


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("put_on", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("cls", KINDS)
def test_norms_by_hooks(cls, put_on, before):
    """The older ones, which compute the weight in a forward pre-hook."""
    torch.manual_seed(0)
    conv = cls(3, 8, 3)
    if before:
        put_on(conv)
    ssp.convert(conv, 0.5)
    if not before:
        put_on(conv)
    y = conv(image())
    conv.weight.retain_grad()  # what the hook made of the parameters behind it
    y.pow(2).sum().backward()
    assert rows(conv.weight.grad) == 4
    ssp.revert(conv)
    assert type(conv) is cls


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("cls", KINDS)
def test_pruning(cls, before):
    torch.manual_seed(0)
    conv = cls(3, 8, 3)
    if before:
        prune.random_unstructured(conv, "weight", 0.5)
    ssp.convert(conv, 0.5)
    if not before:
        prune.random_unstructured(conv, "weight", 0.5)
    conv(image()).pow(2).sum().backward()
    grad = conv.weight_orig.grad
    assert rows(grad) == 4 and not grad[conv.weight_mask == 0].any()
    prune.remove(conv, "weight")
    ssp.revert(conv)
    assert type(conv) is cls and int(conv.weight.eq(0).sum()) == 108


# --- what wraps the forward of an instance ------------------------------------------------------


def wrap_forward(module, calls):
    """As accelerate's hooks: the bound forward of the moment, called by another."""
    old_forward = module.forward

    @functools.wraps(old_forward)
    def new_forward(self, *args, **kwargs):
        calls.append(type(self))
        return old_forward(*args, **kwargs)

    module.forward = functools.update_wrapper(
        functools.partial(new_forward, module), old_forward
    )


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("cls", KINDS)
def test_a_forward_wrapped_in_the_instance(cls, before):
    """What plan says is so: no layer is called converted and stays dense without a word."""
    torch.manual_seed(0)
    conv, calls = cls(3, 8, 3), []
    if before:
        wrap_forward(conv, calls)
    (row,) = ssp.plan(conv)
    # The bound method in the wrapper hides a forward of the class's own from all who come later.
    assert row.action == "convert" or (before and cls in OWN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ssp.convert(conv, 0.5, strict=False)
    if not before:
        wrap_forward(conv, calls)
    assert kept(conv) == {"weight": 4 if row.action == "convert" else 8} and len(calls) == 1
    ssp.revert(conv)
    assert type(conv) is cls
    assert kept(conv) == {"weight": 8} and len(calls) == 2


def test_the_forward_of_the_model_wrapped_in_the_instance():
    model = make(nn.Conv2d)
    calls = []
    wrap_forward(model, calls)
    ssp.convert(model, 0.5)
    assert set(kept(model).values()) == {4}
    del model.forward
    assert set(kept(model).values()) == {4}


# --- tools that ask for the class ---------------------------------------------------------------


@pytest.mark.parametrize("cls", KINDS)
def test_names_documentation_and_signatures_are_the_original_ones(cls):
    original = cls(3, 8, 3)
    conv = ssp.convert(cls(3, 8, 3), 0.5)
    for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(conv), attribute) == getattr(cls, attribute)
    assert isinstance(conv, cls) and issubclass(type(conv), cls)
    assert inspect.signature(conv.forward) == inspect.signature(original.forward)
    assert inspect.signature(conv._conv_forward) == inspect.signature(original._conv_forward)


def test_equal_classes_for_equal_layers():
    """A class for each layer would cost memory, and torch.compile a graph each."""
    model = ssp.convert(make(nn.Conv2d), 0.5)
    again = ssp.convert(make(nn.Conv2d), 0.75)
    assert type(model[0]) is type(model[3]) is type(again[0])
