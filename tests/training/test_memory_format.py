"""channels_last: model, input or both; the gradients and their strides."""

import pytest
import torch
from torch import nn

import ssprop_patch as ssp

from .by_hand import batch, compare, net, sgd

LAST = torch.channels_last


def layout(t):
    """The strides that mean something: those along sizes above 1."""
    return [s for n, s in zip(t.shape, t.stride(), strict=True) if n > 1]


def loop(of_model, of_input):
    def train(model):
        if of_model:
            model.to(memory_format=LAST)
        optimizer = sgd(model)
        for i in range(2):
            optimizer.zero_grad()
            images, labels = batch(i)
            if of_input:
                images = images.contiguous(memory_format=LAST)
            images.requires_grad_()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            yield (
                images.grad,
                {
                    "images": layout(images.grad),
                    **{name: layout(p.grad) for name, p in model.named_parameters()},
                },
            )

    return train


@pytest.mark.parametrize("of_model, of_input", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_channels_last(name, of_model, of_input):
    """Values as by hand; strides of the gradients as the dense network has them."""
    model, _ = compare(lambda: net(name), loop(of_model, of_input))
    for p in model.parameters():
        assert layout(p.grad) == layout(p)


@pytest.mark.parametrize("name", ["test_resnet", "test_nfnet"])
def test_channels_last_bit_for_bit(name):
    compare(lambda: net(name), loop(True, True), exact=True)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_the_format_reaches_through_the_network(name):
    """What a layer gets and hands back has the format that it has in the dense network."""

    def formats(model):
        seen = []

        def look(module, args, output):
            seen.append(layout(args[0]))
            output.register_hook(lambda grad: seen.append(layout(grad)))

        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(look)
        images = batch(0)[0].contiguous(memory_format=LAST)
        model(images).square().sum().backward()
        return seen

    dense = net(name).to(memory_format=LAST)
    expected = formats(dense)
    model = ssp.convert(net(name).to(memory_format=LAST), 0.5)
    assert formats(model) == expected


def test_a_model_moved_to_channels_last_in_the_middle_of_training():
    def train(model):
        optimizer = sgd(model)
        for i in range(3):
            images, labels = batch(i)
            if i == 1:
                model.to(memory_format=LAST)
            if i:
                images = images.contiguous(memory_format=LAST)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            yield

    compare(lambda: net("test_resnet"), train, steps=3)


def test_channels_last_3d():
    def make():
        return nn.Sequential(
            nn.Conv3d(3, 8, 3),
            nn.BatchNorm3d(8),
            nn.ReLU(),
            nn.Conv3d(8, 8, 3, groups=8),
            nn.Conv3d(8, 5, 1),
            nn.AdaptiveAvgPool3d(1),
            nn.Flatten(),
        ).double()

    def train(model):
        model.to(memory_format=torch.channels_last_3d)
        optimizer = sgd(model)
        for _ in range(2):
            optimizer.zero_grad()
            clips = torch.randn(2, 3, 6, 7, 8, dtype=torch.float64).requires_grad_()
            clips.data = clips.data.contiguous(memory_format=torch.channels_last_3d)
            model(clips).square().sum().backward()
            optimizer.step()
            yield clips.grad, [layout(p.grad) for p in model.parameters()]

    compare(make, train)
