"""Pictures: they show what they were given, nothing is cut off, and matplotlib's state stays."""

import itertools
import subprocess
import sys
from statistics import fmean, stdev
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import nn

import ssprop_patch as ssp
from ssprop_patch import plots


def small():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 16, 3)).double()


def history(rate=0.5, steps=4, every=1, net=small, **kwargs):
    torch.manual_seed(0)
    model = ssp.convert(net(), rate, **kwargs)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with ssp.Meter(model, energy=False, channels_every=every) as meter:
        for _ in range(steps):
            model(torch.randn(2, 3, 12, 12).double()).square().mean().backward()
            optimizer.step()
    return meter


RUNS = [
    {
        "method": m,
        "seed": s,
        "accuracy": 0.5 + 0.1 * i + 0.05 * e + 0.01 * s,
        "flops": (e + 1) * (3e12 - i * 1e12),
        "seconds": (e + 1) * (10.0 - i) + s,
        "joules": (e + 1) * 700.0,
    }
    for i, m in enumerate(["dense", "ssprop"])
    for s in range(3)
    for e in range(4)
]


def texts_of(figure):
    """Texts that are shown, where they are drawn."""
    figure.draw_without_rendering()
    return [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]


FIGURES = {
    "schedule": lambda: plots.schedule(ssp.BarSchedule(0.8), 10),
    "long schedule": lambda: plots.schedule(
        ssp.StepSchedule([i / 100 for i in range(60)], range(1, 60)), 60
    ),
    "resnet50": lambda: plots.flops_per_layer(
        ssp.summary(timm.create_model("resnet50"), input_size=(1, 3, 64, 64), drop_rate=0.8)
    ),
    "resnet18": lambda: plots.flops_per_layer(
        ssp.summary(timm.create_model("resnet18"), input_size=(1, 3, 64, 64), drop_rate=0.8)
    ),
    "one layer": lambda: plots.flops_per_layer(
        ssp.summary(nn.Conv2d(3, 8, 3), input_size=(1, 3, 64, 64), drop_rate=0.8)
    ),
    "report": lambda: plots.flops_per_layer(history().report()),
    "accuracy": lambda: plots.accuracy(RUNS),
    "one cost": lambda: plots.accuracy([{**r, "flops": "", "joules": None} for r in RUNS]),
    "channels": lambda: plots.channels(history().channels),
    "one layer's channels": lambda: plots.channels(history().channels, ["0"]),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_picture_is_as_wide_as_a_readme_and_nothing_is_cut_off(name):
    figure = FIGURES[name]()
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()  # of all that is drawn
    assert width * figure.dpi == pytest.approx(830)
    assert box.x0 > -0.01 and box.x1 < width + 0.01 and box.y0 > -0.01 and box.y1 < height + 0.01
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert any(axes.get_xlabel() for axes in shown) or figure.get_supxlabel()
    assert any(axes.get_ylabel() or axes.get_yticklabels() for axes in shown)


def test_the_names_of_53_layers_do_not_run_into_each_other():
    figure = FIGURES["resnet50"]()
    texts_of(figure)
    (axes,) = figure.axes
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert len(boxes) == 54  # and everything else
    assert all(a.y0 >= b.y1 - 0.5 for a, b in itertools.pairwise(boxes))
    assert axes.get_yticklabels()[0].get_text() == "conv1"


@pytest.mark.parametrize("name", ["schedule", "report", "accuracy", "channels"])
@pytest.mark.parametrize(("suffix", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_the_file_name_says_png_or_svg(tmp_path, name, suffix, begins):
    path = tmp_path / f"picture.{suffix}"
    FIGURES[name]().savefig(path)
    assert path.read_bytes().startswith(begins)


def test_a_schedule_is_drawn_as_it_is():
    figure = plots.schedule(ssp.BarSchedule(0.8), 6)
    (axes,) = figure.axes
    drawn = [patch.get_data() for patch in axes.patches]
    for data in drawn:
        assert data.values.tolist() == [0.0, 0.8] * 3
        assert data.edges.tolist() == list(range(7))
    assert "mean 0.40" in [t.get_text() for t in texts_of(figure)]
    assert axes.get_title() == "BarSchedule(0.8, period=2)"


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


def bars_of(figure):
    (axes,) = figure.axes
    return [[bar.get_width() for bar in container] for container in axes.containers]


def test_bars_are_the_flops_of_a_summary():
    summary = ssp.summary(small(), input_size=(2, 3, 32, 32), drop_rate=0.5)
    figure = plots.flops_per_layer(summary)
    dense, sparse = bars_of(figure)
    assert "(MFLOP)" in figure.axes[0].get_xlabel()
    np.testing.assert_allclose(dense, [row.dense_backward / 1e6 for row in summary.layers])
    np.testing.assert_allclose(sparse, [row.sparse_backward / 1e6 for row in summary.layers])
    shown = [t.get_text() for t in texts_of(figure)]
    assert any(f"{100 * summary.backward_saved:.1f} %" in text for text in shown)


def test_bars_are_the_flops_of_a_report():
    report = history().report()
    dense, sparse = bars_of(plots.flops_per_layer(report))
    assert len(dense) == 2
    assert sum(sparse) / sum(dense) == pytest.approx(1 - report.backward_saved)


def test_the_last_bar_and_the_title_are_of_the_whole_network():
    model = nn.Sequential(*small(), nn.Flatten(), nn.Linear(16 * 8 * 8, 100).double())
    summary = ssp.summary(model, input_size=(2, 3, 12, 12), drop_rate=0.5)
    figure = plots.flops_per_layer(summary)
    dense, sparse = bars_of(figure)
    assert dense[-1] == sparse[-1] == pytest.approx(2 * 2 * 2 * 16 * 8 * 8 * 100 / 1e3)
    assert sum(sparse) / sum(dense) == pytest.approx(1 - summary.backward_saved)
    assert figure.axes[0].get_yticklabels()[-1].get_text() == "everything else"


def test_layers_that_cost_more_than_dense_and_layers_that_cost_nothing():
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 1, 1)).requires_grad_(False)
    texts_of(plots.flops_per_layer(ssp.summary(model, input_size=(1, 1, 4, 4), drop_rate=0.5)))
    model = nn.Conv2d(1, 2, 1, bias=False)
    summary = ssp.summary(model, input_size=(1, 1, 4, 4), drop_rate=0.5)
    assert summary.layers[0].saved < 0
    assert any(t.get_text().startswith("+") for t in texts_of(plots.flops_per_layer(summary)))
    with pytest.raises(TypeError, match="Summary"):
        plots.flops_per_layer(model)


def test_accuracy_has_a_panel_for_each_cost_and_a_mean_for_each_method():
    figure = plots.accuracy(RUNS, labels={"ssprop": "ssProp"})
    units = [axes.get_xlabel() for axes in figure.axes]
    assert [u.rpartition("(")[2] for u in units] == ["TFLOP)", "s)", "J)"]
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["dense", "ssProp"]
    for axes, cost, unit in zip(
        figure.axes, ["flops", "seconds", "joules"], [1e12, 1, 1], strict=True
    ):
        means = [
            line
            for line in axes.lines
            if line.get_linewidth() == 1.5 and line.get_linestyle() == "-"
        ]
        for line, method in zip(means, ["dense", "ssprop"], strict=True):
            runs = [[r for r in RUNS if (r["method"], r["seed"]) == (method, s)] for s in range(3)]
            xs = [fmean(r[cost] / unit for r in same) for same in zip(*runs, strict=True)]
            ys = [fmean(100 * r["accuracy"] for r in same) for same in zip(*runs, strict=True)]
            np.testing.assert_allclose(line.get_xdata(), xs)
            np.testing.assert_allclose(line.get_ydata(), ys)
        assert sum(line.get_linewidth() == 0.8 for line in axes.lines) == 6


def test_bars_of_accuracy_are_the_standard_deviation_of_the_seeds():
    axes = plots.accuracy(RUNS).axes[0]
    _, _, (_, vertical) = axes.containers[0]
    low, high = vertical.get_segments()[0][:, 1]
    ends = [100 * r["accuracy"] for r in RUNS[:12] if r["accuracy"] >= 0.65]
    assert (high - low) / 2 == pytest.approx(stdev(ends))


def test_accuracy_from_a_csv_file_is_that_of_its_rows(tmp_path):
    path = tmp_path / "runs.csv"
    lines = [",".join(RUNS[0]), *(",".join(map(str, row.values())) for row in RUNS)]
    path.write_text("\n".join(lines) + "\n")
    from_file, from_rows = plots.accuracy(path), plots.accuracy(RUNS)
    for a, b in zip(from_file.axes, from_rows.axes, strict=True):
        assert a.get_xlabel() == b.get_xlabel()
        for one, other in zip(a.lines, b.lines, strict=True):
            np.testing.assert_allclose(one.get_xydata(), other.get_xydata())


def test_runs_with_one_row_each_and_a_cost_that_some_lack():
    rows = [
        {"method": m, "accuracy": 0.9, "flops": 1e9, "joules": j}
        for m, j in [("a", 3.0), ("b", None)]
    ]
    figure = plots.accuracy(rows)
    assert [axes.get_xlabel() for axes in figure.axes] == ["forward and backward so far (GFLOP)"]


def test_seeds_that_ended_at_different_epochs_can_be_drawn():
    figure = plots.accuracy(RUNS[:-1])
    assert len(figure.axes) == 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "rows must have"),
        ([{"method": "a", "accuracy": 0.5}], "flops, seconds or joules"),
        ([{"accuracy": 0.5, "flops": 1.0}], "method"),
        ([{"method": "a", "accuracy": 93.0, "flops": 1.0}], r"accuracy must be in \[0, 1\]"),
        ([{"method": "a", "accuracy": "x", "flops": 1.0}], "accuracy must be a number"),
        ([{"method": "a", "accuracy": 0.5, "flops": float("nan")}], "flops must be a number"),
    ],
)
def test_rows_that_cannot_be_drawn_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        plots.accuracy(rows)


def images_of(figure):
    return [axes.images[0].get_array() for axes in figure.axes if axes.get_title()]


def test_channels_are_sorted_by_how_often_they_were_kept_and_dense_windows_are_grey():
    rates = [0.0, 0.75, 0.5, 0.75]
    meter = history(ssp.LambdaSchedule(lambda t: rates[t % 4], interval="step"), steps=8)
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

    titles = [a.get_title() for a in plots.channels(history(selection=winner).channels).axes]
    assert "0\nthe same 4 of 8: 100 %; never trained: 50 %" in titles
    turn = itertools.count()

    def in_turn(dy):
        return torch.roll(winner(dy), 2 * next(turn))

    taken = history(0.75, steps=4, selection=in_turn, exclude="^2$").channels
    assert taken.winners()["0"] == (8, 2, 0.25, 0.0)
    (axes, *_) = plots.channels(taken).axes
    assert axes.get_title() == "0\nthe same 2 of 8: 25 %"


def test_of_many_layers_twelve_are_drawn_from_the_first_to_the_last():
    def many():
        return nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(15)]).double()

    meter = history(net=many)
    names = [a.get_title().partition("\n")[0] for a in plots.channels(meter.channels).axes]
    names = [name for name in names if name]
    assert len(names) == 12 and names[0] == "0" and names[-1] == "14"
    assert names == sorted(names, key=int)
    figure = plots.channels(meter.channels, ["3", "1"])
    assert [a.get_title()[0] for a in figure.axes[:2]] == ["3", "1"]


def test_a_history_with_nothing_to_show_says_why():
    with pytest.raises(ValueError, match="no window is complete"):
        plots.channels(history(every=10).channels)
    with pytest.raises(ValueError, match="no layer 'conv1' in the history; there are 0, 2"):
        plots.channels(history().channels, ["conv1"])


def test_matplotlib_is_imported_when_asked_for_and_pyplot_never(tmp_path):
    code = (
        "import sys, ssprop_patch as ssp; from ssprop_patch import plots; "
        "assert 'matplotlib' not in sys.modules; plots.schedule(0.5, 3).savefig(sys.argv[1]); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.png")], check=True)


def test_without_matplotlib_the_extra_is_named():
    hidden = {"matplotlib": None, "matplotlib.figure": None}
    with mock.patch.dict(sys.modules, hidden), pytest.raises(ImportError) as error:
        plots.schedule(0.5, 3)
    assert 'pip install "ssprop_patch[plot]"' in str(error.value)
