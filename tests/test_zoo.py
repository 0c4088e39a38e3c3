"""benchmarks/zoo.py: a network of each family, what the zoo would notice, and how it is run."""

from __future__ import annotations

import csv
import importlib.util
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import oracle
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ssprop_patch as ssp

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from zoo import check, count, models, runner, step, table, weights  # noqa: E402
from zoo import oracle as zoo_oracle  # noqa: E402
from zoo.models import Entry, Sample  # noqa: E402

GIB = 2**30

# A small network of each family, among them every way in which a convolution is written there.
SAMPLE = {
    "timm": """
        test_byobnet test_coatnet test_convnext test_efficientnet test_mambaout test_nfnet
        test_resnet test_vit test_vit_relpos cait_xxs24_224 coat_lite_tiny
        convit_tiny cpubone_nano csatv2 cspnext_tiny cs3darknet_focus_s
        dla46x_c edgenext_xx_small efficientformerv2_s0 efficientvim_m1 efficientvit_b0
        efficientvit_m0 fasternet_t0 ghostnet_050 hardcorenas_a hgnetv2_b0 iformer_t
        inception_next_atto lcnet_035 lcnetv2_small levit_128s lowformer_b0 mobilevit_xxs
        naflexvit_base_patch16_gap pit_ti_224 poolformerv2_s12 pvt_v2_b0 regnety_002
        repghostnet_050 resnest14d resnetv2_18 rexnetr_100 selecsls42 shvit_s1 skresnet18
        starnet_s050 swiftformer_xs tf_mixnet_s tiny_vit_5m_224 visformer_tiny
        vit_tiny_r_s16_p8_224 xcit_nano_12_p16_224""",
    "torchvision": """
        shufflenet_v2_x0_5 quantized_mobilenet_v2 lraspp_mobilenet_v3_large
        fasterrcnn_mobilenet_v3_large_320_fpn ssdlite320_mobilenet_v3_large mc3_18 raft_small""",
}
NOTHING = {"naflexvit_base_patch16_gap"}  # embeds its patches by a linear layer
FLOAT32 = {"raft_small"}  # makes coordinates in float32, whatever it is given


def entry_of(library: str, name: str) -> Entry:
    return next(e for e in models.entries() if (e.library, e.name) == (library, name))


def check_sample(sample: Sample) -> tuple[tuple[str, str], dict]:
    found: dict = {}
    return check.check(sample, 0, found), found


def small(*more: nn.Module) -> Sample:
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), *more, nn.Conv2d(8, 8, 3, groups=2)
    return Sample(nn.Sequential(*layers), (torch.randn(2, 3, 12, 12),))


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# --- the networks ------------------------------------------------------------------------------


def test_the_sample_holds_over_forty_families():
    families = {entry_of(library, n).family for library in SAMPLE for n in SAMPLE[library].split()}
    assert len(families) >= 40


@pytest.mark.parametrize(
    ("library", "name"), [(library, n) for library in SAMPLE for n in SAMPLE[library].split()]
)
def test_a_network_of_each_family(library, name):
    row = check.row(entry_of(library, name))
    if name in NOTHING:
        assert (row["result"], row["reason"]) == ("nothing to convert", "no convolution")
        return
    assert (row["result"], row["reason"]) == ("ok", "")
    assert row["dtype"] == ("float32" if name in FLOAT32 else "float64")
    assert row["rate0"] == "equal" and row["gradients"] == "all"
    assert 0 < row["sparse"] <= row["convolutions"] and 0 < row["dropped"] <= row["calls"]
    assert 0 < float(row["step_share"]) <= 1 and 0 < float(row["backward_share"]) <= 1
    assert torch.get_default_dtype() == torch.float32


def test_every_network_of_both_libraries_is_listed_once():
    import timm
    import torchvision

    found = models.entries()
    assert len(set(found)) == len(found)
    assert {e.name for e in found if e.library == "timm"} == set(timm.list_models())
    of_torchvision = {e.name for e in found if e.library == "torchvision"}
    assert of_torchvision == set(torchvision.models.list_models())
    assert {table.kind({"library": "timm", "family": e.family}) for e in found} >= {
        "timm: ResNet-like", "timm: ViT-like"
    }  # fmt: skip
    unknown = {e.family for e in found if e.library == "timm"} - table.OF_FAMILY.keys()
    assert not unknown


# --- what it would notice ----------------------------------------------------------------------


def test_a_network_that_is_as_it_should_be_is_ok(double):
    assert check_sample(small())[0] == ("ok", "")


@pytest.mark.parametrize(
    "wrong",
    [{"schedule": 0.6}, {"schedule": 0.0}, {"selection": "random"}, {"exclude": "0"}],
    ids=str,
)
def test_another_gradient_is_noticed(double, monkeypatch, wrong):
    right = ssp.convert
    monkeypatch.setattr(ssp, "convert", lambda m, schedule: right(m, **{"schedule": 0.8} | wrong))
    with pytest.raises(check.Mismatch, match="gradient of"):
        check_sample(small())


def convert_and(monkeypatch, add):
    """Make conversion also put something on the first layer."""
    right = ssp.convert

    def wrong(model, schedule):
        right(model, schedule=schedule)
        add(model[0])

    monkeypatch.setattr(ssp, "convert", wrong)


def test_an_error_in_the_input_gradient_is_noticed(double, monkeypatch):
    def scale(layer, args):
        if args[0].requires_grad:
            args[0].register_hook(lambda g: g * (1 + 1e-7))

    convert_and(monkeypatch, lambda layer: layer.register_forward_pre_hook(scale))
    with pytest.raises(check.Mismatch, match="gradient of input 0"):
        check_sample(small())


def test_another_forward_is_noticed(double, monkeypatch):
    def scale(layer, args, y):
        return y * (1 + 2**-52)

    convert_and(monkeypatch, lambda layer: layer.register_forward_hook(scale))
    with pytest.raises(check.Mismatch, match="outputs are not the dense ones"):
        check_sample(small())


def test_other_buffers_after_a_step_are_noticed(double, monkeypatch):
    sample = small(nn.BatchNorm2d(8))

    def count_twice(layer, args):
        sample.model[2].num_batches_tracked += 1

    convert_and(monkeypatch, lambda layer: layer.register_forward_pre_hook(count_twice))
    with pytest.raises(check.Mismatch, match="buffers are not the dense ones"):
        check_sample(sample)


def test_another_gradient_at_rate_0_is_noticed(double, monkeypatch):
    def scale(layer, args, y):
        if ssp.get_controller(layer).drop_rate == 0:
            y.register_hook(lambda g: g * (1 + 2**-50))

    convert_and(monkeypatch, lambda layer: layer.register_forward_hook(scale))
    with pytest.raises(check.Mismatch, match="at rate 0 the gradient of"):
        check_sample(small())


def test_a_layer_that_warns_that_it_stays_dense_is_noticed(double, monkeypatch):
    def warn(layer, args):
        warnings.warn("its backward stays dense", stacklevel=1)

    convert_and(monkeypatch, lambda layer: layer.register_forward_pre_hook(warn))
    with pytest.raises(check.Mismatch, match="stays dense"):
        check_sample(small())


def test_an_error_of_the_package_is_a_row(monkeypatch):
    def broken(model, schedule):
        raise AttributeError("no such thing")

    monkeypatch.setattr(ssp, "convert", broken)
    row = check.row(entry_of("timm", "test_vit"))
    assert (row["result"], row["reason"]) == ("ERROR", "AttributeError: no such thing")


@pytest.mark.parametrize("left", ["class", "attribute", "hook", "value", "key", "order"])
def test_what_revert_leaves_behind_is_noticed(double, monkeypatch, left):
    right = ssp.revert

    def wrong(model):
        right(model)
        layer = model[0]
        if left == "class":
            layer.__class__ = type("Conv2d", (nn.Conv2d,), {})
        elif left == "attribute":
            layer.stride = (1, 2)
        elif left == "hook":
            layer.register_forward_hook(lambda *a: None)
        elif left == "value":
            layer.weight.data[0, 0, 0, 0] += 1
        elif left == "key":
            layer.register_buffer("more", torch.zeros(1))
        else:
            vars(layer)["training"] = vars(layer).pop("training")

    monkeypatch.setattr(ssp, "revert", wrong)
    with pytest.raises(check.Mismatch, match="after revert differs"):
        check_sample(small())


def test_a_network_whose_gradients_vanish_proves_nothing(double):
    class Nothing(nn.Module):
        def forward(self, x):
            return x * 0

    with pytest.raises(step.CannotRun, match="no gradient of a convolution was dropped"):
        check_sample(Sample(nn.Sequential(small().model, Nothing()), small().inputs))


def test_a_mismatch_is_a_tie_only_where_two_channels_are_as_large(double):
    sample = small()
    layer = sample.model[0]
    with torch.no_grad():  # all channels alike, and so are their gradients
        layer.weight.copy_(layer.weight[:1].expand_as(layer.weight))
        layer.bias.zero_()
        last = sample.model[-1]
        last.weight.copy_(last.weight[:1].expand_as(last.weight))
    same = nn.Sequential(sample.model, nn.Flatten(1), nn.Linear(8 * 64, 1, bias=False))
    with torch.no_grad():
        same[2].weight.fill_(1)
    try:  # which of the equal ones is kept may happen to agree
        result, _ = check_sample(Sample(same, sample.inputs))
    except check.Tie:
        return
    assert result == ("ok", "")


def test_why_convolutions_stay_dense_is_counted(double):
    up = nn.ConvTranspose2d(8, 8, 2), nn.Conv2d(8, 1, 1), nn.Conv2d(1, 8, 1)
    result, found = check_sample(small(*up))
    assert result == ("ok", "")
    assert found["convolutions"] == 5 and found["sparse"] == 3
    assert found["left_dense"] == "transposed convolution: 1; one output channel: 1"


def test_a_convolution_outside_of_any_layer_is_counted_and_stays_dense(double):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(8, 8, 1, 1))

        def forward(self, x):
            return nn.functional.conv2d(x, self.kernel)

    result, found = check_sample(small(Functional()))
    assert result == ("ok", "") and found["functional"] == 1


def test_a_large_network_is_checked_by_input_and_small_convolutions(double, monkeypatch):
    monkeypatch.setattr(check, "MANY_PARAMETERS", 10)
    monkeypatch.setattr(check, "MOST_GRADIENTS", 8 * 9 + 8)
    result, found = check_sample(small(nn.BatchNorm2d(8)))
    assert result == ("ok", "")
    assert found["gradients"] == "input and 1 of 2 convolutions" and "rate0" not in found


def test_a_network_that_cannot_be_built_is_a_row_with_the_reason():
    row = check.row(Entry("timm", "resnet", "no_such_network"))
    assert row["result"] == "not run" and "no_such_network" in row["reason"]


# --- the parts ---------------------------------------------------------------------------------


def test_both_oracles_agree(double):
    layers = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 3, groups=3), nn.Conv2d(12, 12, 3, groups=12)
    model, x = nn.Sequential(*layers), torch.randn(2, 3, 9, 9)

    def gradients(context):
        model.zero_grad()
        with context as record:
            y = model(x)
        y.pow(3).sum().backward()
        return [p.grad for p in model.parameters()], record

    one, mine = gradients(zoo_oracle.network(model, 0.6))
    two, theirs = gradients(oracle.network(model, 0.6))
    assert all(map(torch.equal, one, two))
    assert mine.calls == theirs.calls == 3
    assert mine.gap == theirs.gap > 0


def test_large_draws_are_left_out_and_then_every_parameter_has_a_value():
    def make():
        model = nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300), nn.Linear(300, 8))
        nn.init.zeros_(model[1].weight)
        return model

    state = torch.get_rng_state()
    with weights.LeaveOutLargeDraws():
        nn.Linear(300, 300, bias=False)
        left_out = torch.full((300, 300), 1e3).normal_()
    assert torch.equal(torch.get_rng_state(), state)  # not one number was drawn
    assert not left_out.any()  # not what was there before: some draw until all are small enough
    one, two = (models.build(seed, make) for seed in (0, 1))
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert p.isfinite().all() and (p != 0).all() and not torch.equal(p, q)
    assert one[0].weight.std().item() == pytest.approx((2 / 300) ** 0.5, rel=0.02)
    assert one[1].weight.min() > 0.5 and one[1].weight.max() < 1.5


def test_no_two_rows_of_a_weight_repeat_each_other():
    layer = models.build(0, nn.Linear, 1024, 2048)
    rows = layer.weight.detach()[:, :8]
    assert len(torch.unique(rows, dim=0)) == 2048


def test_shares_are_those_of_torchs_counter():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 1), nn.Conv2d(1, 8, 3, bias=False),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    x = torch.randn(2, 3, 16, 16)
    with count.watched(model) as watch:
        y = model(x)
    shares = watch.shares((x,))
    with FlopCounterMode(display=False) as counter:
        model(x)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    # The layer with one channel stays dense; of biases torch counts nothing.
    sparse = [2 * 2 * 14 * 14 * 8 * 27, 2 * 2 * 12 * 12 * 8 * 9]
    biases = 2 * 14 * 14 * 8
    backward = sparse[0] + 2 * sparse[1] + biases
    all_backward = counter.get_total_flops() + biases
    assert shares.backward == pytest.approx(backward / all_backward)
    assert shares.step == pytest.approx((sum(sparse) + backward) / (forward + all_backward))
    assert count.shares_without_data(model, (x,)) == shares


def test_grouped_convolutions_count_as_summary_counts_them():
    model = small().model
    x = torch.randn(2, 3, 12, 12)
    with count.watched(model) as watch:
        model(x)
    layers = ssp.summary(model, inputs=x)
    assert (watch.sparse_forward, watch.sparse_backward) == (layers.forward, layers.dense_backward)
    assert watch.shares((x,)).step == 1


# --- the run -----------------------------------------------------------------------------------


def invented(entry: Entry) -> dict:
    """What workers run here in place of a check: it does what the network's name says."""
    if entry.name == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if entry.name == "hangs":
        time.sleep(600)
    if entry.name.startswith("needs"):
        bytearray(int(float(entry.name.split()[1]) * GIB))  # not written to: costs nothing
    if entry.name.startswith("tensor"):
        try:
            torch.empty(int(float(entry.name.split()[1]) * GIB), dtype=torch.uint8)
        except Exception as error:
            assert step.is_memory(error)
            raise MemoryError from error
    return {"result": "ok", "reason": str(os.getpid())}


def run_invented(*names: str, **kwargs) -> dict[str, dict]:
    todo = [Entry("timm", "none", name) for name in names]
    return {row["name"]: row for row in runner.Runner(invented, **kwargs).run(todo)}


def test_a_worker_that_dies_or_hangs_costs_one_row():
    rows = run_invented("a", "dies", "b", "hangs", "c", jobs=2, timeout=6)
    results = {name: row["result"] for name, row in rows.items()}
    assert results == {"a": "ok", "b": "ok", "c": "ok", "dies": "died", "hangs": "timeout"}
    assert rows["dies"]["reason"] == "its process: killed by signal 9"
    assert rows["hangs"]["reason"] == "over 6 s" and float(rows["hangs"]["seconds"]) >= 6


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's data")
def test_what_needs_more_than_its_part_of_the_memory_runs_alone():
    rows = run_invented("needs 5", "tensor 5", "a", "needs 9", "tensor 9", jobs=2, memory=8)
    assert next(row["name"] for row in rows.values()) == "a"
    assert {n: r["result"] for n, r in rows.items()} == {
        "a": "ok", "needs 5": "ok", "tensor 5": "ok", "needs 9": "memory", "tensor 9": "memory",
    }  # fmt: skip
    assert rows["needs 9"]["reason"] == "needs more than 8 GiB"


def test_a_worker_does_several_networks_and_is_replaced_in_time(monkeypatch):
    monkeypatch.setattr(runner, "MODELS_PER_WORKER", 2)
    rows = run_invented(*"abcde", jobs=1)
    workers = [row["reason"] for row in rows.values()]
    assert workers[0] == workers[1] != workers[2] == workers[3] != workers[4]


def script():
    spec = importlib.util.spec_from_file_location("zoo_script", BENCHMARKS / "zoo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_killed_run_leaves_whole_rows_and_the_next_one_continues(tmp_path, capsys):
    path = tmp_path / "zoo.csv"
    names = ["test_vit", "test_vit2", "test_vit3", "test_resnet"]
    arguments = ["--only", *names, "--jobs", "1", "--output", str(path)]
    process = subprocess.Popen(
        [sys.executable, str(BENCHMARKS / "zoo.py"), *arguments], stdout=subprocess.DEVNULL
    )
    while not (path.exists() and path.read_text().count("\n") > 1):
        assert process.poll() is None or path.read_text().count("\n") > 1
        time.sleep(0.05)
    process.kill()
    process.wait()
    before = read(path)
    assert 1 <= len(before) <= 4 and all(None not in row.values() for row in before)
    with path.open("a") as file:  # what a crash of the machine might leave
        file.write("timm,vision_transformer,test_v")

    assert script().main(arguments) == 0
    after = read(path)
    assert sorted(row["name"] for row in after) == sorted(names)
    assert all(row["result"] == "ok" for row in after)
    kept = {row["name"]: row for row in after}
    assert all(kept[row["name"]] == row for row in before)  # not run again: even the seconds agree
    printed = capsys.readouterr().out
    assert "| timm: ViT-like | 3 | 3 | 0 | 0 | 3 | 3 |" in printed

    text = path.read_text()
    assert script().main(["--table", "--only", "vision_transformer", "--output", str(path)]) == 0
    assert path.read_text() == text
    assert "ResNet" not in capsys.readouterr().out


def test_failed_rows_are_done_again_only_when_asked(tmp_path, capsys):
    path = tmp_path / "zoo.csv"
    results = runner.Results(path, check.FIELDS)
    results.append({"library": "timm", "family": "vision_transformer", "name": "test_vit",
                    "result": "ERROR", "reason": "a, b\nc"})  # fmt: skip
    arguments = ["--only", "test_vit", "--jobs", "1", "--output", str(path)]
    assert script().main(["--table", *arguments]) == 1
    assert "timm vision_transformer test_vit: ERROR: a, b" in capsys.readouterr().out
    assert script().main(arguments) == 1
    assert script().main([*arguments, "--failed"]) == 0
    assert [row["result"] for row in read(path)] == ["ok"]
    capsys.readouterr()
    assert script().main([*arguments, "--list"]) == 0
    assert capsys.readouterr().out == "timm vision_transformer test_vit ok\n"


def test_a_pattern_that_names_no_network_is_an_error(tmp_path, capsys):
    assert script().main(["--only", "resnet999", "--output", str(tmp_path / "zoo.csv")]) == 2
    assert "no network is called resnet999" in capsys.readouterr().err
