"""benchmarks/plot.py: the picture of what bench_conv.py and bench_step.py wrote."""

from __future__ import annotations

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
    assert [title.split(";")[0] for title in found] == ["networks", "networks", "single layers"]
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


def test_picture_is_written_beside_the_rows(tmp_path, capsys):
    file = tmp_path / "times.csv"
    schema.append(file, compared())
    assert plot.main([str(file)]) == 0
    figure = plot.draw(schema.read(file))
    figure.canvas.draw()
    drawn = np.asarray(figure.canvas.buffer_rgba())
    assert np.array_equal(np.asarray(Image.open(tmp_path / "times.png").convert("RGBA")), drawn)
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
