"""What a summary counts of the network that is in no row: against torch's counter, and in words."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ssprop_patch as ssp

from .networks import Mixed


def by_torch(model, x):
    """FLOPs of forward and backward, run on the meta device: there attention is two products."""
    model, x = copy.deepcopy(model).to("meta"), x.to("meta")
    with FlopCounterMode(display=False) as forward:
        y = model(x).sum()
    with FlopCounterMode(display=False) as backward:
        y.backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("frozen", [(), ("stem", "kernel"), ("proj",), ("stem", "kernel", "up")])
def test_all_products_count_and_what_of_their_backward_is_needed(frozen):
    model, x = Mixed(), torch.randn(2, 3, 32, 32)
    for name, p in model.named_parameters():
        p.requires_grad_(name.partition(".")[0] not in frozen)
    s = ssp.summary(model, inputs=x, drop_rate=0.5)
    assert (s.forward, s.dense_backward) == by_torch(model, x)
    assert [row.name for row in s.layers] == ["stem"]


def test_the_layers_that_have_a_row_do_not_count_twice():
    model, x = Mixed(), torch.randn(2, 3, 32, 32)
    convolutions = ssp.summary(model, inputs=x, drop_rate=0.0)
    both = ssp.summary(model, inputs=x, drop_rate=0.0, types=(nn.Conv2d, nn.Linear))
    assert {row.name for row in both.layers} == {"stem", "proj", "head"}
    assert (both.forward, both.dense_backward) == (
        convolutions.forward,
        convolutions.dense_backward,
    )
    assert both.others.forward < convolutions.others.forward


def test_a_recurrent_layer_counts_as_the_products_it_is():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(4, 6, 3, padding=1)
            self.lstm = nn.LSTM(6, 8, num_layers=2, bidirectional=True, batch_first=True)

        def forward(self, x):
            return self.lstm(self.conv(x).mT)[0]

    s = ssp.summary(Net(), input_size=(3, 4, 7), drop_rate=0.5)
    matrices = sum(w.numel() for w in Net().lstm.parameters() if w.dim() == 2)
    assert s.others.forward == 2 * 3 * 7 * matrices
    assert s.others.dense_backward == 2 * s.others.forward


def test_the_headline_is_of_the_whole_network():
    """Of a ViT's backward its one convolution is a hundredth: the last lines say so."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=64)
    s = ssp.summary(model, input_size=(2, 3, 64, 64), drop_rate=0.8)
    forward, backward = by_torch(model, torch.randn(2, 3, 64, 64))
    (row,) = s.layers
    saved = row.dense_backward - row.sparse_backward
    assert saved / backward == pytest.approx(s.backward_saved, rel=1e-3)
    assert saved / (forward + backward) == pytest.approx(s.total_saved, rel=1e-3)
    assert 0.005 < s.backward_saved < 0.02 < 0.75 < row.saved
    whole, alone = str(s).splitlines()[-2:]
    assert whole == (
        f"saved: {100 * s.backward_saved:.1f} % of the backward FLOPs of the whole network, "
        f"{100 * s.total_saved:.2f} % of forward + backward"
    )
    assert f"{100 * row.saved:.1f} % of the backward FLOPs of the 1 converted layer alone" in alone
    assert s.to_dict()["backward_saved"] == s.backward_saved


def test_what_cannot_be_counted_is_said(monkeypatch):
    monkeypatch.setattr("ssprop_patch.flops.products.MODES_SEE_OPERATORS", False)
    s = ssp.summary(Mixed(), input_size=(2, 3, 32, 32), drop_rate=0.5)
    assert s.others is None
    assert "not known of the whole network: this torch shows" in str(s).splitlines()[-2]
