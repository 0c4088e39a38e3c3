"""benchmarks/gpu.py, on the CPU: what was measured is kept, whatever happens."""

from __future__ import annotations

import csv
import itertools
import subprocess
import sys
import time
from types import SimpleNamespace

import gpu
import networks
import pytest
import torch
from gpu_run import measure, report, steps
from unet import UNet

from . import BENCHMARKS, ROOT

# --- steps ------------------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch):
    """Networks that would be compiled are not, and remembered."""
    found = []
    monkeypatch.setattr(torch, "compile", lambda model: found.append(model) or model)
    monkeypatch.setattr(gpu, "check_kernels", lambda device: True)
    return found


def run(tmp_path, *more: str) -> tuple[int, list[dict[str, str]]]:
    file = tmp_path / "gpu.csv"
    arguments = ["--device", "cpu", "--network", "test_resnet:2:32", "--output", str(file)]
    status = gpu.main([*arguments, "--iterations", "3", *more])
    if not file.exists():
        return status, []
    with file.open(newline="") as lines:
        return status, list(csv.DictReader(lines))


def test_everything_is_measured_and_written(tmp_path, compiled, capsys):
    status, rows = run(tmp_path)
    assert status == 0
    sides = {"dense", "dense compiled", *measure.RULES, *(f"{r} compiled" for r in measure.RULES)}
    assert {row["side"] for row in rows} == sides
    assert len(compiled) == 1 + len(measure.RULES)  # dense once, for all comparisons
    # One comparison of all eager sides, then one for each rule; the dense ones are in all.
    assert len(rows) == 3 * (6 + 4 * 3)
    first = {(r["side"], r["mode"]): r for r in rows[: 3 * 6]}
    for (side, mode), row in first.items():
        p25, p50, p75 = (float(row[f"{p}_ms"]) for p in ("p25", "p50", "p75"))
        assert 0 < p25 <= p50 <= p75
        for column, base in (("of_dense", "dense"), ("of_compiled", "dense compiled")):
            share = p50 / float(first[base, mode]["p50_ms"])
            assert float(row[column]) == pytest.approx(share, abs=1e-3)
        assert (row["dtype"], row["memory_format"]) == ("bfloat16 autocast", "channels_last")
        assert row["peak_memory_mib"] == row["joules"] == "" and row["iterations"] == "3"
        step, parts = first[side, "step"], (first[side, m] for m in ("forward", "backward"))
        assert float(step["p75_ms"]) >= max(float(p["p25_ms"]) for p in parts)
    out = capsys.readouterr().out
    assert "principal+coarse compiled" in out and "Bars: backward at most 0.40" in out


def test_when_time_is_up_what_was_measured_is_there(tmp_path, compiled, monkeypatch, capsys):
    made = measure.Bench.side

    def slow(self, way):
        side = made(self, way)
        if way != measure.Way("l1", compiled=True):
            return side

        def step():
            raise steps.OutOfTime  # as the alarm does

        return side._replace(step=step)

    monkeypatch.setattr(measure.Bench, "side", slow)
    status, rows = run(tmp_path, "--rules", "l1")
    assert status == 0 and {r["side"] for r in rows} == {"dense", "dense compiled", "l1"}
    assert "The time was up before everything was measured." in capsys.readouterr().out


def test_time_that_is_up_in_the_middle_leaves_whole_iterations(monkeypatch):
    calls = itertools.count()

    def step():
        if next(calls) == 2 * (3 + 4) + 1:  # the second side of the fifth iteration
            raise steps.OutOfTime
        return [1.0, 2.0, 3.0]

    sides = {name: steps.Side(step, torch.nn.Identity()) for name in ("dense", "l1")}
    found = steps.take_turns(sides, 10)
    assert found.is_over and {s: len(rows) for s, rows in found.taken.items()} == {
        "dense": 4,
        "l1": 4,
    }


def test_too_few_iterations_are_not_kept(tmp_path, compiled, monkeypatch, capsys):
    def turns(sides, iterations):
        return steps.Turns({side: [[1.0] * 3] * 2 for side in sides}, True, {})

    monkeypatch.setattr(measure, "take_turns", turns)
    assert run(tmp_path, "--iterations", "5") == (0, [])
    assert "Nothing was measured." in capsys.readouterr().out


@pytest.mark.parametrize("when", ["made", "measured"])
def test_a_side_that_fails_leaves_the_others(when, tmp_path, compiled, monkeypatch, capsys):
    made = measure.Bench.side

    def side(self, way):
        if way.rule != "principal":
            return made(self, way)
        if when == "made":
            raise RuntimeError("no memory\nat all")
        return made(self, way)._replace(step=lambda: 1 / 0)

    monkeypatch.setattr(measure.Bench, "side", side)
    status, rows = run(tmp_path, "--no-compile", "--rules", "l1", "principal")
    assert status == 1 and {r["side"] for r in rows} == {"dense", "l1"}
    reason = "RuntimeError: no memory at all" if when == "made" else "ZeroDivisionError"
    assert f"FAILED test_resnet, principal: {reason}" in capsys.readouterr().out


def test_the_budget_ends_what_runs_and_is_gone_afterwards():
    with pytest.raises(steps.OutOfTime), steps.budget(0.05):
        time.sleep(60)
    with steps.budget(0.05):
        pass
    time.sleep(0.1)  # nothing is raised any more


# --- joules and the table ---------------------------------------------------------------------


def test_joules_are_those_of_the_gpu_for_each_step():
    class Counter:
        def begin(self):
            self.steps = 0

        def end(self):
            return {"GPU 0": 10.0 * self.steps, "CPU package 0": 1000.0}

    counter = Counter()

    def step():
        counter.steps += 1
        time.sleep(0.01)
        return [0.0] * 3

    side = steps.Side(step, torch.nn.Identity())
    assert steps.joules_per_step(side, steps._OnlyGpus(counter), 0.03) == pytest.approx(10)
    assert counter.steps >= 2
    assert steps.joules_per_step(side, None, 0.03) is None


def test_nvml_is_asked_for_the_difference(monkeypatch):
    readings = iter([1000, 5000, 7500])  # millijoules
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: {"GPU-abc": next(readings)}[handle],
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="abc")
    )
    counter = steps.Nvml(0)
    counter.begin()
    assert counter.end() == {"GPU": 2.5}


@pytest.mark.parametrize(
    ("side", "backward", "step", "compiled", "verdict"),
    [
        ("l1", "0.40", "0.9", "", "backward reached"),
        ("l1", "0.41", "0.9", "", "backward missed"),
        ("l1", "0.30", "1.01", "", "slower"),
        ("l1 compiled", "0.9", "0.9", "0.70", "step reached"),
        ("l1 compiled", "0.1", "0.1", "0.71", "step missed"),
        ("l1 compiled", "0.1", "0.1", "1.2", "slower"),
        ("l1 Triton", "0.2", "0.5", "", "backward reached"),
        ("l1 compiled", "0.1", "0.1", "", "?"),
        ("dense compiled", "0.5", "0.8", "1.0", ""),
    ],
)
def test_the_bars(side, backward, step, compiled, verdict):
    common = {"name": "net", "side": side, "p50_ms": "1.0", "peak_memory_mib": "", "joules": ""}
    rows = [
        {**common, "mode": "backward", "of_dense": backward, "of_compiled": ""},
        {**common, "mode": "step", "of_dense": step, "of_compiled": compiled},
    ]
    last = report.show(rows).splitlines()[-1]
    found = [word for word in ("reached", "missed", "slower", "?") if word in last]
    assert found == ([verdict.split()[-1]] if verdict else []) and verdict in last


# --- the networks -----------------------------------------------------------------------------


def test_the_u_net():
    with torch.device("meta"):
        model = UNet()
        out = model(torch.empty(2, 3, 64, 48))
    assert out.shape == (2, 2, 64, 48)
    assert sum(p.numel() for p in model.parameters()) == 31_037_698
    network = networks.Network.parse("unet:2:32")
    assert network.loss(torch.randn(network.shape))(torch.randn(2, 2, 32, 32)).dim() == 0
    with pytest.raises(ValueError, match="multiple of 16 pixels"):
        networks.Network.parse("unet:2:40")


def test_torch_is_enough():
    code = f"""
import sys; sys.path.insert(0, {str(BENCHMARKS)!r})
for name in ("timm", "rich", "torchvision", "diffusers", "zeus", "pynvml", "triton"):
    sys.modules[name] = None
import gpu, networks
print(networks.Network.parse("unet:1:32").build().__class__.__name__)
try:
    networks.Network.parse("resnet50:1:32")
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["UNet", "resnet50 needs timm: pip install timm"], done


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--network", "unet:1:32"])
    assert "there is no CUDA device" in capsys.readouterr().err
