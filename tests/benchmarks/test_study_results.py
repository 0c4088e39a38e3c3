"""What is made of the runs of a study: rows, the frontier, tables."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from classifier.options import UserError
from study import equal_cost, groups, plot, runs, table
from study.frontier import frontier
from study.rows import Rows, claim
from study.settings import resolve

from . import BENCHMARKS


def test_rows_survive_a_torn_write_and_are_there_once(tmp_path):
    rows = Rows(tmp_path / "runs.csv", ("id", "text"))
    assert rows.read() == [] and rows.ids() == set()
    assert rows.append({"id": "a", "text": 'with, "quotes"'})
    with rows.path.open("a") as file:
        file.write("b,half of a")  # what a killed process left
    assert rows.ids() == {"a"}
    assert rows.append({"id": "c", "text": "whole"})
    assert not rows.append({"id": "a", "text": "again"})
    assert rows.read() == [{"id": "a", "text": 'with, "quotes"'}, {"id": "c", "text": "whole"}]
    assert rows.path.read_text().count("\n") == 3
    with pytest.raises(UserError, match="other columns"):
        Rows(rows.path, ("id", "other")).read()


def test_rows_of_an_older_version_are_read_and_added_to(tmp_path):
    path = tmp_path / "runs.csv"
    Rows(path, ("id", "text")).append({"id": "a", "text": "old"})
    rows = Rows(path, ("id", "new", "text"), {"new": "0"})
    assert rows.read() == [{"id": "a", "new": "0", "text": "old"}]
    assert not rows.append({"id": "a", "new": "1", "text": "again"})
    assert rows.append({"id": "b", "new": "1", "text": "x"})
    assert path.read_text() == "id,new,text\na,0,old\nb,1,x\n"
    with pytest.raises(UserError, match="other columns"):
        Rows(path, ("id", "new"), {"new": "0"}).read()


def test_a_claim_excludes_others_until_its_holder_ends(tmp_path):
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from pathlib import Path;"
        "from study.rows import claim\n"
        "with claim(Path(sys.argv[2])) as mine: print(mine, flush=True); time.sleep(60)"
    )
    path = tmp_path / "run.lock"
    command = [sys.executable, "-c", code, str(BENCHMARKS), str(path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "True\n"
    with claim(path) as mine:
        assert not mine
    holder.kill()
    holder.communicate()
    with claim(path) as mine:
        assert mine


def test_frontier_is_what_nothing_beats():
    generator = np.random.default_rng(0)
    for _ in range(50):
        points = [tuple(p) for p in generator.integers(0, 6, (8, 2)).tolist()]

        def beaten(i: int, points=points) -> bool:
            (x, y), others = points[i], [p for p in points if p != points[i]]
            return any(a <= x and b >= y for a, b in others) or points[i] in points[:i]

        found = frontier(points)
        assert sorted(found) == [i for i in range(8) if not beaten(i)]
        assert [points[i][0] for i in found] == sorted(points[i][0] for i in found)
    assert frontier([]) == []


def made_up(
    accuracies: list[float], flops: float, seconds: float = 2.0, **settings: object
) -> list[dict[str, str]]:
    row = dict.fromkeys(runs.FIELDS, "1")
    found = []
    for seed, accuracy in enumerate(accuracies):
        run = resolve({**settings, "seed": seed})
        values = {"accuracy": accuracy, "total_flops": flops, "train_s": seconds}
        found.append(row | {n: str(v) for n, v in {**runs.cells(run), **values}.items()})
    return found


def test_table_by_hand():
    sparse = {"schedule": "ConstantSchedule(0.8)", "dropout": 0.0}
    rows = [
        *made_up([0.50, 0.60, 0.70], 4e12),
        *made_up([0.51, 0.60], 4e12, dropout=0.3),
        *made_up([0.40, 0.50, 0.90], 3e12, method="dense-equal-compute", **sparse),
        *made_up([0.43, 0.57, 0.92], 3e12, method="ssprop", **sparse),
        *made_up(
            [0.55],
            3e12,
            method="ssprop",
            selection="random",
            dropout=0.3,
            schedule="ConstantSchedule(0.8)",
        ),
        *made_up([0.1], 1e12, share=0.5),
    ]
    whole, part = groups.conditions(rows)
    names, lines = table.cells(whole)
    at = {line[0]: dict(zip(names, line, strict=True)) for line in lines}
    ssprop = at["ssProp ConstantSchedule(0.8)"]
    assert ssprop["accuracy, %"] == "64.00 ± 25.24"  # of 43, 57, 92
    assert ssprop["- equal compute"] == "+4.00 ± 2.65"  # of 3, 7, 2
    assert ssprop["- dense"] == "+4.00 ± 15.72"  # of -7, -3, 22
    assert ssprop["seeds"] == "3" and ssprop["TFLOP"] == "3" and ssprop["of dense"] == "0.750"
    assert at["dense"]["- dense"] == at["dense"]["- equal compute"] == ""
    assert at["dense, dropout 0.3"]["- dense"] == "+0.50 ± 0.71"  # of 1, 0
    both = at["ssProp ConstantSchedule(0.8), random channels, dropout 0.3"]
    assert both["- dense"] == "+4.00" and both["- equal compute"] == ""
    assert [method.label for method in part.methods] == ["dense"]
    text = table.markdown([whole, part], "name")
    assert text.count("\n| method |") == 2 and text.count("\n| ---") == 2
    assert "| 64.00 ± 25.24 |" in text and table.LEGEND in text


def test_difference_to_dense_at_equal_flops_by_hand():
    whole = {"method": "dense"}
    rule = {"method": "ssprop", "schedule": "ConstantSchedule(0.8)", "selection": "principal"}
    rows = [
        *made_up([0.50, 0.60, 0.70], 4e12, **whole),
        *made_up([0.30, 0.50, 0.68], 2e12, **whole, steps_share=0.5),
        *made_up([0.10], 1e12, **whole, steps_share=0.25),
        *made_up([0.47, 0.60, 0.72], 3e12, **rule),  # dense: 0.40, 0.55, 0.69
        *made_up([0.25, 0.60], 1.5e12, **rule, remainder="coarse"),  # dense: 0.20, none
        *made_up([0.66], 3e12, **whole, frozen=["layer1"]),
        *made_up([0.99], 3e12, **whole, dropout=0.3),
    ]
    (condition,) = groups.conditions(rows)
    found = [equal_cost.above_dense(condition, method) for method in condition.methods]
    wanted = [[], [], [], [0.07, 0.05, 0.03], [0.05], [0.26], []]
    assert [pytest.approx(w) for w in wanted] == found
    # t of 2 degrees of freedom is 4.303; 2 points of deviation, over the root of 3
    assert equal_cost.text(found[3]) == "+5.00 ± 4.97" and equal_cost.text([0.05]) == "+5.00"
    names, lines = table.cells(condition)
    at = {line[0]: dict(zip(names, line, strict=True)) for line in lines}
    column = "- dense, equal FLOPs"
    assert at["ssProp ConstantSchedule(0.8), principal directions"][column] == "+5.00 ± 4.97"
    assert at["dense, 0.5 of the steps"][column] == ""
    assert at["dense, frozen layer1"]["- dense"] == "+16.00"
    kinds = [plot._kind(method) for method in condition.methods]
    assert kinds[:3] == ["dense"] * 3 and kinds[3:5] == [
        "principal",
        "principal + coarse remainder",
    ]
    assert kinds[5:] == ["dense, lower layers frozen", "dense, other regulariser"]


def test_difference_to_dense_at_equal_seconds_by_hand():
    rows = [
        *made_up([0.50, 0.60], 4e12, 40.0, method="dense"),
        *made_up([0.30, 0.50], 2e12, 20.0, method="dense", steps_share=0.5),
        # At equal FLOPs dense has 0.30 and 0.50, at equal seconds 0.40 and 0.55.
        *made_up([0.45, 0.59], 2e12, 30.0, method="ssprop", schedule="ConstantSchedule(0.8)"),
        *made_up([0.45, 0.59], 2e12, 50.0, method="ssprop", schedule="ConstantSchedule(0.6)"),
    ]
    (condition,) = groups.conditions(rows)
    fast, slow = condition.methods[2:]
    assert equal_cost.above_dense(condition, fast) == [pytest.approx(0.15), pytest.approx(0.09)]
    by_seconds = equal_cost.above_dense(condition, fast, "train_s")
    assert by_seconds == [pytest.approx(0.05), pytest.approx(0.04)]
    assert equal_cost.above_dense(condition, slow, "train_s") == []
    names, lines = table.cells(condition)
    cells = [line[names.index("- dense, equal seconds")] for line in lines]
    assert cells == ["", "", "+4.50 ± 6.35", ""]


def test_picture_shows_the_means_over_seeds():
    rows = [
        *made_up([0.50, 0.60], 4e12),
        *made_up([0.40, 0.80], 3e12, method="ssprop", schedule="ConstantSchedule(0.8)"),
        *made_up([0.1], 1e12, share=0.5),
    ]
    flops, seconds, _, other, *_ = plot.figure(groups.conditions(rows), "name").axes

    def points(axes) -> list[tuple[float, float]]:
        marks = [line for line in axes.lines if line.get_marker() == "."]
        return [(m.get_xdata()[0], m.get_ydata()[0]) for m in marks]

    assert points(flops) == [pytest.approx((4, 55)), pytest.approx((3, 60))]
    assert points(seconds) == [pytest.approx((2.0, 55)), pytest.approx((2.0, 60))]
    assert points(other) == [pytest.approx((1, 10))]
    assert flops.get_xlabel().endswith("(TFLOP)") and other.get_xlabel().endswith("(TFLOP)")


def test_conditions_with_the_same_methods_share_one_list_and_say_what_differs():
    rows = [
        row
        for share in (0.5, 1.0)
        for method in ({}, {"method": "ssprop", "schedule": "ConstantSchedule(0.8)"})
        for row in made_up([0.5, 0.6], 4e12, share=share, **method)
    ]
    figure = plot.figure(groups.conditions(rows), "name")
    panels = [axes for axes in figure.axes if axes.axison]
    assert len(panels) == 4 and len(figure.axes) == 5
    titles = [axes.get_title("left") for axes in panels[::2]]
    assert titles == ["50 % of the training images", "100 % of the training images"]
    assert "batch" in figure.get_suptitle() and "training images" not in figure.get_suptitle()
    (legend,) = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels[:2] == ["1  dense", "2  ssProp ConstantSchedule(0.8)"]
    widths = [axes.get_window_extent().width for axes in panels]
    assert np.ptp(widths) < 1
    # Seconds and accuracies are the same: the second number stands beside the first.
    numbers = [text for text in panels[1].texts if text.get_text() in "12"]
    one, two = (text.get_window_extent() for text in numbers)
    assert len(numbers) == 2 and not one.overlaps(two)


def test_points_move_apart_by_as_little_as_it_takes():
    points = [(50.0, 50.0)] * 12 + [(52.0, 50.0), (90.0, 90.0)]
    box = (40.0, 0.0, 100.0, 100.0)
    moved = plot.apart(points, 10, box)
    assert moved[0] == (50, 50) and moved[-1] == (90, 90)
    for i, (x, y) in enumerate(moved):
        assert all(np.hypot(x - a, y - b) > 9.99 for a, b in moved[:i])
        assert 40 <= x <= 100 and 0 <= y <= 100
    assert all(np.hypot(x - 50, y - 50) <= 30 for x, y in moved[:-1])
    assert plot.apart([(0, 0), (0, 0)], 10, (0, 0, 1, 1)) == [(0, 0), (0, 0)]  # no room


def test_what_a_training_takes_is_not_below_nothing():
    rows = made_up([0.5, 0.6], 4e12)
    for row, seconds in zip(rows, ("1", "300"), strict=True):
        row["train_s"] = seconds
    _, seconds, _ = plot.figure(groups.conditions(rows), "name").axes
    assert seconds.get_xlim()[0] == 0


def test_schedules_of_nearly_the_same_flops_share_a_baseline():
    equal = made_up([0.5], 1.00e12, method="dense-equal-compute", schedule="ConstantSchedule(0.4)")
    near, far = (
        made_up([0.6], flops, method="ssprop", schedule=f"ConstantSchedule({rate})")
        for flops, rate in ((1.019e12, 0.38), (1.021e12, 0.37))
    )
    other = made_up([0.6], 1.0e12, method="ssprop", schedule="ConstantSchedule(0.39)", dropout=0.3)
    (condition,) = groups.conditions([*equal, *near, *far, *other])
    partners = [condition.equal_compute(method) for method in condition.methods]
    assert partners == [None, condition.methods[0], None, None]
