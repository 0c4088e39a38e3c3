"""Which channels each layer keeps: counted against a choice made by hand."""

import json

import oracle
import pytest
import torch

import ssprop_patch as ssp
from metering import by_hand
from metering.by_hand import by_step, gradients, quiet_meter, rate_at, train
from ssprop_patch.metering import ChannelHistory


def chosen(model, x, rate):
    """Which channels of each layer the oracle keeps in one backward: rows that are not zero."""
    found = {}
    with oracle.network(model, rate):
        grads = gradients(model, x)
    for name in ("0", "2", "4"):
        found[name] = grads[f"{name}.weight"].flatten(1).any(1).float()
    return found


def test_shares_are_those_of_a_choice_made_by_hand():
    rate = 0.6
    plain, model = by_hand.net(), ssp.convert(by_hand.net(), rate)
    with quiet_meter(model, channels_every=2) as meter:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        plainly = torch.optim.SGD(plain.parameters(), 0.1)
        expected = []
        for i in range(5):
            expected.append(chosen(plain, by_hand.batch(i), rate))
            plainly.step()
            gradients(model, by_hand.batch(i))
            optimizer.step()
        shares = meter.channels.shares()
    assert list(shares) == ["0", "2", "4"]
    for name, share in shares.items():
        by_step = torch.stack([e[name] for e in expected[:4]])
        torch.testing.assert_close(share, by_step.view(2, 2, -1).mean(1), rtol=0, atol=0)
        assert share.dtype == torch.float32


def test_a_history_comes_back_from_json():
    model = ssp.convert(by_hand.net(), by_step())
    with quiet_meter(model, channels_every=2) as meter:
        train(model, 5)
        history = meter.channels
    back = ChannelHistory.from_dict(json.loads(json.dumps(history.to_dict())))
    assert back.every == 2 and back.winners() == history.winners()
    for sparse_only in (False, True):
        shares, again = (h.shares(sparse_only=sparse_only) for h in (history, back))
        assert list(again) == list(shares) == ["0", "2", "4"]
        for name, share in shares.items():
            torch.testing.assert_close(again[name], share, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(KeyError, match="every"):
        ChannelHistory.from_dict({})


def test_dense_backwards_keep_every_channel_or_are_left_aside():
    model = ssp.convert(by_hand.net(), by_step())  # dense, sparse, sparse, dense, sparse
    with quiet_meter(model, channels_every=1) as meter:
        train(model, 5)
        all_of_them, sparse = meter.channels.shares(), meter.channels.shares(sparse_only=True)
    for t, dense in enumerate([True, False, False, True, False]):
        k = max(1, int((1 - rate_at(t)) * 12 + 0.5))
        assert all_of_them["2"][t].sum() == k
        assert sparse["2"][t].isnan().all() if dense else sparse["2"][t].sum() == k


def test_a_window_of_both_kinds():
    model = ssp.convert(by_hand.net(), by_step())
    with quiet_meter(model, channels_every=5) as meter:
        train(model, 5)
        (mixed,), (sparse,) = (
            meter.channels.shares()["4"],
            meter.channels.shares(sparse_only=True)["4"],
        )
    torch.testing.assert_close(mixed, (3 * sparse + 2) / 5)


def test_a_window_without_a_backward_is_not_a_number():
    model = ssp.convert(by_hand.net(), 0.5)
    with quiet_meter(model, channels_every=1) as meter:
        optimizer = train(model, 1)
        optimizer.step()
        shares = meter.channels.shares()["0"]
    assert shares.isnan().all(1).tolist() == [False, True]


def test_grouped_and_depthwise_channels_are_numbered_as_the_layers():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.Conv2d(8, 8, 3, groups=8),
        torch.nn.Conv2d(8, 12, 1, groups=2),
    ).double()
    with quiet_meter(ssp.convert(model, 0.5), channels_every=1) as meter:
        train(model, 1)
        shares = meter.channels.shares()
    model.zero_grad()
    grads = gradients(model, by_hand.batch(0))
    assert {name: tuple(s.shape) for name, s in shares.items()} == {
        "0": (1, 8),
        "1": (1, 8),
        "2": (1, 12),
    }
    assert shares["2"].view(2, 6).sum(1).tolist() == [3, 3]
    assert shares["1"].sum() == 4
    assert grads["2.weight"].shape[0] == 12


def test_a_layer_that_is_never_sparse_is_left_out():
    model = ssp.convert(by_hand.net(), 0.5, exclude="^2$")
    with quiet_meter(model, channels_every=1) as meter:
        train(model, 2)
        assert list(meter.channels.shares()) == ["0", "4"]


def test_an_unfinished_window_is_left_out_and_nothing_is_known_before_the_first():
    model = ssp.convert(by_hand.net(), 0.5)
    with quiet_meter(model, channels_every=3) as meter:
        assert meter.channels.shares() == {}
        train(model, 5)
        assert meter.channels.shares()["0"].shape == (1, 8)


def test_history_is_only_kept_when_asked_for():
    with quiet_meter(by_hand.net()) as meter:
        assert meter.channels is None
        assert all(record._times_kept is None for record in meter._records.values())


def test_a_layer_that_is_converted_later_has_no_share_before():
    model = ssp.convert(by_hand.net(), 0.5)
    with quiet_meter(model, channels_every=1) as meter:
        optimizer = train(model, 1)
        ssp.convert(model, 0.5, types=(torch.nn.Conv2d, torch.nn.Linear))
        train(model, 1, optimizer)
        shares = meter.channels.shares()
    assert shares["6"].isnan().all(1).tolist() == [True, False]
    assert shares["6"][1].sum() == pytest.approx(3)
