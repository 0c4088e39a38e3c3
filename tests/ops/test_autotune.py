"""Measuring the ways: what is timed, taken, kept, saved and refused."""

import json
import time

import pytest
import torch
from torch import nn

import ssprop_patch as ssp
from ssprop_patch import functional, kernels
from ssprop_patch.core.geometry import ConvParams
from ssprop_patch.ops import algorithms, native
from ssprop_patch.ops import channel_gradients as kept_module

from .layers import run


@pytest.fixture
def measuring():
    kernels.benchmark = True


def test_nothing_is_measured_unless_asked_for():
    assert kernels.benchmark is False
    run()
    assert kernels.choices() == []


@pytest.mark.parametrize("kernel, groups", [(1, 1), (3, 1), (3, 2), (3, 8)])
def test_the_gradient_is_the_same_when_measured(kernel, groups, measuring):
    for _ in range(2):  # while measuring, and as remembered
        assert run(c_out=8, kernel=kernel, groups=groups) < 1e-12
    [choice] = kernels.choices()
    assert choice.kept == 4 and choice.needs == "xw" and choice.geometry[3] == groups
    dx, dw = algorithms.candidates(
        torch.empty(choice.input_shape),
        torch.empty(choice.weight_shape),
        ConvParams(*choice.geometry),
    )
    assert set(choice.ms) == {f"dx {name}" for name in dx} | {f"dw {name}" for name in dw}


@pytest.mark.parametrize("fast_dx, fast_dw", [("gather", "matmul"), ("matmul", "gather")])
def test_the_fastest_of_each_is_taken_and_timed_once(fast_dx, fast_dw, measuring, monkeypatch):
    ran = []

    def slowed(part, name, way, fast):
        def slow(*args):
            ran.append((part, name))
            time.sleep(0 if name == fast else 0.02)
            return way(*args)

        return slow

    for part, table, fast in (("dx", algorithms.DX, fast_dx), ("dw", algorithms.DW, fast_dw)):
        for name, way in list(table.items()):
            monkeypatch.setitem(table, name, slowed(part, name, way, fast))
    for name, way in list(algorithms.CHOOSING.items()):
        monkeypatch.setitem(algorithms.CHOOSING, name, slowed("both", name, way, None))
    run()
    [choice] = kernels.choices()
    assert (choice.dx, choice.dw) == (fast_dx, fast_dw)
    ran.clear()
    assert run(seed=1) < 1e-12
    assert ran == [("dw", fast_dw), ("dx", fast_dx)]


@pytest.mark.skipif(native.build.find_compiler() is None, reason="there is no C compiler")
@pytest.mark.parametrize("choosing", [0.0, 0.05])
def test_a_way_that_chooses_the_channels_itself_is_measured_with_that(
    choosing, measuring, monkeypatch
):
    # Of two parts and the choice of channels 40 ms and that, of the one call 60.
    select, real = kept_module.select_channels, algorithms.CHOOSING["direct"]
    monkeypatch.setattr(
        kept_module, "select_channels", lambda *args: time.sleep(choosing) or select(*args)
    )
    for table in (algorithms.DX, algorithms.DW):
        for name, way in list(table.items()):
            monkeypatch.setitem(table, name, lambda k, way=way: time.sleep(0.02) or way(k))
    monkeypatch.setitem(
        algorithms.CHOOSING, "direct", lambda *args: time.sleep(0.06) or real(*args)
    )
    monkeypatch.setattr(kernels, "by_rule", lambda kept: algorithms.Algorithms("gather", "gather"))
    assert run(kernel=3) < 1e-12
    [choice] = kernels.choices()
    assert (choice.dx == choice.dw == "direct") is (choosing > 0)


def test_each_shape_rate_and_need_is_a_choice_of_its_own(measuring):
    run()
    run(shape=(3, 8, 6, 6))
    run(rate=0.8)
    run(dtype=torch.float32)
    w = torch.randn(10, 8, 1, 1, requires_grad=True)
    functional.conv2d(torch.randn(2, 8, 6, 6), w, drop_rate=0.5).sum().backward()
    assert [c.needs for c in kernels.choices()] == ["xw"] * 4 + ["w"]
    assert len({(c.input_shape, c.kept, c.dtype) for c in kernels.choices()}) == 4
    assert not any(name.startswith("dx") for name in kernels.choices()[-1].ms)


def test_inputs_that_never_repeat_are_not_timed_for_ever(measuring):
    for n in range(1, 40):
        assert run(shape=(1, 8, n, 2)) < 1e-12
    assert len(kernels.choices()) == 16
    run(c_out=12)  # another layer
    assert len(kernels.choices()) == 17


def test_deterministic_runs_measure_nothing_but_use_what_they_know(measuring, tmp_path):
    run()
    kernels.save(tmp_path / "kernels.json")
    kernels.clear()
    torch.use_deterministic_algorithms(True)
    try:
        run()
        assert kernels.choices() == []
        assert kernels.load(tmp_path / "kernels.json") == 1
        run(seed=2)
        assert len(kernels.choices()) == 1
    finally:
        torch.use_deterministic_algorithms(False)


def test_saved_choices_are_used_without_measuring(measuring, tmp_path, monkeypatch):
    run()
    run(kernel=3, groups=2)
    before = kernels.choices()
    path = tmp_path / "kernels.json"
    kernels.save(path)
    # As if another way had won: whether it is used shows that the file decides.
    content = json.loads(path.read_text())
    content[0]["dx"] = next(n for n in ("gather", "matmul") if n != content[0]["dx"])
    path.write_text(json.dumps(content))
    kernels.clear()
    kernels.benchmark = False
    assert kernels.load(path) == 2
    assert kernels.choices()[1] == before[1]
    used, choose = [], kernels.choose
    monkeypatch.setattr(kernels, "choose", lambda *args: used.append(choose(*args)) or used[-1])
    assert run() < 1e-12
    assert used == [(content[0]["dx"], content[0]["dw"])]


def test_choices_of_another_machine_stand_aside(measuring, tmp_path):
    run()
    path = tmp_path / "kernels.json"
    kernels.save(path)
    content = json.loads(path.read_text())
    content[0]["device"] = "an abacus"
    path.write_text(json.dumps(content))
    kernels.clear()
    assert kernels.load(path) == 0
    run()
    assert len(kernels.choices()) == 2


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[1]", '[{"dx": "gather"}]', "null"],
    ids=["none", "dict", "int", "part", "null"],
)
def test_a_file_of_something_else_is_refused_whole(content, measuring, tmp_path):
    run()
    before = kernels.choices()
    path = tmp_path / "kernels.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"kernels\.json holds no choices"):
        kernels.load(path)
    assert kernels.choices() == before


def test_a_way_that_does_not_exist_is_refused(measuring, tmp_path):
    run()
    path = tmp_path / "kernels.json"
    kernels.save(path)
    path.write_text(path.read_text().replace('"dx": "', '"dx": "un'))
    kernels.clear()
    with pytest.raises(ValueError, match="no algorithm 'un"):
        kernels.load(path)
    assert kernels.choices() == []


@pytest.mark.parametrize(
    "kernel, stride, way", [(3, 1, "matmul"), (1, 2, "forward"), (3, 2, "forward_nhwc")]
)
def test_a_way_of_other_layers_is_refused(kernel, stride, way, measuring, tmp_path):
    run()
    path = tmp_path / "kernels.json"
    kernels.save(path)
    content = json.loads(path.read_text())
    content[0]["dx"] = way
    content[0]["weight_shape"][2:] = [kernel, kernel]
    content[0]["geometry"][0] = [stride, stride]
    path.write_text(json.dumps(content))
    kernels.clear()
    with pytest.raises(ValueError, match=f"algorithm '{way}' cannot compute"):
        kernels.load(path)
    assert kernels.choices() == []


def test_a_whole_network_and_its_table(measuring):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.Conv2d(8, 16, 1, stride=2),
        nn.Flatten(),
        nn.LazyLinear(2),
    )
    x = torch.randn(4, 3, 12, 12)
    model(x)
    ssp.convert(model, 0.5, selection="l2")
    for _ in range(2):
        model(x).sum().backward()
    lines = kernels.table().splitlines()
    assert len(lines) == 1 + 3 == 1 + len(kernels.choices())
    assert lines[0].split()[:2] == ["input", "weight"]
    assert any("4x3x12x12" in line and "8x3x3x3" in line and " - " in line for line in lines)


def test_compiled_networks_measure_too(measuring):
    model = ssp.convert(nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3)), 0.5)
    torch.compile(model, backend="aot_eager")(torch.randn(2, 4, 6, 6)).sum().backward()
    assert [c.weight_shape for c in kernels.choices()] == [(8, 8, 3, 3), (8, 4, 1, 1)]
