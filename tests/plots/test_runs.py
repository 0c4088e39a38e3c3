"""The picture of runs shows means and spreads of what they tell."""

from statistics import fmean, stdev

import numpy as np
import pytest

from ssprop_patch import plots

from .pictures import RUNS


def test_accuracy_has_a_panel_for_each_cost_and_a_mean_for_each_method():
    figure = plots.accuracy(RUNS, labels={"ssprop": "ssProp"})
    units = [axes.get_xlabel() for axes in figure.axes]
    assert [u.rpartition("(")[2] for u in units] == ["TFLOP)", "s)", "J)"]
    legend = figure.axes[-1].get_legend()
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
    assert [axes.get_xlabel() for axes in figure.axes] == ["forward + backward so far (GFLOP)"]


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
