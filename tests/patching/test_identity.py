"""What conversion leaves alone: identity, aliases, hooks and wrappers."""

import pytest
import torch
from torch import nn

import ssprop_patch as ssp

from .networks import NAMES, OWN, all_rows, backward, image, loss, make, rows


class OnlyInit(nn.Conv2d):
    """Stock but for its name."""


class Wrapper(nn.Module):
    """As DDP and others: the model one level down, its forward passed through."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)


def test_everything_else_stays():
    model = make()
    model.stem.eval()
    model.layer2.conv1.weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    def outside():
        return (
            [
                (n, id(m), m.training, type(m).__name__, type(m).__module__)
                for n, m in model.named_modules()
            ],
            [(n, id(p), p.requires_grad) for n, p in model.named_parameters()],
            [(n, id(b)) for n, b in model.named_buffers()],
            list(model.state_dict()),
            [id(p) for p in optimizer.param_groups[0]["params"]],
        )

    before = outside()
    ssp.convert(model, 0.5)
    assert outside() == before
    weight = model.stem.weight.detach().clone()
    backward(model)
    optimizer.step()
    assert not torch.equal(model.stem.weight, weight)
    ssp.revert(model)
    assert outside() == before


def test_converted_layers_are_still_instances_of_their_class_and_say_what_they_are():
    model = ssp.convert(make(), 0.5)
    assert isinstance(model.stem, nn.Conv2d)
    assert "sparse backward" in repr(model.stem) and "kernel_size=(3, 3)" in repr(model.stem)
    assert "sparse backward" not in repr(ssp.revert(model))


def test_an_alias_is_one_layer():
    model = make()
    model.alias = model.layer1.conv1
    ssp.convert(model, 0.5, exclude="alias")
    assert all_rows(backward(model)) == {**dict.fromkeys(NAMES, 4), "layer1.conv1": 8}
    ssp.convert(model, 0.5, overrides={"alias": 0.75})
    assert model.alias is model.layer1.conv1
    assert all_rows(backward(model)) == {**dict.fromkeys(NAMES, 4), "layer1.conv1": 2}
    ssp.revert(model)
    assert type(model.alias) is nn.Conv2d


def test_modules_held_in_a_python_list():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
            self.order = [self.convs[2], self.convs[0], self.convs[1]]

        def forward(self, x):
            for conv in self.order:
                x = conv(x)
            return x

    model = make(Listed)
    ssp.convert(model, 0.6)
    assert all_rows(backward(model)) == {"convs.0": 1, "convs.1": 1, "convs.2": 1}
    assert model.order[0] is model.convs[2]


def test_a_shared_module_chooses_anew_in_each_call():
    shared = make(nn.Conv2d, 3, 12, 3)
    apart = nn.ModuleList(make(nn.Conv2d, 3, 12, 3) for _ in range(2))
    x, z = image(), image(size=9) - 1
    for model in (shared, apart):
        ssp.convert(model, 0.75)
    (loss(shared(x)) + loss(-shared(z))).backward()
    (loss(apart[0](x)) + loss(-apart[1](z))).backward()
    torch.testing.assert_close(shared.weight.grad, apart[0].weight.grad + apart[1].weight.grad)
    assert 3 <= rows(shared.weight.grad) <= 6


@pytest.mark.parametrize("cls", [nn.Conv2d, OnlyInit, *OWN])
def test_hooks_survive_and_fire(cls):
    model = make(cls, 3, 8, 3, padding=1)
    fired = []
    model.register_forward_pre_hook(lambda m, args: fired.append("forward_pre"))
    model.register_forward_hook(lambda m, args, out: fired.append("forward"))
    model.register_full_backward_pre_hook(lambda m, gy: fired.append("backward_pre"))
    model.register_full_backward_hook(
        lambda m, gx, gy: fired.append(("backward", gx[0].shape, gy[0].shape))
    )
    model.weight.register_hook(lambda g: fired.append("weight"))

    def passes():
        fired.clear()
        backward(model, image().requires_grad_())
        return sorted(map(str, fired))

    dense = passes()
    assert len(dense) == 5
    ssp.convert(model, 0.5)
    assert passes() == dense
    assert rows(model.weight.grad) == 4
    ssp.revert(model)
    assert passes() == dense


def test_a_forward_hook_may_change_the_output():
    model = make(nn.Conv2d, 3, 8, 3)
    ssp.convert(model, 0.5)
    model.register_forward_hook(lambda m, args, out: out * torch.arange(8.0).view(-1, 1, 1))
    grads = backward(model)
    assert rows(grads["weight"]) == 4 and rows(grads["weight"][:1]) == 0


def test_a_wrapped_model():
    model = make()
    wrapper = Wrapper(model)
    assert ssp.convert(wrapper, 0.5, exclude="module.stem") is wrapper
    assert all_rows(backward(model)) == {**dict.fromkeys(NAMES, 4), "stem": 8}
    assert all_rows(backward(wrapper))["module.layer1.conv1"] == 4
    assert ssp.is_converted(wrapper) and ssp.is_converted(model.layer2)
    ssp.revert(wrapper)
    assert not ssp.is_converted(model)


def test_a_compiled_wrapper_converted_after_it_has_run():
    model = make(nn.Conv2d, 3, 8, 3)
    compiled = torch.compile(model, backend="eager")
    assert rows(_compiled_backward(compiled, model)) == 8
    assert ssp.convert(compiled, 0.5) is compiled
    assert rows(_compiled_backward(compiled, model)) == 4
    ssp.revert(compiled)
    assert rows(_compiled_backward(compiled, model)) == 8
    torch._dynamo.reset()


def _compiled_backward(compiled, model):
    model.zero_grad()
    loss(compiled(image())).backward()
    return model.weight.grad


def test_is_converted():
    model = make()
    assert not ssp.is_converted(model)
    ssp.convert(model.layer1, 0.5)
    assert ssp.is_converted(model) and ssp.is_converted(model.layer1.conv1)
    assert not ssp.is_converted(model.layer2) and not ssp.is_converted(model.stem)


def test_a_new_layer_made_from_the_class_of_a_patched_one_is_an_ordinary_layer():
    """Model surgery: ``type(layer)(...)``."""
    model = make()
    ssp.convert(model, 0.5)
    model.stem = type(model.stem)(3, 8, 3, padding=1)
    assert all_rows(backward(model)) == {**dict.fromkeys(NAMES, 4), "stem": 8}
    ssp.convert(model, 0.75)
    assert all_rows(backward(model)) == dict.fromkeys(NAMES, 2)
    ssp.revert(model)
    assert all_rows(backward(model)) == dict.fromkeys(NAMES, 8)
