"""Channels chosen ahead: hooks, checkpoints, compilers, arguments and FLOPs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import ssprop_patch as ssp
from ssprop_patch.core import two_resolutions as plain
from ssprop_patch.core.geometry import ConvParams
from ssprop_patch.core.reference import whole_backward
from training.ahead_networks import BLOCK, a_network, backward, batch, converted, ready, scores_of

# --- who meets such a gradient --------------------------------------------------------------------


def test_hooks_see_ordinary_gradients():
    model, other = ready(a_network()), ready(a_network())
    seen = {}

    def hook(module, inputs, out):
        out.register_hook(lambda grad: seen.update({module: grad.sum().item()}))

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.ReLU):
            module.register_forward_hook(hook)
    found, expected = backward(model), backward(other)
    assert len(seen) == sum(
        isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.ReLU) for m in model.modules()
    )
    # Where it was formed a gradient goes on whole.
    for name, grad in found.items():
        cosine = F.cosine_similarity(grad.flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.8, name


def test_gradients_that_are_asked_for_are_ordinary_tensors():
    model = ready(a_network())
    x, y = batch()
    kept = []
    model.act1.register_forward_hook(lambda module, inputs, out: kept.append(out))
    loss = F.cross_entropy(model(x), y)
    grads = torch.autograd.grad(loss, kept, retain_graph=True)
    assert [type(g) for g in grads] == [torch.Tensor]
    loss.backward()
    assert model.conv1.weight.grad is not None


def test_second_derivatives():
    model = ready(a_network())
    x, y = batch()
    loss = F.cross_entropy(model(x), y)
    grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    sum(g.square().sum() for g in grads).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_accumulated_and_retained():
    model = ready(a_network())
    x, y = batch()
    loss = F.cross_entropy(model(x), y)
    model.zero_grad()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    for p, g in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * g)


def checkpointed(stage, reentrant):
    forward = stage.forward
    stage.forward = lambda x: checkpoint(forward, x, use_reentrant=reentrant)


def behind_another_operation(stage):
    forward = stage.forward
    stage.forward = lambda x: forward(x * 1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant):
    model, other = ready(a_network()), ready(a_network())
    checkpointed(model.layer2, reentrant)
    if reentrant:  # what comes in is a leaf then, of which all channels are asked for
        behind_another_operation(other.layer2)
    found, expected = backward(model), backward(other)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name])


def test_frozen_layers_and_inputs():
    model = ready(a_network())
    model.conv1.weight.requires_grad_(False)
    model.layer1[0].conv2.weight.requires_grad_(False)
    x, y = batch()
    F.cross_entropy(model(x.requires_grad_()), y).backward()
    assert type(x.grad) is torch.Tensor and x.grad.abs().sum() > 0
    assert model.layer1[0].conv1.weight.grad.abs().sum() > 0


def test_autocast():
    model = ready(a_network()).float()
    x, y = batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(x.float()), y)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_compiled_it_is_the_papers_choice_with_the_coarse_remainder():
    model, other = ready(a_network()), ssp.convert(a_network(), 0.6, remainder="coarse")
    found = backward(torch.compile(model, backend="aot_eager"))
    expected = backward(other)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name.removeprefix("_orig_mod.")])


# --- arguments ----------------------------------------------------------------------------------


def test_it_wants_the_coarse_remainder():
    model = a_network()
    for selection in ("ahead", ssp.Ahead()):
        with pytest.raises(ValueError, match='remainder="coarse"'):
            ssp.convert(model, 0.6, selection=selection)
    assert not ssp.is_converted(model)


@pytest.mark.parametrize(
    "settings, error",
    [
        (dict(look_interval=0), ValueError),
        (dict(look_interval=1.5), TypeError),
        (dict(momentum=1.0), ValueError),
        (dict(momentum="much"), TypeError),
    ],
)
def test_bad_settings(settings, error):
    with pytest.raises(error, match=next(iter(settings))):
        ssp.Ahead(**settings)


def test_the_plan_says_which_layers_are_chosen_ahead():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=2)
    )
    rows = ssp.plan(model, selection="ahead", remainder="coarse").rows
    assert ["chosen ahead" in str(row) for row in rows] == [True, True, False]


def test_a_depthwise_layer_keeps_the_channels_of_its_input():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU6(),
        nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU6(),
        nn.Conv2d(12, 8, 1),
    ).double()
    ssp.convert(model, 0.7, selection=ssp.Ahead(100), remainder="coarse")
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    for _ in range(5):
        model.zero_grad()
        model(x).square().sum().backward()
    team = scores_of(model[0]).team
    assert scores_of(model[3]).team is team and len(team.members) == 2
    out = model[:6](x)
    kept = scores_of(model[6]).team.kept(2, x.device), team.kept(4, x.device)

    def call(module, inputs):
        params = ConvParams(module.stride, module.padding, module.dilation, module.groups)
        return module.weight, params, inputs

    # Said with whole tensors, from the last layer down.
    g = plain.reduce(2 * model[6](out), kept[0], BLOCK)
    maps = [x]
    for module in model[:6]:
        maps.append(module(maps[-1]).detach())
    for number in range(6, -1, -1):
        module, inner = model[number], maps[number]
        if isinstance(module, nn.Conv2d):
            weight, params, _ = call(module, inner)
            if number == 0:
                _, dw, _ = whole_backward(
                    g.whole(),
                    inner,
                    weight,
                    params,
                    (False, True, False),
                    kept=kept[1].index,
                    block=BLOCK,
                )
            else:
                g, dw, _ = plain.conv_backward(g, inner, weight, params, kept[1], BLOCK)
            torch.testing.assert_close(module.weight.grad, dw)
        elif isinstance(module, nn.ReLU6):
            g = plain.pointwise(g, ((inner > 0) & (inner < 6)).double())
        else:
            mean, invstd = inner.mean((0, 2, 3)), None
            invstd = (inner.var((0, 2, 3), correction=0) + module.eps).rsqrt()
            g, _, _ = plain.batch_norm(g, inner, module.weight, mean, invstd)


def test_functions_do_not_choose_ahead():
    x, w = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
    with pytest.raises(ValueError, match="converted models"):
        ssp.functional.conv2d(x, w, drop_rate=0.5, selection="ahead", remainder="coarse")


# --- FLOPs ----------------------------------------------------------------------------------------


def test_what_is_counted_is_what_the_meter_counts():
    model = converted(a_network(), look_interval=10)
    x, _ = batch()
    summary = ssp.summary(model, inputs=x)
    scores = [scores_of(m) for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(s.passes == 0 for s in scores)
    for _ in range(4):
        backward(model)
    passes = []
    for _ in range(7):
        with ssp.Meter(model) as meter:
            backward(model)
        passes.append(meter.report().backward_flops)
    usual, look = passes[0], passes[-1]
    assert set(passes[:-1]) == {usual} and look > usual
    assert summary.sparse_backward == pytest.approx((9 * usual + look) / 10, rel=1e-6)
    dense = ssp.summary(model, inputs=x, drop_rate=0.0).sparse_backward
    assert usual < ssp.summary(a_network(), inputs=x, drop_rate=0.6).sparse_backward < dense


def test_flops_of_one_convolution_by_hand():
    from ssprop_patch.core.rule import BackwardKind, Extent
    from ssprop_patch.flops.gradient import layer_flops

    n, c_in, c_out, size, taps, k, read = 2, 10, 20, 8, 9, 6, 4
    extent = Extent.of(
        (n, c_in, size, size), (c_out, c_in, 3, 3), (n, c_out, size, size), 1, block=4
    )
    kind = BackwardKind("channels", 4, inputs=read, scored=False)
    positions, blocks = n * size**2, n * 4
    dx = 2 * positions * taps * k * read + 2 * blocks * (c_out * c_in + k * read)
    dx += 2 * positions * read
    dw = 2 * positions * taps * k * c_in + 2 * blocks * (c_out - k) * c_in + positions * c_in
    db = blocks * c_out
    for mask in ((True, True, True), (True, False, False), (False, True, False)):
        expected = dx * mask[0] + dw * mask[1] + db * mask[2]
        assert layer_flops(extent, kind, k, mask).backward == expected
