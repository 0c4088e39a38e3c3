"""convert, revert, converted: what they change, what they leave alone, and what they refuse."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import ssprop_patch as ssp
from ssprop_patch.iterations import Membership

# --- networks and what is asked of them ---------------------------------------------------------


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.norm(self.conv1(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1 = Block(8)
        self.layer2 = Block(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


NAMES = ["stem", "layer1.conv1", "layer1.conv2", "layer2.conv1", "layer2.conv2"]


class Standardised(nn.Conv2d):
    """Weight standardisation in a forward of its own; F.conv2d gets everything by position."""

    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(
            x, w, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class ByKeyword(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(
            input=x, weight=self.weight * 2, bias=self.bias, padding=self.padding, stride=1
        )


class OnlyConvForward(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight * 3, bias)


class ThroughConvForward(nn.Conv2d):
    def forward(self, x, scale=1.0):
        return self._conv_forward(x, self.weight * scale, self.bias)


class OnlyInit(nn.Conv2d):
    """Stock but for its name."""


class WithoutConvolution(nn.Conv2d):
    def forward(self, x):
        return torch.einsum("oihw,nihw->no", self.weight, x)


OWN = [Standardised, ByKeyword, OnlyConvForward, ThroughConvForward]


class Wrapper(nn.Module):
    """As DDP and others: the model one level down, its forward passed through."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)


def image(n=4, size=6):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def make(cls=Net, *args, **kwargs):
    torch.manual_seed(0)
    return cls(*args, **kwargs)


def loss(y):
    return (y * torch.linspace(0.1, 1.0, y[0].numel()).view(y[0].shape)).pow(2).sum()


def backward(model, x=None):
    """One pass; the gradients by name, copied."""
    model.zero_grad()
    loss(model(image() if x is None else x)).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def rows(grad):
    """How many output channels got a gradient."""
    return int(grad.flatten(1).ne(0).any(1).sum())


def all_rows(grads):
    return {n.removesuffix(".weight"): rows(g) for n, g in grads.items() if g.dim() == 4}


def assert_same(grads, others):
    assert grads.keys() == others.keys()
    for name, grad in grads.items():
        assert torch.equal(grad, others[name]), name


def snapshot(model):
    """Every module's class and attributes; equal only if the very same objects are in place."""

    def content(value):
        if isinstance(value, Membership):  # made anew, with the same meaning
            return "membership", value.controller
        return dict(value) if isinstance(value, dict) else value

    return {
        name: (type(m), {k: content(v) for k, v in vars(m).items()})
        for name, m in model.named_modules(remove_duplicate=False)
    }


def optimizer_step(model):
    torch.optim.SGD(model.parameters(), 0.0).step()


# --- what a converted layer does ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "size"), [(nn.Conv1d, (9,)), (nn.Conv2d, (6, 6)), (nn.Conv3d, (4, 4, 4))]
)
def test_stock_layers_keep_the_largest_channels(cls, size):
    model, dense = make(cls, 3, 10, 3), make(cls, 3, 10, 3)
    x = torch.randn(4, 3, *size)
    assert ssp.convert(model, 0.7) is model
    assert torch.equal(model(x), dense(x))

    y = dense(x)
    y.retain_grad()
    loss(y).backward()
    kept = set(y.grad.abs().transpose(0, 1).flatten(1).mean(1).topk(3).indices.tolist())
    grads = backward(model, x)
    for name, p in dense.named_parameters():
        for c in range(10):
            expected = p.grad[c] if c in kept else torch.zeros_like(p.grad[c])
            torch.testing.assert_close(grads[name][c], expected)


@pytest.mark.parametrize("cls", OWN)
def test_own_forwards_are_caught(cls):
    model, dense = (make(cls, 3, 10, 3, padding=1).double() for _ in range(2))
    x = image().double()
    ssp.convert(model, 0.7)
    assert torch.equal(model(x), dense(x))
    grads, expected = backward(model, x), backward(dense, x)
    assert rows(grads["weight"]) == 3 and int(grads["bias"].ne(0).sum()) == 3
    kept = grads["bias"].ne(0)
    # What happened to the weight before the convolution stays in autograd.
    torch.testing.assert_close(grads["weight"][kept], expected["weight"][kept])


def test_own_forward_with_arguments_of_its_own():
    model = make(ThroughConvForward, 3, 10, 3)
    dense = make(ThroughConvForward, 3, 10, 3)(image(), scale=2.0)
    ssp.convert(model, 0.7)
    y = model(image(), scale=2.0)
    assert torch.equal(y, dense)
    loss(y).backward()
    assert rows(model.weight.grad) == 3


def test_a_forward_without_convolution_warns_once_and_stays_dense():
    model, dense = make(WithoutConvolution, 3, 8, 6), make(WithoutConvolution, 3, 8, 6)
    ssp.convert(model, 0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            grads = backward(model)
    assert [w.category for w in caught] == [UserWarning]
    assert "WithoutConvolution" in str(caught[0].message)
    assert_same(grads, backward(dense))


def test_a_forward_without_convolution_does_not_warn_when_dense():
    model = make(WithoutConvolution, 3, 8, 6)
    ssp.convert(model, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(model)


def test_a_convolution_inside_an_own_forward_keeps_its_own_settings():
    """The outer layer's forward runs the inner layer, which has other settings."""

    class Offset(nn.Conv2d):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.excluded = nn.Conv2d(3, 8, 3)
            self.zero = nn.Conv2d(3, 8, 3)
            self.in_eval = nn.Conv2d(3, 8, 3)
            self.inner = nn.Conv2d(3, 8, 3)
            self.own_inner = ByKeyword(3, 8, 3)

        def forward(self, x):
            children = sum(child(x) for child in self.children())
            return F.conv2d(x, self.weight, self.bias) + children

    model = make(Offset, 3, 8, 3)
    ssp.convert(
        model,
        0.5,
        exclude="excluded",
        overrides={"zero": 0.0, "inner": 0.75, "own_inner": 0.75},
    )
    model.in_eval.eval()
    assert {n.split(".")[0]: rows(g) for n, g in backward(model).items() if g.dim() == 4} == {
        "weight": 4, "excluded": 8, "zero": 8, "in_eval": 8, "inner": 2, "own_inner": 2
    }  # fmt: skip


def test_the_root_may_be_a_convolution():
    model = make(nn.Conv2d, 3, 8, 3)
    assert ssp.convert(model, 0.5) is model and ssp.is_converted(model)
    assert rows(backward(model)["weight"]) == 4
    assert ssp.revert(model) is model and type(model) is nn.Conv2d
    assert rows(backward(model)["weight"]) == 8


def test_whole_network_drops_in_every_layer():
    model = make()
    ssp.convert(model, 0.75)
    assert all_rows(backward(model)) == dict.fromkeys(NAMES, 2)


def test_one_output_channel_stays_dense():
    model = nn.Sequential(make(nn.Conv2d, 3, 8, 3), nn.Conv2d(8, 1, 1), nn.Conv1d(4, 1, 1))
    ssp.convert(model, 0.9)
    assert type(model[1]) is nn.Conv2d and type(model[2]) is nn.Conv1d
    loss(model[1](torch.randn(2, 8, 3, 3))).backward()
    assert rows(model[1].weight.grad) == 1


def test_drop_rate_zero_is_bit_identical():
    model, dense = make(), make()
    ssp.convert(model, 0.0)
    assert_same(backward(model), backward(dense))


def test_a_rate_that_keeps_every_channel_is_bit_identical():
    model, dense = make(), make()
    ssp.convert(model, 0.05)  # 7.6 of 8 channels, rounded: 8
    assert_same(backward(model), backward(dense))


def test_eval_gives_the_exact_gradient():
    model, dense = make().eval(), make().eval()
    ssp.convert(model, 0.8)
    assert_same(backward(model), backward(dense))
    assert rows(backward(model.train())["stem.weight"]) == 2


@pytest.mark.parametrize("cls", OWN)
def test_eval_gives_the_exact_gradient_in_own_forwards(cls):
    model, dense = make(cls, 3, 8, 3, padding=1).eval(), make(cls, 3, 8, 3, padding=1).eval()
    ssp.convert(model, 0.8)
    assert_same(backward(model), backward(dense))


def test_a_single_layer_in_eval_is_dense_among_others():
    model = make()
    ssp.convert(model, 0.5)
    model.layer1.conv2.eval()
    assert all_rows(backward(model)) == {**dict.fromkeys(NAMES, 4), "layer1.conv2": 8}


def test_no_grad_and_inference_mode_run():
    model, dense = make(), make()
    ssp.convert(model, 0.8)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(model(image()), dense(image()))


def test_frozen_parameters_get_no_gradient():
    model = make()
    model.stem.requires_grad_(False)
    model.layer1.conv2.weight.requires_grad_(False)
    ssp.convert(model, 0.5)
    grads = backward(model)
    assert not {"stem.weight", "stem.bias", "layer1.conv2.weight"} & grads.keys()
    assert int(grads["layer1.conv2.bias"].ne(0).sum()) == 4


# --- identity, aliases, hooks, wrappers ---------------------------------------------------------


def test_everything_else_stays():
    model = make()
    model.stem.eval()
    model.layer2.conv1.weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    def outside():
        return (
            [(n, id(m), m.training, type(m).__name__, type(m).__module__)
             for n, m in model.named_modules()],
            [(n, id(p), p.requires_grad) for n, p in model.named_parameters()],
            [(n, id(b)) for n, b in model.named_buffers()],
            list(model.state_dict()),
            [id(p) for p in optimizer.param_groups[0]["params"]],
        )  # fmt: skip

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


# --- choosing layers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exclude", "dense"),
    [
        ("stem", ["stem"]),
        ("layer1.conv2", ["layer1.conv2"]),
        ("layer1", ["layer1.conv1", "layer1.conv2"]),
        ("conv1", ["layer1.conv1", "layer2.conv1"]),
        (r"layer\d\.conv2", ["layer1.conv2", "layer2.conv2"]),
        (["stem", "layer2"], ["stem", "layer2.conv1", "layer2.conv2"]),
        ((), []),
        ([], []),
    ],
)
def test_exclude(exclude, dense):
    model = make()
    ssp.convert(model, 0.5, exclude=exclude)
    assert all_rows(backward(model)) == {n: 8 if n in dense else 4 for n in NAMES}
    assert [n for n in NAMES if type(model.get_submodule(n)) is nn.Conv2d] == dense


def test_an_excluded_last_layer_has_the_exact_gradient():
    model, dense = nn.Sequential(make(nn.Conv2d, 3, 8, 3)), nn.Sequential(make(nn.Conv2d, 3, 8, 3))
    for m in (model, dense):
        m.append(make(nn.Conv2d, 8, 8, 3))
    ssp.convert(model, 0.5, exclude="1")
    grads, expected = backward(model), backward(dense)
    assert torch.equal(grads["1.weight"], expected["1.weight"])
    assert rows(grads["0.weight"]) == 4


def test_filter_gets_module_and_name():
    model = make()
    seen = {}

    def keep(module, name):
        seen[name] = module
        return module.kernel_size == (1, 1)

    ssp.convert(model, 0.5, filter_fn=keep)
    assert list(seen) == NAMES
    assert all(model.get_submodule(name) is module for name, module in seen.items())
    assert all_rows(backward(model)) == {n: 4 if n.endswith("conv2") else 8 for n in NAMES}


def test_filter_is_not_asked_about_what_is_dense_anyway():
    model = nn.Sequential(nn.ConvTranspose2d(3, 3, 3), nn.Conv2d(3, 1, 1), nn.Conv2d(1, 4, 1))
    seen = []
    ssp.convert(model, 0.5, filter_fn=lambda module, name: seen.append(name) or True)
    assert seen == ["2"]


def test_overrides():
    model = make()
    ssp.convert(
        model,
        ssp.StepSchedule([0.0, 0.5], milestones=[1]),
        overrides={"layer1": 0.75, "stem": 0.0, "conv1": 0.25},
    )
    controller = ssp.get_controller(model)
    assert all_rows(backward(model)) == dict.fromkeys(NAMES, 8)  # dense: nobody's own rate counts
    controller.step(1)
    own = {"stem": 8, "layer1.conv1": 2, "layer1.conv2": 2, "layer2.conv1": 6, "layer2.conv2": 4}
    assert all_rows(backward(model)) == own  # of two patterns the first counts
    controller.drop_rate = 0.875
    assert all_rows(backward(model)) == {**own, "layer2.conv2": 1}
    with ssp.dense(model):
        assert all_rows(backward(model)) == dict.fromkeys(NAMES, 8)


def test_the_first_pattern_that_matches_counts():
    for overrides in ({"layer1": 0.75, "conv1": 0.25}, {"conv1": 0.25, "layer1": 0.75}):
        model = make()
        ssp.convert(model, 0.5, overrides=overrides)
        kept = 8 * (1 - next(iter(overrides.values())))
        assert all_rows(backward(model))["layer1.conv1"] == kept


@pytest.mark.parametrize("selection", ["l1", "l2", "random", lambda dy: -dy.abs().sum((0, 2, 3))])
@pytest.mark.parametrize("cls", [nn.Conv2d, Standardised])
def test_selection_reaches_the_layers(selection, cls):
    model = make(cls, 3, 8, 6)
    ssp.convert(model, 0.75, selection=selection)
    ssp.get_controller(model).manual_seed(3)
    # Channel 0 has one large entry, channel 1 many middling ones, the others next to nothing.
    dy = torch.full((4, 8, 1, 1), 1e-3) * torch.arange(1, 9).view(-1, 1, 1)
    dy[0, 0], dy[:, 1], dy[:, 2] = 3.0, 1.0, 0.9

    def kept():
        model.zero_grad()
        model(image()).backward(dy)
        return model.weight.grad.flatten(1).ne(0).any(1).nonzero().flatten().tolist()

    if selection == "l1":
        assert kept() == [1, 2]
    elif selection == "l2":
        assert kept() == [0, 1]
    elif selection == "random":
        draws = [kept() for _ in range(12)]
        assert {len(d) for d in draws} == {2} and len({tuple(d) for d in draws}) > 4
        ssp.get_controller(model).manual_seed(3)
        assert [kept() for _ in range(12)] == draws
    else:
        assert kept() == [3, 4]


def test_random_selection_leaves_the_default_generator_alone():
    model = make(nn.Conv2d, 3, 8, 3)
    ssp.convert(model, 0.5, selection="random")
    state = torch.get_rng_state()
    backward(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_one_controller_for_two_models():
    generator, discriminator = make(), make()
    controller = ssp.SparsityController(0.5)
    for model in (generator, discriminator):
        ssp.convert(model, controller=controller)
        assert ssp.get_controller(model) is controller
    assert ssp.get_controller(nn.ModuleList([generator, discriminator])) is controller
    controller.drop_rate = 0.75
    for model in (generator, discriminator):
        assert all_rows(backward(model)) == dict.fromkeys(NAMES, 2)
    ssp.revert(generator)
    assert all_rows(backward(discriminator)) == dict.fromkeys(NAMES, 2)


# --- again, and back ----------------------------------------------------------------------------


def test_converting_twice_is_converting_once_with_the_new_arguments():
    model, once = make(), make()
    counting = ssp.LambdaSchedule(lambda t: 0.25, interval="step")
    ssp.convert(model, counting, exclude="layer1", overrides={"stem": 0.5}, selection="l2")
    old = ssp.get_controller(model)
    for m in (model, once):
        ssp.convert(m, 0.75, exclude="stem", overrides={"layer2": 0.5})
    assert_same(backward(model), backward(once))
    assert {n: type(m) for n, m in model.named_modules()} == {
        n: type(m) for n, m in once.named_modules()
    }
    assert ssp.get_controller(model) is not old
    optimizer_step(model)
    assert old.t == 0  # it has nothing left to count
    ssp.revert(model)
    assert type(model.layer1.conv1) is nn.Conv2d


def test_converting_again_with_the_same_controller():
    model = make()
    ssp.convert(model, ssp.LambdaSchedule(lambda t: 0.1 * t, interval="step"))
    controller = ssp.get_controller(model)
    optimizer_step(model)
    ssp.convert(model, controller=controller, exclude="stem")
    assert ssp.get_controller(model) is controller
    optimizer_step(model)
    assert controller.t == 2


def test_a_part_with_a_schedule_of_its_own():
    model = make()
    counting = ssp.LambdaSchedule(lambda t: 0.5, interval="step")
    ssp.convert(model, counting)
    whole = ssp.get_controller(model)
    ssp.convert(model.layer2, 0.75)
    part = ssp.get_controller(model.layer2)
    assert part is not whole and ssp.get_controller(model.layer1) is whole
    with pytest.raises(ValueError, match="2 controllers"):
        ssp.get_controller(model)
    assert all_rows(backward(model)) == {n: 2 if n.startswith("layer2") else 4 for n in NAMES}
    optimizer_step(model)
    assert whole.t == 1
    ssp.revert(model.layer2)
    assert ssp.get_controller(model) is whole


def test_revert_restores_every_module_exactly():
    model = make()
    model.own = make(Standardised, 3, 8, 3)
    model.normed = parametrizations.weight_norm(make(nn.Conv2d, 3, 8, 3))
    before = snapshot(model)
    ssp.convert(model, 0.5, overrides={"stem": 0.25}, selection="random")
    assert snapshot(model) != before
    model.zero_grad()
    loss(model(image())).backward()
    assert ssp.revert(model) is model
    assert snapshot(model) == before
    ssp.revert(model)
    assert snapshot(model) == before


def test_revert_of_a_part():
    model = make()
    ssp.convert(model, 0.5)
    ssp.revert(model.layer1)
    assert all_rows(backward(model)) == {n: 8 if "layer1" in n else 4 for n in NAMES}


def test_revert_of_a_model_that_was_never_converted():
    model = make()
    before = snapshot(model)
    ssp.revert(model)
    assert snapshot(model) == before


def test_a_reverted_model_is_dense_and_no_longer_counts():
    model, dense = make(), make()
    ssp.convert(model, ssp.LambdaSchedule(lambda t: 0.5, interval="step"))
    controller = ssp.get_controller(model)
    ssp.revert(model)
    assert_same(backward(model), backward(dense))
    optimizer_step(model)
    assert controller.t == 0


def test_a_forward_before_revert_goes_back_sparse():
    model = make()
    ssp.convert(model, 0.5)
    out = loss(model(image()))
    ssp.revert(model)
    out.backward()
    assert rows(model.stem.weight.grad) == 4


# --- converted(...) -----------------------------------------------------------------------------


def test_converted_as_context_manager():
    model = make()
    before = snapshot(model)
    with ssp.converted(model, 0.5, exclude="stem") as inside:
        assert inside is model
        assert all_rows(backward(model)) == {**dict.fromkeys(NAMES, 4), "stem": 8}
    assert snapshot(model) == before


def test_converted_takes_the_schedule_by_name():
    model = make()
    with ssp.converted(model, schedule=0.75):
        assert ssp.get_controller(model).drop_rate == 0.75


def test_converted_as_decorator():
    model = make()

    @ssp.converted(model, 0.5)
    def passes(n):
        return [all_rows(backward(model))["stem"] for _ in range(n)]

    assert not ssp.is_converted(model)
    for n in (1, 2):
        assert passes(n) == [4] * n
        assert not ssp.is_converted(model)


def test_converted_on_exception():
    model = make()
    before = snapshot(model)
    with pytest.raises(KeyError), ssp.converted(model, 0.5):
        raise KeyError
    assert snapshot(model) == before


def test_converted_nests_and_gives_an_earlier_conversion_back():
    model = make()
    ssp.convert(model, ssp.LambdaSchedule(lambda t: 0.5, interval="step"), overrides={"stem": 0.25})
    controller = ssp.get_controller(model)
    before, grads = snapshot(model), all_rows(backward(model))
    with pytest.raises(KeyError), ssp.converted(model, 0.75, exclude="layer1"):
        inner = ssp.get_controller(model)
        with ssp.converted(model, 0.875):
            assert all_rows(backward(model)) == dict.fromkeys(NAMES, 1)
        assert ssp.get_controller(model) is inner
        assert all_rows(backward(model)) == {n: 8 if "layer1" in n else 2 for n in NAMES}
        optimizer_step(model)
        assert controller.t == 0  # not in force, so it does not count
        raise KeyError
    assert snapshot(model) == before
    assert all_rows(backward(model)) == grads
    optimizer_step(model)
    assert controller.t == 1


def test_converted_with_bad_arguments_changes_nothing():
    model = make()
    ssp.convert(model, 0.5)
    before = snapshot(model)
    with pytest.raises(ValueError, match="drop_rate"), ssp.converted(model, 1.5):
        pytest.fail("never entered")
    assert snapshot(model) == before


# --- strict, and other refusals -----------------------------------------------------------------


def no_convolution():
    return nn.Sequential(nn.Linear(3, 3), nn.ConvTranspose2d(3, 3, 1), nn.Conv2d(3, 1, 1))


@pytest.mark.parametrize("model", [nn.Linear(2, 2), no_convolution()], ids=["none", "only dense"])
def test_strict(model):
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"(?s)nothing to convert.*strict=False"):
        ssp.convert(model, 0.5)
    assert snapshot(model) == before
    with pytest.warns(UserWarning, match="nothing to convert") as caught:
        assert ssp.convert(model, 0.5, strict=False) is model
    assert len(caught) == 1 and caught[0].filename == __file__
    assert snapshot(model) == before and not ssp.is_converted(model)


def test_strict_says_why_each_layer_stays_dense():
    with pytest.raises(ValueError, match=r"(?s)transposed.*one output channel"):
        ssp.convert(no_convolution())


def test_nothing_left_to_convert_keeps_an_earlier_conversion_under_strict():
    model = make()
    ssp.convert(model, 0.5)
    before = snapshot(model)
    with pytest.raises(ValueError, match="nothing to convert"):
        ssp.convert(model, 0.5, filter_fn=lambda module, name: False)
    assert snapshot(model) == before
    with pytest.warns(UserWarning, match="nothing to convert"):
        ssp.convert(model, 0.5, filter_fn=lambda module, name: False, strict=False)
    assert not ssp.is_converted(model)


def bad_filter(module, name):
    if name == "layer2.conv1":
        raise RuntimeError("filter broke")
    return True


BAD = {
    "rate 1": (dict(schedule=1.0), ValueError, "1.0"),
    "rate below 0": (dict(schedule=-0.1), ValueError, "-0.1"),
    "rate nan": (dict(schedule=math.nan), ValueError, "nan"),
    "rate in percent": (dict(schedule=80), ValueError, "0.8"),
    "rate as text": (dict(schedule="0.5"), TypeError, "0.5"),
    "rate as bool": (dict(schedule=True), TypeError, "True"),
    "rate None": (dict(schedule=None), TypeError, "None"),
    "schedule class": (dict(schedule=ssp.BarSchedule), TypeError, "BarSchedule"),
    "schedule nan at 0": (dict(schedule=lambda t: math.nan), ValueError, "nan"),
    "schedule text at 0": (dict(schedule=lambda t: "0.5"), TypeError, "0.5"),
    "schedule 1 at 0": (dict(schedule=lambda t: 1.0), ValueError, "t=0"),
    "steps 0": (dict(steps_per_epoch=0), ValueError, "steps_per_epoch"),
    "steps float": (dict(steps_per_epoch=10.0), TypeError, "steps_per_epoch"),
    "steps bool": (dict(steps_per_epoch=True), TypeError, "steps_per_epoch"),
    "override 1": (dict(overrides={"stem": 1.0}), ValueError, "stem"),
    "override nan": (dict(overrides={"stem": math.nan}), ValueError, "stem"),
    "override text": (dict(overrides={"stem": "0.5"}), TypeError, "stem"),
    "selection": (dict(selection="l3"), ValueError, "l3.*|.*random"),
    "selection type": (dict(selection=3), TypeError, "int"),
    "exclude typo": (dict(exclude="layer1.conv3"), ValueError, "layer1.conv"),
    "exclude among others": (dict(exclude=["stem", "layer9"]), ValueError, "layer9"),
    "exclude number": (dict(exclude=[1]), TypeError, "1"),
    "exclude empty": (dict(exclude=""), ValueError, "''"),
    "exclude no regex": (dict(exclude="layer1.(conv"), ValueError, "layer1"),
    "override typo": (dict(overrides={"stern": 0.5}), ValueError, "'stem'"),
    "controller type": (dict(controller="none"), TypeError, "controller"),
    "controller and schedule": (
        dict(controller=ssp.SparsityController(0.5), schedule=0.5), ValueError, "controller",
    ),
    "controller and steps": (
        dict(controller=ssp.SparsityController(0.5), steps_per_epoch=2), ValueError, "controller",
    ),
    "filter": (dict(filter_fn=bad_filter), RuntimeError, "filter broke"),
}  # fmt: skip


@pytest.mark.parametrize("already", [False, True], ids=["fresh", "converted before"])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_change_nothing(case, already):
    arguments, error, text = BAD[case]
    model = make()
    if already:
        ssp.convert(model, 0.5, exclude="layer1")
    before = snapshot(model)
    with pytest.raises(error, match=f"(?s){text}"):
        ssp.convert(model, **arguments)
    assert snapshot(model) == before


@pytest.mark.parametrize("function", [ssp.convert, ssp.revert, ssp.plan])
def test_not_a_module(function):
    with pytest.raises(TypeError, match=r"nn.Module"):
        function("resnet50")


def test_a_pattern_that_matches_nothing_names_the_nearest():
    with pytest.raises(ValueError) as caught:
        ssp.convert(make(), exclude="layer2.conv_1")
    assert "'layer2.conv_1'" in str(caught.value) and "'layer2.conv1'" in str(caught.value)
    assert "'stem'" not in str(caught.value)
    with pytest.raises(ValueError, match="no layer to convert"):
        ssp.convert(nn.Linear(2, 2), exclude="x")


def test_lazy_convolutions_are_refused():
    model = nn.Sequential(make(), nn.LazyConv2d(4, 3))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"(?s)nothing was changed.*1: lazy.*forward"):
        ssp.convert(model)
    assert snapshot(model) == before
    ssp.revert(model)  # nothing on it: nothing to refuse
    model[1](torch.randn(1, 3, 4, 4))
    ssp.convert(model, 0.5)
    assert rows(backward(model[1])["weight"]) == 2


def test_a_parametrization_put_on_after_conversion():
    model = make()
    ssp.convert(model, 0.5)
    parametrizations.weight_norm(model.layer1.conv1)
    before = snapshot(model)
    for again in (ssp.revert, ssp.convert):
        with pytest.raises(ValueError, match=r"(?s)layer1.conv1.*remove_parametrizations.*then"):
            again(model)
        assert snapshot(model) == before
    grads = backward(model)
    assert all_rows({"stem": grads["stem.weight"]}) == {"stem": 4}
    assert rows(grads["layer1.conv1.parametrizations.weight.original1"]) == 4
    ssp.revert(model.layer2)  # where nothing is in the way
    parametrize.remove_parametrizations(model.layer1.conv1, "weight")
    ssp.revert(model)
    assert not ssp.is_converted(model) and type(model.layer1.conv1) is nn.Conv2d


class Stubborn(nn.Conv2d):
    stubborn = True

    def __setattr__(self, name, value):
        if name == "__class__" and self.stubborn:
            raise TypeError("__class__ is mine")
        super().__setattr__(name, value)


@pytest.mark.parametrize("already", [False, True], ids=["fresh", "converted before"])
def test_a_class_that_cannot_be_replaced_leaves_every_layer_as_it_was(already):
    model = make()
    model.layer1.conv2 = Stubborn(8, 8, 1)
    if already:
        ssp.convert(model, 0.5, exclude=["layer1.conv2", "stem"])
        old = ssp.get_controller(model)
    before = snapshot(model)
    with pytest.raises(TypeError, match="__class__ is mine"):
        ssp.convert(model, 0.75, exclude="layer2")
    assert snapshot(model) == before
    if already:
        assert ssp.get_controller(model) is old
        assert all_rows(backward(model)) == {
            n: 8 if n in ("stem", "layer1.conv2") else 4 for n in NAMES
        }
        ssp.convert(model, 0.75, exclude="layer1.conv2")  # goes on without it


def test_revert_rolls_back_too():
    model = make()
    model.layer1.conv2 = Stubborn(8, 8, 1)
    model.layer1.conv2.stubborn = False
    ssp.convert(model, 0.5)
    model.layer1.conv2.stubborn = True
    before = snapshot(model)
    with pytest.raises(TypeError, match="is mine"):
        ssp.revert(model)
    assert snapshot(model) == before
    assert all_rows(backward(model)) == dict.fromkeys(NAMES, 4)
