"""Libraries that look layers up by exact class, or put classes of their own in their place."""

import copy

import oracle
import pytest
import torch
from torch import nn

import ssprop_patch as ssp

from .common import RATE, batches, check_training, net, state, zero_rows


def plain_net():
    """Without batch norm, as per-sample gradients need it."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    ).double()


def step(model, i=0):
    x, y = batches()[i]
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    return [p.grad.clone() for p in model.parameters()]


# --- Opacus: per-sample gradients -------------------------------------------------------------


def private(model, mode):
    opacus = pytest.importorskip("opacus", reason="pip install opacus")
    data = [(x, y) for xs, ys in batches() for x, y in zip(xs, ys, strict=True)]
    model, optimizer, loader = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        data_loader=torch.utils.data.DataLoader(data, batch_size=4),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["hooks", "functorch"])
@pytest.mark.parametrize("schedule", [0.0, RATE])
def test_opacus_refuses_a_converted_model_by_the_name_of_a_layer(mode, schedule):
    pytest.importorskip("opacus", reason="pip install opacus")
    model = ssp.convert(plain_net(), schedule)
    with pytest.raises(RuntimeError, match=r"(?s)Opacus .* '0' \(Conv2d\).*revert\(model\) first"):
        private(model, mode)


@pytest.mark.filterwarnings("ignore")
def test_opacus_after_revert_is_as_if_never_converted():
    model = ssp.revert(ssp.convert(plain_net(), RATE))
    expected, found = private(plain_net(), "hooks"), private(model, "hooks")
    torch.testing.assert_close(state(found), state(expected), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_is_private_already_is_refused():
    pytest.importorskip("opacus", reason="pip install opacus")
    model = private(plain_net(), "hooks")
    with pytest.raises(ValueError, match=r"(?s)nothing was changed.*_module.0: Opacus computes"):
        ssp.convert(model, RATE)
    assert not ssp.is_converted(model)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_opacus_by_expanded_weights_is_dense_and_says_so():
    pytest.importorskip("opacus", reason="pip install opacus")
    expected = private(plain_net(), "ew")
    with pytest.warns(UserWarning, match="ExpandedWeight.*stays dense"):
        found = private(ssp.convert(plain_net(), RATE), "ew")
    torch.testing.assert_close(state(found), state(expected), rtol=0, atol=0)


# --- BackPACK: more than the gradient -----------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_backpack():
    backpack = pytest.importorskip("backpack", reason="pip install backpack-for-pytorch")
    model = ssp.convert(plain_net(), 0.0)
    with pytest.raises(RuntimeError, match=r"BackPACK .* '0' \(Conv2d\).*revert\(model\) first"):
        backpack.extend(model)

    def per_sample(model):
        model, loss = backpack.extend(model), backpack.extend(nn.CrossEntropyLoss())
        x, y = batches()[0]
        with backpack.backpack(backpack.extensions.BatchGrad()):
            loss(model(x), y).backward()
        return [p.grad_batch for p in model.parameters()]

    extended = plain_net()
    expected = per_sample(extended)
    found = per_sample(ssp.revert(ssp.convert(plain_net(), RATE)))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="0: BackPACK computes gradients"):
        ssp.convert(extended, RATE)


# --- PEFT: layers of its own around the old ones ------------------------------------------------


def with_lora(model):
    peft = pytest.importorskip("peft", reason="pip install peft")
    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, target_modules=["0", "3"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def train_trainable(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for x, y in batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def test_peft_convert_after():
    check_training(train_trainable, lambda: with_lora(net()))


def test_peft_converted_before():
    """The layers wrapped stay sparse; what PEFT makes of their class is new, and dense."""
    model = with_lora(ssp.convert(net(), RATE))
    names = [row.name for row in ssp.plan(model).converted]
    converted = [n for n, m in model.named_modules() if n in names and ssp.is_converted(m)]
    assert len(names) == 6 and len(converted) == 2
    assert all(name.endswith("base_layer") for name in converted)
    merged = ssp.revert(model).merge_and_unload()
    expected = with_lora(net()).merge_and_unload()
    torch.testing.assert_close(state(merged), state(expected), rtol=0, atol=0)


# --- torchao: quantized weights -------------------------------------------------------------------


def test_torchao_int8_weights():
    quantization = pytest.importorskip("torchao.quantization", reason="pip install torchao")

    def quantized(model):
        quantization.quantize_(model.float(), quantization.Int8WeightOnlyConfig())
        return model

    def gradient(model):
        x = batches()[0][0].float().requires_grad_()
        model(x).square().sum().backward()
        return x.grad

    types = (nn.Conv2d, nn.Linear)
    (row,) = ssp.plan(quantized(net()), types=types).skipped
    assert "a tensor subclass with operations of its own" in row.reason
    with oracle.network(masked := quantized(net()), RATE):
        expected = gradient(masked)
    torch.testing.assert_close(gradient(ssp.convert(quantized(net()), RATE, types=types)), expected)
    converted_first = quantized(ssp.convert(net(), RATE, types=types))
    with pytest.warns(UserWarning, match="Linear: its weight is a Int8Tensor.*stays dense"):
        found = gradient(converted_first)
    torch.testing.assert_close(found, expected)


def test_torchao_quantization_aware_training():
    """Its fake-quantized layers write their own forward: convert after prepare."""
    quantization = pytest.importorskip("torchao.quantization", reason="pip install torchao")
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    def make():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 32), nn.Linear(32, 4)
        )
        weights = IntxFakeQuantizeConfig(torch.int4, group_size=32)
        quantization.quantize_(model, QATConfig(weight_config=weights, step="prepare"))
        return model

    def gradients(model):
        x, y = batches()[0]
        nn.functional.cross_entropy(model(x.float()), y).backward()
        return [p.grad for p in model.parameters()]

    types = (nn.Conv2d, nn.Linear)
    with oracle.network(masked := make(), RATE, types=types):
        expected = gradients(masked)
    found = gradients(ssp.convert(make(), RATE, types=types))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert zero_rows(found[0]) == 4


# --- torch-pruning: fewer channels in the same layers ---------------------------------------------


def test_torch_pruning():
    tp = pytest.importorskip("torch_pruning", reason="pip install torch-pruning")

    def pruned(model):
        pruner = tp.pruner.MagnitudePruner(
            model,
            batches()[0][0],
            importance=tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=[model[-1]],
        )
        pruner.step()
        return model.train()  # which the library leaves in eval()

    expected = pruned(net())
    model = pruned(ssp.convert(net(), RATE))
    torch.testing.assert_close(state(model), state(expected), rtol=0, atol=0)
    assert model[0].out_channels == 4 and ssp.is_converted(model)
    with oracle.network(masked := copy.deepcopy(expected), RATE):
        wanted = step(masked)
    torch.testing.assert_close(step(model), wanted, rtol=1e-9, atol=1e-11)
    assert zero_rows(model[0].weight.grad) == 2


# --- captum: attributions -------------------------------------------------------------------------


def attributions(model, method):
    attr = pytest.importorskip("captum.attr", reason="pip install captum")
    (x, _), (base, _), _ = batches()
    model = model.float().eval()
    x, base = x.float(), base.float()
    if method == "LRP":
        # captum has no rule for Flatten: what comes before it, position by position
        return attr.LRP(model[:-3]).attribute(x, target=(1, 2, 3))
    if method == "LayerGradCam":
        return attr.LayerGradCam(model, model[3]).attribute(x, target=1)
    if method in ("Saliency", "GuidedBackprop", "Deconvolution", "InputXGradient"):
        return getattr(attr, method)(model).attribute(x, target=1)
    return getattr(attr, method)(model).attribute(x, base, target=1)


def relu_net():
    """What LRP has rules for."""
    model = net()
    model[4] = nn.ReLU()
    return model


@pytest.mark.filterwarnings("ignore:Setting:UserWarning")
@pytest.mark.parametrize(
    "method",
    [
        "DeepLift",
        "LRP",
        "Saliency",
        "GuidedBackprop",
        "Deconvolution",
        "InputXGradient",
        "IntegratedGradients",
        "LayerGradCam",
    ],
)
@pytest.mark.parametrize("rate", [0.0, 0.8])
def test_captum_attributes_to_an_evaluated_model_as_to_a_plain_one(method, rate):
    expected = attributions(relu_net(), method)
    converted = ssp.convert(relu_net(), rate)
    if method == "LRP":
        with pytest.raises(TypeError, match="has no rule defined"):  # it looks classes up
            attributions(converted, method)
        converted = ssp.reverted_copy(converted)
    found = attributions(converted, method)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert found.any()
