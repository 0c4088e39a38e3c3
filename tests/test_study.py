"""benchmarks/study.py: its grid, its rows, interrupting and resuming, the data, what it draws."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
import itertools
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import ssprop_patch as ssp

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from classifier import costs, decoded, models, training  # noqa: E402
from classifier.options import UserError  # noqa: E402
from study import grid, groups, labels, runs, table  # noqa: E402
from study.frontier import frontier  # noqa: E402
from study.rows import Rows, claim  # noqa: E402
from study.settings import Settings, resolve  # noqa: E402

from ssprop_patch.schedule_text import parse_schedule  # noqa: E402

# The script, whose name is that of its package.
SCRIPT = BENCHMARKS / "study.py"
_spec = importlib.util.spec_from_file_location("study_script", SCRIPT)
script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)

SMOKE = BENCHMARKS / "studies" / "smoke.toml"
# All but times, and what they are measured on.
REPEATS = ("id", "steps", "accuracy", "best_accuracy", "test_loss", "train_accuracy", "train_loss",
           "total_flops", "mean_drop_rate", "weights", "digest")  # fmt: skip


def main(*arguments: object) -> int:
    return script.main(script.__doc__, [str(a) for a in arguments])


def rows_in(folder: Path) -> list[dict[str, str]]:
    with (folder / "runs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# --- the grid ---------------------------------------------------------------------------------


def test_lists_are_multiplied_and_seeds_are_outermost():
    found = list(
        grid.expand(
            {
                "seeds": [3, 5],
                "settings": {"epochs": 4, "network": "resnet18"},
                "conditions": [{"share": [0.1, 1.0]}, {"share": 0.5, "augment": False}],
                "methods": [
                    {"method": "dense"},
                    {"method": "ssprop", "drop_rate": [0.2, 0.8], "exclude": [[], ["^conv1$"]]},
                ],
            }
        )
    )
    by_hand = [
        (seed, share, augment, method)
        for seed in (3, 5)
        for share, augment in ((0.1, True), (1.0, True), (0.5, False))
        for method in ("dense", *["ssprop"] * 4)
    ]
    got = [(s.seed, s.share, s.augment, s.method) for s in found]
    assert sorted(got) == sorted(by_hand)
    assert [s.seed for s in found] == [3] * 15 + [5] * 15
    sparse = {(s.schedule, s.exclude) for s in found if s.method == "ssprop"}
    assert sparse == {
        (f"BarSchedule({rate}, period=2)", exclude)
        for rate in (0.2, 0.8)
        for exclude in ((), ("^conv1$",))
    }
    assert len({s.id for s in found}) == len(found) == 30


def test_what_cannot_change_a_run_is_not_in_it():
    methods = [{"method": ["dense", "dense-equal-compute", "ssprop"],
                "drop_rate": [0.5, 0.8], "selection": ["l1", "random"]}]  # fmt: skip
    found = list(grid.expand({"seeds": 1, "methods": methods}))
    assert sorted(s.method for s in found) == ["dense", *["dense-equal-compute"] * 2,
                                               *["ssprop"] * 4]  # fmt: skip


def test_id_is_of_all_settings_and_of_nothing_else():
    base = {"method": "ssprop", "lr": 0.1, "overrides": {"layer1": 0.5, "layer2": 0.2}}
    settings = resolve(base)
    assert resolve(dict(reversed(base.items()))).id == settings.id
    assert resolve({**base, "epochs": 30, "drop_rate": 0.8}).id == settings.id  # the defaults
    assert resolve({**base, "schedule": "BarSchedule(0.8)"}).id == settings.id  # the same schedule
    other = {"method": "dense", "selection": "l2", "types": ["Linear"], "exclude": ["fc"],
             "overrides": {"layer2": 0.2, "layer1": 0.5}, "network": "resnet50", "data": "x",
             "optimizer": "adamw", "lr_schedule": "warm-cosine", "amp": "bf16",
             "schedule": "0.3", "drop_rate": 0.3}  # fmt: skip
    ids = {settings.id}
    for field in dataclasses.fields(Settings):
        value = other.get(field.name)
        if value is None:
            value = not field.default if isinstance(field.default, bool) else 1
            value = 0.25 if isinstance(field.default, float) else value
        value = 7 if field.name == "image_size" or field.name == "eval_every" else value
        ids.add(resolve({**base, field.name: value}).id)
    assert len(ids) == 1 + len(dataclasses.fields(Settings))


def test_ids_are_the_same_in_another_process():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path;"
        "from study.grid import read; print(*[r.id for r in read(Path(sys.argv[2])).runs])"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", code, str(BENCHMARKS), str(SMOKE)]
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert out.split() == [run.id for run in grid.read(SMOKE).runs]


def test_words_of_a_schedule():
    text = "SequentialSchedule([BarSchedule({drop_rate}), 0.1], milestones=[{0.75 epochs}])"
    text = text.replace("0.1]", "LinearSchedule({drop_rate}, 0, total={epochs - 1})]")
    settings = resolve({"method": "ssprop", "schedule": text, "drop_rate": 0.6, "epochs": 10})
    want = ssp.SequentialSchedule(
        [ssp.BarSchedule(0.6), ssp.LinearSchedule(0.6, 0.0, total=9)], milestones=[8]
    )
    assert settings.schedule == repr(want)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[settings]\nepoch = 3", "did you mean epochs"),
        ("[settings]\nepochs = 2.5", "epochs must be a int"),
        ("[settings]\nepochs = 0", "epochs must be from 1"),
        ("[settings]\nshare = 0", "share must be above 0"),
        ("[settings]\nshare = 1.5", "share must be above 0 to 1"),
        ("[settings]\naugment = 1", "augment must be a bool"),
        ("[settings]\nlr = []", "leaves no run"),
        ("[settings]\ntypes = ['Convolution']", "no class 'Convolution'"),
        ("[settings]\nseed = 1", "seeds = 3"),
        ("[settings]\nmethod = 'sparse'", "dense-equal-compute"),
        ("[settings]\nmethod = 'ssprop'\noverrides = {layer1 = 1.0}", "overrides must be"),
        ("[settings]\nmethod = 'ssprop'\nschedule = 'BarShedule(0.8)'", "did you mean BarSchedule"),
        ("[settings]\nmethod = 'ssprop'\ndrop_rate = 1.0", "drop_rate must be from 0 to below 1"),
        ("[[conditions]]\nlr = 1.0\n[[methods]]\nlr = 2.0", "which one counts"),
        ("[methods]\nmethod = 'dense'", "[[methods]]"),
        ("seeds = 0", "seeds must be"),
        ("[setings]\nlr = 1.0", "setings"),
        ("lr = = 1", "is not TOML"),
        ("[settings]\nnetwork = 'resnet_18'", "did you mean resnet18"),
    ],
)
def test_what_a_study_refuses_is_one_line(text, message, tmp_path, capsys):
    (tmp_path / "bad.toml").write_text(text)
    assert main(tmp_path / "bad.toml", "--output", tmp_path / "out") == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and message in line
    assert not (tmp_path / "out").exists()


def shares_a_baseline(run: Settings, others: tuple[Settings, ...]) -> bool:
    """Tell whether a dense run under the same conditions costs the same within the tolerance."""
    condition = labels.key_of_condition(run)
    per_epoch = int(50_000 * run.share) // run.batch_size  # of CIFAR
    source = SimpleNamespace(train=(torch.zeros(1, 3, 32, 32), torch.tensor([9])))

    def cost(one: Settings) -> costs.StepCost:
        return runs.step_cost(one, *runs.build(one, source))

    schedule, own = parse_schedule(run.schedule), cost(run)
    per_t = 1 if schedule.interval == "step" else per_epoch
    rates = [schedule(step // per_t) for step in range(run.epochs * per_epoch)]
    flops = sum(own.total(rates))
    return any(
        other.method == "dense-equal-compute"
        and labels.key_of_condition(other) == condition
        and abs(runs.steps_of(other, cost(other), per_epoch) * sum(own.total([0.0])) / flops - 1)
        < groups.NEAR
        for other in others
        if other.seed == run.seed
    )


@pytest.mark.parametrize(
    "path", sorted((BENCHMARKS / "studies").glob("*.toml")), ids=lambda p: p.stem
)
def test_every_study_has_networks_that_exist_and_its_baselines(path):
    study = grid.read(path)
    for name in {run.network for run in study.runs}:
        models.resolve(name)
    wanted = set(study.runs)
    assert len(wanted) == len(study.runs) > 0
    for run in study.runs:
        if run.method == "ssprop" and run.dropout == run.label_smoothing == 0:
            equal = dataclasses.replace(run, method="dense-equal-compute", selection="")
            assert equal in wanted or shares_a_baseline(run, study.runs), labels.run(run)
            nothing = {"schedule": "", "types": (), "exclude": (), "overrides": ()}
            assert dataclasses.replace(equal, method="dense", **nothing) in wanted


# --- costs ------------------------------------------------------------------------------------


class _Cost:
    """100 FLOPs forward, 200 backward at rate 0, 40 at 0.8."""

    def total(self, rates):
        return 100 * len(rates), sum({0.0: 200, 0.8: 40}[rate] for rate in rates)


@pytest.mark.parametrize(
    ("schedule", "epochs", "steps"),
    [
        ("BarSchedule(0.8, period=2)", 4, 15),  # 10 x 300 + 10 x 140 = 4400 = 14.67 x 300
        ("BarSchedule(0.8, period=2)", 1, 5),  # the first epoch is dense
        ("ConstantSchedule(0.8)", 4, 9),  # 20 x 140 = 2800 = 9.33 x 300
        ("BarSchedule(0.8, period=4, interval='step')", 1, 4),  # 3 x 300 + 2 x 140 = 3.93 x 300
    ],
)
def test_steps_of_equal_compute_by_hand(schedule, epochs, steps):
    settings = resolve({"method": "dense-equal-compute", "schedule": schedule, "epochs": epochs})
    assert runs.steps_of(settings, _Cost(), 5) == steps
    sparse = dataclasses.replace(settings, method="ssprop", selection="l1")
    assert runs.steps_of(sparse, _Cost(), 5) == 5 * epochs


def test_cost_of_excluded_layers_and_of_layers_with_own_rates():
    model, shape = timm.create_model("resnet18", num_classes=10), (4, 3, 64, 64)
    layers = {"exclude": ["^conv1$", "layer4"], "overrides": {"layer1": 0.5, "layer2.0": 0.0}}
    cost, plain = costs.StepCost(model, shape, **layers), costs.StepCost(model, shape)
    assert cost.forward == plain.forward and cost.backward(0.0) == plain.backward(0.0)
    linear = plain.backward(0.0) - ssp.summary(model, input_size=shape, drop_rate=0).dense_backward
    ssp.convert(model, 0.8, **layers)
    for rate in (0.8, 0.3, 0.97):
        ssp.get_controller(model).drop_rate = rate
        want = ssp.summary(model, input_size=shape).sparse_backward
        assert cost.backward(rate) == want + linear


def test_cost_of_linear_layers_counts_each_once():
    model, shape = models.build(
        resolve({"network": "convnext_atto_small"}).options("cpu"), classes=10, channels=3, size=32
    )[0], (2, 3, 32, 32)  # fmt: skip
    convolutions = costs.StepCost(model, shape)
    both = costs.StepCost(model, shape, types=(nn.Conv2d, nn.Linear), exclude=["head"])
    assert both.forward == convolutions.forward
    bias = []

    def count(module, _, out):
        bias.append(out.numel())

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(count)
    model(torch.zeros(shape))
    # The package counts the bias' gradient, torch's counter does not.
    assert both.backward(0.0) == convolutions.backward(0.0) + sum(bias)
    # Depthwise and dense convolutions alone cannot save what both can.
    assert both.backward(0.8) < 0.25 * both.backward(0.0) < convolutions.backward(0.8)


# --- data -------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.05, 0.5, 0.999, 1.0])
def test_share_is_stratified_seeded_and_nested(share):
    labels_ = torch.tensor([0] * 40 + [1] * 200 + [2] * 3)[torch.randperm(243)]
    chosen = decoded.stratified(labels_, share, seed=1)
    counts = torch.bincount(labels_[chosen], minlength=3).tolist()
    assert counts == [max(1, round(share * n)) for n in (40, 200, 3)]
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert torch.equal(chosen, decoded.stratified(labels_, share, seed=1))
    assert set(chosen.tolist()) <= set(decoded.stratified(labels_, 1.0, seed=1).tolist())
    if share < 0.9:
        assert not torch.equal(chosen, decoded.stratified(labels_, share, seed=2))
        more = decoded.stratified(labels_, share + 0.1, seed=1)
        assert set(chosen.tolist()) <= set(more.tolist())


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder of train and test images of two classes, 8 x 8 pixels, and one of 12 x 10."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / "pictures" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                size = (12, 10, 3) if (part, i) == ("test", 2) else (8, 8, 3)
                pixels = generator.integers(0, 256, size, np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return tmp_path / "pictures"


def packed(folder: Path, path: Path) -> Path:
    """Pack a folder's files in reverse order, below another folder, beside a file of no use."""
    with tarfile.open(path, "w:gz") as archive:
        for file in sorted(folder.rglob("*.jpg"), reverse=True):
            archive.add(file, Path("some") / file.relative_to(folder))
        note = tarfile.TarInfo("some/train/cat/._0.jpg")
        archive.addfile(note, io.BytesIO())
    return path


def test_archive_and_folder_hold_the_same_images_decoded_once(pictures, tmp_path, monkeypatch):
    archive = packed(pictures, tmp_path / "pictures.tar.gz")
    both = [
        decoded.load("pets", data_dir=place, cache_dir=tmp_path / "cache", size=8)
        for place in (pictures, archive)
    ]
    assert both[0].digest == both[1].digest
    images, classes = both[1].train
    assert images.shape == (12, 3, 8, 8) and images.dtype == torch.uint8
    assert classes.tolist() == [0] * 6 + [1] * 6
    want = np.asarray(Image.open(pictures / "train" / "dog" / "3.jpg"))
    assert np.array_equal(images[9].permute(1, 2, 0).numpy(), want)
    assert both[0].test[0].shape == (6, 3, 8, 8)
    assert len(both[0].data(0.5).train) == 6

    monkeypatch.setattr(decoded, "_image", None)  # decoding again would fail
    again = decoded.load("pets", data_dir=archive, cache_dir=tmp_path / "cache", size=8)
    assert torch.equal(again.train[0], images) and again.digest == both[0].digest
    monkeypatch.undo()

    Image.new("RGB", (8, 8)).save(pictures / "train" / "dog" / "3.jpg")
    changed = decoded.load("pets", data_dir=pictures, cache_dir=tmp_path / "cache", size=8)
    assert changed.digest != both[0].digest and not changed.train[0][9].any()


def test_images_that_cannot_be_used_are_refused(pictures, tmp_path):
    def load(place: Path):
        return decoded.load("pets", data_dir=place, cache_dir=tmp_path / "cache", size=8)

    with pytest.raises(UserError, match="no images of 'pets'"):
        load(tmp_path / "nowhere")
    (tmp_path / "bad.tar.gz").write_bytes(b"not an archive")
    with pytest.raises(UserError, match="cannot be read as an archive"):
        load(tmp_path / "bad.tar.gz")
    (pictures / "train" / "dog" / "3.jpg").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"cannot read the image train/dog/3\.jpg"):
        load(pictures)
    (pictures / "train" / "dog" / "3.jpg").unlink()
    (pictures / "test" / "dog").rename(pictures / "test" / "cow")
    with pytest.raises(UserError, match=r"differ in the classes \['cow', 'dog'\]"):
        load(pictures)


# --- rows, frontier, table --------------------------------------------------------------------


def test_rows_survive_a_torn_write_and_are_there_once(tmp_path):
    rows = Rows(tmp_path / "runs.csv", ("id", "text"))
    assert rows.read() == [] and rows.ids() == set()
    assert rows.append({"id": "a", "text": 'with, "quotes"'})
    with rows.path.open("a") as file:
        file.write("b,half of a")  # what a killed process left
    assert rows.ids() == {"a"}
    assert rows.append({"id": "c", "text": "whole"})
    assert not rows.append({"id": "a", "text": "again"})
    assert rows.read() == [{"id": "a", "text": 'with, "quotes"'}, {"id": "c", "text": "whole"}]
    assert rows.path.read_text().count("\n") == 3
    with pytest.raises(UserError, match="other columns"):
        Rows(rows.path, ("id", "other")).read()


def test_a_claim_excludes_others_until_its_holder_ends(tmp_path):
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from pathlib import Path;"
        "from study.rows import claim\n"
        "with claim(Path(sys.argv[2])) as mine: print(mine, flush=True); time.sleep(60)"
    )
    path = tmp_path / "run.lock"
    command = [sys.executable, "-c", code, str(BENCHMARKS), str(path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "True\n"
    with claim(path) as mine:
        assert not mine
    holder.kill()
    holder.communicate()
    with claim(path) as mine:
        assert mine


def test_frontier_is_what_nothing_beats():
    generator = np.random.default_rng(0)
    for _ in range(50):
        points = [tuple(p) for p in generator.integers(0, 6, (8, 2)).tolist()]

        def beaten(i: int, points=points) -> bool:
            (x, y), others = points[i], [p for p in points if p != points[i]]
            return any(a <= x and b >= y for a, b in others) or points[i] in points[:i]

        found = frontier(points)
        assert sorted(found) == [i for i in range(8) if not beaten(i)]
        assert [points[i][0] for i in found] == sorted(points[i][0] for i in found)
    assert frontier([]) == []


def made_up(accuracies: list[float], flops: float, **settings: object) -> list[dict[str, str]]:
    row = dict.fromkeys(runs.FIELDS, "1")
    found = []
    for seed, accuracy in enumerate(accuracies):
        run = resolve({**settings, "seed": seed})
        values = {"accuracy": accuracy, "total_flops": flops, "train_s": 2.0}
        found.append(row | {n: str(v) for n, v in {**runs.cells(run), **values}.items()})
    return found


def test_table_by_hand():
    sparse = {"schedule": "ConstantSchedule(0.8)", "dropout": 0.0}
    rows = [
        *made_up([0.50, 0.60, 0.70], 4e12),
        *made_up([0.51, 0.60], 4e12, dropout=0.3),
        *made_up([0.40, 0.50, 0.90], 3e12, method="dense-equal-compute", **sparse),
        *made_up([0.43, 0.57, 0.92], 3e12, method="ssprop", **sparse),
        *made_up([0.55], 3e12, method="ssprop", selection="random", dropout=0.3,
                 schedule="ConstantSchedule(0.8)"),
        *made_up([0.1], 1e12, share=0.5),
    ]  # fmt: skip
    whole, part = groups.conditions(rows)
    names, lines = table.cells(whole)
    at = {line[0]: dict(zip(names, line, strict=True)) for line in lines}
    ssprop = at["ssProp ConstantSchedule(0.8)"]
    assert ssprop["accuracy, %"] == "64.00 ± 25.24"  # of 43, 57, 92
    assert ssprop["- equal compute"] == "+4.00 ± 2.65"  # of 3, 7, 2
    assert ssprop["- dense"] == "+4.00 ± 15.72"  # of -7, -3, 22
    assert ssprop["seeds"] == "3" and ssprop["TFLOP"] == "3" and ssprop["of dense"] == "0.750"
    assert at["dense"]["- dense"] == at["dense"]["- equal compute"] == ""
    assert at["dense, dropout 0.3"]["- dense"] == "+0.50 ± 0.71"  # of 1, 0
    both = at["ssProp ConstantSchedule(0.8), random channels, dropout 0.3"]
    assert both["- dense"] == "+4.00" and both["- equal compute"] == ""
    assert [method.label for method in part.methods] == ["dense"]
    text = table.markdown([whole, part], "name")
    assert text.count("\n| method |") == 2 and text.count("\n| ---") == 2
    assert "| 64.00 ± 25.24 |" in text and table.LEGEND in text


def test_schedules_of_nearly_the_same_flops_share_a_baseline():
    equal = made_up([0.5], 1.00e12, method="dense-equal-compute", schedule="ConstantSchedule(0.4)")
    near, far = (
        made_up([0.6], flops, method="ssprop", schedule=f"ConstantSchedule({rate})")
        for flops, rate in ((1.019e12, 0.38), (1.021e12, 0.37))
    )
    other = made_up([0.6], 1.0e12, method="ssprop", schedule="ConstantSchedule(0.39)", dropout=0.3)
    (condition,) = groups.conditions([*equal, *near, *far, *other])
    partners = [condition.equal_compute(method) for method in condition.methods]
    assert partners == [None, condition.methods[0], None, None]


def test_a_network_narrower_than_timm_s_stem_has_a_narrow_stem():
    net, _ = models.build(resolve({"network": "resnet8_narrow"}).options("cpu"),
                          classes=10, channels=3, size=32)  # fmt: skip
    shapes = [tuple(m.weight.shape) for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert shapes[:3] == [(24, 3, 3, 3), (24, 24, 3, 3), (24, 24, 3, 3)]
    assert max(shape[0] for shape in shapes) == 96
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


# --- runs -------------------------------------------------------------------------------------

TINY = {"data": "digits", "image_size": 8, "network": "resnet8_narrow", "epochs": 3,
        "batch_size": 32, "share": 0.06}  # two steps an epoch  # fmt: skip


def trained(tmp_path: Path, **settings: object) -> dict[str, object]:
    run = resolve({**TINY, **settings})
    source = decoded.load("digits", data_dir=None, cache_dir=tmp_path, size=8)
    path = tmp_path / f"{run.id}.pt"
    return runs.train(run, source, torch.device("cpu"), path, lambda *_: None)


def test_what_a_run_is_told_reaches_it(tmp_path):
    base = trained(tmp_path, method="ssprop")
    differ = {base["weights"]}
    for settings in (
        {"label_smoothing": 0.1},
        {"dropout": 0.3},
        {"weight_decay": 0.1},
        {"selection": "random"},
        {"exclude": ["layer1"]},
        {"overrides": {"layer1": 0.2}},
        {"types": ["Conv2d", "Linear"]},
        {"lr_schedule": "warm-cosine"},
        {"augment": False},
        {"share": 0.07},
        {"optimizer": "adamw", "lr": 1e-3},
    ):
        row = trained(tmp_path, method="ssprop", **settings)
        assert row["weights"] not in differ, settings
        differ.add(row["weights"])
    assert base["steps"] == 6 and base["mean_drop_rate"] == pytest.approx(0.8 / 3)


def test_evaluated_every_second_epoch_and_at_the_end(tmp_path, monkeypatch):
    calls = []
    evaluate = training.evaluate

    def counted(model, batches, autocast):
        calls.append(0)
        return evaluate(model, batches, autocast)

    monkeypatch.setattr(training, "evaluate", counted)
    row = trained(tmp_path, eval_every=2)
    assert len(calls) == 3  # after epochs 2 and 3, and on the training images
    calls.clear()
    every = trained(tmp_path)
    assert len(calls) == 4
    assert row["weights"] == every["weights"] and row["accuracy"] == every["accuracy"]


def test_one_cycle_goes_up_to_the_rate_and_down_in_the_steps_it_has():
    options = resolve({"lr": 0.3}).options("cpu")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    scheduler = training._lr_scheduler(optimizer, 20, options)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.3) and 4 <= peak <= 7
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True) and rates[-1] < 1e-3


def test_too_few_images_for_a_batch(tmp_path):
    with pytest.raises(UserError, match="batch_size 4000 is more than the 1347 training images"):
        trained(tmp_path, batch_size=4000, share=1.0)


# --- whole studies ----------------------------------------------------------------------------


def test_smoke_study_and_what_it_leaves(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert main(SMOKE, "--output", out, "--list") == 0
    assert "0 of 12 runs finished" in capsys.readouterr().out and not out.exists()
    assert main(SMOKE, "--output", out) == 0
    printed = capsys.readouterr().out
    for text in ("12/12", "dense, dropout 0.2", "ssProp BarSchedule(0.8, period=2)", "test loss"):
        assert text in printed
    assert "| dense, dropout 0.2 | 2 |" in (out / "table.md").read_text()
    assert min(Image.open(out / "study.png").size) > 500
    rows = rows_in(out)
    assert [row["id"] for row in rows] == [run.id for run in grid.read(SMOKE).runs]
    assert not list((out / "state").glob("*.pt"))
    for equal, sparse in itertools.product(rows, rows):
        pair = equal["method"] == "dense-equal-compute" and sparse["method"] == "ssprop"
        if pair and equal["schedule"] == sparse["schedule"] and equal["seed"] == sparse["seed"]:
            step = int(equal["total_flops"]) / int(equal["steps"])
            assert abs(int(equal["total_flops"]) - int(sparse["total_flops"])) <= step / 2
            assert float(equal["trained_epochs"]) < float(sparse["trained_epochs"]) == 2.0

    # Nothing is left to do; a study that has grown trains what is new.
    before = (out / "runs.csv").read_bytes()
    train = runs.train
    monkeypatch.setattr(runs, "train", None)
    left = out / "state" / f"{rows[0]['id']}.pt"
    left.touch()  # of a process that was killed after it wrote the row
    assert main(SMOKE, "--output", out, "--table") == 0
    assert main(SMOKE, "--output", out) == 0
    assert not left.exists()
    assert (out / "runs.csv").read_bytes() == before
    monkeypatch.setattr(runs, "train", train)
    grown = tmp_path / "smoke.toml"
    grown.write_text(SMOKE.read_text().replace("dropout = [0.0, 0.2]", "dropout = [0.0, 0.4]"))
    assert main(grown, "--output", out) == 0
    assert len(rows_in(out)) == 14
    assert "dense, dropout 0.2" not in (out / "table.md").read_text()

    # What is committed of a study is its own rows, wherever they were trained.
    results = tmp_path / "results" / "grown"
    assert main(grown, "--output", out, "--table", "--plot", "--results", results) == 0
    assert [row["id"] for row in rows_in(results)] == [run.id for run in grid.read(grown).runs]
    assert {path.name for path in results.iterdir()} == {"runs.csv", "table.md", "study.png"}

    # Other images under the same name do not mix with these.
    source = decoded.load("digits", data_dir=None, cache_dir=tmp_path, size=8)
    other = dataclasses.replace(source, digest="0" * 12)
    monkeypatch.setattr(decoded, "load", lambda *_, **__: other)
    grown.write_text(SMOKE.read_text().replace("seeds = 2", "seeds = [5]"))
    assert main(grown, "--output", out) == 2
    assert "other images called 'digits'" in capsys.readouterr().err


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, capsys, monkeypatch):
    train = runs.train

    def fail_once(settings, *arguments):
        if settings.method == "dense":
            raise RuntimeError("out of memory")
        return train(settings, *arguments)

    monkeypatch.setattr(runs, "train", fail_once)
    out = tmp_path / "out"
    study = tmp_path / "study.toml"
    text = SMOKE.read_text().replace("seeds = 2", "seeds = 1").replace("[0.5, 0.8]", "0.8")
    study.write_text(text)
    assert main(study, "--output", out) == 1
    assert "out of memory" in capsys.readouterr().out
    assert [r["method"] for r in rows_in(out)] == ["ssprop", "dense-equal-compute"]
    monkeypatch.setattr(runs, "train", train)
    assert main(study, "--output", out, "--stop-after", "0") == 0
    assert len(rows_in(out)) == 2
    assert main(study, "--output", out) == 0
    assert len(rows_in(out)) == 4


def test_two_processes_killed_and_resumed_give_the_rows_of_an_uninterrupted_study(tmp_path):
    study = tmp_path / "study.toml"
    text = SMOKE.read_text().replace("epochs = 2", "epochs = 8").replace("[0.5, 0.8]", "0.8")
    study.write_text(text.replace("[0.0, 0.2]", "0.2").replace("seeds = 2", "seeds = 1"))
    torn, whole = tmp_path / "torn", tmp_path / "whole"
    command = [sys.executable, str(SCRIPT), str(study), "--output", str(torn), "--jobs", "2"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 240
    while True:
        assert process.poll() is None and time.monotonic() < deadline
        finished = {row["id"] for row in rows_in(torn)} if (torn / "runs.csv").exists() else set()
        if finished and {path.stem for path in torn.glob("state/*.pt")} - finished:
            break
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with (torn / "runs.csv").open("a") as file:
        file.write("0123456789ab,dense,half a row")
    begun = {path.stem for path in torn.glob("state/*.pt")}
    finished = {row["id"] for row in rows_in(torn)} - {"0123456789ab"}
    assert finished and begun - finished

    # What was finished is not trained again, and what was begun goes on where it was.
    started: dict[str, int] = {}
    train = training.train

    def spied(run, options, batches, build, schedule, path, progress):
        first = []
        started.setdefault(path.stem, 0)
        out = train(run, options, batches, build, schedule, path,
                    lambda done, text: (first.append(done), progress(done, text)))  # fmt: skip
        started[path.stem] = first[0] if first else run.steps
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train", spied)
        assert main(study, "--output", torn) == 0
    assert not finished & set(started)
    for name in begun - finished:
        assert started[name] > 1, name
    assert main(study, "--output", whole) == 0
    a, b = ({row["id"]: row for row in rows_in(folder)} for folder in (torn, whole))
    assert len(rows_in(torn)) == len(a) == len(b) == 3
    for name, row in b.items():
        assert [a[name][column] for column in REPEATS] == [row[column] for column in REPEATS]
    assert not list((torn / "state").glob("*.pt"))
    assert {row["jobs"] for row in rows_in(whole)} == {"1"}
    assert {a[name]["jobs"] for name in finished} == {"2"}
