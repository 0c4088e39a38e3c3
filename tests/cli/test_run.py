"""``run``: a script runs as ever, and its network is converted.

The script here has what those of timm and torchvision have in common: a library that builds the
network, a ``train_one_epoch`` and a checkpoint that holds the epoch. It trains in float64.
"""

from __future__ import annotations

import re
import runpy
import subprocess
import sys

import pytest
import torch
from torch.optim import optimizer

import ssprop_patch as ssp
from ssprop_patch.__main__ import main
from ssprop_patch.schedule import call_counts

REGISTRY = """
import torch
from torch import nn

def build(width=10):
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 20, 3, bias=False), nn.BatchNorm2d(20), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 4),
    ).double()
"""

TRAIN = """
import argparse, contextlib, sys
import oracle, torch
from torch import nn
from classifier import loss_function  # lies beside this script
from nets_of_the_test import build

def train_one_epoch(model, optimizer, epoch, args, steps=3):
    dropped = 0.8 if epoch % 2 else 0.0
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 * epoch + step)
        x = torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64)
        y = torch.randint(4, (6,), generator=generator)
        by_hand = args.oracle and dropped
        with oracle.network(model, dropped) if by_hand else contextlib.nullcontext():
            loss = loss_function(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--resume")
    parser.add_argument("--output")
    parser.add_argument("--oracle", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    model, teacher = build(), build()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    first = 0
    if args.resume:
        state = torch.load(args.resume)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"] + 1
    for epoch in range(first, args.epochs):
        train_one_epoch(model, optimizer, epoch, args)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
        torch.save(state, f"{args.output}{epoch}.pt")

if __name__ == "__main__":
    main()
"""


LOSS = "from torch.nn.functional import cross_entropy as loss_function"


def modules():
    return [n for n in sys.modules if n.partition(".")[0] in ("nets_of_the_test", "classifier")]


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A training script in a folder with the library it uses and a module of its own."""
    for name in modules():  # the other benchmark's, in this process
        monkeypatch.delitem(sys.modules, name)
    library = tmp_path / "project" / "nets_of_the_test"
    library.mkdir(parents=True)
    (library / "__init__.py").write_text("from .registry import build")
    (library / "registry.py").write_text(REGISTRY)
    (library.parent / "classifier.py").write_text(LOSS)
    (library.parent / "train.py").write_text(TRAIN)
    yield library.parent / "train.py"
    for name in modules():
        del sys.modules[name]


FACTORY = ["--factory", "nets_of_the_test.build"]


def convert(script, *arguments, options=()):
    assert main(["run", *FACTORY, *options, str(script), *map(str, arguments)]) == 0


def plain(script, *arguments):
    """Run the script itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        patch.syspath_prepend(script.parent)
        runpy.run_path(str(script), run_name="__main__")


def rates(text):
    """The drop rate of each epoch and the share of zero rows, as the wrapper prints them."""
    found = re.findall(r"ssprop: epoch (\d+): drop rate ([\d.]+); ([\d.]+)% of the rows", text)
    return {int(epoch): (float(rate), float(share)) for epoch, rate, share in found}


def checkpoint(path):
    return torch.load(path)["model"]


def equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


# --- what is trained ----------------------------------------------------------------------------


def test_epochs_are_dense_and_sparse_in_turn_and_the_weights_are_those_of_the_oracle(
    script, tmp_path, capsys
):
    convert(script, "--output", tmp_path / "ours")
    assert rates(capsys.readouterr().err) == {0: (0, 0), 1: (0.8, 80), 2: (0, 0), 3: (0.8, 80)}
    plain(script, "--oracle", "--output", tmp_path / "oracle")
    plain(script, "--output", tmp_path / "dense")
    for epoch in range(4):
        ours, oracle, dense = (
            checkpoint(tmp_path / f"{name}{epoch}.pt") for name in ("ours", "oracle", "dense")
        )
        assert list(ours) == list(dense)
        assert equal(ours, dense) == (epoch == 0)
        for key in ours:
            torch.testing.assert_close(ours[key], oracle[key], rtol=1e-9, atol=1e-12)


def test_resumed_run_goes_on_with_the_rate_of_its_epoch_and_ends_with_the_same_weights(
    script, tmp_path, capsys
):
    convert(script, "--output", tmp_path / "whole")
    convert(script, "--output", tmp_path / "torn", "--epochs", 1)
    capsys.readouterr()
    convert(script, "--output", tmp_path / "torn", "--resume", tmp_path / "torn0.pt")
    assert rates(capsys.readouterr().err) == {1: (0.8, 80), 2: (0, 0), 3: (0.8, 80)}
    assert equal(checkpoint(tmp_path / "whole3.pt"), checkpoint(tmp_path / "torn3.pt"))


def test_checkpoints_pass_between_converted_and_plain_runs(script, tmp_path):
    plain(script, "--output", tmp_path / "a", "--epochs", 1)
    convert(script, "--output", tmp_path / "a", "--resume", tmp_path / "a0.pt", "--epochs", 2)
    plain(script, "--output", tmp_path / "a", "--resume", tmp_path / "a1.pt", "--epochs", 3)
    plain(script, "--oracle", "--output", tmp_path / "b", "--epochs", 3)
    ours, oracle = checkpoint(tmp_path / "a2.pt"), checkpoint(tmp_path / "b2.pt")
    for key in ours:
        torch.testing.assert_close(ours[key], oracle[key], rtol=1e-9, atol=1e-12)


def test_schedule_and_exclude_are_those_of_convert(script, tmp_path, capsys):
    check = "build(), build(); assert [hasattr(m, '_ssprop_policy') for m in model[:4:3]] == "
    script.write_text(TRAIN.replace("build(), build()", f"{check}[False, True]"))
    options = ["--schedule", "LinearSchedule(0.0, 0.5, total=2)", "--exclude", "0"]
    convert(script, "--output", tmp_path / "a", options=options)
    text = capsys.readouterr().err
    assert "1 of 2 convolutions converted, LinearSchedule(0.0, 0.5, total=2)" in text
    assert rates(text) == {0: (0, 0), 1: (0.25, 25), 2: (0.5, 50), 3: (0.5, 50)}


def test_only_the_first_network_is_converted(script, tmp_path):
    check = "build(), build(); converted = ssp.is_converted(model), ssp.is_converted(teacher)"
    text = TRAIN.replace("build(), build()", f"{check}; assert converted == (True, False)")
    script.write_text("import ssprop_patch as ssp\n" + text)
    convert(script, "--output", tmp_path / "a", "--epochs", 1)
    assert (tmp_path / "a0.pt").exists()


def test_network_of_timm_and_of_torchvision_under_whatever_name(tmp_path, capsys):
    import timm
    import torchvision

    script = tmp_path / "train.py"
    for line, model in (
        ("import timm; m = timm.create_model('test_resnet')", "ResNet of timm.create_model"),
        ("from timm.models import create_model; m = create_model('test_resnet')", "ResNet of timm"),
        (
            "import torchvision.models as z; m = z.get_model('resnet18')",
            "ResNet of torchvision.models.get_model: 20 of 20",
        ),
    ):
        script.write_text(f"{line}\nimport ssprop_patch as ssp\nassert ssp.is_converted(m)")
        main(["run", "--schedule", "0.5", str(script)])
        assert f"ssprop: {model}" in capsys.readouterr().err
    assert not ssp.is_converted(timm.create_model("test_resnet"))
    assert not ssp.is_converted(torchvision.models.get_model("resnet18"))


# --- what is left behind ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "last_line", ["", "    raise OSError", "    sys.exit()", "    sys.exit(3)"]
)
def test_everything_is_put_back_however_the_script_ends(script, tmp_path, last_line, capsys):
    script.write_text(TRAIN + last_line)
    argv, path, hooks = sys.argv, list(sys.path), len(optimizer._global_optimizer_pre_hooks)
    try:
        convert(script, "--output", tmp_path / "a", "--epochs", 2)
        ended = None
    except (OSError, SystemExit) as error:
        ended = error
    assert (type(ended) is OSError) == ("OSError" in last_line)
    assert (getattr(ended, "code", None) == 3) == ("3" in last_line)
    assert sys.argv is argv and sys.path == path
    assert len(optimizer._global_optimizer_pre_hooks) == hooks
    library = sys.modules["nets_of_the_test"]
    assert library.build is sys.modules["nets_of_the_test.registry"].build
    assert not hasattr(library.build, "__wrapped__")


def test_second_process_is_silent(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    convert(script, "--output", tmp_path / "a", "--epochs", 2)
    assert "ssprop" not in capsys.readouterr().err


SEEN = """
import os, sys
print(sys.argv, sys.path[0], os.getcwd() in sys.path, __name__, __file__)
import shadowed
"""


def test_a_script_sees_the_command_line_and_the_path_that_python_gives_it(tmp_path):
    """And not the folder that the command was started in."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "train.py").write_text(SEEN)
    (tmp_path / "shadowed.py").write_text("raise SystemExit('found in the current folder')")

    def seen(*command):
        done = subprocess.run(
            [sys.executable, *command, "project/train.py", "--version", "--drop-rate", "2", "--"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert "No module named 'shadowed'" in done.stderr.splitlines()[-1]
        return done.stdout, done.returncode

    assert seen("-m", "ssprop_patch", "run") == seen()


def test_what_a_script_raises_is_shown_as_python_shows_it(script, tmp_path):
    script.write_text(TRAIN + "    raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        convert(script, "--output", tmp_path / "a", "--epochs", 1)


# --- what goes wrong is said --------------------------------------------------------------------


def refusal(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        main(["run", *map(str, arguments)])
    assert ended.value.code not in (0, None)
    return f"{ended.value.code}{capsys.readouterr().err}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--schedule", "BarSchedule(0.8, interval='step')"], "must count epochs"),
        (["--schedule", "BarSchedule(1.8)"], "[0, 1)"),
        (["--drop-rate", "1"], "[0, 1)"),
        (["--schedule", "__import__('os')"], "not a schedule"),
        (["--factory", "no_such_library.build"], "No module named 'no_such_library'"),
        (["--factory", "nets_of_the_test.make"], "no attribute 'make'"),
        (["--factory", "torch.nn.Conv2d"], "a class"),
        (["--factory", "torch.nn.init.zeros_"], "called none of torch.nn.init.zeros_"),
        ([*FACTORY, "--epoch-function", "train_epoch"], "no function train_epoch"),
        ([*FACTORY, "--epoch-argument", "index"], "a parameter 'index'"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(
    script, tmp_path, capsys, options, message
):
    said = refusal(capsys, [*options, script, "--output", tmp_path / "a"])
    assert message in said
    assert not list(tmp_path.glob("a*"))


def test_missing_script_is_refused(capsys):
    assert "there is no file 'no/train.py'" in refusal(capsys, ["no/train.py"])


def test_constant_rate_needs_no_epochs(script, tmp_path, capsys):
    options = ["--schedule", "0.5", "--epoch-function", "nothing"]
    convert(script, "--output", tmp_path / "a", options=options)
    assert "first step: drop rate 0.5; 50.0% of the rows" in capsys.readouterr().err


def test_gradients_that_are_dense_in_a_sparse_epoch_are_reported(script, tmp_path, capsys):
    script.write_text(TRAIN.replace("    first = 0", "    first = 0; model.eval()"))
    convert(script, "--output", tmp_path / "a", "--epochs", 1)
    assert "WARNING" not in capsys.readouterr().err
    convert(script, "--output", tmp_path / "a", "--epochs", 2)
    assert "WARNING: these gradients look dense" in capsys.readouterr().err


def test_layers_that_have_no_gradient_yet_are_not_taken_for_sparse(script, tmp_path, capsys):
    # As timm starts its residual branches; the bias lets the gradient through the ReLU.
    start = "    first = 0; nn.init.zeros_(model[4].weight); nn.init.ones_(model[4].bias)"
    script.write_text(TRAIN.replace("    first = 0", start))
    convert(script, "--output", tmp_path / "a", "--epochs", 1)
    assert rates(capsys.readouterr().err) == {0: (0, 0)}


def test_training_of_another_network_is_reported(script, tmp_path, capsys):
    script.write_text(TRAIN.replace("model, teacher =", "teacher, model =") + "    sys.exit()")
    convert(script, "--output", tmp_path / "a", "--epochs", 1)
    assert "WARNING: epoch 0: no gradient has reached the converted" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--selection", "principal"],
        ["--remainder", "coarse"],
        ["--selection", "principal", "--remainder", "coarse"],
    ],
    ids=" ".join,
)
def test_every_selection_and_remainder_is_offered_and_its_calls_are_reported(
    script, tmp_path, capsys, options, monkeypatch
):
    # Other tests of this process may have compiled something; a script's process is its own.
    monkeypatch.setattr(call_counts, "was_compiled", lambda: False)
    expected = "principal" in options, "coarse" in options
    check = (
        "build(), build(); rule = model[3]._ssprop_policy.rule; "
        f"assert (rule.subspace is not None, rule.block > 0) == {expected}"
    )
    script.write_text(TRAIN.replace("build(), build()", check))
    convert(script, "--output", tmp_path / "a", "--epochs", 3, options=options)
    said = [line for line in capsys.readouterr().err.splitlines() if "epoch" in line]
    assert said == [
        "ssprop: epoch 0: drop rate 0; 0 of 2 convolutions ran sparse",
        "ssprop: epoch 1: drop rate 0.8; 2 of 2 convolutions ran sparse",
        "ssprop: epoch 2: drop rate 0; 0 of 2 convolutions ran sparse",
    ]
    script.write_text(TRAIN.replace("    first = 0", "    first = 0; model.eval()"))
    convert(script, "--output", tmp_path / "a", "--epochs", 2, options=options)
    assert "WARNING: none ran sparse" in capsys.readouterr().err
