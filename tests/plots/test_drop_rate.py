"""The picture of a schedule shows what it was given."""

import pytest

import ssprop_patch as ssp
from ssprop_patch import plots

from .pictures import words


def test_a_schedule_is_drawn_as_it_is():
    figure = plots.schedule(ssp.BarSchedule(0.8), 6)
    (axes,) = figure.axes
    drawn = [patch.get_data() for patch in axes.patches]
    for data in drawn:
        assert data.values.tolist() == [0.0, 0.8] * 3
        assert data.edges.tolist() == list(range(7))
    assert "mean 0.40" in words(figure)
    assert axes.get_title("left") == "BarSchedule(0.8, period=2)"


def test_a_schedule_of_steps_is_drawn_over_epochs():
    schedule = ssp.LinearSchedule(0.0, 0.8, total=8, interval="step")
    (axes,) = plots.schedule(schedule, 2, steps_per_epoch=4).axes
    data = axes.patches[0].get_data()
    assert data.edges.tolist() == [i / 4 for i in range(9)]
    assert data.values.tolist() == [schedule(t) for t in range(8)]
    with pytest.raises(ValueError, match="steps_per_epoch"):
        plots.schedule(schedule, 2)
    with pytest.raises(ValueError, match="epochs"):
        plots.schedule(0.5, 0)
