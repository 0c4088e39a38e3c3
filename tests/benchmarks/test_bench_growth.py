"""benchmarks/bench_growth.py: what varies, the table with its marks, and the picture."""

from __future__ import annotations

import dataclasses

import bench_growth
import growth_picture
import networks
import pytest
import rows as schema
import torch
from matplotlib.image import imread
from rich.console import Console

import ssprop_patch as ssp

TINY = {
    "batch": ("test_resnet:2:32", "test_resnet:4:32"),
    "3-D, resolution": ("unet3d_4:1:16", "unet3d_4:1:24"),
    "network": ("test_resnet:2:32", "test_efficientnet:2:32"),
}


@pytest.fixture
def tiny(monkeypatch):
    for module in (bench_growth, growth_picture):
        monkeypatch.setattr(module, "PANELS", TINY)


def test_one_thing_is_varied_at_a_time():
    for panel, texts in growth_picture.PANELS.items():
        found = [networks.Network.parse(text) for text in texts]
        varied = growth_picture._VARIED[panel.rpartition(" ")[2]]
        values = [getattr(network, varied) for network in found]
        assert len(set(values)) == len(values) > 2
        others = {"batch", "pixels", "name"} - {"name" if varied == "width" else varied}
        assert len({tuple(getattr(n, each) for each in sorted(others)) for n in found}) == 1
    everything = bench_growth.networks(list(growth_picture.PANELS))
    assert len(set(everything)) == len(everything) < sum(map(len, growth_picture.PANELS.values()))


@pytest.mark.usefixtures("tiny")
def test_rows_table_and_picture(tmp_path, capsys):
    output = tmp_path / "growth.csv"
    options = ["--iterations", "1", "--warmup", "1", "--output", str(output)]
    assert bench_growth.main(options) == 0
    rows = schema.read(output)
    names = {(r.name, r.shape, r.side, r.mode) for r in rows}
    assert len(names) == len(rows) == 5 * 2 * 3  # networks, sides and modes
    assert ("unet3d_4", "1x1x24x24x24", "sparse", "step") in names
    assert len(capsys.readouterr().out.split("test_resnet")) == 4
    picture = output.with_suffix(".png")
    assert imread(picture).shape[1] == 830
    picture.unlink()
    assert bench_growth.main(["--draw", str(output)]) == 0 and picture.exists()

    panels = growth_picture._points(rows, "3-D, resolution")
    assert panels[0] == ["16", "24"] and set(panels[1][0]) >= {"backward", "step"}
    figure = growth_picture.draw(rows)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == [
        "batch\ntest_resnet, 32²",
        "3-D, resolution\nunet3d_4, batch 1",
        "network\nbatch 2, 32²",
    ]


@pytest.mark.usefixtures("tiny")
def test_what_is_slower_or_larger_than_dense_is_marked():
    row = {"p20_ms": 1.0, "p80_ms": 1.0, "limit_ms": 0.2, "kernel": ""}
    setting = schema.Setting.here(
        torch.device("cpu"),
        name="test_resnet",
        shape=(2, 3, 32, 32),
        dtype=torch.float32,
        amp=False,
        memory_format=torch.contiguous_format,
        drop_rate=0.8,
        selection="l1",
        options="",
        iterations=1,
    )
    found = [
        schema.Row(
            **dataclasses.asdict(setting),
            **row,
            side=side,
            mode=mode,
            p50_ms=share,
            share_of_dense=share,
            peak_memory_mib=None if mode == "backward" else 100 * memory,
        )
        for side, memory in (("dense", 1.0), ("sparse", 1.021))
        for mode, share in (("backward", 0.6 if side == "sparse" else 1), ("step", 1.003))
    ]
    console = Console(width=120, record=True)
    console.print(bench_growth.table(found, ["batch"]))
    line = next(text for text in console.export_text().splitlines() if "test_resnet" in text)
    assert "0.600 " in line and "1.003 !" in line and "1.021 !" in line
    assert "0.600 !" not in line


def test_volumes_in_channels_last(monkeypatch, tmp_path):
    panels = {"3-D, resolution": ("unet3d_16:1:16",)}
    monkeypatch.setattr(bench_growth, "PANELS", panels)
    output = tmp_path / "growth.csv"
    options = ["--iterations", "1", "--warmup", "1", "--channels-last", "--output", str(output)]
    assert bench_growth.main(options) == 0
    assert {r.memory_format for r in schema.read(output)} == {"channels_last_3d"}


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="no row of a network"):
        growth_picture.draw([])


def test_a_volume_goes_through_the_3d_network():
    network = networks.Network.parse("unet3d_4:2:16")
    assert network.shape == (2, 1, 16, 16, 16) and network.width == 4
    net, x = network.build(), torch.randn(network.shape)
    assert net(x).shape == x.shape
    widths = [m.out_channels for m in net.modules() if isinstance(m, torch.nn.Conv3d)]
    assert max(widths) == 32 and len(widths) == 15
    ssp.convert(net, 0.8)
    network.loss(x)(net(x)).backward()
    assert all(p.grad is not None for p in net.parameters())
    with pytest.raises(ValueError, match="a multiple of 8 pixels"):
        networks.Network.parse("unet3d_4:2:20")
