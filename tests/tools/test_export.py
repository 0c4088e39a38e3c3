"""What leaves the process (torch.export, TorchScript) is the dense network; the model stays."""

import io

import pytest
import torch

import ssprop_patch as ssp

from .networks import (
    assert_equal,
    assert_trains_sparsely,
    gradients,
    images,
    own_forwards,
    small,
)

RATE = 0.5
NETWORKS = {"small": small, "own_forwards": own_forwards}

# With torch 2.6, which does not say that it exports, one has to be in eval mode: docs/limits.md.
MODES = [False, True] if hasattr(torch.compiler, "is_exporting") else [False]


def calls(exported):
    """Every operator with its inputs by name: the graph, but for object identities."""
    return [
        (str(n.target), str(n.args), str(n.kwargs))
        for n in exported.graph.nodes
        if n.op == "call_function"
    ]


def export(model, x, **kwargs):
    return torch.export.export(model, (x,), **kwargs)


@pytest.mark.parametrize("train", MODES)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_exported_graph_is_that_of_the_plain_network(name, strict, train):
    x, make = images(size=16), NETWORKS[name]
    plain, model = make().train(train), ssp.convert(make(), RATE).train(train)
    expected, found = export(plain, x, strict=strict), export(model, x, strict=strict)
    assert calls(found) == calls(expected)
    assert model.training is train and ssp.is_converted(model)
    assert_equal(gradients(found.module(), x), gradients(expected.module(), x))
    assert_trains_sparsely(model, make, x, RATE)


def test_an_export_with_dynamic_sizes_goes_through_a_file():
    model = ssp.convert(small(), RATE).eval()
    shapes = ({0: torch.export.Dim("n", min=2, max=64)},)
    found = export(model, images(3), dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(found, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for n in (2, 5):
        torch.testing.assert_close(loaded(images(n)), model(images(n)), rtol=1e-12, atol=1e-14)


def test_core_operators_are_all_that_is_left_after_decomposition():
    """What a backend (ExecuTorch, TensorRT, CoreML) gets to see."""
    for train in MODES:
        model = ssp.convert(small(), RATE).train(train)
        found = export(model, images()).run_decompositions()
        targets = {str(n.target) for n in found.graph.nodes if n.op == "call_function"}
        assert {t for t in targets if "conv" in t} == {"aten.convolution.default"}
        assert not [t for t in targets if "ssprop" in t]


def test_the_module_of_an_export_is_trained_densely():
    """It has no controller; to train sparsely, train the model that was exported."""
    x, train = images(), MODES[-1]
    module = export(ssp.convert(small(), RATE).train(train), x).module()
    assert not ssp.is_converted(module)
    assert_equal(gradients(module, x), gradients(export(small().train(train), x).module(), x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_a_scripted_network_is_optimized_for_inference():
    x = images()
    plain, model = small().eval(), ssp.convert(small(), RATE).eval()
    found, expected = (
        torch.jit.optimize_for_inference(torch.jit.script(m)) for m in (model, plain)
    )
    assert torch.equal(found(x), expected(x))
    assert ssp.is_converted(model)
    assert_trains_sparsely(model, small, x, RATE)
