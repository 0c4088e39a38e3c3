"""benchmarks/run_study.py: whole studies, interrupted, grown and shared by processes."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import time

import pytest
from classifier import decoded, training
from PIL import Image
from study import grid, runs

from . import BENCHMARKS, rows_in
from .studies import SMOKE, main

# All but times, and what they are measured on.
REPEATS = (
    "id",
    "steps",
    "accuracy",
    "best_accuracy",
    "test_loss",
    "train_accuracy",
    "train_loss",
    "total_flops",
    "mean_drop_rate",
    "weights",
    "digest",
)


def test_smoke_study_and_what_it_leaves(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert main(SMOKE, "--output", out, "--list") == 0
    assert "0 of 12 runs finished" in capsys.readouterr().out and not out.exists()
    study = tmp_path / "smoke.toml"
    study.write_text(SMOKE.read_text().replace("[0.5, 0.8]", "0.8"))
    assert main(study, "--output", out) == 0
    printed = capsys.readouterr().out
    for text in ("8/8", "dense, dropout 0.2", "ssProp BarSchedule(0.8, period=2)", "test loss"):
        assert text in printed
    assert "| dense, dropout 0.2 | 2 |" in (out / "table.md").read_text()
    assert Image.open(out / "study.png").size[0] == 1245
    rows = rows_in(out)
    assert [row["id"] for row in rows] == [run.id for run in grid.read(study).runs]
    assert not list((out / "state").glob("*.pt"))
    for equal, sparse in itertools.product(rows, rows):
        pair = equal["method"] == "dense-equal-compute" and sparse["method"] == "ssprop"
        if pair and equal["schedule"] == sparse["schedule"] and equal["seed"] == sparse["seed"]:
            step = int(equal["total_flops"]) / int(equal["steps"])
            assert abs(int(equal["total_flops"]) - int(sparse["total_flops"])) <= step / 2
            assert float(equal["trained_epochs"]) < float(sparse["trained_epochs"]) == 2.0

    # Nothing is left to do; a study that has grown trains what is new.
    before = (out / "runs.csv").read_bytes()
    train = runs.train
    monkeypatch.setattr(runs, "train", None)
    left = out / "state" / f"{rows[0]['id']}.pt"
    left.touch()  # of a process that was killed after it wrote the row
    assert main(study, "--output", out, "--table") == 0
    assert main(study, "--output", out) == 0
    assert not left.exists()
    assert (out / "runs.csv").read_bytes() == before
    monkeypatch.setattr(runs, "train", train)
    grown = study
    grown.write_text(study.read_text().replace("dropout = [0.0, 0.2]", "dropout = [0.0, 0.4]"))
    assert main(grown, "--output", out) == 0
    assert len(rows_in(out)) == 10
    assert "dense, dropout 0.2" not in (out / "table.md").read_text()

    # What is committed of a study is its own rows, wherever they were trained.
    results = tmp_path / "results" / "grown"
    assert main(grown, "--output", out, "--table", "--plot", "--results", results) == 0
    assert [row["id"] for row in rows_in(results)] == [run.id for run in grid.read(grown).runs]
    assert {path.name for path in results.iterdir()} == {"runs.csv", "table.md", "study.png"}

    # Other images under the same name do not mix with these.
    source = decoded.load("digits", data_dir=None, cache_dir=tmp_path, size=8)
    other = dataclasses.replace(source, digest="0" * 12)
    monkeypatch.setattr(decoded, "load", lambda *_, **__: other)
    grown.write_text(SMOKE.read_text().replace("seeds = 2", "seeds = [5]"))
    assert main(grown, "--output", out) == 2
    assert "other images called 'digits'" in capsys.readouterr().err


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, capsys, monkeypatch):
    train = runs.train

    def fail_once(settings, *arguments):
        if settings.method == "dense":
            raise RuntimeError("out of memory")
        return train(settings, *arguments)

    monkeypatch.setattr(runs, "train", fail_once)
    out = tmp_path / "out"
    study = tmp_path / "study.toml"
    text = SMOKE.read_text().replace("seeds = 2", "seeds = 1").replace("[0.5, 0.8]", "0.8")
    study.write_text(text.replace("[0.0, 0.2]", "0.2"))
    assert main(study, "--output", out) == 1
    assert "out of memory" in capsys.readouterr().out
    assert [r["method"] for r in rows_in(out)] == ["ssprop", "dense-equal-compute"]
    monkeypatch.setattr(runs, "train", train)
    assert main(study, "--output", out, "--stop-after", "0") == 0
    assert len(rows_in(out)) == 2
    assert main(study, "--output", out) == 0
    assert len(rows_in(out)) == 3


def test_two_processes_killed_and_resumed_give_the_rows_of_an_uninterrupted_study(tmp_path):
    study = tmp_path / "study.toml"
    text = SMOKE.read_text().replace("epochs = 2", "epochs = 6").replace("[0.5, 0.8]", "0.8")
    study.write_text(text.replace("[0.0, 0.2]", "0.2").replace("seeds = 2", "seeds = 1"))
    torn, whole = tmp_path / "torn", tmp_path / "whole"
    command = [
        sys.executable,
        str(BENCHMARKS / "run_study.py"),
        str(study),
        "--output",
        str(torn),
        "--jobs",
        "2",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 240
    while True:
        assert process.poll() is None and time.monotonic() < deadline
        finished = {row["id"] for row in rows_in(torn)} if (torn / "runs.csv").exists() else set()
        if finished and {path.stem for path in torn.glob("state/*.pt")} - finished:
            break
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with (torn / "runs.csv").open("a") as file:
        file.write("0123456789ab,dense,half a row")
    begun = {path.stem for path in torn.glob("state/*.pt")}
    finished = {row["id"] for row in rows_in(torn)} - {"0123456789ab"}
    assert finished and begun - finished

    # What was finished is not trained again, and what was begun goes on where it was.
    started: dict[str, int] = {}
    train = training.train

    def spied(run, options, batches, build, schedule, path, progress):
        first = []
        started.setdefault(path.stem, 0)
        out = train(
            run,
            options,
            batches,
            build,
            schedule,
            path,
            lambda done, text: (first.append(done), progress(done, text)),
        )
        started[path.stem] = first[0] if first else run.steps
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train", spied)
        assert main(study, "--output", torn) == 0
    assert not finished & set(started)
    for name in begun - finished:
        assert started[name] > 1, name
    assert main(study, "--output", whole) == 0
    a, b = ({row["id"]: row for row in rows_in(folder)} for folder in (torn, whole))
    assert len(rows_in(torn)) == len(a) == len(b) == 3
    for name, row in b.items():
        assert [a[name][column] for column in REPEATS] == [row[column] for column in REPEATS]
    assert not list((torn / "state").glob("*.pt"))
    assert {row["jobs"] for row in rows_in(whole)} == {"1"}
    assert {a[name]["jobs"] for name in finished} == {"2"}
