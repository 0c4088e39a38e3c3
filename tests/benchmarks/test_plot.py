"""benchmarks/plot.py: the picture of what bench_conv.py and bench_step.py wrote."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace

import numpy as np
import plot
import pytest
import rows as schema
from PIL import Image

from .made_up_rows import SETTING, compared


def test_picture_has_a_panel_for_each_setting_and_the_last_of_repeats():
    slower = [replace(r, share_of_dense=9.0) for r in compared()]
    other = compared(replace(SETTING, drop_rate=0.5))
    layers = compared(replace(SETTING, name="conv2d:8:3"), ("forward", "backward", "both"))
    found = plot.panels([*slower, *compared(), *other, *layers])
    assert [panel.kind for panel in found] == ["networks", "networks", "layers"]
    first, half, single = found.values()
    assert {r.share_of_dense for r in first["net", "2x3x8x8"].values()} == {0.4, 0.625}
    assert {r.drop_rate for r in half["net", "2x3x8x8"].values()} == {0.5}
    assert {p.mode for p in single["conv2d:8:3", "2x3x8x8"]} == {"backward", "both"}


def test_picture_shows_medians_quantiles_and_limits():
    (axes,) = plot.draw(compared()).axes
    marks = {m.get_xdata()[0] for m in axes.lines if m.get_marker() == "o"}
    limits = {
        round(m.get_xdata()[0], 6)
        for m in axes.lines
        if m.get_marker() == "|" and m.get_markersize() > 8
    }
    assert marks == {0.4, 0.625} and limits == {0.25, 0.625}
    spans = sorted(
        tuple(x for x, _ in segment)
        for whiskers in axes.collections
        for segment in whiskers.get_segments()
    )
    # 700 and 1100 of 2000 ms; 2000 and 3000 of 4000.
    assert np.allclose(spans, [(0.35, 0.55), (0.5, 0.75)])


def test_panels_side_by_side_have_one_width_and_share_their_lines():
    names = [f"net{i}" for i in range(45)]
    options = ["", "compiled", "align=8", "groups=1"]
    rows = [
        row
        for option, name in itertools.product(options, names[:44])
        for row in compared(replace(SETTING, name=name, options=option))
    ]
    rows += compared(replace(SETTING, name=names[44], device="Other"))
    figure = plot.draw(rows)
    figure.draw_without_rendering()
    boxes = [axes.get_window_extent().bounds for axes in figure.axes]
    assert len(boxes) == 2 * 4 + 1  # 40 lines at most, three panels at most beside each other
    assert np.ptp([width for _, _, width, _ in boxes]) < 1
    lines = [len(axes.get_yticks()) for axes in figure.axes]
    assert lines == [40, 40, 40, 4, 4, 4, 40, 4, 1]
    titles = [axes.get_title("left").replace("\n", " ") for axes in figure.axes]
    cpu = "Some CPU, 2.0 GHz"
    assert titles == [cpu, f"{cpu}, compiled", f"{cpu}, align=8"] * 2 + [f"{cpu}, groups=1"] * 2 + [
        "Other"
    ]
    assert "drop rate 0.8 by l1" in figure.get_suptitle()


def test_the_legend_is_above_the_first_line_and_whiskers_are_whole():
    figure = plot.draw(compared())
    figure.draw_without_rendering()
    (axes,) = figure.axes
    legend = axes.get_legend().get_window_extent()
    (top,) = {round(y) for _, y in axes.transData.transform([(0, -0.35)])}
    assert legend.y0 >= top and legend.y1 <= axes.get_window_extent().y1
    words = [text.get_text() for text in axes.get_legend().get_texts()]
    assert words == ["backward", "whole step", "limit"]
    slow = [replace(row, p80_ms=3 * row.p50_ms) for row in compared()]
    assert plot.draw(slow).axes[0].get_xlim()[1] > 3 * 0.625


def test_picture_is_written_beside_the_rows(tmp_path, capsys):
    file = tmp_path / "times.csv"
    schema.append(file, compared())
    assert plot.main([str(file)]) == 0
    png = io.BytesIO()
    plot.draw(schema.read(file)).savefig(png)
    drawn, written = (np.asarray(Image.open(f)) for f in (png, tmp_path / "times.png"))
    assert np.array_equal(drawn, written) and drawn.shape[1] == 1245
    assert plot.main([str(file), "-o", str(tmp_path / "other.png")]) == 0
    assert (tmp_path / "other.png").read_bytes() == (tmp_path / "times.png").read_bytes()

    only_dense = tmp_path / "dense.csv"
    schema.append(only_dense, [r for r in compared() if r.side == "dense"])
    missing = tmp_path / "missing.csv"
    for argument, message in (
        (only_dense, "no row of a sparse side"),
        (missing, "there is no file"),
    ):
        with pytest.raises(SystemExit) as stop:
            plot.main([str(argument)])
        assert stop.value.code == 2 and message in capsys.readouterr().err
