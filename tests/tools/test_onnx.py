"""ONNX files of a converted network: the plain one's, and what they compute is the same."""

import itertools
import warnings

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

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

RATE = 0.5
NETWORKS = {"small": small, "own_forwards": own_forwards}


def exported(model, x, file, dynamo):
    with warnings.catch_warnings():  # the older exporter says of itself that it is
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), file, input_names=["x"], output_names=["y"], dynamo=dynamo)
    graph = onnx.load(file)
    onnx.checker.check_model(graph)
    return graph


def operators(graph):
    return [(node.domain, node.op_type) for node in graph.graph.node]


def run(file, x):
    (y,) = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(
        ["y"], {"x": x.numpy()}
    )
    return torch.from_numpy(y)


@pytest.mark.parametrize(
    "name, dynamo, train",
    # the newer exporter takes seconds a file
    [
        ("small", True, True),
        ("own_forwards", True, False),
        *itertools.product(NETWORKS, [False], [True, False]),
    ],
)
def test_the_file_is_that_of_the_plain_network(name, dynamo, train, tmp_path):
    x, make = images(size=16, dtype=torch.float32), NETWORKS[name]
    plain, model = make(torch.float32).train(train), ssp.convert(make(torch.float32), RATE)
    files = [str(tmp_path / "plain.onnx"), str(tmp_path / "converted.onnx")]
    graphs = [
        exported(m, x, file, dynamo)
        for m, file in zip((plain, model.train(train)), files, strict=True)
    ]
    assert operators(graphs[1]) == operators(graphs[0])
    assert {domain for domain, _ in operators(graphs[1])} <= {"", "ai.onnx"}
    assert torch.equal(run(files[1], x), run(files[0], x))
    if not train:  # float32, other kernels
        torch.testing.assert_close(run(files[1], x), model(x).detach(), rtol=1e-4, atol=1e-5)

    assert model.training is train and ssp.is_converted(model)
    assert_equal(gradients(model.eval(), x), gradients(plain.eval(), x))
    assert_trains_sparsely(model.double(), lambda: make(torch.float32).double(), x.double(), RATE)
