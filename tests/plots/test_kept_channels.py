"""The picture of channels shows which were kept, and says how often the same ones."""

import itertools

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import ssprop_patch as ssp
from ssprop_patch import plots

from .pictures import deep, metered


def images_of(figure):
    return [axes.images[0].get_array() for axes in figure.axes if axes.get_title()]


def test_channels_are_sorted_by_how_often_they_were_kept_and_dense_windows_are_grey():
    rates = [0.0, 0.75, 0.5, 0.75]
    meter = metered(ssp.LambdaSchedule(lambda t: rates[t % 4], interval="step"), steps=8)
    shares = meter.channels.shares(sparse_only=True)
    images = images_of(plots.channels(meter.channels))
    assert len(images) == len(shares) == 2
    for image, share in zip(images, shares.values(), strict=True):
        found, share = np.ma.filled(image, np.nan), share.numpy().T
        assert np.isnan(found).all(0).tolist() == [True, False, False, False] * 2
        mean = np.nanmean(found, 1)
        assert (np.diff(mean) <= 1e-6).all()
        as_rows = lambda a: sorted(map(tuple, np.nan_to_num(a, nan=-1.0).tolist()))  # noqa: E731
        assert as_rows(found) == as_rows(share)


def test_titles_say_whether_the_same_channels_win():
    def winner(dy):
        return torch.arange(dy.shape[1], 0, -1.0)

    titles = [a.get_title() for a in plots.channels(metered(selection=winner).channels).axes]
    assert "0\nthe same 4 of 8: 100 %\nnever trained: 50 %" in titles
    turn = itertools.count()

    def in_turn(dy):
        return torch.roll(winner(dy), 2 * next(turn))

    taken = metered(0.75, steps=4, selection=in_turn, exclude="^2$").channels
    assert taken.winners()["0"] == (8, 2, 0.25, 0.0)
    (axes, *_) = plots.channels(taken).axes
    assert axes.get_title() == "0\nthe same 2 of 8: 25 %"


def test_of_many_layers_twelve_are_drawn_from_the_first_to_the_last():
    meter = metered(net=deep)
    names = [a.get_title().partition("\n")[0] for a in plots.channels(meter.channels).axes]
    names = [name for name in names if name]
    assert len(names) == 12 and names[0] == "0" and names[-1] == "14"
    assert names == sorted(names, key=int)
    figure = plots.channels(meter.channels, ["3", "1"])
    assert [a.get_title()[0] for a in figure.axes[:2]] == ["3", "1"]
    for count, expected in ((1, ["0"]), (2, ["0", "14"]), (3, ["0", "7", "14"])):
        given = Figure().subplots(1, count)
        plots.channels(meter.channels, ax=given)
        assert [a.get_title().partition("\n")[0] for a in np.ravel(given)] == expected
    with pytest.raises(ValueError, match="ax= has 1 axes, and 2 panels"):
        plots.channels(meter.channels, ["3", "1"], ax=Figure().subplots())


def test_a_history_with_nothing_to_show_says_why():
    with pytest.raises(ValueError, match="no window is complete"):
        plots.channels(metered(every=10).channels)
    with pytest.raises(ValueError, match="no layer 'conv1' in the history; there are 0, 2"):
        plots.channels(metered().channels, ["conv1"])
