"""Pictures are readable in a README: nothing is small, cut off or in the way of something else."""

import io
import itertools

import matplotlib
import matplotlib.style
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.path import Path
from matplotlib.transforms import Bbox
from PIL import Image

from ssprop_patch import plots
from ssprop_patch.plots import style

from .pictures import FIGURES, RUNS, texts


@pytest.mark.parametrize("name", FIGURES)
def test_a_picture_is_as_wide_as_a_readme_and_nothing_is_cut_off(name):
    figure = FIGURES[name]()
    assert isinstance(figure, Figure) and figure.dpi == 150
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()  # of all that is drawn
    assert width == pytest.approx(8.3) and height < 10
    assert box.x0 > -0.01 and box.x1 < width + 0.01 and box.y0 > -0.01 and box.y1 < height + 0.01
    assert any(axes.get_xlabel() for axes in figure.axes) or figure.get_supxlabel()
    assert any(axes.get_ylabel() or axes.get_yticklabels() for axes in figure.axes)


def apart(a, b):
    return a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_is_small_or_runs_into_another(name):
    found = texts(FIGURES[name]())
    assert min(text.get_fontsize() for text, _ in found) >= 8
    met = [
        (one.get_text(), other.get_text())
        for (one, a), (other, b) in itertools.combinations(found, 2)
        if not apart(a, b)
    ]
    assert not met


@pytest.mark.parametrize("name", [n for n in FIGURES if "channels" not in n])
def test_the_legend_is_inside_and_hides_nothing(name):
    figure = FIGURES[name]()
    found = texts(figure)
    assert not figure.legends
    (legend,) = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    axes, box = legend.axes, legend.get_window_extent()
    inside = Bbox.intersection(box, axes.get_window_extent())
    assert inside is not None and inside.height > box.height - 1 and inside.width > box.width - 1
    written = Bbox.union([b for text, b in found if text in legend.get_texts()])
    bars = [patch for patch in axes.patches if patch.get_width()] if axes.containers else []
    assert all(apart(written, bar.get_window_extent()) for bar in bars)
    for line in axes.lines:
        path = line.get_transform().transform_path(line.get_path())
        if line.get_alpha() is None:  # thin lines of single seeds may touch its frame
            assert not Path(path.vertices).intersects_bbox(written, filled=False)
    for stairs in (patch for patch in axes.patches if hasattr(patch, "get_data")):
        top = axes.transData.transform((0, max(stairs.get_data().values)))[1]
        assert top < written.y0


@pytest.mark.parametrize("name", ["accuracy", "channels", "twelve layers' channels"])
def test_panels_are_of_one_size(name):
    figure = FIGURES[name]()
    figure.draw_without_rendering()
    panels = [a for a in figure.axes if a.get_label() != "<colorbar>"]
    boxes = np.array([axes.get_window_extent().bounds[2:] for axes in panels])
    assert len(boxes) == {"accuracy": 3, "channels": 2}.get(name, 12)
    assert np.ptp(boxes, 0) == pytest.approx(0, abs=1)


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return np.dot([0.2126, 0.7152, 0.0722], linear)


DARK = ["dark_background", {"savefig.facecolor": "black", "savefig.transparent": True}]


@pytest.mark.parametrize("theme", ["default", DARK], ids=["default", "dark"])
@pytest.mark.parametrize("name", ["schedule", "report", "accuracy", "channels"])
def test_letters_are_dark_on_an_opaque_bright_ground_whatever_the_settings(name, theme):
    """So a bright page and a dark one show the same; and the settings stay as they were."""
    with matplotlib.style.context(theme):
        before = dict(matplotlib.rcParams)
        figure = FIGURES[name]()
        found = texts(figure)
        png = io.BytesIO()
        figure.savefig(png, format="png")
        pixels = np.asarray(Image.open(png).convert("RGBA"))
        assert dict(matplotlib.rcParams) == before
    assert (pixels[..., 3] == 255).all()
    corner = pixels[0, 0, :3] / 255
    assert luminance(corner) > 0.9
    assert all(luminance(matplotlib.colors.to_rgb(a.get_facecolor())) > 0.9 for a in figure.axes)
    for text, _ in found:
        colour = matplotlib.colors.to_rgb(text.get_color())
        assert (luminance(corner) + 0.05) / (luminance(colour) + 0.05) > 7, text.get_text()


@pytest.mark.parametrize("name", FIGURES)
def test_a_picture_is_drawn_into_axes_that_are_given(name):
    """In the style of their figure: the same, but for what is said of all panels together."""
    own = FIGURES[name]()
    count = sum(axes.get_label() != "<colorbar>" for axes in own.axes)
    given = Figure(figsize=(10, 8))
    grid = given.subplots(1, count + 1)
    axes = grid[:count]
    assert FIGURES[name](ax=axes[0] if count == 1 else axes) is given
    assert given.axes == list(grid) and not grid[-1].has_data()  # none was added, no other used
    for mine, theirs in zip(own.axes, axes, strict=False):
        assert len(mine.lines) == len(theirs.lines) and len(mine.images) == len(theirs.images)
        assert theirs.get_xlabel()
        assert theirs.get_facecolor() == grid[-1].get_facecolor()
    if count > 1 and "channels" not in name:
        with pytest.raises(ValueError, match=f"has 1 axes, and {count} panels"):
            FIGURES[name](ax=axes[0])


def test_letters_in_given_axes_have_their_colour():
    with matplotlib.style.context("dark_background"):
        axes = Figure().subplots()
        found = texts(plots.accuracy([{**r, "flops": "", "joules": ""} for r in RUNS], ax=axes))
    assert {matplotlib.colors.to_rgb(text.get_color()) for text, _ in found} == {(1, 1, 1)}


@pytest.mark.parametrize(
    ("largest", "of", "expected"),
    [
        (1.27e12, "FLOP", (1e12, "TFLOP")),
        (999e9, "FLOP", (1e9, "GFLOP")),
        (4e15, "FLOP", (1e15, "PFLOP")),
        (12, "FLOP", (1, "FLOP")),
        (9999, "s", (1, "s")),
        (36000, "s", (3600, "h")),
        (9999, "J", (1, "J")),
        (12e3, "J", (1e3, "kJ")),
    ],
)
def test_units_leave_few_digits(largest, of, expected):
    assert style.unit(largest, of) == expected


def test_the_range_is_where_curves_end_up():
    curves = [[10, 50, *[90 + i / 10 for i in range(40)]], [20, 60, *[94.0] * 40]]
    low, high = style.shown_range(curves)
    assert 85 < low < 91 and 94 < high <= 100
    assert style.shown_range([[100.0], [99.9]])[1] > 100  # a marker at the border stays whole
    assert style.shown_range([[0.0], [0.1]])[0] == 0


def test_wrapped_text_keeps_its_lines_and_says_that_something_is_missing():
    assert style.wrapped("one\ntwo", 8, 9) == "one\ntwo"
    lines = style.wrapped("word " * 100, 4, 8, lines=2).splitlines()
    assert len(lines) == 2 and lines[1].endswith(" …")
    assert max(map(len, lines)) <= 72 * 4 / (0.6 * 8)


@pytest.mark.parametrize("name", ["schedule", "report", "accuracy", "channels"])
@pytest.mark.parametrize(("suffix", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_the_file_name_says_png_or_svg(tmp_path, name, suffix, begins):
    path = tmp_path / f"picture.{suffix}"
    FIGURES[name]().savefig(path)
    assert path.read_bytes().startswith(begins)
    written = tmp_path / f"written.{suffix}"
    style.write(FIGURES[name](), written)
    assert written.read_bytes().startswith(begins)
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, written.name]
