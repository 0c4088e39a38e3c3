"""Layers whose weight is read elsewhere: what a plan can know of them from the code around them."""

import functools

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import ssprop_patch as ssp


class Reads(nn.Module):
    """As Mamba and others do, whose kernel takes the weight of a layer that is never called."""

    def __init__(self):
        super().__init__()
        self.conv1d = nn.Conv1d(4, 4, 3, groups=4)
        self.out = nn.Conv1d(4, 4, 1)
        nn.init.ones_(self.conv1d.weight)

    def forward(self, x):
        return self.out(F.conv1d(x, self.conv1d.weight, self.conv1d.bias, groups=4))


def decorated(function):
    @functools.wraps(function)
    def wrapper(self, *args):
        getattr(self, "conv1d")  # noqa: B009
        return function(self, *args)

    return wrapper


class ReadsBehindADecorator(Reads):
    forward = decorated(Reads.forward)


class ReadsInAHelper(Reads):
    def fast_forward(self, x):
        weight = self.conv1d.weight.squeeze(1)
        return F.conv1d(x, weight.unsqueeze(1), self.conv1d.bias, groups=self.conv1d.groups)

    def forward(self, x):
        return self.out(self.fast_forward(x))


class ReadsOrCalls(Reads):
    def forward(self, x):
        return super().forward(x) if x.shape[0] > 1 else self.out(self.conv1d(x))


class CallsInAnInnerFunction(Reads):
    def forward(self, x):
        weight = self.conv1d.weight
        call = lambda t: self.conv1d(t * weight.mean())  # noqa: E731
        return self.out(torch.utils.checkpoint.checkpoint(call, x))


class HandsOver(Reads):
    def forward(self, x):
        scale = self.conv1d.weight.mean()
        return torch.utils.checkpoint.checkpoint(self.conv1d, x, use_reentrant=False) * scale


class CallsByName(Reads):
    def forward(self, x):
        return getattr(self, "conv" + "1d")(x) * self.conv1d.weight.mean()


class CallsAllChildren(Reads):
    def forward(self, x):
        for child in self.children():
            x = child(x) * self.conv1d.weight.mean()
        return x


class CallsItsForward(Reads):
    def forward(self, x):
        return self.conv1d.forward(x) * self.conv1d.weight.mean()


class CalledFromOutside(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixer = Reads()

    def forward(self, x):
        return self.mixer(x) + self.mixer.conv1d(x)


class SameNameOutside(nn.Module):
    """A method that means another layer by the name."""

    def __init__(self):
        super().__init__()
        self.conv1d = Reads()

    def forward(self, x):
        return self.conv1d(x)


def row_of(model, name):
    (row,) = (r for r in ssp.plan(model) if r.name == name)
    return row


@pytest.mark.parametrize("cls", [Reads, ReadsBehindADecorator, ReadsInAHelper])
def test_a_layer_that_is_read_and_never_called_is_left_dense(cls):
    model = cls()
    row = row_of(model, "conv1d")
    reason = f"{cls.__name__} reads its weight and never calls it"
    assert (row.action, row.reason) == ("skip", reason)
    assert row_of(model, "out").action == "convert"
    ssp.convert(model, 0.5)
    assert ssp.is_converted(model.out) and not ssp.is_converted(model.conv1d)
    model(torch.randn(2, 4, 8)).pow(2).sum().backward()
    zero = [int((c.weight.grad.flatten(1) == 0).all(1).sum()) for c in (model.conv1d, model.out)]
    assert zero == [0, 2]


def test_that_another_class_calls_something_else_by_the_name_does_not_count():
    assert row_of(SameNameOutside(), "conv1d.conv1d").action == "skip"


@pytest.mark.parametrize(
    "cls",
    [
        ReadsOrCalls,
        CallsInAnInnerFunction,
        HandsOver,
        CallsByName,
        CallsAllChildren,
        CallsItsForward,
    ],
)
def test_a_layer_that_may_be_called_is_converted_and_the_plan_tells_of_the_other_use(cls):
    row = row_of(cls(), "conv1d")
    assert row.action == "convert"
    assert row.reason.startswith(f"stock forward; {cls.__name__} also reads its weight: what it")


def test_a_layer_that_is_called_from_outside_is_converted():
    assert row_of(CalledFromOutside(), "mixer.conv1d").action == "convert"


def test_a_layer_with_two_holders_is_converted_if_one_of_them_calls_it():
    model = nn.ModuleList([Reads(), nn.Sequential()])
    model[1].append(model[0].conv1d)
    assert row_of(model, "0.conv1d").action == "convert"


def test_weights_read_while_a_model_is_made_are_no_reason():
    model = timm.create_model("test_vit", num_classes=3)
    rows = ssp.plan(model, types=nn.Linear).converted
    assert rows and {row.reason for row in rows} == {"stock forward"}


def test_where_nothing_is_left_a_warning_says_why():
    model = Reads()
    with pytest.warns(UserWarning, match=r"(?s)nothing to convert.*Reads reads its weight"):
        ssp.convert(model, 0.5, exclude="^out$")
    assert not ssp.is_converted(model)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "falcon_mamba", "lfm2"])
def test_in_transformers(name):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    more = {
        "mamba": {"state_size": 4, "intermediate_size": 64},
        "falcon_mamba": {"state_size": 4, "intermediate_size": 64},
        "mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
        "lfm2": {
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "layer_types": ["conv"],
            "conv_L_cache": 3,
        },
    }
    config = transformers.AutoConfig.for_model(name, **small, **more[name])
    (row,) = ssp.plan(transformers.AutoModel.from_config(config))
    assert row.action == "skip" and row.reason.endswith("reads its weight and never calls it")


def test_qkv_of_beit_is_called_in_some_of_its_configurations_only():
    model = timm.create_model(
        "beit_base_patch16_224", embed_dim=16, depth=1, num_heads=2, num_classes=3
    )
    reasons = {row.name: row.reason for row in ssp.plan(model, types=nn.Linear)}
    assert "Attention also reads its weight" in reasons["blocks.0.attn.qkv"]
    assert reasons["head"] == reasons["blocks.0.mlp.fc1"] == "stock forward"
