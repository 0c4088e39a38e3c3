"""benchmarks/bench_step.py: its sides, its networks, times and memory."""

from __future__ import annotations

from types import SimpleNamespace

import bench_step
import networks
import pytest
import rows as schema
import timm
import torch
from torch import nn

import ssprop_patch as ssp


def step_options(**given: object) -> SimpleNamespace:
    options = {
        "drop_rate": 0.8,
        "selection": ["l1"],
        "remainder": [None],
        "types": [],
        "amp": False,
        "skip_grouped": False,
        "align": 1,
        "compile": False,
    }
    return SimpleNamespace(**options | given)


def test_several_rules_are_sides_of_one_comparison():
    args = step_options(selection=["l1", "principal"], remainder=[None, "coarse"])
    assert bench_step.sparse_sides(args) == {
        "l1": (0.8, "l1", None),
        "l1+coarse": (0.8, "l1", "coarse"),
        "principal": (0.8, "principal", None),
        "principal+coarse": (0.8, "principal", "coarse"),
    }
    one = step_options(selection=["principal"])
    assert bench_step.sparse_sides(one) == {
        "sparse": (0.8, "principal", None),
        "rate0": (0.0, "principal", None),
    }


def sparse_layers(model: nn.Module) -> set[str]:
    return {name for name, m in model.named_modules() if hasattr(m, "_ssprop_policy")}


def test_which_layers_of_a_network_become_sparse():
    vit = timm.create_model("test_vit")
    linear = {n for n, m in vit.named_modules() if isinstance(m, nn.Linear)}
    assert sparse_layers(bench_step.make_sparse(vit, 0.8, step_options())) == {"patch_embed.proj"}
    both = bench_step.make_sparse(vit, 0.8, step_options(types=["linear"]))
    assert sparse_layers(both) == {"patch_embed.proj", *linear} - {"head"}
    assert not sparse_layers(vit)
    net = timm.create_model("test_efficientnet")
    all_of_them = sparse_layers(bench_step.make_sparse(net, 0.8, step_options()))
    rest = sparse_layers(bench_step.make_sparse(net, 0.8, step_options(skip_grouped=True)))
    grouped = {n for n, m in net.named_modules() if getattr(m, "groups", 1) > 1}
    assert rest == all_of_them - grouped != all_of_them


def test_measured_plan_says_which_layers_become_sparse(tmp_path, monkeypatch):
    asked = []

    def plan(model, *, inputs, types, drop_rate, measure, align, progress):
        asked.append((tuple(inputs.shape), nn.Linear in types, drop_rate, measure))
        own = set(model.modules())
        # A plan of another copy would not know these layers.
        return SimpleNamespace(pays=lambda layer, name: layer in own and name.startswith("layer1"))

    monkeypatch.setattr(ssp, "plan", plan)
    net, x = timm.create_model("test_resnet"), torch.zeros(2, 3, 32, 32)
    args = step_options(types=["linear"])
    found = bench_step.make_sparse(net, 0.8, args, measured_on=x)
    assert asked == [((2, 3, 32, 32), True, 0.8, True)]
    assert (
        sparse_layers(found)
        == {
            n
            for n in sparse_layers(bench_step.make_sparse(net, 0.8, args))
            if n.startswith("layer1")
        }
        != set()
    )

    file = tmp_path / "times.csv"
    bench_step.main(
        [
            "--network",
            "test_resnet:2:32",
            "--measured-plan",
            "--iterations",
            "1",
            "--warmup",
            "1",
            "--output",
            str(file),
        ]
    )
    limits = {r.side: r.limit for r in schema.read(file) if r.mode == "backward"}
    assert limits["sparse"] + 0.1 < limits["plan"] < 0.99
    assert limits["rate0"] == pytest.approx(1.0, rel=1e-3)

    monkeypatch.setattr(ssp, "plan", lambda *_, **__: SimpleNamespace(pays=lambda *_: False))
    with pytest.warns(UserWarning, match="nothing to convert"):
        none = bench_step.make_sparse(net, 0.8, args, measured_on=x)
    assert bench_step.flops_left(none, x.shape, args) == 1.0


def test_the_plan_of_a_compiled_network_is_measured_compiled(monkeypatch):
    asked = []

    def plan(model, **kwargs):
        asked.append(isinstance(model, torch._dynamo.OptimizedModule))
        return SimpleNamespace(pays=lambda *_: True)

    monkeypatch.setattr(ssp, "plan", plan)
    net, x = timm.create_model("test_resnet"), torch.zeros(2, 3, 32, 32)
    for compiled in (True, False):
        bench_step.make_sparse(net, 0.8, step_options(compile=compiled), measured_on=x)
    assert asked == [True, False]


def test_networks_are_timed_and_written(tmp_path, capsys, monkeypatch):
    file = tmp_path / "times.csv"
    monkeypatch.setattr(ssp.kernels, "benchmark", False)
    bench_step.main(
        [
            "--network",
            "test_resnet:2:32",
            "test_vit:1:160",
            "--types",
            "Linear",
            "--iterations",
            "2",
            "--warmup",
            "1",
            "--selection",
            "l2",
            "--measured-kernels",
            "--output",
            str(file),
        ]
    )
    assert ssp.kernels.choices()
    ssp.kernels.clear()
    out = capsys.readouterr().out
    found = {(r.name, r.side, r.mode): r for r in schema.read(file)}
    assert len(found) == 2 * 3 * 3
    for (name, side, mode), row in found.items():
        assert name in out and row.selection == "l2"
        assert row.options == "types=linear kernels=measured"
        assert row.shape == ("2x3x32x32" if name == "test_resnet" else "1x3x160x160")
        assert 0 < row.p20_ms <= row.p50_ms <= row.p80_ms
        assert (row.peak_memory_mib is not None) is (mode == "step")
        dense = {m: found[name, "dense", m].p50_ms for m in ("forward", "backward", "step")}
        assert row.share_of_dense == pytest.approx(row.p50_ms / dense[mode], abs=1e-3)
        if mode == "backward" and side == "sparse":
            # At least a fifth of the channels is left; where some are dense, or few, more.
            assert 0.2 < row.limit < 0.3
            step = found[name, side, "step"]
            spared = dense["backward"] - row.limit_ms
            assert step.limit_ms == pytest.approx(dense["step"] - spared, abs=1e-3)


@pytest.mark.parametrize(
    "text, message",
    [
        ("resnet18", "'resnet18' is not NAME:BATCH:PIXELS"),
        ("resnet18:8:0", "'resnet18:8:0' is not NAME:BATCH:PIXELS"),
        ("resnett18:8:32", "timm has no network 'resnett18'; the nearest names are .*resnet18"),
        ("unet_cifar10:8:32", "the nearest names are .*unet2d_cifar10"),
        ("unet2d_cifar10:8:31", "takes a multiple of 8 pixels"),
    ],
)
def test_network_that_does_not_exist_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        bench_step.Network.parse(text)


def test_a_network_that_makes_images(tmp_path, monkeypatch):
    class Small(nn.Module):
        def __init__(self, pixels):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, images):
            return self.conv(images)

    monkeypatch.setattr(networks, "UNet", Small)
    file = tmp_path / "times.csv"
    bench_step.main(
        [
            "--network",
            "unet2d_cifar10:2:16",
            "--measured-plan",
            "--iterations",
            "1",
            "--warmup",
            "1",
            "--output",
            str(file),
        ]
    )
    rows = schema.read(file)
    assert {(r.name, r.shape) for r in rows} == {("unet2d_cifar10", "2x3x16x16")}
    assert {r.side for r in rows} == {"dense", "sparse", "rate0", "plan"}


def test_the_network_of_ddpm():
    net = networks.Network.parse("unet2d_cifar10:1:32")
    model, x = net.build(), torch.randn(net.shape)
    assert sum(p.numel() for p in model.parameters()) == 35_746_307  # as its authors' weights
    with torch.no_grad():
        out = model(x)
    assert out.shape == x.shape and net.loss(x)(out).dim() == 0


def test_peak_memory_is_on_top_of_what_was_there(monkeypatch):
    model = nn.Linear(2, 2)
    model.weight.grad = torch.ones(2, 2)
    state = {"now": 300, "peak": 900}  # MiB; an earlier peak does not count

    def step() -> None:
        assert model.weight.grad is None  # what the last step left is not there before
        state["peak"] = max(state["peak"], 450)

    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: state["now"] << 20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: state["peak"] << 20)
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda _: state.update(peak=state["now"])
    )
    assert bench_step.peak_memory(step, model, device) == 150
    assert bench_step.peak_memory(step, model, torch.device("meta")) is None


def test_peak_memory_on_the_cpu():
    model = nn.Linear(2, 2)
    before = torch.ones(2**20)  # does not count

    def step() -> None:
        first = before * 2  # 4 MiB
        second = first + 1
        del first
        third = second + 1
        del second, third

    found = bench_step.peak_memory(step, model, torch.device("cpu"))
    assert found == pytest.approx(8, abs=0.01)
