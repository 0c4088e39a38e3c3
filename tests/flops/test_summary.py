"""flops_summary: known numbers, which layers, at which rate; its table and its errors."""

import json

import pytest
import timm
import torch
import torchvision
from timm.layers import Conv2dSame, StdConv2d
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ssprop_patch as ssp
from ssprop_patch.flops.count import conv_flops

from .networks import counted, rows, small


def cifar_resnet18():
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    return model


# --- known numbers ----------------------------------------------------------------------------


def test_cifar_resnet18_has_the_known_costs():
    """142.2 and 283.9 GFLOP, and what the paper's default saves of them."""
    s = ssp.summary(cifar_resnet18(), input_size=(128, 3, 32, 32))
    assert (round(s.forward / 1e9, 1), round(s.dense_backward / 1e9, 1)) == (142.2, 283.9)
    assert (round(100 * s.backward_saved, 1), round(100 * s.total_saved, 1)) == (39.9, 26.6)
    assert len(s.layers) == 20
    assert s.rate == "BarSchedule(0.8, period=2), mean over 2 epochs"


def test_cifar_resnet18_counted_another_way():
    """40.1 % and 26.8 % are the same run with k cut off, a dX for the image, and batch norm.

    That is 12 of 64 channels where this package keeps the nearest, 13, and 12 FLOPs for each
    element of a batch norm's backward.
    """
    dense = sparse = forward = 0
    for i, row in enumerate(ssp.summary(cifar_resnet18(), input_size=(128, 3, 32, 32)).layers):
        outputs = torch.Size(row.output_shape).numel()
        norm = 12 * outputs
        backward = row.dense_backward * (1 if i else 2)
        forward += row.forward
        dense += backward + norm
        sparse += backward // row.channels * int(row.channels * 0.2) + 2 * outputs + norm
    saved = (dense - sparse) / 2  # in every other epoch
    assert round(100 * saved / dense, 1) == 40.1
    assert round(100 * saved / (dense + forward), 1) == 26.8


def test_agrees_with_torchs_counter_on_a_whole_network():
    model = timm.create_model("resnet18", num_classes=7)
    s = ssp.summary(model, input_size=(2, 3, 64, 64), drop_rate=0.5)
    x = torch.randn(2, 3, 64, 64)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    assert s.forward + s.dense_backward == counter.get_total_flops()
    ssp.convert(model, 0.5)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    ran = counter.get_total_flops()
    importance = sum(2 * torch.Size(row.output_shape).numel() for row in s.layers)
    assert s.forward + s.sparse_backward == ran + importance


# --- which layers, at which rate --------------------------------------------------------------


def test_first_layer_needs_no_input_gradient_unless_the_input_does():
    model, x = small(), torch.randn(2, 3, 8, 8)
    first = rows(ssp.summary(model, inputs=x, drop_rate=0.5))["stem"]
    assert first.dense_backward == first.forward
    first = rows(ssp.summary(model, inputs=x.requires_grad_(), drop_rate=0.5))["stem"]
    assert first.dense_backward == 2 * first.forward


def test_frozen_weights_and_a_stem_without_grad():
    model = small()
    model.body.requires_grad_(False)
    body = rows(ssp.summary(model, input_size=(2, 3, 8, 8), drop_rate=0.5))["body"]
    assert body.dense_backward == body.forward  # dX only, no bias
    for name in ("stem", "norm"):
        model.get_submodule(name).requires_grad_(False)
    found = rows(ssp.summary(model, input_size=(2, 3, 8, 8), drop_rate=0.5))
    assert found["stem"].dense_backward == found["body"].dense_backward == 0
    assert found["stem"].saved == 0.0
    assert found["head"].dense_backward == found["head"].forward + 2 * 64 * 4


def test_unconverted_counts_what_convert_would_patch():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1, 1), nn.ConvTranspose2d(1, 8, 2, 2))
    before = ssp.summary(model, input_size=(2, 3, 8, 8), drop_rate=0.5)
    after = ssp.summary(ssp.convert(model, 0.5), input_size=(2, 3, 8, 8))
    assert before.layers == after.layers
    assert [row.kept for row in after.layers] == [4, 1, 8]
    assert [row.drop_rate for row in after.layers] == [0.5, 0.0, 0.0]


def test_transposed_convolution_counts_as_dense_and_as_torch_counts_it():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 3, 2, bias=False))
    x = torch.randn(2, 3, 8, 8)
    row = ssp.summary(model, inputs=x, drop_rate=0.5).layers[1]
    _, forward, backward = counted(2, model[0](x).detach().requires_grad_(), model[1])
    assert (row.forward, row.dense_backward, row.sparse_backward) == (forward, backward, backward)


def test_excluded_and_overridden_layers():
    model = ssp.convert(small(), 0.5, exclude="stem", overrides={"head": 0.75})
    found = rows(ssp.summary(model, input_size=(2, 3, 8, 8)))
    assert [(r.kept, r.drop_rate) for r in found.values()] == [(8, 0.0), (8, 0.5), (1, 0.75)]
    assert found["stem"].sparse_backward == found["stem"].dense_backward
    found = rows(ssp.summary(model, input_size=(2, 3, 8, 8), drop_rate=0.25))
    assert [r.kept for r in found.values()] == [8, 12, 1]
    found = rows(ssp.summary(model, input_size=(2, 3, 8, 8), drop_rate=0))
    assert [r.kept for r in found.values()] == [8, 16, 4]  # an override waits for a rate above 0


def test_layers_frozen_in_eval_mode_are_dense_but_a_whole_model_in_eval_is_not():
    model = ssp.convert(small(), 0.5)
    model.body.eval()
    assert rows(ssp.summary(model, input_size=(2, 3, 8, 8)))["body"].kept == 16
    model.eval()
    assert [r.kept for r in ssp.summary(model, input_size=(2, 3, 8, 8)).layers] == [4, 8, 2]


def test_a_module_called_often_counts_often():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            x = self.conv(self.conv(x))
            return self.conv.forward(x[..., ::2, ::2])

    model = Twice()
    once = conv_flops((1, 4, 8, 8), (4, 4, 3, 3), (1, 4, 8, 8), output_mask=(True, True, True))
    s = ssp.summary(model, inputs=torch.randn(1, 4, 8, 8, requires_grad=True), drop_rate=0.5)
    assert [(r.name, r.calls) for r in s.layers] == [("conv", 2), ("conv", 1)]
    assert [r.forward for r in s.layers] == [2 * once.forward, once.forward // 4]
    assert s.dense_backward == 9 * once.dense_backward // 4


def test_shared_modules_and_shared_weights():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    twin = nn.Conv2d(4, 4, 3, padding=1)
    twin.weight = conv.weight
    s = ssp.summary(nn.Sequential(conv, conv, twin), input_size=(1, 4, 8, 8), drop_rate=0.5)
    # The first call of the shared module needs no dX: a row of its own.
    assert [(r.name, r.calls) for r in s.layers] == [("0", 1), ("0", 1), ("2", 1)]
    assert len({r.forward for r in s.layers}) == 1


def test_forwards_of_their_own():
    model = nn.Sequential(Conv2dSame(3, 8, 3, stride=2), StdConv2d(8, 8, 3, padding=0, groups=2))
    s = ssp.summary(model, input_size=(2, 3, 9, 9), drop_rate=0.5)
    assert [r.output_shape for r in s.layers] == [(2, 8, 5, 5), (2, 8, 3, 3)]
    assert [r.forward for r in s.layers] == [2 * 2 * 25 * 27 * 8, 2 * 2 * 9 * 36 * 8]
    assert [r.kept for r in s.layers] == [4, 4]


def test_layers_that_convolve_in_their_own_way_are_named():
    model = timm.create_model("tf_efficientnet_cc_b0_4e")
    s = ssp.summary(model, input_size=(1, 3, 64, 64), drop_rate=0.5)
    assert len(s.not_counted) > 3 and "blocks" in s.not_counted[0]
    assert f"no row for {len(s.not_counted)} layers that convolve in their own way" in str(s)
    assert s.others.forward > 0 and "the rest" in str(s)


def test_a_single_convolution_and_unbatched_input():
    conv = nn.Conv1d(2, 4, 3)
    s = ssp.summary(conv, input_size=(2, 10), drop_rate=0.5)
    assert (s.layers[0].name, s.layers[0].output_shape) == ("", (4, 8))
    assert s.forward == 2 * 8 * 6 * 4 and "(model)" in str(s)


# --- schedules --------------------------------------------------------------------------------


def test_a_schedule_is_averaged_with_the_true_k_of_each_epoch():
    model, size = small(), (2, 3, 8, 8)
    schedule = ssp.LinearSchedule(0.0, 0.9, total=6)
    mean = ssp.summary(model, input_size=size, schedule=schedule, epochs=9)
    single = [ssp.summary(model, input_size=size, drop_rate=schedule(t)) for t in range(9)]
    for i, row in enumerate(mean.layers):
        each = [s.layers[i].sparse_backward for s in single]
        assert abs(row.sparse_backward - sum(each) / 9) <= 0.5
        assert row.kept == min(s.layers[i].kept for s in single)
        assert row.drop_rate == pytest.approx(schedule.average(9))


def test_bar_schedule_over_an_odd_number_of_epochs():
    model, size = small(), (2, 3, 8, 8)
    sparse = ssp.summary(model, input_size=size, drop_rate=0.8)
    third = ssp.summary(model, input_size=size, schedule=ssp.BarSchedule(0.8), epochs=3)
    assert third.backward_saved == pytest.approx(sparse.backward_saved / 3, rel=1e-4)


def test_a_converted_model_is_counted_by_its_controller():
    model, size = ssp.convert(small(), ssp.BarSchedule(0.5)), (2, 3, 8, 8)
    assert ssp.summary(model, input_size=size).backward_saved == 0.0  # now: t = 0, dense
    with ssp.sparsity(model, 0.5):
        now = ssp.summary(model, input_size=size)
    assert now.layers == ssp.summary(model, input_size=size, drop_rate=0.5).layers
    assert now.rate == "drop rate 0.5, as it is now"
    mean = ssp.summary(model, input_size=size, epochs=10)
    assert mean.backward_saved == pytest.approx(now.backward_saved / 2, rel=1e-4)
    other = ssp.summary(model, input_size=size, schedule=0.75)
    assert other.rate == "ConstantSchedule(0.75)" and other.layers[0].kept == 2


def test_a_schedule_that_counts_steps():
    model, size = small(), (2, 3, 8, 8)
    schedule = ssp.BarSchedule(0.5, period=10, interval="step")
    half = ssp.summary(model, input_size=size, schedule=0.5).backward_saved / 2
    s = ssp.summary(model, input_size=size, schedule=schedule, epochs=3, steps_per_epoch=20)
    assert s.backward_saved == pytest.approx(half, rel=1e-4)
    ssp.convert(model, schedule, steps_per_epoch=5)  # 5 steps: only the dense half
    assert ssp.summary(model, input_size=size, epochs=1).backward_saved == 0.0
    assert ssp.summary(model, input_size=size, epochs=2).backward_saved > 0.0


# --- inputs, printing, errors -----------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x, y):
        return self.a(x) + self.b(y)


def test_ways_to_give_inputs():
    model, x, y = TwoInputs(), torch.randn(1, 3, 4, 4), torch.randn(1, 2, 4, 4)
    expected = ssp.summary(model, inputs=(x, y), drop_rate=0.5)
    assert ssp.summary(model, inputs={"y": y, "x": x}, drop_rate=0.5) == expected
    assert ssp.summary(model, input_size=[x.shape, [1, 2, 4, 4]], drop_rate=0.5) == expected
    half = small().to(torch.bfloat16)
    assert len(ssp.summary(half, input_size=[2, 3, 8, 8], drop_rate=0.5).layers) == 3


def test_prints_as_an_aligned_table_and_goes_to_json():
    s = ssp.summary(small(), input_size=(2, 3, 8, 8), drop_rate=0.75)
    lines = str(s).splitlines()
    # Without output and class, which leaves all in 100 columns.
    assert lines[0].split()[:6] == ["layer", "calls", "input", "weight", "kept", "drop"]
    assert " ".join(lines[2].split()) == (
        "stem 1 2x3x8x8 8x3x3x3 2/8 0.75 55.3 kFLOP 55.3 kFLOP 15.9 kFLOP 71.3 %"
    )
    assert len({len(line) for line in lines[:7]}) == 1
    assert lines[6].startswith("total") and "drop rate 0.75" in lines[7]
    share = (
        f"{100 * s.backward_saved:.1f} % of the backward FLOPs of the {{}}, "
        f"{100 * s.total_saved:.1f} % of forward + backward"
    )
    assert lines[9:] == [
        f"saved: {share.format('whole network')}",
        f"       {share.format('3 converted layers alone')}",
    ]
    saved = f"{100 * s.backward_saved:.1f} % of the backward FLOPs saved"
    assert repr(s) == f"Summary(3 layers, drop rate 0.75: {saved})"
    data = json.loads(json.dumps(s.to_dict()))
    assert (
        data["sparse_backward"]
        == s.sparse_backward
        == sum(row["sparse_backward"] for row in data["layers"])
    )
    assert data["layers"][0]["kept"] == 2 and data["total_saved"] == s.total_saved


SIZE = (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "input_size or inputs"),
        ({"input_size": SIZE, "inputs": torch.ones(SIZE)}, ValueError, "input_size or inputs"),
        ({"inputs": [torch.ones(SIZE)]}, TypeError, r"inputs=\(images,\)"),
        ({"input_size": 32}, TypeError, "input_size must be a shape"),
        ({"input_size": (2, 3, 8.0, 8)}, TypeError, "each of input_size must be an integer"),
        ({"input_size": (2, 3, 0, 8)}, ValueError, "each of input_size must be an integer >= 1"),
        ({"input_size": (2, 5, 8, 8)}, ValueError, r"input_size \(2, 5, 8, 8\): RuntimeError: .*5"),
        ({"inputs": torch.ones(2, 5, 8, 8)}, ValueError, r"inputs of shapes \[\(2, 5, 8, 8\)\]"),
        ({"inputs": (1, 2)}, ValueError, "does not run on"),
        ({"input_size": SIZE, "drop_rate": 1.5}, ValueError, "drop_rate"),
        ({"input_size": SIZE, "drop_rate": "0.5"}, TypeError, "drop_rate"),
        ({"input_size": SIZE, "drop_rate": 0.5, "schedule": 0.5}, ValueError, "not both"),
        ({"input_size": SIZE, "schedule": ssp.BarSchedule(0.5)}, ValueError, "give epochs"),
        ({"input_size": SIZE, "schedule": "bar", "epochs": 2}, TypeError, "Schedule"),
        ({"input_size": SIZE, "epochs": 0}, ValueError, "epochs must be an integer >= 1"),
        (
            {"input_size": SIZE, "epochs": 2, "schedule": ssp.BarSchedule(0.5, interval="step")},
            ValueError,
            "give steps_per_epoch",
        ),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ssp.summary(small(), **arguments)


def test_models_that_cannot_be_counted():
    with pytest.raises(ValueError, match="no convolution in this Linear"):
        ssp.summary(nn.Linear(3, 3), input_size=(1, 3))
    with pytest.raises(ValueError, match="0: lazy"):
        ssp.summary(nn.Sequential(nn.LazyConv2d(3, 3)), input_size=SIZE)
    with pytest.raises(TypeError, match=r"nn\.Module"):
        ssp.summary("resnet18", input_size=SIZE)
