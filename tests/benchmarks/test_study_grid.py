"""benchmarks/run_study.py: from a study's file to its runs, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from classifier import costs, models
from study import grid, groups, labels, runs
from study.rows import Rows
from study.settings import Settings, resolve

import ssprop_patch as ssp

from . import BENCHMARKS
from .studies import SMOKE, main


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
    methods = [
        {
            "method": ["dense", "dense-equal-compute", "ssprop"],
            "drop_rate": [0.5, 0.8],
            "selection": ["l1", "random"],
        }
    ]
    found = list(grid.expand({"seeds": 1, "methods": methods}))
    assert sorted(s.method for s in found) == [
        "dense",
        *["dense-equal-compute"] * 2,
        *["ssprop"] * 4,
    ]


def test_id_is_of_all_settings_and_of_nothing_else():
    base = {"method": "ssprop", "lr": 0.1, "overrides": {"layer1": 0.5, "layer2": 0.2}}
    settings = resolve(base)
    assert resolve(dict(reversed(base.items()))).id == settings.id
    assert resolve({**base, "epochs": 30, "drop_rate": 0.8}).id == settings.id  # the defaults
    assert resolve({**base, "schedule": "BarSchedule(0.8)"}).id == settings.id  # the same schedule
    other = {
        "method": "dense",
        "selection": "l2",
        "types": ["Linear"],
        "exclude": ["fc"],
        "overrides": {"layer2": 0.2, "layer1": 0.5},
        "network": "resnet50",
        "data": "x",
        "optimizer": "adamw",
        "lr_schedule": "warm-cosine",
        "amp": "bf16",
        "schedule": "0.3",
        "drop_rate": 0.3,
        "remainder": "coarse",
        "frozen": ["layer1"],
    }
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


@functools.cache
def step_cost(settings: Settings) -> costs.StepCost:
    """Return what a step of a run on CIFAR-10 costs."""
    source = SimpleNamespace(train=(torch.zeros(1, 3, 32, 32), torch.tensor([9])))
    return runs.step_cost(settings, *runs.build(settings, source))


def test_rows_of_the_first_studies_keep_their_ids():
    for path in sorted((BENCHMARKS / "results" / "studies").glob("cifar10_*_small/runs.csv")):
        rows = Rows(path, runs.FIELDS, runs.ADDED).read()
        assert rows
        for row in rows:
            assert Settings.of_row(row).id == row["id"]


def shares_a_baseline(run: Settings, others: tuple[Settings, ...]) -> bool:
    """Tell whether a dense run under the same conditions costs the same within the tolerance."""
    condition = labels.key_of_condition(run)
    per_epoch = int(50_000 * run.share) // run.batch_size  # of CIFAR

    def cost(one: Settings) -> costs.StepCost:
        # All that it depends on, so that each is counted once.
        names = ("network", "image_size", "batch_size", "types", "exclude", "overrides")
        return step_cost(Settings("ssprop", **{name: getattr(one, name) for name in names}))

    schedule, own = ssp.parse_schedule(run.schedule), cost(run)
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


def stopped_earlier(run: Settings, others: tuple[Settings, ...]) -> bool:
    """Tell whether dense trainings of fewer steps are there to interpolate between."""
    shares = [
        other.steps_share
        for other in others
        if other.method == "dense"
        and other.seed == run.seed
        and labels.key_of_condition(other) == labels.key_of_condition(run)
    ]
    return min(shares, default=1.0) <= 0.5 and max(shares) == 1.0


@pytest.mark.parametrize(
    "path", sorted((BENCHMARKS / "studies").glob("*.toml")), ids=lambda p: p.stem
)
def test_every_study_has_networks_that_exist_and_its_baselines(path):
    study = grid.read(path)
    for name in {run.network for run in study.runs}:
        models.resolve(name)
    wanted = set(study.runs)
    assert len(wanted) == len(study.runs) > 0
    # Every seed has the same runs, so that what holds for one holds for all.
    seeds = [
        frozenset(o for o in study.runs if o.seed == s) for s in sorted({r.seed for r in wanted})
    ]
    alike = {frozenset(dataclasses.replace(o, seed=0) for o in of_one) for of_one in seeds}
    assert len(alike) == 1
    for run in seeds[0]:
        if run.method == "ssprop" and run.dropout == run.label_smoothing == 0:
            equal = dataclasses.replace(run, method="dense-equal-compute", selection="")
            assert (
                equal in wanted
                or stopped_earlier(run, study.runs)
                or shares_a_baseline(run, study.runs)
            ), labels.run(run)
            nothing = {"schedule": "", "types": (), "exclude": (), "overrides": ()}
            nothing |= {"remainder": "none", "frozen": ()}
            assert dataclasses.replace(equal, method="dense", **nothing) in wanted
