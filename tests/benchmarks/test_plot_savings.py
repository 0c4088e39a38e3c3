"""benchmarks/plot_savings.py: the first picture of the README."""

from __future__ import annotations

from dataclasses import replace

import plot_savings
import pytest
import rows as schema
from PIL import Image

from . import BENCHMARKS
from .made_up_rows import SETTING, compared


def measured(name, device, share):
    rows = compared(replace(SETTING, name=name, device=device))
    return [
        replace(row, side="l1", share_of_dense=share if row.mode == "step" else share / 2)
        for row in rows
        if row.side == "sparse"
    ]


ROWS = [
    *measured("slow", "A", 0.9),
    *measured("slow", "B", 0.6),
    *measured("fast", "A", 0.7),
    *measured("fast", "B", 0.8),
    *measured("once", "B", 0.1),
]


def test_bars_are_the_rows_of_what_all_devices_measured_the_most_saved_on_top():
    figure = plot_savings.draw(ROWS, {"fast": 0.5, "slow": 0.4, "other": 0.1})
    figure.draw_without_rendering()
    expected = {"A": [[0.35, 0.45], [0.7, 0.9]], "B": [[0.4, 0.3], [0.8, 0.6]]}
    for axes, (device, shares) in zip(figure.axes, expected.items(), strict=True):
        assert axes.get_title("left") == device
        assert [[bar.get_width() for bar in bars] for bars in axes.containers] == shares
        (flops,) = axes.lines
        assert flops.get_xdata().tolist() == [0.5, 0.4]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["fast", "slow"]
    assert "drop rate 0.8" in figure.get_suptitle()


def test_the_committed_picture_is_drawn_from_the_committed_rows(tmp_path, capsys):
    path = tmp_path / "savings.png"
    assert plot_savings.main(["-o", str(path)]) == 0
    committed = Image.open(BENCHMARKS / "results" / "savings.png")
    assert Image.open(path).size == committed.size and committed.size[0] == 1245
    nothing = tmp_path / "times.csv"
    schema.append(nothing, compared())
    with pytest.raises(SystemExit):
        plot_savings.main(["--times", str(nothing), "-o", str(path)])
    assert "with the side l1" in capsys.readouterr().err
