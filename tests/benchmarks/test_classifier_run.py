"""benchmarks/train_classifier.py: what it prints and writes, interrupting and resuming."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import plot_runs
import pytest
import torch
import train_classifier
from classifier import checkpoint, clock, plot, training
from classifier.options import METHODS, UserError, parse
from classifier.store import Store
from PIL import Image

from . import BENCHMARKS, rows_in

# Two steps an epoch. Enough to go through everything, and quick.
TINY = ["--train-images", "64", "--batch-size", "32", "--model", "resnet8_narrow", "--seeds", "1"]


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run all four methods for three epochs; return the output folder and what was printed."""
    folder = tmp_path_factory.mktemp("benchmark") / "out"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert train_classifier.main([*TINY, "--epochs", "3", "--output", str(folder)]) == 0
    return folder, printed.getvalue()


def test_prints_one_table_with_all_methods_and_says_where_the_files_are(benchmark):
    folder, out = benchmark
    for text in ("accuracy", "backward", "total", "forward", "step", "ssProp", "equal compute"):
        assert text in out
    assert out.count("┏") == 1
    lines = [[cell.strip() for cell in line.split("│")] for line in out.splitlines()]
    for row in rows_in(folder):
        (cells,) = (line for line in lines if line[1:2] == [METHODS[row["method"]].label])
        assert float(cells[2]) == pytest.approx(float(row["epochs"]), rel=1e-3)
        assert cells[3] == f"{100 * float(row['accuracy']):.2f}"
        assert float(cells[9]) == pytest.approx(float(row["train_s"]), abs=0.06)
    for name in ("runs.csv", "history.csv", "results.png"):
        assert f"wrote {folder / name}" in out
        assert (folder / name).exists()


def test_csv_agrees_with_the_package_and_with_itself(benchmark):
    folder, _ = benchmark
    runs = {row["method"]: row for row in rows_in(folder)}
    assert list(runs) == ["dense", "ssprop", "dense-equal", "whole-gradient"]
    dense, sparse = runs["dense"], runs["ssprop"]
    assert dense["steps"] == sparse["steps"] == "6"
    assert sparse["sparse_steps"] == "2"  # epochs are dense, sparse, dense
    assert dense["sparse_steps"] == runs["dense-equal"]["sparse_steps"] == "0"
    assert sparse["schedule"] == "BarSchedule(0.8, period=2)"
    whole = runs["whole-gradient"]
    assert whole["sparse_steps"] == whole["steps"] == "6"
    rule = {name: whole[name] for name in ("schedule", "selection", "remainder")}
    assert rule == {
        "schedule": "ConstantSchedule(0.8)",
        "selection": "principal",
        "remainder": "coarse",
    }
    assert 0.4 < float(whole["total_flops"]) / float(dense["total_flops"]) < 0.8
    assert 0.5 < float(sparse["total_flops"]) / float(dense["total_flops"]) < 0.9
    assert dense["forward_flops"] == sparse["forward_flops"]
    for row in runs.values():
        laps = sum(float(row[f"{name}_s"]) for name in clock.LAPS)
        assert laps == pytest.approx(float(row["step_s"]))
        assert laps * int(row["steps"]) == pytest.approx(float(row["train_s"]))
        last = [e for e in rows_in(folder, "history.csv") if e["method"] == row["method"]][-1]
        assert last["accuracy"] == row["accuracy"]
        assert last["flops"] == row["total_flops"]
        assert float(last["seconds"]) == pytest.approx(float(row["train_s"]))
        assert row["torch"] == torch.__version__


def test_equal_compute_is_within_half_a_step(benchmark):
    runs = {row["method"]: row for row in rows_in(benchmark[0])}
    total = {method: int(row["total_flops"]) for method, row in runs.items()}
    step = total["dense"] / int(runs["dense"]["steps"])
    assert abs(total["dense-equal"] - total["ssprop"]) <= step / 2


def test_picture_shows_every_epoch_and_the_rates(benchmark):
    folder, _ = benchmark
    assert Image.open(folder / "results.png").size[0] == 1245
    results = [json.loads((folder / "state" / f"{m}-seed0.json").read_text()) for m in METHODS]
    figure = plot.figure(rows_in(folder), rows_in(folder, "history.csv"))
    flops, seconds, rates = figure.axes
    for axes, column in ((flops, "flops"), (seconds, "seconds")):
        # Of a single seed one line, and the marker at the end.
        curves = [line.get_xydata() for line in axes.lines if len(line.get_xdata()) > 1]
        assert len(curves) == len(results)
        for result, curve in zip(results, curves, strict=True):
            epochs = result["epochs"]
            assert curve[:, 1] == pytest.approx([100 * e["accuracy"] for e in epochs])
            shares = [e[column] / epochs[-1][column] for e in epochs]
            assert curve[:, 0] / curve[-1, 0] == pytest.approx(shares)
    assert [label.get_text() for label in rates.get_yticklabels()] == [
        METHODS[result["row"]["method"]].label for result in results
    ]
    for i, (patch, result) in enumerate(zip(rates.patches, results, strict=True)):
        tops, edges, _ = patch.get_data()
        row = result["row"]
        # As they were in force, step by step: the picture has the schedule alone.
        starts = [step * row["epochs"] / row["steps"] for step, _ in result["rates"]]
        assert edges == pytest.approx([*starts, row["epochs"]])
        assert 1 - (tops - i) / 0.8 == pytest.approx([rate for _, rate in result["rates"]])


def test_the_committed_picture_can_be_drawn_again_from_the_committed_rows(tmp_path, capsys):
    results = BENCHMARKS / "results"
    files = [str(results / f"digits_{name}.csv") for name in ("runs", "history")]
    again = tmp_path / "again.png"
    assert plot_runs.main([*files, "-o", str(again)]) == 0
    assert Image.open(again).size == Image.open(results / "digits.png").size
    with Path(files[0]).open(newline="") as file:
        for row in csv.DictReader(file):
            rates, edges = plot.rate_pieces(row)
            each = float(row["epochs"]) / int(row["steps"])
            sparse = sum(b - a for r, a, b in zip(rates, edges, edges[1:], strict=False) if r)
            assert round(sparse / each) == int(row["sparse_steps"]) and len(rates) <= 10
    with pytest.raises(SystemExit):
        plot_runs.main([files[1], files[0], "-o", str(tmp_path / "no.png")])
    assert "digits_history.csv" in capsys.readouterr().err
    assert not (tmp_path / "no.png").exists()


def test_methods_start_alike(benchmark):
    """The first epoch is dense in both: same weights, same images, same crops, same dropout."""
    first = {e["method"]: e for e in reversed(rows_in(benchmark[0], "history.csv"))}
    assert first["dense"]["step"] == first["ssprop"]["step"] == "2"
    assert first["dense"]["train_loss"] == first["ssprop"]["train_loss"]
    assert first["dense"]["accuracy"] == first["ssprop"]["accuracy"]


def test_finished_benchmark_is_kept_from_other_options(benchmark, capsys):
    folder, _ = benchmark
    before = (folder / "runs.csv").read_bytes()
    assert train_classifier.main([*TINY, "--epochs", "4", "--output", str(folder)]) == 2
    assert "epochs was 3, now 4" in capsys.readouterr().err
    assert (folder / "runs.csv").read_bytes() == before


#: Runs the script; killed where its second checkpoint is written, but not yet in its place.
KILLED = """
import os, runpy, signal, sys
script = sys.argv.pop(1)
sys.path.insert(0, os.path.dirname(script))
from classifier import checkpoint
save, saves = checkpoint.save, []
def save_or_end(path, parts):
    saves.append(path)
    if len(saves) == 2:
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    save(path, parts)
checkpoint.save = save_or_end
runpy.run_path(script, run_name="__main__")
"""


@contextlib.contextmanager
def interrupted(after: int) -> Iterator[None]:
    """Send SIGINT to this process, as Ctrl-C does, after so many checkpoints."""
    save, saves = checkpoint.save, []

    def save_and_interrupt(path, parts):
        save(path, parts)
        saves.append(path)
        if len(saves) == after:
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "save", save_and_interrupt)
            yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_interrupted_and_killed_run_ends_with_the_same_weights(tmp_path, capsys, monkeypatch):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    # With all that has a state: dropout, random selection, momentum, a schedule of epochs.
    arguments = [*TINY, "--model", "test_resnet", "--epochs", "4", "--methods", "ssprop"]
    arguments += ["--dropout", "0.2", "--selection", "random"]
    state = torn / "state" / "ssprop-seed0.pt"

    def epochs() -> int:
        return len(torch.load(state, weights_only=True)["history"]["epochs"])

    with interrupted(after=1):
        assert train_classifier.main([*arguments, "--output", str(torn)]) == 130
    line = capsys.readouterr().err
    assert line.startswith("interrupted; to continue: python ") and line.count("\n") == 1
    assert line.rstrip().endswith("--resume")
    assert epochs() == 1

    assert train_classifier.main([*arguments, "--output", str(torn)]) == 2
    assert "unfinished" in capsys.readouterr().err

    command = [sys.executable, "-c", KILLED, str(BENCHMARKS / "train_classifier.py"), *arguments]
    process = subprocess.run([*command, "--output", str(torn), "--resume"], capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert epochs() == 2  # the third was not yet in its place
    assert len(list(state.parent.glob("*.tmp"))) == 1

    changed = [*arguments, "--output", str(torn), "--resume", "--lr", "0.3"]
    assert train_classifier.main(changed) == 2
    assert "lr was 0.1, now 0.3" in capsys.readouterr().err

    assert train_classifier.main([*arguments, "--output", str(torn), "--resume"]) == 0
    assert train_classifier.main([*arguments, "--output", str(whole)]) == 0
    ((a,), (b,)) = rows_in(whole), rows_in(torn)
    for name in ("weights", "accuracy", "train_loss", "test_loss", "total_flops", "sparse_steps"):
        assert a[name] == b[name], name
    assert not state.exists()

    # Nothing is left to do: nothing is trained, and all is written again.
    (torn / "results.png").unlink()
    monkeypatch.setattr(training, "train", None)
    assert train_classifier.main([*arguments, "--output", str(torn), "--resume"]) == 0
    assert (torn / "results.png").exists()
    assert rows_in(torn) == [b]


def test_store_replaces_only_what_it_wrote(tmp_path):
    options = parse([*TINY, "--output", str(tmp_path), "--methods", "dense"])
    (tmp_path / "mine.txt").write_text("keep")
    store = Store(tmp_path)
    store.open(options, {})
    store.finish("dense-seed0", {"row": {}})
    (tmp_path / "runs.csv").write_text("old")
    store.open(options, {})  # finished, the same options: measured again
    assert store.result("dense-seed0") is None
    assert not (tmp_path / "runs.csv").exists()
    assert (tmp_path / "mine.txt").read_text() == "keep"
    with pytest.raises(UserError, match=r"unfinished benchmark \(0 of 1"):
        store.open(options, {})
    more = parse([*TINY, "--output", str(tmp_path), "--seeds", "2", "--resume"])
    store.open(more, {})  # more runs than before is no change of any one of them
