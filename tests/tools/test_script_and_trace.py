"""TorchScript, tracing and export give the dense network."""

import io

import pytest
import torch
import torch.fx
from torch import nn

import ssprop_patch as ssp

from .kinds import KINDS, Doubled, OnlyInit, image, kept, make

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
