"""What is shown: one line in a list, a table of 100 columns when printed, HTML in a notebook."""

import inspect
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import ssprop_patch as ssp
from ssprop_patch import metering, timing
from ssprop_patch._text import columns

LONG = "a_block_with_a_long_name_in_a_network_of_many_blocks_in_blocks"


class Odd(nn.Conv2d):
    """Whose name wants to be escaped, and whose repr has several lines."""

    def extra_repr(self):
        return "one\ntwo"


Odd.__name__ = "Odd<b>"


@pytest.fixture(scope="module")
def shown():
    """One of each that is public, of a network with long names."""
    torch.manual_seed(0)
    inner = nn.Sequential(Odd(3, 8, 3), nn.Conv2d(8, 64, 3), nn.Conv2d(64, 8, 3, groups=2))
    model = nn.Sequential()
    model.add_module(LONG, inner)
    model.add_module("one", nn.Conv2d(8, 1, 1))
    x = torch.randn(2, 3, 12, 12)
    ssp.kernels.benchmark = True
    try:
        measured = ssp.plan(model, inputs=x, measure=True, iterations=1)
        kernels = ssp.kernels.table()
    finally:
        ssp.kernels.benchmark = False
        ssp.kernels.clear()
    found = [measured, ssp.plan(model, selection="principal")]
    found.append(ssp.summary(model, input_size=x.shape, drop_rate=0.8))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found += timing.time_steps(model, x, iterations=1)
    found += timing.time_layers(model, x, iterations=1)
    ssp.convert(model, 0.5, selection=ssp.Principal())
    with ssp.Meter(model, channels_every=1) as meter:
        for _ in range(2):
            model(x).sum().backward()
            optimizer.step()
        report = meter.report()
    ssp.convert(model, 0.5)
    with ssp.Meter(model, channels_every=1) as other:
        model(x).sum().backward()
        optimizer.step()
    found += [meter, report, report.layers[0], report.energy, meter.channels, ssp.status(model)]
    found += [*other.channels.winners().values(), ssp.get_controller(model), ssp.plan(model)]
    found += [ssp.Ahead(), ssp.Coarse(), ssp.Principal(), ssp.Subspace(), ssp.LambdaSchedule(len)]
    found += [ssp.sparsity(model, 0.5), ssp.paused(model), ssp.converted(model)]
    found += [timing.Quantiles.of([1.0]), *ssp.kernels.choices()]
    found += map(ssp.parse_schedule, ("0.5", "BarSchedule(0.5)", "StepSchedule([0.1, 0.2], [3])"))
    found += [ssp.LinearSchedule(0.0, 0.5, 9), ssp.CosineSchedule(0.0, 0.5, 9)]
    found.append(ssp.SequentialSchedule([ssp.BarSchedule(0.5), ssp.BarSchedule(0.6)], [5]))
    return found, kernels


def test_what_is_public_is_one_line_in_a_list(shown):
    lines = [repr(obj) for obj in shown[0]]
    lines += [repr(row) for obj in shown[0] if isinstance(obj, ssp.Plan) for row in obj]
    assert [line for line in lines if "\n" in line] == []
    modules = [ssp, metering, timing]
    public = {v for m in modules for n in m.__all__ if inspect.isclass(v := getattr(m, n))}
    assert public - {c for obj in shown[0] for c in type(obj).__mro__} == {metering.EnergyCounter}


def test_tables_fit_a_screen(shown):
    objects, kernels = shown
    plans = [o for o in objects if isinstance(o, ssp.Plan)]
    (summary,) = (o for o in objects if isinstance(o, ssp.Summary))
    (report,) = (o for o in objects if isinstance(o, ssp.MeterReport))
    for text in (*map(str, plans), str(summary), report.table(), str(report), kernels):
        assert max(map(len, text.splitlines())) <= 100
    # As many lines as layers, and each name can be told from the next.
    names = [line.split()[0] for line in report.table().splitlines()[1:]]
    assert len(set(names)) == len(report.layers) == 4
    assert names[0].startswith("a_block_with") and names[0].endswith("blocks.0")


def test_a_table_wraps_leaves_out_and_shortens_only_what_it_has_to():
    a, b, why = "a" * 36, "b" * 40, "because it is so and not otherwise"
    assert columns([("name", "why"), (a, why)]) == [f"{'name':36}  why", f"{a}  {why}"]
    assert columns([(a, b, why)]) == [f"{a}  {b}  because it is so and", " " * 80 + "not otherwise"]
    assert columns([(a, b, "c" * 30, "d")], optional=(2, 1), wrapped=0) == [f"{a}  {b}  d"]
    # The last one comes back, as it fits once the wide one is gone.
    assert columns([(a, "c", b, b)], optional=(1, 2), wrapped=0) == [f"{a}  c  {b}"]
    assert columns([(a + b, b)], wrapped=0) == [f"{a[:28]}…{b[:29]}  {b}"]


class Cells(HTMLParser):
    def __init__(self):
        super().__init__()
        self.events, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.events.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.events.append((self.open[-1], data))


def test_notebooks_show_totals_and_unfold_the_layers(shown):
    tables = [o for o in shown[0] if isinstance(o, (ssp.Plan, ssp.Summary, ssp.MeterReport))]
    assert len(tables) == 5
    for table in tables:
        parser = Cells()
        parser.feed(table._repr_html_())
        parser.close()
        assert parser.open == []  # every tag is closed, in order
        where = parser.events.index("details")
        totals = [e[1] for e in parser.events[:where] if isinstance(e, tuple)]
        layers = [e[1] for e in parser.events[where:] if isinstance(e, tuple)]
        assert f"{LONG}.0" in layers and f"{LONG}.0" not in totals
        if isinstance(table, ssp.Plan):
            assert totals[0] in str(table).splitlines() and totals[0].startswith("4 layers: ")
            assert table.measured or "Odd<b>" in layers
        else:
            assert any("% of the backward FLOPs" in text for text in totals)


def test_a_cell_that_ends_with_a_plot_shows_it():
    """Without pyplot, which would have to be imported first."""
    code = (
        "import sys, ssprop_patch as ssp; png = ssp.plots.schedule(0.5, 3)._repr_png_(); "
        "assert 'matplotlib.pyplot' not in sys.modules; print(png[:8])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == r"b'\x89PNG\r\n\x1a\n'"
