"""Features of a converted network: what is trained through them is sparse, as the oracle says."""

import contextlib

import pytest
import torch
from timm.models import create_feature_extractor as timm_extractor
from torchvision.models import resnet18
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import ssprop_patch as ssp

from .networks import (
    assert_equal,
    assert_same,
    from_timm,
    gradients,
    images,
    oracle_gradients,
)

RATE = 0.6
# Stock layers alone; "same" padding; standardised weights in blocks that timm does not let
# torch.fx trace, and in a stem that it does; depthwise ones.
NAMES = ["test_resnet", "test_efficientnet", "test_nfnet", "test_convnext"]


def stages(model):
    """Names of the modules that give the last two features."""
    info = model.feature_info
    return [row["module"] for row in getattr(info, "info", info)][-2:]


def by_hooks(model, names):
    """The outputs of some modules, caught as the whole network runs: knows nothing of tools."""

    def call(x):
        found = {}
        with contextlib.ExitStack() as stack:
            for name in names:
                handle = model.get_submodule(name).register_forward_hook(
                    lambda m, args, out, name=name: found.update({name: out})
                )
                stack.callback(handle.remove)
            model(x)
        return [found[name] for name in names]

    return call


def torchvision_resnet():
    torch.manual_seed(0)
    return resnet18(num_classes=3).double()


@pytest.mark.parametrize("name", NAMES)
def test_timm_features_only(name):
    x = images(size=32)
    expected = oracle_gradients(from_timm(name, features_only=True), x, RATE)
    model = ssp.convert(from_timm(name, features_only=True), RATE)
    assert_same(gradients(model, x), expected)


@pytest.mark.parametrize("kind", ["hook", "fx", "getter", "dict"])
def test_the_other_ways_in_which_timm_takes_features(kind):
    x = images(size=64)
    arguments = dict(features_only=True, feature_cls=kind, out_indices=(1, 3))
    expected = oracle_gradients(from_timm("test_resnet", **arguments), x, RATE)
    model = ssp.convert(from_timm("test_resnet", **arguments), RATE)
    assert_same(gradients(model, x), expected)


@pytest.mark.parametrize("name", NAMES)
def test_timm_forward_intermediates(name):
    x, plain = images(size=32), from_timm(name)
    expected = oracle_gradients(plain, x, RATE, plain.forward_intermediates)
    model = ssp.convert(from_timm(name), RATE)
    assert_same(gradients(model, x, model.forward_intermediates), expected)


@pytest.mark.parametrize("name", NAMES)
def test_timm_extractor_of_a_converted_model(name):
    x, plain, model = images(size=32), from_timm(name), ssp.convert(from_timm(name), RATE)
    names = stages(model)
    expected = oracle_gradients(plain, x, RATE, by_hooks(plain, names))
    assert_same(gradients(model, x, timm_extractor(model, names)), expected)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_timm_extractor_that_is_converted_itself(name):
    x, plain, model = images(size=32), from_timm(name), from_timm(name)
    names = stages(model)
    expected = oracle_gradients(plain, x, RATE, by_hooks(plain, names))
    extractor = ssp.convert(timm_extractor(model, names), RATE)
    assert_same(gradients(model, x, extractor), expected)
    ssp.revert(extractor)
    assert_equal(gradients(model, x, extractor), gradients(plain, x, timm_extractor(plain, names)))


def test_layers_that_a_tracer_took_apart_before_conversion_are_layers_no_more():
    """Stem and last layer of an NFNet: functions in a graph. The plan lists the rest."""
    x, model = images(size=32), from_timm("test_nfnet")
    names = stages(model)
    whole = {row.name for row in ssp.plan(model)}
    extractor = timm_extractor(model, names)
    apart = whole - {row.name for row in ssp.plan(extractor)}
    assert {name.split(".")[0] for name in apart} == {"stem", "final_conv"}
    ssp.convert(extractor, RATE)

    # As the whole network with these left dense.
    expected = ssp.convert(from_timm("test_nfnet"), RATE, exclude=sorted(apart))
    assert_same(gradients(model, x, extractor), gradients(expected, x, by_hooks(expected, names)))


RETURNED = {"layer1": "low", "layer2.1.conv2": "inside", "layer3": "high"}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("converted_first", [True, False])
def test_torchvision_extractor(converted_first, train):
    x, plain, model = images(size=32), torchvision_resnet(), torchvision_resnet()
    if converted_first:
        ssp.convert(model, RATE)
    extractor = create_feature_extractor(model, RETURNED)
    if not converted_first:
        ssp.convert(extractor, RATE)
    call = by_hooks(plain.train(train), list(RETURNED))
    found = gradients(model, x, extractor.train(train))
    if train:
        assert_same(found, oracle_gradients(plain, x, RATE, call))
    else:
        assert_equal(found, gradients(plain, x, call))


def test_the_layer_getter_under_the_segmentation_networks():
    x, plain, model = images(size=32), torchvision_resnet(), torchvision_resnet()
    returned = {"layer1": "low", "layer3": "high"}
    body = ssp.convert(IntermediateLayerGetter(model, returned), RATE)
    expected = oracle_gradients(plain, x, RATE, by_hooks(plain, list(returned)))
    found = gradients(model, x, body)
    assert_same(found, expected)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_node_names_stay(name):
    model = from_timm(name)
    before = get_graph_node_names(model)
    assert get_graph_node_names(ssp.convert(model, RATE)) == before
    assert get_graph_node_names(ssp.revert(model)) == before


def test_a_layer_that_writes_its_own_forward_is_one_node():
    """Every name that a converted network offers selects the same tensor of the plain one."""
    model = from_timm("test_nfnet")
    plain = get_graph_node_names(model)[0]
    converted = get_graph_node_names(ssp.convert(model, RATE))[0]
    taken = [name for name in plain if name not in converted]
    own = {n for n, m in model.named_modules() if type(m).__name__ == "ScaledStdConv2d"}
    assert taken and {name.rpartition(".")[0] for name in taken} <= own
    added = [name for name in converted if name not in plain]
    assert added and set(added) <= own
    assert set(added) == {name.rpartition(".")[0] for name in taken}
