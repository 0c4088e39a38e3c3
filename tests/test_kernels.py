"""Which way a sparse backward is computed: rules, measurements, and what is remembered of them."""

import json
import time

import oracle
import pytest
import torch
from torch import nn

import ssprop_patch as ssp
from ssprop_patch import functional, kernels, native, rules, ways
from ssprop_patch import kept as kept_module
from ssprop_patch.kept import ConvParams, Kept
from ssprop_patch.passes import put_sums
from ssprop_patch.selection import l1_scores


@pytest.fixture(autouse=True)
def forgotten():
    kernels.clear()
    yield
    kernels.benchmark = False
    kernels.clear()


@pytest.fixture
def measuring():
    kernels.benchmark = True


def run(shape=(2, 8, 6, 6), c_out=10, kernel=1, groups=1, dtype=torch.float64, rate=0.5, seed=0):
    """Run one layer's backward; return the largest error against the masked dense kernel."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=dtype, requires_grad=True)
    w = torch.randn(c_out, shape[1] // groups, kernel, kernel, generator=g, dtype=dtype)
    w.requires_grad_()
    geometry = {"padding": kernel // 2, "groups": groups}
    y = functional.conv2d(x, w, **geometry, drop_rate=rate)
    dy = torch.randn(y.shape, generator=g, dtype=dtype)
    y.backward(dy)
    keep = oracle.choose(dy, groups, rate).keep
    dx, dw, _ = oracle.gradients(x.detach(), w.detach(), None, dy, keep, **geometry)
    return max((x.grad - dx).abs().max().item(), (w.grad - dw).abs().max().item())


def rule(x, w, p, kept):
    dy = torch.empty(x.shape[0], w.shape[0], *[1] * (x.dim() - 2))
    k = kept if p.groups == w.shape[0] else kept // p.groups
    return rules.by_rule(Kept(dy, x, w, p, k, l1_scores))


def test_a_choice_made_for_a_first_derivative_has_a_second_one(monkeypatch):
    def second_order():
        g = torch.Generator().manual_seed(0)
        x = torch.randn(2, 8, 6, 6, generator=g, dtype=torch.float64, requires_grad=True)
        w = torch.randn(8, 4, 3, 3, generator=g, dtype=torch.float64, requires_grad=True)
        y = functional.conv2d(x, w, groups=2, drop_rate=0.5)
        first = torch.autograd.grad(y.square().sum(), (x, w), create_graph=True)
        return torch.autograd.grad(sum(t.cos().sum() for t in first), (x, w))

    monkeypatch.setattr(kernels, "choose", lambda *args: ways.Ways("gather", "gather"))
    expected = second_order()
    monkeypatch.setattr(kernels, "choose", lambda *args: ways.Ways("direct", "direct"))
    for got, like in zip(second_order(), expected, strict=True):
        torch.testing.assert_close(got, like, rtol=1e-12, atol=1e-12)


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
    dx, dw = ways.possible(
        torch.empty(choice.input_shape), torch.empty(choice.weight_shape),
        ConvParams(*choice.geometry),
    )  # fmt: skip
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

    for part, table, fast in (("dx", ways.DX, fast_dx), ("dw", ways.DW, fast_dw)):
        for name, way in list(table.items()):
            monkeypatch.setitem(table, name, slowed(part, name, way, fast))
    for name, way in list(ways.CHOOSING.items()):
        monkeypatch.setitem(ways.CHOOSING, name, slowed("both", name, way, None))
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
    select, real = kept_module.select_channels, ways.CHOOSING["direct"]
    monkeypatch.setattr(
        kept_module, "select_channels", lambda *args: time.sleep(choosing) or select(*args)
    )
    for table in (ways.DX, ways.DW):
        for name, way in list(table.items()):
            monkeypatch.setitem(table, name, lambda k, way=way: time.sleep(0.02) or way(k))
    monkeypatch.setitem(ways.CHOOSING, "direct", lambda *args: time.sleep(0.06) or real(*args))
    monkeypatch.setattr(kernels, "by_rule", lambda kept: ways.Ways("gather", "gather"))
    assert run(kernel=3) < 1e-12
    [choice] = kernels.choices()
    assert (choice.dx == choice.dw == "direct") is (choosing > 0)


@pytest.mark.skipif(native.build.find_compiler() is None, reason="there is no C compiler")
@pytest.mark.parametrize("size, kernel, groups", [(6, 1, 1), (6, 3, 2), (6, 3, 8), (1, 1, 1)])
@pytest.mark.parametrize("selection, calls", [("l1", 1), ("l2", 1), ("random", 0)])
def test_a_small_layer_is_one_call(size, kernel, groups, selection, calls, monkeypatch):
    made, real = [], ways.conv_backward
    monkeypatch.setattr(ways, "conv_backward", lambda *args: made.append(args) or real(*args))
    x = torch.randn(2, 8, size, size, requires_grad=True)
    w = torch.randn(8, 8 // groups, kernel, kernel, requires_grad=True)
    padding = kernel // 2
    y = functional.conv2d(
        x, w, padding=padding, groups=groups, drop_rate=0.5, selection=selection
    )
    y.backward(torch.randn_like(y))
    assert len(made) == calls


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


@pytest.mark.parametrize("kernel, groups", [(1, 1), (3, 1), (3, 2)])
def test_rows_of_a_layer_with_several_positions_are_the_ordinary_gradient(
    kernel, groups, monkeypatch
):
    monkeypatch.setattr(kernels, "choose", lambda *args: ways.Ways("rows", "rows"))
    assert run(kernel=kernel, groups=groups) < 1e-12
    monkeypatch.setattr(ways, "is_done_by_c", lambda t: False)
    assert run(kernel=kernel, groups=groups) < 1e-12


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
    "content", ["", "{}", "[1]", '[{"dx": "gather"}]', "null"],
    ids=["none", "dict", "int", "part", "null"],
)  # fmt: skip
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
    with pytest.raises(ValueError, match="no way 'un"):
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
    with pytest.raises(ValueError, match=f"'{way}' is no way to compute"):
        kernels.load(path)
    assert kernels.choices() == []


def test_a_whole_network_and_its_table(measuring):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4),
        nn.Conv2d(8, 16, 1, stride=2), nn.Flatten(), nn.LazyLinear(2),
    )  # fmt: skip
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


@pytest.mark.parametrize("avx512", [True, False])
@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("kernel, stride", [(1, 1), (3, 2), (5, 1)])
def test_rules_for_one_and_three_dimensions(avx512, dims, groups, kernel, stride, monkeypatch):
    monkeypatch.setattr(rules, "_AVX512", avx512)
    x = torch.empty(4, 8, *[6] * dims)
    w = torch.empty(8, 8 // groups, *[kernel] * dims)
    p = ConvParams((stride,) * dims, (kernel // 2,) * dims, (1,) * dims, groups)
    dx, dw = ways.possible(x, w, p)
    found = rule(x, w, p, 4)
    assert found.dx in dx and found.dw in dw


@pytest.mark.parametrize(
    ("weight", "stride", "layout", "way"),
    [
        ((16, 1, 3, 3), 1, torch.contiguous_format, "gather"),
        ((16, 1, 5, 5), 1, torch.contiguous_format, "gather_nhwc"),
        ((16, 1, 5, 5), 2, torch.channels_last, "gather"),
        ((16, 4, 3, 3), 1, torch.contiguous_format, "forward/gather_nhwc"),
        ((16, 4, 3, 3), 2, torch.contiguous_format, "gather_nhwc"),
        ((16, 8, 3, 3), 1, torch.contiguous_format, "mask"),  # the kernels' own block
        ((16, 8, 3, 3), 2, torch.channels_last, "gather"),
    ],
)
def test_the_rules_for_grouped_layers_without_avx512(weight, stride, layout, way, monkeypatch):
    monkeypatch.setattr(rules, "_AVX512", False)
    monkeypatch.setattr(native, "is_available", lambda t: False)
    x = torch.empty(4, 16, 10, 10).contiguous(memory_format=layout)
    w = torch.empty(weight)
    padding = (weight[-1] // 2,) * 2
    p = ConvParams((stride,) * 2, padding, (1, 1), 16 // weight[1])
    assert str(rule(x, w, p, 4)) == way


@pytest.mark.skipif(native.build.find_compiler() is None, reason="there is no C compiler")
@pytest.mark.parametrize(
    ("kernel", "stride", "layout", "way"),
    [
        (3, 1, torch.contiguous_format, "direct"),
        (3, 2, torch.contiguous_format, "direct"),
        (3, 1, torch.channels_last, "direct"),
        (3, 2, torch.channels_last, "direct"),
    ],
)
def test_the_rules_for_grouped_layers_with_c_functions(kernel, stride, layout, way, monkeypatch):
    monkeypatch.setattr(rules, "_AVX512", False)
    x, w = torch.empty(4, 16, 10, 10).contiguous(memory_format=layout), torch.empty(16, 1, 5, 5)
    w = w[..., :kernel, :kernel].contiguous()
    p = ConvParams((stride,) * 2, (kernel // 2,) * 2, (1, 1), 16)
    assert str(rule(x, w, p, 4)) == way
    w.requires_grad_()  # a derivative of this backward is asked for
    assert str(rule(x, w, p, 4)) != "direct"


@pytest.mark.skipif(native.build.find_compiler() is None, reason="there is no C compiler")
@pytest.mark.parametrize(
    ("size", "channels", "kept", "kernel", "stride", "layout", "avx512", "way"),
    [
        (10, 32, 12, 3, 1, torch.contiguous_format, False, "direct"),
        (10, 32, 12, 3, 2, torch.contiguous_format, False, "direct"),
        (10, 3, 12, (1, 5), 1, torch.contiguous_format, False, "direct"),
        (10, 32, 12, 7, 1, torch.contiguous_format, False, "gather"),
        (10, 32, 34, 3, 1, torch.contiguous_format, False, "gather"),
        (10, 32, 53, 3, 2, torch.contiguous_format, False, "direct"),
        (10, 32, 54, 3, 2, torch.contiguous_format, False, "gather"),
        (10, 32, 12, 3, 1, torch.contiguous_format, True, "gather"),
        (10, 32, 12, 3, 1, torch.channels_last, False, "gather/direct"),
        (10, 32, 12, 3, 2, torch.channels_last, False, "gather"),
        (10, 3, 12, 3, 1, torch.channels_last, False, "gather"),
        (12, 32, 34, 3, 1, torch.contiguous_format, False, "gather/direct"),
        (12, 32, 77, 3, 1, torch.channels_last, False, "gather/direct"),
        (12, 32, 78, 3, 1, torch.contiguous_format, False, "gather"),
        (12, 32, 54, 3, 2, torch.contiguous_format, False, "gather"),
    ],
)
def test_the_rules_for_ordinary_layers_with_c_functions(
    size, channels, kept, kernel, stride, layout, avx512, way, monkeypatch
):
    monkeypatch.setattr(rules, "_AVX512", avx512)
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    x = torch.empty(4, channels, size, size).contiguous(memory_format=layout)
    w = torch.empty(80, channels, *kernel)
    p = ConvParams((stride,) * 2, tuple(n // 2 for n in kernel), (1, 1), 1)
    assert str(rule(x, w, p, kept)) == way
    monkeypatch.setattr(native, "is_available", lambda t: False)
    assert str(rule(x, w, p, kept)) == "gather"


@pytest.mark.skipif(native.build.find_compiler() is None, reason="there is no C compiler")
@pytest.mark.parametrize("avx512", [False, True])
@pytest.mark.parametrize(
    ("size", "channels", "kept", "stride", "layout", "way"),
    [
        (10, 32, 8, 1, torch.contiguous_format, "direct"),
        (10, 32, 8, 2, torch.contiguous_format, "matmul"),
        (24, 96, 32, 1, torch.contiguous_format, "matmul"),
        (10, 128, 32, 1, torch.contiguous_format, "matmul"),
        (10, 128, 29, 1, torch.contiguous_format, "direct"),
        (5, 129, 20, 1, torch.contiguous_format, "matmul"),
        (5, 129, 19, 1, torch.contiguous_format, "direct"),
        (5, 32, 80, 1, torch.contiguous_format, "matmul"),
        (10, 128, 78, 1, torch.channels_last, "direct"),
        (10, 128, 79, 1, torch.channels_last, "matmul"),
        (1, 300, 80, 1, torch.contiguous_format, "rows"),
        (1, 300, 80, 1, torch.channels_last, "rows"),
        (1, 20000, 80, 1, torch.contiguous_format, "matmul"),
    ],
)
def test_the_rules_for_1x1_layers_with_c_functions(
    avx512, size, channels, kept, stride, layout, way, monkeypatch
):
    monkeypatch.setattr(rules, "_AVX512", avx512)
    x = torch.empty(4, channels, size, size).contiguous(memory_format=layout)
    w = torch.empty(80, channels, 1, 1)
    p = ConvParams((stride,) * 2, (0, 0), (1, 1), 1)
    found = str(rule(x, w, p, kept))
    assert found == way or (avx512 and way == "matmul" and found == "gather")
    monkeypatch.setattr(native, "is_available", lambda t: False)
    assert str(rule(x, w, p, kept)) in ("matmul", "gather")


@pytest.mark.skipif(native.build.find_compiler() is None, reason="there is no C compiler")
@pytest.mark.parametrize(
    ("samples", "kept", "stride", "layout", "way"),
    [
        (4, 11, 1, torch.contiguous_format, "direct"),
        (4, 12, 1, torch.contiguous_format, "gather/direct"),
        (4, 12, 1, torch.channels_last_3d, "gather/direct"),
        (1, 90, 1, torch.channels_last_3d, "direct"),
        (4, 90, 2, torch.contiguous_format, "gather"),
    ],
)
def test_the_rules_for_three_spatial_dimensions(samples, kept, stride, layout, way, monkeypatch):
    monkeypatch.setattr(rules, "_AVX512", False)
    x = torch.empty(samples, 32, 6, 6, 6).contiguous(memory_format=layout)
    p = ConvParams((stride,) * 3, (1,) * 3, (1,) * 3, 1)
    assert str(rule(x, torch.empty(128, 32, 3, 3, 3), p, kept)) == way


@pytest.mark.parametrize("avx512", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("kernel, stride", [(1, 1), (1, 2), (3, 1), (3, 2)])
@pytest.mark.parametrize("size", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rules_name_ways_that_the_layer_has(
    avx512, layout, groups, kernel, stride, size, dtype, monkeypatch
):
    monkeypatch.setattr(rules, "_AVX512", avx512)
    x = torch.empty(4, 8, size, size, dtype=dtype).contiguous(memory_format=layout)
    w = torch.empty(8, 8 // groups, kernel, kernel)
    p = ConvParams((stride,) * 2, (kernel // 2,) * 2, (1, 1), groups)
    dx, dw = ways.possible(x, w, p)
    found = rule(x, w, p, 4)
    assert found.dx in dx and found.dw in dw


@pytest.mark.parametrize("samples", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("threads", [1, 3])
def test_large_products_are_added_up_on_the_way(samples, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    batches = []
    monkeypatch.setattr(
        ways, "put_sums", lambda parts, *args: batches.append(len(parts)) or put_sums(parts, *args)
    )
    monkeypatch.setattr(kernels, "choose", lambda *args: ways.Ways("matmul", "matmul"))
    assert run((samples, 512, 3, 3), c_out=1100) < 1e-11
    assert batches == [min(samples, threads)]
