"""torch.fx: traced graphs are sparse in training, follow the controller and outlive the model."""

import copy
import gc
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import timm.models
import torch
import torch.fx
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import ssprop_patch as ssp

from .kinds import KINDS, image, kept, make


def tenths(t):
    return min(t, 9) / 10


def by_step():
    return ssp.LambdaSchedule(tenths, interval="step")


def assert_same_in_eval(model, dense):
    for m in (model, dense):
        kept(m.eval(), image(32))
    expected = dict(dense.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, expected[name].grad), name


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
import sys, torch
from tools import kinds as t
for file in sys.argv[1:]:
    print(set(t.kept(torch.load(file, weights_only=False)).values()))
"""


def test_traced_graphs_go_through_files_into_another_process(tmp_path):
    files = [tmp_path / f"{cls.__name__}.pt" for cls in KINDS]
    for cls, file in zip(KINDS, files, strict=True):
        torch.save(torch.fx.symbolic_trace(ssp.convert(make(cls), 0.5)), file)
    child = subprocess.run(
        [sys.executable, "-c", LOAD, *files],
        cwd=Path(__file__).parents[1],
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
