"""benchmarks/run_zoo.py: many networks in worker processes, killed and continued."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import run_zoo
from zoo import check, runner
from zoo.models import Entry

from . import BENCHMARKS, invented, rows_in


def run_invented(*names: str, **kwargs) -> dict[str, dict]:
    todo = [Entry("timm", "none", name) for name in names]
    return {row["name"]: row for row in runner.Runner(invented.check, **kwargs).run(todo)}


def test_a_worker_that_dies_or_hangs_costs_one_row():
    rows = run_invented("a", "dies", "b", "hangs", "c", jobs=2, timeout=3)
    results = {name: row["result"] for name, row in rows.items()}
    assert results == {"a": "ok", "b": "ok", "c": "ok", "dies": "died", "hangs": "timeout"}
    assert rows["dies"]["reason"] == "its process: killed by signal 9"
    assert rows["hangs"]["reason"] == "over 3 s" and float(rows["hangs"]["seconds"]) >= 3


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's data")
def test_what_needs_more_than_its_part_of_the_memory_runs_alone():
    rows = run_invented("needs 5", "a", "tensor 9", jobs=2, memory=8)
    assert next(row["name"] for row in rows.values()) == "a"
    results = {name: row["result"] for name, row in rows.items()}
    assert results == {"a": "ok", "needs 5": "ok", "tensor 9": "memory"}
    assert rows["tensor 9"]["reason"] == "needs more than 8 GiB"


def test_a_worker_does_several_networks_and_is_replaced_in_time(monkeypatch):
    monkeypatch.setattr(runner, "MODELS_PER_WORKER", 2)
    rows = run_invented(*"abc", jobs=1)
    workers = [row["reason"] for row in rows.values()]
    assert workers[0] == workers[1] != workers[2]


def test_a_killed_run_leaves_whole_rows_and_the_next_one_continues(tmp_path, capsys):
    path = tmp_path / "zoo.csv"
    names = ["test_vit", "test_vit2", "test_resnet"]
    arguments = ["--only", *names, "--jobs", "1", "--output", str(path)]
    process = subprocess.Popen(
        [sys.executable, str(BENCHMARKS / "run_zoo.py"), *arguments], stdout=subprocess.DEVNULL
    )
    while not (path.exists() and path.read_text().count("\n") > 1):
        assert process.poll() is None or path.read_text().count("\n") > 1
        time.sleep(0.05)
    process.kill()
    process.wait()
    before = rows_in(path.parent, path.name)
    assert 1 <= len(before) <= 3 and all(None not in row.values() for row in before)
    with path.open("a") as file:  # what a crash of the machine might leave
        file.write("timm,vision_transformer,test_v")

    assert run_zoo.main(arguments) == 0
    after = rows_in(path.parent, path.name)
    assert sorted(row["name"] for row in after) == sorted(names)
    assert all(row["result"] == "ok" for row in after)
    kept = {row["name"]: row for row in after}
    assert all(kept[row["name"]] == row for row in before)  # not run again: even the seconds agree
    printed = capsys.readouterr().out
    assert "| timm: ViT-like | 2 | 2 | 0 | 0 | 2 | 2 |" in printed

    text = path.read_text()
    assert run_zoo.main(["--table", "--only", "vision_transformer", "--output", str(path)]) == 0
    assert path.read_text() == text
    assert "ResNet" not in capsys.readouterr().out


def test_failed_rows_are_done_again_only_when_asked(tmp_path, capsys):
    path = tmp_path / "zoo.csv"
    results = runner.Results(path, check.FIELDS)
    results.append(
        {
            "library": "timm",
            "family": "vision_transformer",
            "name": "test_vit",
            "result": "ERROR",
            "reason": "a, b\nc",
        }
    )
    arguments = ["--only", "test_vit", "--jobs", "1", "--output", str(path)]
    assert run_zoo.main(["--table", *arguments]) == 1
    assert "timm vision_transformer test_vit: ERROR: a, b" in capsys.readouterr().out
    assert run_zoo.main(arguments) == 1
    assert run_zoo.main([*arguments, "--failed"]) == 0
    assert [row["result"] for row in rows_in(path.parent, path.name)] == ["ok"]
    capsys.readouterr()
    assert run_zoo.main([*arguments, "--list"]) == 0
    assert capsys.readouterr().out == "timm vision_transformer test_vit ok\n"


def test_a_pattern_that_names_no_network_is_an_error(tmp_path, capsys):
    assert run_zoo.main(["--only", "resnet999", "--output", str(tmp_path / "zoo.csv")]) == 2
    assert "no network is called resnet999" in capsys.readouterr().err
