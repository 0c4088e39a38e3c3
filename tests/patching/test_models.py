"""Whole networks of timm and torchvision, in float64, against a masked dense oracle.

Small images, random weights. What is random in a forward (dropout, drop path, the samplers of a
detector) repeats, as each run starts from the same seed and the same buffers.
"""

import copy
import warnings

import oracle
import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import ssprop_patch as ssp

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

RATE = 0.8


# --- the networks -----------------------------------------------------------------------------


def classifier(make, shape=(3, 3, 32, 32), **kwargs):
    """A network and its input; kwargs go to the maker."""
    return lambda: (make(num_classes=5, **kwargs), (torch.randn(shape),))


def from_timm(name, size=32, batch=3, **kwargs):
    return classifier(
        lambda **k: timm.create_model(name, pretrained=False, **k), (batch, 3, size, size), **kwargs
    )


def from_torchvision(name, shape=(3, 3, 64, 64), **kwargs):
    return classifier(
        lambda **k: torchvision.models.get_model(name, weights=None, **k), shape, **kwargs
    )


def detector(name, **kwargs):
    def make():
        model = torchvision.models.get_model(
            name, weights=None, weights_backbone=None, num_classes=4, **kwargs
        )
        images = [torch.rand(3, 64, 80), torch.rand(3, 72, 64)]
        boxes = torch.tensor([[4.0, 4, 40, 50], [20, 10, 60, 60]])
        targets = [
            {"boxes": boxes, "labels": torch.tensor([1, 2])},
            {"boxes": boxes[:1] + 2, "labels": torch.tensor([3])},
        ]
        return model, (images, targets)

    return make


def segmenter(name):
    return lambda: (
        torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=4),
        (torch.randn(2, 3, 48, 48),),
    )


def optical_flow():
    model = torchvision.models.optical_flow.raft_small(weights=None)
    model.register_forward_pre_hook(lambda m, a, k: (a, {"num_flow_updates": 2}), with_kwargs=True)
    return model, (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128))


def channels_last(make):
    def make_channels_last():
        model, (images,) = make()
        layout = torch.channels_last
        return model.to(memory_format=layout), (images.contiguous(memory_format=layout),)

    return make_channels_last


def checkpointed(make):
    def make_checkpointed():
        model, inputs = make()
        model.set_grad_checkpointing()
        return model, inputs

    return make_checkpointed


NETWORKS = {
    # own forwards: weight standardisation, scaled, TensorFlow's padding
    "resnetv2_50x1_bit": from_timm("resnetv2_50x1_bit"),
    "nfnet_f0": from_timm("nfnet_f0", batch=2),
    "tf_efficientnet_b0": from_timm("tf_efficientnet_b0", drop_rate=0.2, drop_path_rate=0.2),
    "tf_mixnet_s": from_timm("tf_mixnet_s"),
    # one module under two names
    "coat_lite_tiny": from_timm("coat_lite_tiny", img_size=32),
    # depthwise, grouped, dense connections, squeeze and excite, hybrid, attention
    "convnext_atto": from_timm("convnext_atto", drop_path_rate=0.1),
    "regnety_002": from_timm("regnety_002"),
    "densenet121": from_timm("densenet121", size=48),
    "mobilenetv3_small_100": from_timm("mobilenetv3_small_100"),
    "resnext50_32x4d": from_timm("resnext50_32x4d"),
    "ecaresnet26t": from_timm("ecaresnet26t"),
    "vit_tiny_r_s16_p8_224": from_timm("vit_tiny_r_s16_p8_224", size=224, batch=2),
    "levit_128s": from_timm("levit_conv_128s", size=224, batch=2),
    "mobilevit_xxs": from_timm("mobilevit_xxs", size=64),
    "resnet18": from_torchvision("resnet18"),
    "hrnet_w18_small": from_timm("hrnet_w18_small", size=64),
    "res2net50_14w_8s": from_timm("res2net50_14w_8s"),
    "repvgg_a0": from_timm("repvgg_a0"),
    "ghostnet_100": from_timm("ghostnet_100"),
    "dpn48b": from_timm("dpn48b"),
    "vovnet39a": from_timm("vovnet39a"),
    "efficientnet_cc_b0_4e": from_timm("efficientnet_cc_b0_4e"),  # CondConv: stays dense
    "squeezenet1_1": from_torchvision("squeezenet1_1"),
    "shufflenet_v2_x0_5": from_torchvision("shufflenet_v2_x0_5"),
    "googlenet": from_torchvision("googlenet", aux_logits=True, init_weights=False),
    "inception_v3": from_torchvision(
        "inception_v3", (3, 3, 107, 107), aux_logits=False, init_weights=False
    ),
    "convnext_atto channels_last": channels_last(from_timm("convnext_atto")),
    "regnety_002 channels_last": channels_last(from_timm("regnety_002")),
    "resnet10t checkpointed": checkpointed(from_timm("resnet10t")),
    # other jobs
    "r3d_18": from_torchvision("r3d_18", (2, 3, 4, 24, 24)),
    "fasterrcnn_mobilenet_v3_large_320_fpn": detector(
        "fasterrcnn_mobilenet_v3_large_320_fpn", min_size=64, max_size=80
    ),
    "lraspp_mobilenet_v3_large": segmenter("lraspp_mobilenet_v3_large"),
    "raft_small": optical_flow,
}
# Slow: like one of the others, or in the sample of the zoo, whose check is the same.
SLOW = {
    "coat_lite_tiny",
    "densenet121",
    "dpn48b",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "hrnet_w18_small",
    "inception_v3",
    "levit_128s",
    "lraspp_mobilenet_v3_large",
    "nfnet_f0",
    "raft_small",
    "res2net50_14w_8s",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "tf_mixnet_s",
    "vit_tiny_r_s16_p8_224",
    "vovnet39a",
}
assert not SLOW - NETWORKS.keys()
FLOAT32 = {"raft_small"}  # makes coordinates in float32, whatever it is given


# --- running them -----------------------------------------------------------------------------


def tensors(output):
    """All tensors in what a network returns, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [t for value in values if value is not None for t in tensors(value)]


class Run:
    """One training step without an optimizer: outputs, gradients and buffers after it."""

    def __init__(self, model, inputs, buffers):
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(value)
        model.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        self.outputs = tensors(model(*copy.deepcopy(inputs)))
        # A smooth loss whose gradient differs everywhere.
        weights = [torch.randn(t.shape) for t in self.outputs]
        sum((t * w).sum() for t, w in zip(self.outputs, weights, strict=True)).backward()
        self.grads = {name: p.grad for name, p in model.named_parameters()}
        self.buffers = [b.clone() for b in model.buffers()]

    def same_forward(self, other):
        assert len(self.outputs) == len(other.outputs)
        for one, two in zip(self.outputs, other.outputs, strict=True):
            assert torch.equal(one, two)
        for one, two in zip(self.buffers, other.buffers, strict=True):
            assert torch.equal(one, two)

    def same_gradients(self, other):
        assert self.grads.keys() == other.grads.keys()
        for name, grad in self.grads.items():
            two = other.grads[name]
            assert (grad is None) == (two is None), name
            assert grad is None or torch.equal(grad, two), name

    def close_gradients(self, other, rtol):
        sizes = {n: g.abs().max().item() for n, g in other.grads.items() if g is not None}
        # A shift in front of a batch norm has gradient zero: what is left of it is rounding.
        eps = torch.finfo(self.outputs[0].dtype).eps
        rounding = 512 * eps * max(sizes.values())
        for name, grad in self.grads.items():
            two = other.grads[name]
            assert (grad is None) == (two is None), name
            if grad is not None:
                error = (grad - two).abs().max().item()
                assert error <= rtol * sizes[name] + rounding, (
                    f"{name}: off by {error:g} of {sizes[name]:g}"
                )


def classes(model):
    return [(name, type(m)) for name, m in model.named_modules(remove_duplicate=False)]


def attributes(model):
    return [sorted(m.__dict__) for m in model.modules()]


@pytest.fixture
def dtype(name):
    # As the default, for what networks make themselves in their forward.
    chosen = torch.float32 if name in FLOAT32 else torch.float64
    torch.set_default_dtype(chosen)
    yield chosen
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in NETWORKS]
)
def test_a_whole_network(name, dtype):
    model, inputs = NETWORKS[name]()
    model.train()
    buffers = [b.clone() for b in model.buffers()]
    keys, before, held = list(model.state_dict()), classes(model), attributes(model)

    dense = Run(model, inputs, buffers)
    with oracle.network(model, RATE) as record:
        expected = Run(model, inputs, buffers)
    expected.same_forward(dense)
    assert record.dropped > 0
    exact = dtype == torch.float64
    assert record.gap > (1e-9 if exact else 1e-5), "two channels all but tie: use another seed"

    ssp.convert(model, schedule=RATE)
    assert list(model.state_dict()) == keys
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse = Run(model, inputs, buffers)
    sparse.same_forward(dense)
    sparse.close_gradients(expected, rtol=1e-8 if exact else 1e-4)
    with pytest.raises(AssertionError):  # the oracle is not dense by mistake
        sparse.close_gradients(dense, rtol=1e-2)
    del sparse, expected

    ssp.get_controller(model).drop_rate = 0
    Run(model, inputs, buffers).same_gradients(dense)

    ssp.get_controller(model).drop_rate = RATE
    ssp.revert(model)
    assert classes(model) == before and attributes(model) == held
    reverted = Run(model, inputs, buffers)
    reverted.same_forward(dense)
    reverted.same_gradients(dense)


# --- single layers, with every option ---------------------------------------------------------

LAYERS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("dims", LAYERS)
def test_a_single_layer_with_every_padding(dims, mode, batched):
    size = (9, 7, 5)[:dims]
    for padding in (0, 2, (1, 2, 0)[:dims], "same", "valid"):
        for groups in (1, 2, 4):
            for kernel, dilation, stride in ((3, 1, 1), (2, 1, 1), (3, 2, 1), (3, 1, 2)):
                if padding == "same" and stride != 1:
                    continue
                bias = kernel == 3
                layer = LAYERS[dims](
                    4,
                    8 if groups < 4 else 4,
                    kernel,
                    stride,
                    padding,
                    dilation,
                    groups,
                    bias,
                    mode,
                    dtype=torch.float64,
                )
                x = torch.randn(*((2,) if batched else ()), 4, *size, dtype=torch.float64)
                x.requires_grad_()

                def run(layer=layer, x=x):
                    layer.zero_grad()
                    x.grad = None
                    torch.manual_seed(1)
                    y = layer(x)
                    y.backward(torch.randn_like(y))
                    return y.detach(), x.grad, [p.grad for p in layer.parameters()]

                dense = run()
                with oracle.network(layer, 0.5) as record:
                    expected = run()
                assert record.dropped == 1 and record.gap > 1e-9
                ssp.convert(layer, schedule=0.5)
                y, dx, grads = run()
                assert torch.equal(y, dense[0])
                torch.testing.assert_close(dx, expected[1], rtol=1e-10, atol=1e-10)
                torch.testing.assert_close(grads, expected[2], rtol=1e-10, atol=1e-10)
                ssp.get_controller(layer).drop_rate = 0
                zero = run()
                assert torch.equal(zero[1], dense[1])
                assert all(map(torch.equal, zero[2], dense[2]))


# --- where a network is dense -----------------------------------------------------------------


def small():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8)).double()


def input_gradient(model, x):
    x = x.detach().requires_grad_()
    model(x).square().sum().backward()
    return x.grad


def test_an_evaluated_network_has_exact_gradients():
    model, x = small(), torch.randn(2, 3, 8, 8).double()
    dense = input_gradient(model, x)
    ssp.convert(model, schedule=0.8)
    assert not torch.allclose(input_gradient(model, x), dense)
    model.eval()
    assert torch.equal(input_gradient(model, x), dense)
    model.train()
    model[0].eval()  # a frozen stage: only what trains is sparse
    model[2].eval()
    assert torch.equal(input_gradient(model, x), dense)


@pytest.mark.parametrize("rematerialised", [False, True], ids=["plain", "checkpointed"])
def test_the_rate_of_the_forward_counts(rematerialised):
    model, x = small(), torch.randn(2, 3, 8, 8).double()

    def forward():
        if rematerialised:
            return checkpoint(model, x, use_reentrant=False)
        return model(x)

    def gradients(y):
        model.zero_grad()
        y.pow(3).sum().backward()
        return [p.grad for p in model.parameters()]

    dense = gradients(forward())
    controller = ssp.get_controller(ssp.convert(model, schedule=0.8))
    sparse = gradients(forward())
    y = forward()
    controller.drop_rate = 0
    for one, two in zip(gradients(y), sparse, strict=True):
        assert torch.equal(one, two)
    y = forward()
    controller.drop_rate = 0.8
    for one, two in zip(gradients(y), dense, strict=True):
        assert torch.equal(one, two)


def test_transforms_of_torch_func_work_in_each_way_the_error_names():
    model, x = small(), torch.randn(2, 3, 8, 8).double()
    parameters = dict(model.named_parameters())

    def loss(parameters):
        return functional_call(model, parameters, (x,)).square().sum()

    expected = torch.func.grad(loss)(parameters)
    ssp.convert(model, schedule=0.8)
    with pytest.raises(RuntimeError, match=r"torch\.func.*dense\(model\).*eval\(\)"):
        torch.func.grad(loss)(parameters)
    with ssp.dense(model):
        for name, grad in torch.func.grad(loss)(parameters).items():
            assert torch.equal(grad, expected[name])
    model.eval()
    for name, grad in torch.func.grad(loss)(parameters).items():
        assert torch.equal(grad, expected[name])


@pytest.mark.parametrize("frozen", ["weight", "bias", "0.", "2.", "input"])
def test_frozen_parameters_stay_without_gradient(frozen):
    model, x = small(), torch.randn(2, 3, 8, 8).double()
    x.requires_grad_(frozen != "input")
    for name, p in model.named_parameters():
        p.requires_grad_(frozen not in name)

    def run():
        model.zero_grad(set_to_none=True)
        x.grad = None
        model(x).pow(3).sum().backward()
        return [x.grad, *(p.grad for p in model.parameters())]

    with oracle.network(model, 0.5) as record:
        expected = run()
    assert record.gap > 1e-9
    ssp.convert(model, schedule=0.5)
    for grad, want in zip(run(), expected, strict=True):
        assert (grad is None) == (want is None)
        if grad is not None:
            torch.testing.assert_close(grad, want, rtol=1e-10, atol=1e-10)
