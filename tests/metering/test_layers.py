"""Every kind of layer and every way of running it is counted, and counted once."""

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

import ssprop_patch as ssp
from metering import by_hand
from metering.by_hand import RATES, by_step, counted, quiet_meter, train


class WSConv2d(nn.Conv2d):
    """A forward of its own."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def step_of(meter, run):
    """What ``run()`` adds to the counts of a meter."""
    before = counted(meter)
    run()
    return tuple(b - a for a, b in zip(before, counted(meter), strict=True))


def test_an_unconverted_model_is_metered_as_the_dense_one_it_is():
    model = by_hand.net()
    expected = by_hand.by_summary(model, by_hand.batch(0), [0.0] * 3)
    with quiet_meter(model) as meter:
        train(model, 3)
        assert counted(meter) == expected
        assert (meter.steps, meter.drop_rate, meter.report().backward_saved) == (3, 0.0, 0.0)
    assert not ssp.is_converted(model)


def test_layers_that_are_left_out_count_as_dense():
    model = by_hand.net()
    dense = ssp.summary(model, inputs=by_hand.batch(0), drop_rate=0.0).layers
    ssp.convert(model, by_step(), exclude="^0$")
    with quiet_meter(model) as meter:
        train(model, len(RATES))
        stem = meter.report().layers[0]
        assert stem.name == "0"
        assert stem.totals.backward_flops == len(RATES) * dense[0].dense_backward
        assert stem.totals.forward_flops == len(RATES) * dense[0].forward
        assert meter.report().layers[1].saved > 0


def test_a_layer_with_one_output_channel_counts_as_dense():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1, 1)).double()
    expected = by_hand.by_summary(model, by_hand.batch(0), [0.5])
    with quiet_meter(ssp.convert(model, 0.5)) as meter:
        by_hand.gradients(model, by_hand.batch(0))
        assert counted(meter) == expected
        assert meter.kept == {"0": (4, 8), "1": (1, 1)}


def test_forwards_of_their_own():
    make = lambda conv: nn.Sequential(conv(3, 8, 3), nn.Tanh(), conv(8, 4, 1)).double()  # noqa: E731
    expected = by_hand.by_summary(make(nn.Conv2d), by_hand.batch(0), RATES)
    model = ssp.convert(make(WSConv2d), by_step())
    with quiet_meter(model) as meter:
        train(model, len(RATES))
        assert counted(meter) == expected


def test_a_module_in_two_places_is_one_layer_with_two_calls():
    shared = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.Sequential(shared, nn.Tanh(), shared).double()
    once = by_hand.by_summary(shared, by_hand.batch(0), [0.5])
    twice = by_hand.by_summary(shared, by_hand.batch(0).requires_grad_(), [0.5])
    with quiet_meter(ssp.convert(model, 0.5)) as meter:
        by_hand.gradients(model, by_hand.batch(0))
        (row,) = meter.report().layers
        assert (row.name, row.totals.forwards, row.totals.backwards) == ("0", 2, 2)
        assert counted(meter) == tuple(a + b for a, b in zip(once, twice, strict=True))


def test_a_model_that_is_called_twice_before_the_backward():
    model = ssp.convert(by_hand.net(), 0.5)
    with quiet_meter(model) as meter:
        one = step_of(meter, lambda: by_hand.gradients(model, by_hand.batch(0)))

        def both():
            loss = by_hand.loss_of(model(by_hand.batch(0))) + by_hand.loss_of(
                model(by_hand.batch(1))
            )
            loss.backward()

        assert step_of(meter, both) == tuple(2 * n for n in one)


def test_accumulated_gradients_count_each_pass_and_one_step():
    model = ssp.convert(by_hand.net(), by_step())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    per_pass = [by_hand.by_summary(by_hand.net(), by_hand.batch(0), [r] * 3) for r in RATES[:2]]
    with quiet_meter(model) as meter:
        for i in range(6):
            by_hand.loss_of(model(by_hand.batch(i))).backward()
            if i % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
        assert meter.steps == 2
        assert counted(meter) == tuple(map(sum, zip(*per_pass, strict=True)))


# Of the classifier of by_hand.net, forward.
LINEAR = 2 * 2 * (6 * 7 * 7) * 5


class Checkpointed(nn.Module):
    def __init__(self, inner, use_reentrant):
        super().__init__()
        self.inner, self.use_reentrant = inner, use_reentrant

    def forward(self, x):
        x = self.inner[0](x)
        return checkpoint(self.inner[1:], x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_forward_that_checkpointing_repeats_counts_again(use_reentrant):
    plain = by_hand.net()
    model = ssp.convert(Checkpointed(by_hand.net(), use_reentrant), by_step())
    rows = ssp.summary(plain, inputs=by_hand.batch(0), drop_rate=0.0).layers
    forward, dense, sparse = by_hand.by_summary(plain, by_hand.batch(0), RATES)
    # The other way stops once it has what the backward needs: the product itself it does not.
    last = LINEAR if use_reentrant else 0
    repeated = len(RATES) * (sum(row.forward for row in rows[1:]) + last)
    with quiet_meter(model) as meter:
        train(model, len(RATES))
        assert counted(meter) == (forward + repeated, dense, sparse)
        forwards = [row.totals.forwards for row in meter.report().layers]
        assert forwards == [len(RATES), 2 * len(RATES), 2 * len(RATES)]
        assert meter.steps == len(RATES)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_whole_model_may_be_checkpointed(use_reentrant):
    model = ssp.convert(by_hand.net(), 0.5)
    forward, dense, sparse = by_hand.by_summary(
        by_hand.net(), by_hand.batch(0).requires_grad_(), [0.5]
    )
    with quiet_meter(model) as meter:
        x = by_hand.batch(0).requires_grad_()
        by_hand.loss_of(checkpoint(model, x, use_reentrant=use_reentrant)).backward()
        not_repeated = 0 if use_reentrant else LINEAR
        assert counted(meter) == (2 * forward - not_repeated, dense, sparse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_count(dtype):
    model = ssp.convert(by_hand.net(torch.float32), by_step())
    expected = by_hand.by_summary(by_hand.net(), by_hand.batch(0), RATES)

    def call(x):
        with torch.autocast("cpu", dtype=dtype):
            return model(x.float())

    with quiet_meter(model) as meter:
        train(model, len(RATES), call=call)
        assert counted(meter) == expected


def test_a_step_that_the_gradient_scaler_skips_is_no_step_but_its_passes_count():
    model = ssp.convert(by_hand.net(torch.float32), 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    with quiet_meter(model) as meter:
        for scale in (1.0, float("inf"), 1.0):
            loss = by_hand.loss_of(model(by_hand.batch(0).float())) * scale
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert meter.steps == 2
        assert {row.totals.backwards for row in meter.report().layers} == {3}


def test_frozen_layers_cost_what_they_do():
    """A frozen stem has no backward at all, a frozen layer behind it only that of its input."""
    model = by_hand.net()
    model[0].requires_grad_(False)
    model[4].requires_grad_(False)
    expected = by_hand.by_summary(model, by_hand.batch(0), RATES)
    with quiet_meter(ssp.convert(model, by_step())) as meter:
        train(
            model,
            len(RATES),
            torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1),
        )
        assert counted(meter) == expected
        stem = meter.report().layers[0].totals
        assert (stem.forwards, stem.backwards) == (len(RATES), 0)


def test_a_part_in_eval_mode_is_dense_and_counts():
    model = by_hand.net()
    model[2].eval()
    expected = by_hand.by_summary(ssp.convert(model, 0.5), by_hand.batch(0), [0.5])
    dense = ssp.summary(by_hand.net(), inputs=by_hand.batch(0), drop_rate=0.0).layers[1]
    with quiet_meter(model) as meter:
        by_hand.gradients(model, by_hand.batch(0))
        assert counted(meter) == expected
        totals = meter.report().layers[1].totals
        assert totals.backward_flops == dense.dense_backward
        assert (totals.sparse, totals.kept) == (0, 12)


def test_a_model_that_is_evaluated_counts_nothing():
    model = ssp.convert(by_hand.net(), 0.5).eval()
    with quiet_meter(model) as meter:
        by_hand.gradients(model, by_hand.batch(0))
        with torch.no_grad():
            model(by_hand.batch(0))
        assert counted(meter) == (0, 0, 0)
        assert meter.report().seconds == {}


def test_a_trained_part_of_a_model_in_eval_mode_counts():
    model = ssp.convert(by_hand.net(), 0.5).eval()
    model[4].train()
    with quiet_meter(model) as meter:
        by_hand.gradients(model, by_hand.batch(0))
        runs = [(row.totals.forwards, row.totals.backwards) for row in meter.report().layers]
        assert runs == [(0, 0), (0, 0), (1, 1)]


def test_only_gradients_that_are_needed_count():
    model = by_hand.net()
    x = by_hand.batch(0).requires_grad_()
    expected = by_hand.by_summary(model, x, [0.5])
    with quiet_meter(ssp.convert(model, 0.5)) as meter:
        by_hand.gradients(model, x)
        assert counted(meter) == expected
        stem = meter.report().layers[0].totals
        assert stem.dense_backward_flops == 2 * stem.forward_flops


def test_a_detection_model_whose_heads_run_at_every_scale():
    torch.manual_seed(0)
    model = torchvision.models.detection.retinanet_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=3,
        min_size=64,
        max_size=64,
    ).train()
    images = [torch.rand(3, 64, 64)]
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}]

    def step():
        sum(model(images, targets).values()).backward()

    dense = by_hand.by_torch(step)  # groups = 1, matrix products: none
    biases = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            module.register_forward_hook(lambda m, args, y: biases.append(y.numel()))
    ssp.convert(model, 0.5)
    with quiet_meter(model) as meter:
        with ssp.dense(model):
            step()
        assert sum(counted(meter)[::2]) == dense + sum(biases)
        totals = {row.name: row.totals for row in meter.report().layers}
        assert totals["head.classification_head.cls_logits"].forwards == 5
        step()
        assert 0.45 < 2 * meter.report().backward_saved < 0.5
        assert {"forward", "backward"} <= meter.report().seconds.keys()


def test_layers_that_convolve_in_their_own_way_are_named_not_guessed():
    class MyConv(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3, 1, 1))

        def forward(self, x):
            return F.conv2d(x, self.weight)

    model = nn.Sequential(MyConv(), nn.Conv2d(3, 8, 3))
    with quiet_meter(ssp.convert(model, 0.5)) as meter:
        report = meter.report()
    assert report.not_counted == ("0",)
    assert [row.name for row in report.layers] == ["1"]
    assert "no row" in str(report)


def test_a_child_that_is_called_module_is_not_taken_for_a_wrapper():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Sequential(nn.Conv2d(3, 4, 1))
            self.add_module("0", nn.Conv2d(4, 4, 1))

        def forward(self, x):
            return self.get_submodule("0")(self.module(x))

    model = Net().double()
    expected = by_hand.by_summary(model, by_hand.batch(0), [0.5])
    with quiet_meter(ssp.convert(model, 0.5)) as meter:
        by_hand.gradients(model, by_hand.batch(0))
        assert counted(meter) == expected
        assert [row.name for row in meter.report().layers] == ["module.0", "0"]


@pytest.mark.parametrize(
    "name", ["test_convnext", "test_efficientnet", "test_nfnet", "test_mambaout"]
)
def test_timms_families(name):
    model = timm.create_model(name, num_classes=5)
    x = torch.randn(2, 3, 64, 64)
    expected = by_hand.by_summary(model, x, [0.0, 0.6])
    with quiet_meter(ssp.convert(model, 0.6)) as meter:
        with ssp.dense(model):
            by_hand.gradients(model, x)
        by_hand.gradients(model, x)
        assert counted(meter) == expected
