"""The picture of FLOPs shows those of its summary or report, in 40 bars at most."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from torch import nn

import ssprop_patch as ssp
from ssprop_patch import plots

from .pictures import FIGURES, deep, metered, small, summary, words


def bars_of(figure):
    (axes,) = figure.axes
    return [[bar.get_width() for bar in container] for container in axes.containers]


def test_bars_are_the_flops_of_a_summary():
    found = ssp.summary(small(), input_size=(2, 3, 32, 32), drop_rate=0.5)
    figure = plots.flops_per_layer(found)
    dense, sparse = bars_of(figure)
    assert "(MFLOP)" in figure.axes[0].get_xlabel()
    np.testing.assert_allclose(dense, [row.dense_backward / 1e6 for row in found.layers])
    np.testing.assert_allclose(sparse, [row.sparse_backward / 1e6 for row in found.layers])
    shown = words(figure)
    assert any(f"{100 * found.backward_saved:.1f} %" in text for text in shown)


def test_bars_are_the_flops_of_a_report():
    report = metered().report()
    dense, sparse = bars_of(plots.flops_per_layer(report))
    assert len(dense) == 2
    assert sum(sparse) / sum(dense) == pytest.approx(1 - report.backward_saved)


def test_the_last_bar_and_the_title_are_of_the_whole_network():
    model = nn.Sequential(*small(), nn.Flatten(), nn.Linear(16 * 8 * 8, 100).double())
    found = ssp.summary(model, input_size=(2, 3, 12, 12), drop_rate=0.5)
    figure = plots.flops_per_layer(found)
    dense, sparse = bars_of(figure)
    assert dense[-1] == sparse[-1] == pytest.approx(2 * 2 * 2 * 16 * 8 * 8 * 100 / 1e3)
    assert sum(sparse) / sum(dense) == pytest.approx(1 - found.backward_saved)
    assert figure.axes[0].get_yticklabels()[-1].get_text() == "everything else"


def test_layers_that_cost_more_than_dense_and_layers_that_cost_nothing():
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 1, 1)).requires_grad_(False)
    words(plots.flops_per_layer(ssp.summary(model, input_size=(1, 1, 4, 4), drop_rate=0.5)))
    model = nn.Conv2d(1, 2, 1, bias=False)
    found = ssp.summary(model, input_size=(1, 1, 4, 4), drop_rate=0.5)
    assert found.layers[0].saved < 0
    assert any(t.startswith("+") for t in words(plots.flops_per_layer(found)))
    with pytest.raises(TypeError, match="Summary"):
        plots.flops_per_layer(model)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "one layer", "long names", "report"])
def test_what_is_saved_is_written_behind_each_bar_and_inside(name):
    figure = FIGURES[name]()
    figure.draw_without_rendering()
    (axes,) = figure.axes
    dense, _ = axes.containers
    assert len(axes.texts) == len(dense)
    for text, bar in zip(axes.texts, dense, strict=True):
        box = text.get_window_extent()
        assert bar.get_window_extent().x1 < box.x0 and box.x1 < axes.get_window_extent().x1


def names_of(figure):
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


@pytest.mark.parametrize("top", [40, 10, 3])
def test_of_many_layers_the_largest_have_a_bar_and_the_others_one_together(top):
    found = summary("resnet50")
    flops = {row.name: (row.dense_backward, row.sparse_backward) for row in found.layers}
    figure = plots.flops_per_layer(found, **({} if top == 40 else {"top": top}))
    *names, together, rest = names_of(figure)
    dense, sparse = bars_of(figure)
    assert len(dense) == top == len(names) + 2 and rest == "everything else"
    assert together == f"… and {53 - len(names)} more layers"
    assert names == [name for name in flops if name in names]  # in the network's order
    left = set(flops) - set(names)
    assert min(flops[n][0] for n in names) >= max(flops[n][0] for n in left)
    for bars, i in ((dense, 0), (sparse, 1)):
        size = flops[names[0]][i] / bars[0]
        assert bars[-2] * size == pytest.approx(sum(flops[name][i] for name in left))
    assert sum(sparse) / sum(dense) == pytest.approx(1 - found.backward_saved)


def test_as_many_bars_as_asked_for_are_drawn():
    assert len(bars_of(plots.flops_per_layer(summary("resnet50"), top=54))[0]) == 54
    assert names_of(plots.flops_per_layer(summary("resnet50"), top=53))[-2] == (
        "… and 2 more layers"
    )
    report = metered(net=deep).report()
    assert names_of(plots.flops_per_layer(report, top=2)) == ["1", "… and 14 more layers"]
    with pytest.raises(ValueError, match="top must be an integer >= 3"):
        plots.flops_per_layer(summary("resnet50"), top=2)
    with pytest.raises(TypeError, match="top"):
        plots.flops_per_layer(report, top="all")


def test_low_axes_have_as_many_bars_as_they_have_room_for():
    figure = Figure(figsize=(8, 3), layout="constrained")
    plots.flops_per_layer(summary("resnet50"), ax=figure.subplots())
    assert 5 < len(bars_of(figure)[0]) < 12


def test_a_long_name_keeps_its_end():
    (name,) = names_of(FIGURES["long names"]())
    assert name.startswith("…") and "backbone_encoder_".endswith(name[-9:]) and len(name) == 36
