"""benchmarks/bench_conv.py: layers by their text, and their times."""

from __future__ import annotations

from types import SimpleNamespace

import bench_conv
import pytest
import rows as schema
import torch
from torch import nn


@pytest.mark.parametrize(
    "text, layer, rest",
    [
        ("conv2d:2x6x9x9:8:3", nn.Conv2d(6, 8, 3, padding=1, bias=False), {}),
        (
            "Conv2d:2x6x9x9:8:3x5:stride=2x1,dilation=2,groups=2,bias=1",
            nn.Conv2d(6, 8, (3, 5), (2, 1), (2, 4), 2, 2),
            {},
        ),
        (
            "conv2d:2x3x9x9:8:7:stride=2,padding=0,dx=0",
            nn.Conv2d(3, 8, 7, 2, bias=False),
            {"dx": False},
        ),
        ("conv1d:2x6x9:8:4", nn.Conv1d(6, 8, 4, padding=1, bias=False), {}),
        ("conv3d:1x2x5x5x5:4:1", nn.Conv3d(2, 4, 1, bias=False), {}),
        ("convtranspose2d:2x6x4x4:8:2:stride=2", nn.ConvTranspose2d(6, 8, 2, 2, bias=False), {}),
        ("linear:2x5x6:8:bias=1", nn.Linear(6, 8), {}),
        ("linear:5x6:8", nn.Linear(6, 8, bias=False), {}),
    ],
)
def test_layer_is_read_from_text(text, layer, rest):
    spec = bench_conv.LayerSpec.parse(text)
    assert repr(spec.build()) == repr(layer)
    assert spec.dx is rest.get("dx", True)
    shape = text.split(":")[1]
    assert "x".join(map(str, spec.shape)) == shape
    kind, out = spec.name.split(":", 1)
    assert bench_conv.LayerSpec.parse(f"{kind}:{shape}:{out}") == spec  # the name can be used


@pytest.mark.parametrize(
    "text, message",
    [
        ("conv4d:2x6x9x9:8:3", "the kind must be one of conv1d"),
        ("conv2d", "expected conv2d:SHAPE:OUT:KERNEL"),
        ("conv2d:2x6x9x9:8", "expected conv2d:SHAPE:OUT:KERNEL"),
        ("linear:2x6:8:3", "expected linear:SHAPE:OUT"),
        ("conv2d:6x9x9:8:3", "must have 4 dimensions"),
        ("linear:6:8", "2 or more dimensions"),
        ("conv2d:2x6x9xx:8:3", "the shape must be integers >= 1"),
        ("conv2d:0x6x9x9:8:3", "the shape must be integers >= 1"),
        ("conv2d:2x6x9x9:8x8:3", "OUT must be one number"),
        ("conv2d:2x6x9x9:1:3", "one output channel"),
        ("conv2d:2x6x9x9:8:3x3x3", "KERNEL must be 2 numbers or one"),
        ("conv2d:2x6x9x9:8:3:stride=0", "stride must be integers >= 1"),
        ("conv2d:2x6x9x9:8:3:padding=same", "padding must be integers >= 0"),
        ("conv2d:2x6x9x9:8:3:strid=2,dx=1", "strid: the keys are stride"),
        ("linear:2x6:8:stride=2", "stride: the keys are bias, dx"),
        ("conv2d:2x6x9x9:8:3:bias=yes", "bias must be 0 or 1"),
        ("conv2d:2x6x9x9:8:3:groups=4", "divisible by groups"),
        ("conv2d:2x6x9x9:8:13:padding=0", "[Kk]ernel size"),
    ],
)
def test_layer_that_does_not_exist_is_refused_with_its_text(text, message):
    with pytest.raises(ValueError, match=message) as error:
        bench_conv.LayerSpec.parse(text)
    assert text in str(error.value)


@pytest.mark.parametrize(
    "text, kept",
    [
        ("conv2d:1x64x8x8:64:3", 13 / 64),  # 12.8 rounded
        ("conv2d:1x96x8x8:96:3:groups=96", 19 / 96),
        ("conv2d:1x64x8x8:128:3:groups=32", 1 / 4),  # of four in each group one
        ("linear:4x8:10", 2 / 10),
    ],
)
def test_part_of_the_channels_that_is_kept(text, kept):
    assert bench_conv.LayerSpec.parse(text).kept(0.8) == kept


@pytest.mark.parametrize("device", ["cpu", "meta"])  # meta for a device with a queue
def test_backward_is_timed_without_its_forward(device, monkeypatch):
    clock = {"now": 0.0, "forwards": 0, "waits": 0}

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            clock["now"] += 10
            clock["forwards"] += 1
            return x * 1

        @staticmethod
        def backward(ctx, dy):
            clock["now"] += 1
            return dy

    def wait() -> None:
        clock["waits"] += 1

    monkeypatch.setattr(bench_conv, "time", SimpleNamespace(perf_counter=lambda: clock["now"]))
    monkeypatch.setattr(bench_conv, "waiter", lambda _: wait)
    layer = nn.Module()
    layer.forward = Slow.apply
    x = torch.ones(2, 3, requires_grad=True, device=device)
    run = bench_conv.passes(layer, x, None)
    before = clock["forwards"]
    assert run(3) == [10, 1, 11]
    assert clock["forwards"] - before == 6  # each backward, alone or in both, has its own
    # At the four ends of the three parts, of each pass or of all passes together.
    assert clock["waits"] == (4 * 3 if device == "cpu" else 4)


def test_layers_are_timed_and_written(tmp_path, capsys):
    file = tmp_path / "times.csv"
    texts = [
        "conv2d:2x3x9x9:10:3:stride=2,dx=0",
        "conv1d:2x8x16:10:3",
        "linear:2x5x16:20:bias=1",
        "convtranspose2d:2x8x5x5:10:2:stride=2",
    ]
    few = ["--iterations", "2", "--warmup", "1", "--output", str(file)]
    assert bench_conv.main(["--channels-last", *few, "--layer", *texts]) == 0
    out = capsys.readouterr().out
    found = schema.read(file)
    assert len(found) == len(texts) * 2 * 3
    for text in texts:
        kind, shape, rest = text.split(":", 2)
        of_one = {(r.side, r.mode): r for r in found if r.name == f"{kind}:{rest}"}
        assert len(of_one) == 6 and f"{kind}:{rest}" in out
        for (side, mode), row in of_one.items():
            assert row.shape == shape and row.iterations == 2 and row.torch == torch.__version__
            assert row.memory_format == ("channels_last" if "2d" in kind else "contiguous")
            assert 0 < row.p20_ms <= row.p50_ms <= row.p80_ms
            dense = of_one["dense", mode].p50_ms
            assert row.share_of_dense == pytest.approx(row.p50_ms / dense, rel=1e-2)
            assert row.kernel in (("gather", "matmul", "direct") if side == "sparse" else ("",))
        assert of_one["sparse", "backward"].limit_ms == pytest.approx(
            0.2 * of_one["dense", "backward"].p50_ms, abs=2e-5
        )
    assert {r.setting for r in found if r.side == "dense"} == {r.setting for r in found}


@pytest.mark.parametrize("option, dtype", [("--amp", "bfloat16 autocast"), ("--dtype", "float64")])
def test_layers_in_other_dtypes(option, dtype, tmp_path, monkeypatch):
    seen, measured = [], bench_conv.passes

    def passes(layer, x, autocast):
        seen.append((x.dtype, autocast, x.requires_grad))
        return measured(layer, x, autocast)

    monkeypatch.setattr(bench_conv, "passes", passes)
    file = tmp_path / "times.csv"
    given = [option] if option == "--amp" else [option, dtype]
    bench_conv.main(
        [
            *given,
            "--layer",
            "conv2d:2x4x6x6:8:3",
            "conv2d:2x4x6x6:8:3:dx=0",
            "--selection",
            "l2",
            "--iterations",
            "1",
            "--output",
            str(file),
        ]
    )
    wanted = (torch.float32, torch.bfloat16) if option == "--amp" else (torch.float64, None)
    assert seen == [(*wanted, dx) for dx in (True, True, False, False)]
    assert {(r.dtype, r.selection) for r in schema.read(file)} == {(dtype, "l2")}
