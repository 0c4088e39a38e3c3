"""benchmarks/gpu.py, on the CPU: what is wrong is seen, and what was measured is kept."""

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
from gpu_run import kernels, measure, report, steps
from unet import UNet

from ssprop_patch.ops import channel_ops, triton_kernels

from . import BENCHMARKS, ROOT

CPU = torch.device("cpu")


# --- kernels ----------------------------------------------------------------------------------


def sums(t):
    return t.float().sum((0, 2, 3))


def row(v):
    return v.view(-1, 1, 1)


def xhat(y, mean, invstd):
    return (y.float() - row(mean)) * row(invstd)


def behind(dz, relu_out):
    return torch.where(relu_out > 0, dz.float(), 0)


def dy(dz, y, mean, invstd, sum_dz, sum_dz_xhat, relu_out):
    n = y.numel() // y.shape[1]
    inner = behind(dz, relu_out) - row(sum_dz / n) - xhat(y, mean, invstd) * row(sum_dz_xhat / n)
    return inner * row(invstd)


#: In plain torch, what the Triton kernels compute.
STAND_INS = {
    "channel_sums": lambda t, order: sums(t.float().abs() ** order),
    "take_channels": lambda t, index: t[:, index],
    "norm_sums": lambda dz, y, mean, invstd, out: (
        sums(behind(dz, out)),
        sums(behind(dz, out) * xhat(y, mean, invstd)),
        sums(behind(dz, out).square()),
    ),
    "norm_grad_sums": lambda *args: sums(dy(*args).abs()),
    "norm_input_grad": lambda dz, y, weight, mean, invstd, a, b, index, out: (
        dy(dz, y, mean, invstd, a, b, out) * row(weight)
    )[:, index].to(y.dtype),
}
#: Ways in which a kernel may be wrong, of its result.
WRONG = {
    "channel_sums": lambda found: found * 1.0001,
    "take_channels": lambda found: found.flip(1),
    "norm_sums": lambda found: (found[0], found[1], found[1]),
    "norm_grad_sums": lambda found: found[:-1],
    "norm_input_grad": lambda found: torch.full_like(found, float("nan")),
}


@pytest.fixture
def stand_ins(monkeypatch):
    """Kernels that run on the CPU, and nothing but kernels to compare."""
    monkeypatch.setattr(kernels, "why_not", lambda device: "")
    monkeypatch.setattr(gpu, "why_not", lambda device: "")
    monkeypatch.setattr(kernels, "_LAYERS", {})
    monkeypatch.setattr(kernels, "_network", lambda *_: 0.0)
    for name, function in STAND_INS.items():
        monkeypatch.setattr(triton_kernels, name, function)


def test_every_kernel_is_checked():
    functions = set(triton_kernels.__all__) - {"is_available", "why_unavailable"}
    assert functions == set(kernels.KERNELS) == set(STAND_INS) == set(WRONG)


@pytest.mark.usefixtures("stand_ins")
def test_right_kernels_are_right(capsys):
    assert gpu.check_kernels(CPU)
    out = capsys.readouterr().out
    assert "24 of 24 comparisons are right" in out  # with the networks
    for dtype, layout in itertools.product(
        ("float32", "bfloat16"), ("contiguous_format", "channels_last")
    ):
        assert f"norm_input_grad, {dtype}, {layout}" in out


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("name", sorted(WRONG))
def test_a_wrong_kernel_makes_the_exit_status_1(name, monkeypatch, capsys):
    right = STAND_INS[name]
    monkeypatch.setattr(triton_kernels, name, lambda *args: WRONG[name](right(*args)))
    asked = []

    def run(args, seconds, kernels):
        asked.append(kernels)
        return SimpleNamespace(measure=lambda: True, rows=[], failed=[])

    monkeypatch.setattr(gpu, "Run", run)
    assert gpu.main(["--device", "cpu", "--network", "unet:1:32"]) == 1
    out = capsys.readouterr().out
    assert f"WRONG  {name}, float32, channels_last" in out
    assert f"WRONG  {name}, bfloat16, contiguous_format" in out
    assert "20 of 24 comparisons are right" in out
    assert asked == [False]  # the others are timed without the kernels


@pytest.mark.usefixtures("stand_ins")
def test_a_kernel_that_raises_is_wrong_and_the_others_are_checked(monkeypatch, capsys):
    monkeypatch.setattr(triton_kernels, "norm_sums", lambda *_: 1 / 0)
    assert not gpu.check_kernels(CPU)
    assert "20 of 24 comparisons are right" in capsys.readouterr().out


def test_layers_and_a_network_are_compared(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "DTYPES", (torch.float32,))
    assert gpu.check_kernels(CPU)
    out = capsys.readouterr().out
    assert "not checked, no CUDA device" in out or "triton is not installed" in out
    assert "14 of 14 comparisons are right" in out

    right = kernels.reference.sparse_backward

    def one_channel_more(dy, x, w, params, k):
        return right(dy, x, w, params, k + 1)

    monkeypatch.setattr(kernels.reference, "sparse_backward", one_channel_more)
    assert not gpu.check_kernels(CPU)
    out = capsys.readouterr().out
    assert "2 of 14 comparisons are right" in out and "WRONG  depthwise" in out


def test_kernels_are_used_within_and_not_after():
    before = channel_ops._TRITON
    with kernels.triton(True):
        assert channel_ops._TRITON is True
        with kernels.triton(False):
            assert channel_ops._TRITON is False
    assert channel_ops._TRITON is before


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
