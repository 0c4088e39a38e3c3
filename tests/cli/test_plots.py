"""``--plot``: the pictures of ssprop_patch.plots, in the file that is named."""

from __future__ import annotations

import os
import sys

import ssprop_patch as ssp
from ssprop_patch.cli.models import load_model


def test_without_matplotlib_a_plot_is_one_line_that_names_the_extra(
    nets, tmp_path, refused, monkeypatch
):
    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "ssprop_patch.plots", raising=False)
    monkeypatch.delattr(ssp, "plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    picture = tmp_path / "picture.png"
    for words in (
        ["schedule", "0.5", "--epochs", "2"],
        ["report", f"{nets}:build", "--input-size", 1, 3, 8, 8],
    ):
        line, code = refused(*words, "--plot", picture)
        assert line == (
            'ssprop-patch: error: --plot needs matplotlib: pip install "ssprop_patch[plot]"\n'
        )
        assert code == 1 and not os.path.exists(picture)


def test_a_picture_is_written_in_the_format_of_the_files_name(nets, tmp_path, printed):
    commands = {
        "rates.png": ["schedule", "BarSchedule(0.8)", "--epochs", 4],
        "steps.svg": [
            "schedule",
            "LinearSchedule(0, 0.8, total=6, interval='step')",
            "--epochs",
            3,
            "--steps-per-epoch",
            2,
        ],
        "flops.png": ["report", f"{nets}:build", "--input-size", 2, 3, 8, 8],
    }
    begins = {"png": b"\x89PNG", "svg": b"<?xml"}
    for name, words in commands.items():
        path = tmp_path / name
        assert printed(*words, "--plot", path) == f"wrote {path}\n"
        assert path.read_bytes().startswith(begins[name[-3:]])


def test_what_is_drawn_is_what_was_asked_for(nets, tmp_path, printed, monkeypatch):
    """The values in the pictures belong to ssprop_patch.plots; here, what it is given."""
    from matplotlib.figure import Figure

    from ssprop_patch import plots

    given = []
    for name in ("schedule", "flops_per_layer"):
        monkeypatch.setattr(
            plots, name, lambda *args, **kwargs: given.append((args, kwargs)) or Figure()
        )
    picture = tmp_path / "p.png"
    printed("schedule", "BarSchedule(0.8)", "--epochs", 4, "--plot", picture)
    printed(
        "schedule",
        "BarSchedule(0.8, interval='step')",
        "--epochs",
        3,
        "--steps-per-epoch",
        2,
        "--plot",
        picture,
    )
    printed(
        "report", f"{nets}:build", "--input-size", 2, 3, 8, 8, "--drop-rate", 0.5, "--plot", picture
    )
    assert given[0] == ((ssp.BarSchedule(0.8), 4), {})
    assert given[1] == ((ssp.BarSchedule(0.8, interval="step"), 3), {"steps_per_epoch": 2})
    expected = ssp.summary(load_model(f"{nets}:build"), input_size=(2, 3, 8, 8), drop_rate=0.5)
    assert given[2] == ((expected,), {})


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path, refused):
    for name in ("picture.nonsense", "nowhere/picture.png"):
        line, code = refused("schedule", "0.5", "--epochs", 2, "--plot", tmp_path / name)
        assert f"--plot {tmp_path / name}: " in line and code == 1
