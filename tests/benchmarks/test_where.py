"""benchmarks/where.py: kinds of work add up to the step, and marks change nothing."""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import where
from breakdown import kinds, marks
from breakdown.kinds import Slot, split
from torch import nn

import ssprop_patch as ssp
from ssprop_patch.ops.native import build

from . import BENCHMARKS, ROOT

needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="no C compiler")


@dataclass(eq=False)
class Event:
    """As of the profiler."""

    name: str
    cpu_parent: Event | None = None
    self_cpu_time_total: float = 1.0


def chain(*names: str) -> list[Event]:
    """Events of which each lies in the one before; a microsecond each, the last of them 1000."""
    events: list[Event] = []
    for name in names:
        events.append(Event(name, events[-1] if events else None))
    events[-1].self_cpu_time_total = 1000.0
    return events


def last_kind(*names: str) -> str:
    found = split(chain(*names))
    return max(found, key=lambda slot: found[slot]).kind


STEP = f"{kinds.PART}{kinds.BETWEEN}"
FORWARD, BACKWARD, OPTIMIZER = (f"{kinds.PART}{n}" for n in ("forward", "backward", "optimizer"))
ENGINE = "autograd::engine::evaluate_function: AddBackward0"


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        ((FORWARD, "aten::conv2d", "aten::mkldnn_convolution", "aten::copy_"), kinds.FORWARD),
        ((FORWARD, "aten::cross_entropy_loss", "aten::sum"), kinds.LOSS),
        ((FORWARD, "aten::layer_norm", "aten::mean"), kinds.NORM),
        ((FORWARD, "aten::add_"), kinds.ADDITION),
        ((FORWARD,), kinds.PYTHON),
        ((BACKWARD, ENGINE), kinds.PYTHON),
        ((BACKWARD, ENGINE, "AddBackward0"), kinds.PYTHON),
        ((BACKWARD, "torch::autograd::AccumulateGrad"), kinds.PYTHON),
        ((BACKWARD, "AddmmBackward0", "aten::mm"), kinds.LINEAR),
        ((BACKWARD, "_SparseConvBackward"), kinds.PYTHON),
        ((BACKWARD, "_SparseConvBackward", "aten::mm"), kinds.PROJECTING),
        ((BACKWARD, "_SparseConvBackward", "aten::convolution"), kinds.PROJECTING),
        ((BACKWARD, f"{kinds.MARK}{kinds.INPUT}", "aten::mm"), kinds.INPUT),
        (
            (BACKWARD, f"{kinds.MARK}{kinds.INPUT}", f"{kinds.MARK}{kinds.GATHERING}", "aten::mul"),
            kinds.GATHERING,
        ),
        ((BACKWARD, "aten::convolution_backward", f"{kinds.MARK}{kinds.WEIGHT}"), kinds.WEIGHT),
        ((OPTIMIZER, "Optimizer.step#SGD.step", "aten::add_"), kinds.OPTIMIZER),
        ((FORWARD, "aten::of_next_year"), kinds.UNATTRIBUTED),
        ((FORWARD, "torchvision::nms"), kinds.UNATTRIBUTED),
    ],
)
def test_the_kind_of_an_event(names, kind):
    assert last_kind(STEP, *names) == kind


def test_the_kinds_add_up_and_what_is_unknown_has_a_row():
    events = chain(STEP, FORWARD, "aten::of_next_year")
    events.append(Event("aten::relu", events[1], 20.0))
    events.append(Event(BACKWARD, events[0], 5.0))
    unknown: dict[str, float] = {}
    found = split(events, unknown=unknown)
    total = sum(e.self_cpu_time_total for e in events) / 1e6
    assert sum(found.values()) == pytest.approx(total, rel=1e-12)
    assert found[Slot("forward", kinds.UNATTRIBUTED)] == pytest.approx(1e-3)
    assert unknown == {"aten::of_next_year": pytest.approx(1e-3)}
    assert found[Slot("forward", kinds.ACTIVATION)] == pytest.approx(20e-6)
    assert found[Slot("between", kinds.PYTHON)] == pytest.approx(1e-6)
    assert found[Slot("backward", kinds.PYTHON)] == pytest.approx(5e-6)
    assert {slot.kind for slot in found} <= set(kinds.KINDS)


def test_stamps_divide_the_call_that_does_it_all():
    events = [*chain(STEP, BACKWARD), Event(kinds.WHOLE)]
    events[2].cpu_parent, events[2].self_cpu_time_total = events[1], 100.0
    stamps = [(10_000, 20_000, 30_000, 25_000, 0)]  # nanoseconds, of 100 microseconds
    found = split(events, stamps)
    microseconds = {s.kind: 1e6 * t for s, t in found.items() if s.part == "backward"}
    assert microseconds == {
        kinds.CHOOSING: pytest.approx(10),
        kinds.GATHERING: pytest.approx(20),
        kinds.WEIGHT: pytest.approx(30),
        kinds.INPUT: pytest.approx(25),
        kinds.ROWS: 0,
        kinds.PYTHON: pytest.approx(1000 + 15),
    }
    without = split(events)
    assert without[Slot("backward", kinds.ROWS)] == pytest.approx(100e-6)
    assert sum(without.values()) == pytest.approx(sum(found.values()))
    with pytest.raises(ValueError, match="fewer calls"):
        split(events, stamps * 2)
    events.append(Event(kinds.WHOLE, events[1]))
    with pytest.raises(ValueError, match="more calls"):
        split(events, stamps)


def test_every_c_function_has_a_kind():
    assert set(marks.C_FUNCTIONS) == {*build._PASSES, *build._CONV}
    assert set(marks.C_FUNCTIONS.values()) <= {*kinds.KINDS, "conv_backward"}


def test_a_function_that_is_gone_is_an_error(monkeypatch):
    monkeypatch.setitem(marks.PYTHON_FUNCTIONS, kinds.NORM, ("ops.channel_ops.gone",))
    with pytest.raises(AttributeError, match=r"no ops\.channel_ops\.gone any more"), marks.marked():
        pass


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    model(x).square().mean().backward()
    return [p.grad for p in model.parameters()]


def has_own_backward() -> bool:
    name = "aten::convolution_backward"
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")


def network(**rule) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 1),
        nn.Conv2d(32, 16, 3, stride=2),
    )
    return ssp.convert(model, 0.75, **rule) if rule else model


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"selection": "l1"},
        {"selection": "l1", "remainder": "coarse"},
        {"selection": "principal", "remainder": "coarse"},
    ],
    ids=["dense", "l1", "l1+coarse", "principal+coarse"],
)
def test_marks_change_no_gradient_and_come_off(rule):
    x = torch.randn(8, 3, 64, 64)
    plain = gradients(network(**rule), x)
    before = {
        path: vars(home)[name]
        for paths in marks.PYTHON_FUNCTIONS.values()
        for path in paths
        for home, name in [marks._find(path)]
    }
    with marks.marked():
        found = gradients(network(**rule), x)
        assert all(vars(h)[n] is not before[p] for p in before for h, n in [marks._find(p)])
        assert has_own_backward()
    assert not has_own_backward()
    assert all(map(torch.equal, plain, found))
    assert all(vars(h)[n] is before[p] for p in before for h, n in [marks._find(p)])
    library = build.library("float")
    assert library is None or type(library.norm_sums).__name__ == "_FuncPtr"


def test_a_sparse_layers_work_is_found():
    x = torch.randn(8, 3, 64, 64)

    def of(model: nn.Module) -> dict[Slot, float]:
        step = where.make_step(model, x, lambda out: out.square().mean())
        step()
        return where.profiled_step(step)[0]

    dense, coarse = of(network()), of(network(selection="l1", remainder="coarse"))
    principal = of(network(selection="principal"))
    for found in (dense, coarse, principal):
        assert found[Slot("forward", kinds.FORWARD)] > 0
        assert min(found[Slot("backward", k)] for k in (kinds.WEIGHT, kinds.INPUT, kinds.NORM)) > 0
        assert "unattributed" not in {slot.kind for slot in found}
    own = {kinds.CHOOSING, kinds.GATHERING, kinds.PROJECTING, kinds.DIRECTIONS, kinds.COARSE}
    assert own.isdisjoint(slot.kind for slot in dense)
    assert {kinds.CHOOSING, kinds.GATHERING, kinds.COARSE} <= {slot.kind for slot in coarse}
    assert {kinds.PROJECTING, kinds.DIRECTIONS} <= {slot.kind for slot in principal}


@needs_compiler
def test_c_says_how_long_its_parts_took():
    code = f"""
import sys; sys.path.insert(0, {str(BENCHMARKS)!r})
import torch, ssprop_patch as ssp
from breakdown import marks
marks.ask_for_stamps()
layers = torch.nn.Conv2d(16, 16, 3, padding=1), torch.nn.Conv2d(16, 16, 1)
for layer, size in zip(layers, (8, 1)):
    ssp.convert(layer, 0.75)
    with marks.marked() as stamps:
        layer(torch.randn(2, 16, size, size, requires_grad=True)).square().sum().backward()
    print(*stamps[0] if stamps else ())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    of_conv, of_row = (list(map(int, line.split())) for line in done.stdout.splitlines())
    assert min(of_conv[:4]) > 0 == of_conv[4]
    assert of_row[2:4] == [0, 0] and of_row[4] > 0 and of_row[0] > 0


def run(tmp_path, monkeypatch, *more: str) -> tuple[int, list[dict[str, str]]]:
    monkeypatch.setenv("SSPROP_PATCH_CFLAGS", "")  # so that it is as before afterwards
    monkeypatch.setattr(ssp.kernels, "benchmark", False)
    file = tmp_path / "where.csv"
    status = where.main(["--iterations", "1", "--warmup", "1", "--output", str(file), *more])
    with file.open(newline="") as lines:
        return status, list(csv.DictReader(lines))


def test_networks_are_measured_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(where, "TOLERANCE", 100.0)  # of a busy machine
    status, rows = run(tmp_path, monkeypatch, "--network", "test_resnet:2:32", "--channels-last")
    out = capsys.readouterr().out
    assert status == 0 and "test_resnet, 2x3x32x32" in out and "sum of the kinds" in out
    assert {row["side"] for row in rows} == {"dense", "l1"}
    assert {row["memory_format"] for row in rows} == {"channels_last"}
    for side in ("dense", "l1"):
        of_side = [row for row in rows if row["side"] == side]
        assert sum(float(r["share_of_step"]) for r in of_side) == pytest.approx(1, abs=1e-3)
        total = float(of_side[0]["profiled_ms"])
        assert sum(float(r["ms"]) for r in of_side) == pytest.approx(total, rel=1e-3)
        assert float(of_side[0]["step_ms"]) > 0


@pytest.mark.parametrize(("profiled", "status"), [(1.04, 0), (1.06, 1), (0.94, 1)])
def test_kinds_that_do_not_add_up_are_told(profiled, status, tmp_path, monkeypatch, capsys):
    found = where.Found({Slot("forward", kinds.FORWARD): profiled}, 1.0, {})
    monkeypatch.setattr(where, "measure", lambda network, args: {"dense": found})
    assert run(tmp_path, monkeypatch, "--network", "test_resnet:2:32")[0] == status
    err = capsys.readouterr().err
    assert ("test_resnet, dense: the kinds add up to" in err) is bool(status)
    assert (f"{100 * (profiled - 1):+.1f} %" in err) is bool(status)


def test_one_step_is_shown_and_warm_directions(monkeypatch):
    """Medians of kinds would not add up; principal directions turn fast at first."""
    taken = iter([9.0, 1.0, 3.0, 2.0])  # the first does not count

    def profiled(step):
        step()
        seconds = next(taken)
        return {Slot("forward", kinds.FORWARD): seconds / 2, Slot("forward", kinds.NORM): 0.5}, {}

    calls = []
    monkeypatch.setattr(where, "profiled_step", profiled)
    found = where.time_sides({"l1": lambda: calls.append(1)}, {"l1": 5}, 3)["l1"]
    assert found.profiled_s == 1.5 and len(calls) == 5 + 1 + 3 + 3

    seen = {}
    monkeypatch.setattr(where, "time_sides", lambda steps, warmup, n: seen.update(warmup))
    args = SimpleNamespace(
        channels_last=False,
        selection=["l1", "principal"],
        remainder=[None],
        drop_rate=0.8,
        types=[],
        skip_grouped=False,
        align=1,
        warmup=3,
        iterations=1,
    )
    where.measure(where.Network.parse("test_resnet:2:32"), args)
    assert seen == {"dense": 3, "l1": 3, "principal": 13}


def test_a_gpu_is_refused(capsys):
    with pytest.raises(SystemExit):
        where.main(["--device", "cuda"])
    assert "this is for the CPU" in capsys.readouterr().err
