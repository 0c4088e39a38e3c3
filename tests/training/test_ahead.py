"""Networks whose channels are chosen ahead, and what their gradients are."""

import copy
import io
import pickle

import pytest
import timm
import torch
from torch import nn

import ssprop_patch as ssp
from ssprop_patch.core import two_resolutions as plain
from ssprop_patch.core.ahead import Scores
from ssprop_patch.core.geometry import ConvParams
from ssprop_patch.core.reference import whole_backward
from ssprop_patch.ops.lazy_grad.gradients import LazyGradient
from ssprop_patch.ops.lazy_grad.two_resolutions import TwoResolutionGradient
from training.ahead_networks import BLOCK, a_network, backward, converted, scores_of

# --- the gradient ------------------------------------------------------------------------------


class Reduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, which):
        ctx.which = which
        return t.clone()

    @staticmethod
    def backward(ctx, dy):
        return plain.reduce(dy, ctx.which, BLOCK).whole(), None


class TwoResolutionConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, params, kept, inputs):
        ctx.save_for_backward(x, w)
        ctx.config = params, kept, inputs
        return torch.conv2d(x, w, None, params.stride, params.padding)

    @staticmethod
    def backward(ctx, dy):
        (x, w), (params, kept, inputs) = ctx.saved_tensors, ctx.config
        g = plain.reduce(dy, kept, BLOCK)
        if inputs is not None:
            dx, dw, _ = plain.conv_backward(g, x, w, params, inputs, BLOCK)
            return dx.whole(), dw, None, None, None
        mask = (ctx.needs_input_grad[0], True, False)
        dx, dw, _ = whole_backward(dy, x, w, params, mask, kept=kept.index, block=BLOCK)
        return dx, dw, None, None, None


def said_with_whole_tensors(model, kept):
    """Return a dense copy of a ResNet that computes the same with gradients that are all formed."""
    expected = ssp.reverted_copy(model)

    def conv(name, inputs):
        module, which = expected.get_submodule(name), kept[name]
        params = ConvParams(module.stride, module.padding, module.dilation, 1)
        read = None if inputs is None else kept[inputs]
        module.forward = lambda x: TwoResolutionConv.apply(x, module.weight, params, which, read)

    def reduced(name, which):
        module = expected.get_submodule(name)
        module.register_forward_hook(lambda m, i, out: Reduced.apply(out, kept[which]))

    conv("conv1", None)
    reduced("bn1", "conv1"), reduced("act1", "conv1")
    before, blocks = "conv1", [n for n, m in expected.named_modules() if hasattr(m, "conv2")]
    for name in blocks:
        first, second = f"{name}.conv1", f"{name}.conv2"
        conv(first, before), reduced(f"{name}.bn1", first), reduced(f"{name}.act1", first)
        conv(second, first)
        shortcut = expected.get_submodule(name).downsample
        if shortcut is not None:
            conv(f"{name}.downsample.0", before)
        if name != blocks[-1]:  # what comes from the pooling is whole
            reduced(f"{name}.bn2", second), reduced(f"{name}.act2", second)
            if shortcut is not None:
                reduced(f"{name}.downsample.1", second)
        before = second
    return expected


@pytest.mark.parametrize("size", [24, 18])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_a_resnet_against_one_whose_gradients_are_all_formed(size, last):
    model = converted(a_network())
    if last:
        model = model.to(memory_format=torch.channels_last)
    for _ in range(4):
        backward(model, size)
    kept = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            k = module._ssprop_policy.kept(module.out_channels)
            kept[name] = scores_of(module).team.kept(k, torch.device("cpu"))
    found = backward(model, size)
    expected = backward(said_with_whole_tensors(model, kept), size)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-11, msg=name.__add__)
    dense = backward(ssp.reverted_copy(model), size)
    assert not torch.allclose(found["layer1.0.conv1.weight"], dense["layer1.0.conv1.weight"])


def test_a_look_is_the_papers_choice_with_the_coarse_remainder():
    model = converted(a_network())
    other = ssp.convert(a_network(), 0.6, remainder="coarse")
    found, expected = backward(model), backward(other)
    for name, grad in found.items():
        assert torch.equal(grad, expected[name]), name


def test_a_resnet_goes_back_in_two_resolutions_as_a_whole(monkeypatch):
    formed, seen = [], []
    form = LazyGradient.form

    def noted(self):
        if isinstance(self, TwoResolutionGradient):
            formed.append(self)
        return form(self)

    model = timm.create_model("resnet50", num_classes=5).train()
    converted(model)
    for _ in range(4):
        model(torch.randn(2, 3, 64, 64)).sum().backward()
    monkeypatch.setattr(LazyGradient, "form", noted)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    for conv in convs:
        conv.weight.register_hook(seen.append)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert not formed and len(seen) == len(convs)


# --- teams and looks ----------------------------------------------------------------------------


def test_layers_whose_outputs_are_added_keep_the_same_channels():
    model = converted(a_network())
    backward(model)
    teams = {
        name: scores_of(m).team for name, m in model.named_modules() if isinstance(m, nn.Conv2d)
    }
    stage = teams["layer2.0.conv2"]
    assert stage is teams["layer2.0.downsample.0"]
    assert stage is not teams["layer2.1.conv2"]  # nothing reads their sum but the pooling
    assert len({id(team) for team in teams.values()}) == len(teams) - 2
    assert teams["layer1.0.conv2"] is teams["conv1"] or model.layer1[0].downsample is not None


@pytest.mark.parametrize("interval", [1, 3])
def test_looks(interval):
    model = converted(a_network(), look_interval=interval)
    looked = []
    for _ in range(8):
        before = scores_of(model.layer1[0].conv1).mean
        backward(model)
        looked.append(scores_of(model.layer1[0].conv1).mean is not before)
    assert looked == [n < 4 or n % interval == 0 for n in range(8)]


def test_scores_are_a_running_mean_of_shares():
    scores = Scores(ssp.Ahead(momentum=0.5))
    scores.observe(torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(scores.mean, torch.tensor([0.25, 0.75]))
    scores.observe(torch.tensor([8.0, 8.0]))
    torch.testing.assert_close(scores.mean, torch.tensor([0.375, 0.625]))
    for nothing in ([0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]):
        scores.observe(torch.tensor(nothing))
        torch.testing.assert_close(scores.mean, torch.tensor([0.375, 0.625]))


def test_a_layer_that_knows_nothing_looks():
    model = converted(a_network(), look_interval=100)
    scores = scores_of(model.conv1)
    scores.passes = 50
    backward(model)
    assert scores.mean is not None


def test_a_layer_that_was_pruned_begins_anew():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3)).double()
    converted(model, look_interval=100)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for _ in range(5):
        model(x).sum().backward()
    first, last = model[0], model[2]
    first.weight = nn.Parameter(first.weight.detach()[:5].clone())
    first.bias = nn.Parameter(first.bias.detach()[:5].clone())
    last.weight = nn.Parameter(last.weight.detach()[:, :5].clone())
    first.out_channels = last.in_channels = 5
    for _ in range(2):
        model(x).sum().backward()
    assert scores_of(first).mean.shape == (5,)
    assert first.weight.grad.shape == first.weight.shape


# --- state --------------------------------------------------------------------------------------


def train(model, steps, optimizer):
    for _ in range(steps):
        backward(model)
        optimizer.step()


def test_training_goes_on_bit_by_bit_where_a_checkpoint_was_made():
    model = converted(a_network(), look_interval=3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    train(model, 6, optimizer)
    file = io.BytesIO()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "controller": ssp.get_controller(model).state_dict(),
    }
    torch.save(state, file)
    train(model, 5, optimizer)

    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = converted(a_network(), look_interval=3)
    optimizer = torch.optim.SGD(other.parameters(), 0.1, momentum=0.9)
    other.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    ssp.get_controller(other).load_state_dict(state["controller"])
    train(other, 5, optimizer)
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize(
    "broken",
    [
        lambda layer: layer.pop("passes"),
        lambda layer: layer.update(passes=-1),
        lambda layer: layer.update(scores=torch.ones(3)),
        lambda layer: layer.update(scores="none"),
        lambda layer: layer.update(team=["nobody"]),
        lambda layer: layer.update(team=[]),
    ],
)
def test_a_state_of_something_else_changes_nothing(broken):
    model = converted(a_network())
    backward(model)
    controller = ssp.get_controller(model)
    before, state = controller.state_dict(), controller.state_dict()
    state["layers"] = copy.deepcopy(state["layers"])
    broken(state["layers"]["layer2.0.conv2"])
    with pytest.raises(ValueError, match=r"layer2\.0\.conv2"):
        controller.load_state_dict(state)
    after = controller.state_dict()
    for name, layer in before["layers"].items():
        assert layer["passes"] == after["layers"][name]["passes"]
        assert torch.equal(layer["scores"], after["layers"][name]["scores"])


def test_the_state_of_a_model_without_any_is_refused():
    model, plain_model = converted(a_network()), ssp.convert(a_network(), 0.6)
    with pytest.raises(ValueError, match="is in this model only"):
        ssp.get_controller(model).load_state_dict(ssp.get_controller(plain_model).state_dict())


def copied(model):
    return copy.deepcopy(model)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("how", [copied, pickled])
def test_a_copy_has_scores_and_teams_of_its_own(how):
    model = converted(a_network())
    for _ in range(5):
        backward(model)
    other = how(model)
    mine, its = scores_of(model.layer2[0].conv2), scores_of(other.layer2[0].conv2)
    assert mine is not its and mine.team is not its.team
    assert its.team is scores_of(other.layer2[0].downsample[0]).team
    assert its in its.team.members
    for one, two in zip(backward(model).values(), backward(other).values(), strict=True):
        assert torch.equal(one, two)
