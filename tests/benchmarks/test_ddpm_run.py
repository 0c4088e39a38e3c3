"""benchmarks/train_ddpm.py: a run of two steps, its rows and pictures, resuming."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import train_ddpm
from classifier import checkpoint
from PIL import Image

from . import rows_in
from .tiny_ddpm import TINY


def rows_by_method(folder: Path) -> dict[str, dict[str, str]]:
    rows = rows_in(folder)
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["method"]: row for row in rows}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three methods, uninterrupted."""
    folder = tmp_path_factory.mktemp("ddpm")
    assert train_ddpm.main([*TINY, "--output", str(folder)]) == 0
    return folder


def test_rows_and_pictures_of_the_three_methods(output):
    rows = rows_by_method(output)
    dense, sparse, equal = (rows[m] for m in ("dense", "ssprop", "dense-equal-compute"))
    assert (dense["steps"], sparse["steps"], equal["steps"]) == ("4", "4", "3")
    assert float(sparse["mean_drop_rate"]) == pytest.approx(0.4)  # every other epoch
    assert float(dense["mean_drop_rate"]) == float(equal["mean_drop_rate"]) == 0.0
    step = int(dense["total_flops"]) / 4
    assert abs(int(equal["total_flops"]) - int(sparse["total_flops"])) <= step / 2
    assert int(sparse["total_flops"]) < int(dense["total_flops"])
    assert len({row["weights"] for row in rows.values()}) == 3
    assert len({row["distance_of_real"] for row in rows.values()}) == 1
    for row in rows.values():
        assert math.isfinite(float(row["distance"])) and float(row["distance"]) > 0
        assert 0.5 < float(row["held_out_loss"]) < 2  # of noise of variance 1, hardly trained
        picture = Image.open(output / row["picture"])
        assert picture.format == "PNG" and picture.size == (8 * 9 + 1, 2 * 9 + 1)
    assert not list((output / "state").glob("*-seed*.pt"))


def test_says_that_the_distance_is_not_the_fid_and_repeats_nothing(output, capsys, monkeypatch):
    monkeypatch.setattr("ddpm.runs._run", None)  # training again would fail
    before = (output / "runs.csv").read_bytes()
    assert train_ddpm.main([*TINY, "--output", str(output)]) == 0
    assert train_ddpm.main([*TINY, "--output", str(output), "--table"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("not the Inception-FID, and cannot be compared with published ones") == 2
    assert (output / "runs.csv").read_bytes() == before
    assert train_ddpm.main([*TINY, "--output", str(output), "--table", "--lr", "0.1"]) == 2
    assert "no run with these options" in capsys.readouterr().err


def test_two_processes_give_the_same_rows_and_what_is_committed_of_them(output, tmp_path):
    arguments = [*TINY, "--output", str(tmp_path / "out"), "--jobs", "2", "--threads", "1"]
    assert train_ddpm.main([*arguments, "--results", str(tmp_path / "results")]) == 0
    alone, shared = rows_by_method(output), rows_by_method(tmp_path / "results")
    assert list(shared) == ["dense", "dense-equal-compute", "ssprop"]
    for method, row in shared.items():
        assert row["jobs"] == "2" and row["threads"] == "1"
        assert float(row["held_out_loss"]) == pytest.approx(float(alone[method]["held_out_loss"]))
    text = (tmp_path / "results" / "table.md").read_text()
    assert text.count("\n| ssprop BarSchedule(0.8, period=2) | 1 | 2 |") == 1
    assert "not the Inception-FID" in text
    assert Image.open(tmp_path / "results" / "samples.png").size[0] == 1245


def test_interrupted_and_resumed_ends_as_if_it_was_not(output, tmp_path, capsys, monkeypatch):
    save, saves = checkpoint.save, []

    def save_and_stop(path, parts):
        save(path, parts)
        saves.append(path)
        raise KeyboardInterrupt

    arguments = [*TINY, "--methods", "ssprop", "--output", str(tmp_path)]
    monkeypatch.setattr(checkpoint, "save", save_and_stop)
    for epoch in (1, 2):
        assert train_ddpm.main(arguments) == 130
        assert "the same command continues" in capsys.readouterr().err
        state = torch.load(saves[-1], weights_only=True)
        assert len(state["history"]["epochs"]) == epoch
    assert not (tmp_path / "runs.csv").exists()
    monkeypatch.undo()
    assert train_ddpm.main(arguments) == 0  # nothing is left to train, all to measure
    torn, whole = rows_by_method(tmp_path)["ssprop"], rows_by_method(output)["ssprop"]
    for name in ("id", "weights", "train_loss", "held_out_loss", "distance", "total_flops"):
        assert torn[name] == whole[name], name
    assert not saves[-1].exists()


def test_options_that_cannot_be_are_one_line(tmp_path, capsys):
    for more, message in (
        (["--channels", "8", "12"], "multiple of 8"),
        (["--batch-size", "4000"], "more than the"),
        (["--schedule", "BarShedule(0.8)"], "did you mean BarSchedule"),
        (["--data", "pets"], "no images of 'pets'"),
        (["--device", "cuda:99"], "cuda:99"),
    ):
        assert train_ddpm.main([*TINY, "--output", str(tmp_path), *more]) == 2
        line = capsys.readouterr().err
        assert line.startswith("error: ") and message in line and line.count("\n") == 1
    for more in (["--share", "0"], ["--ema", "1"], ["--samples", "1"], ["--epochs", "0"]):
        with pytest.raises(SystemExit):
            train_ddpm.main([*TINY, *more])
