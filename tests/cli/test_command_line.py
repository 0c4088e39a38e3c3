"""What every command shares: help, errors in one line, and life as a process."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import ssprop_patch as ssp
from ssprop_patch.__main__ import COMMANDS, main, parser_of
from ssprop_patch.cli import options
from ssprop_patch.patching.eligibility import DEFAULT_TYPES
from ssprop_patch.patching.layer_kinds import LAYERS

ROOT = Path(__file__).parents[2]


def command(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ssprop_patch", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_report_on_a_timm_model_has_the_totals_of_summary(printed, read_csv):
    size = ("--input-size", 2, 3, 64, 64)
    out = printed("report", "timm:resnet18", *size, "--drop-rate", 0.6, "--csv")
    import timm

    summary = ssp.summary(timm.create_model("resnet18"), input_size=(2, 3, 64, 64), drop_rate=0.6)
    rows = read_csv(out)
    names = [*(layer.name for layer in summary.layers), "fc", "(everything else)"]
    assert [row["name"] for row in rows] == names
    for column in ("forward", "dense_backward", "sparse_backward"):
        assert sum(int(row[column] or 0) for row in rows) == getattr(summary, column)


def test_a_reader_that_leaves_early_hears_no_traceback():
    long = command("schedule", "BarSchedule(0.8)", "--epochs", "30000", "--csv")
    short = command("schedule", "BarSchedule(0.8)", "--epochs", "3")
    short.stdout.close()  # before anything is printed, which stays in the buffer to the end
    assert long.stdout.readline() == "t,epoch,drop_rate\n"
    long.stdout.close()  # as head does
    for process in (long, short):
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 1


def test_the_console_script_is_main():
    text = (ROOT / "pyproject.toml").read_text()
    assert 'ssprop-patch = "ssprop_patch.__main__:main"' in text


def test_an_input_that_does_not_fit_is_the_models_own_error_in_one_line(nets, refused):
    line, code = refused("report", f"{nets}:build", "--input-size", 2, 4, 8, 8)
    assert "does not run on input_size [2, 4, 8, 8]" in line
    assert "expected input[2, 4, 8, 8] to have 3 channels" in line
    assert code == 1


@pytest.mark.parametrize(
    ("sizes", "shapes"),
    [
        ("1 3 8 8", [[1, 3, 8, 8]]),
        ("1x3x8x8", [[1, 3, 8, 8]]),
        ("1×3×8×8", [[1, 3, 8, 8]]),
        ("1x3x8x8 2x5", [[1, 3, 8, 8], [2, 5]]),
        ("1x3x8x8 --input-size 2 5", [[1, 3, 8, 8], [2, 5]]),
        ("7", [[7]]),
    ],
)
def test_sizes_are_read_as_they_are_printed(sizes, shapes):
    words = ["report", "timm:resnet18", "--input-size", *sizes.split()]
    assert parser_of("report").parse_args(words).input_size == shapes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--drop-rate 80", "a fraction, not a percentage"),
        ("--drop-rate high", "'high' is not a number"),
        ("--schedule BarShedule(0.8)", "did you mean BarSchedule"),
        ("--schedule BarSchedule(0.8)", "give --epochs"),
        ("--schedule BarSchedule(0.8,interval='step') --epochs 3", "give --steps-per-epoch"),
        ("--drop-rate 0.5 --schedule 0.5", "not allowed with"),
        ("--types BatchNorm2d", "invalid choice: 'BatchNorm2d'"),
        ("--epochs 0", "'0' is not an integer >= 1"),
        ("--json --csv", "not allowed with"),
        ("--input-size 8 timm:resnet18", "MODEL goes before --input-size"),
        ("--dorp-rate 0.5", "unrecognized arguments"),
        ("--schedule papr --epochs 2", "did you mean PAPER"),
        ("--input-size 8x3xx8", "'8x3xx8' is neither an integer >= 1 nor a shape"),
        ("--input-size 1x3x0x8", "'1x3x0x8' is neither"),
        ("--input-size 8 3x8x8", "write either 8 3 224 224 or 8x3x224x224"),
    ],
)
def test_a_wrong_option_is_one_line_and_code_2(arguments, message, nets, refused):
    line, code = refused("report", f"{nets}:build", "--input-size", 1, 3, 8, 8, *arguments.split())
    assert message in line
    assert code == 2


def test_no_command_no_input_size_and_a_network_without_convolutions_are_one_line(nets, refused):
    assert refused()[1] == 2
    assert "--input-size" in refused("report", f"{nets}:build")[0]
    (Path(nets).parent / "flat.py").write_text("from torch import nn\ndef f(): return nn.Flatten()")
    line, code = refused("report", f"{Path(nets).parent}/flat.py:f", "--input-size", 2, 3)
    assert "no convolution in this Flatten" in line and code == 1


def test_traceback_shows_where(nets):
    with pytest.raises(Exception, match="no such") as error:
        main(["report", f"{nets}:breaks", "--input-size", "1", "3", "8", "8", "--traceback"])
    assert isinstance(error.value.__cause__, RuntimeError)


def help_of(name: str) -> str:
    group = next(a for a in parser_of(name)._actions if getattr(a, "choices", None))
    return group.choices[name].format_help()


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_every_example_of_the_help_is_a_command_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "train.py").write_text("")
    text = help_of(name) if name else parser_of(None).format_help()
    lines = text.replace("\\\n", " ").partition("examples:")[2].splitlines()
    examples = [line.strip() for line in lines if " ssprop-patch" in line]
    assert len(examples) >= 3
    for example in examples:
        words = shlex.split(example.partition("ssprop-patch ")[2].partition(" > ")[0])
        assert words[0] == name or not name
        parser_of(words[0]).parse_args(words)


def test_version_and_help_do_not_wait_for_torch():
    code = "import sys, ssprop_patch.__main__ as m; sys.argv[1:] = {}; m.main()"
    for words in (["--version"], ["--help"], ["run", "--help"], ["schedule", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", AT_EXIT + code.format(words)], capture_output=True, text=True
        )
        assert done.stdout.endswith("torch: False\n") and not done.returncode, words


AT_EXIT = "import atexit, sys; atexit.register(lambda: print('torch:', 'torch' in sys.modules));"


def test_the_classes_to_choose_from_are_those_that_can_be_converted():
    assert tuple(cls.__name__ for cls in LAYERS) == options.TYPES
    assert tuple(cls.__name__ for cls in DEFAULT_TYPES) == options.DEFAULT_TYPES


def test_help_and_version_end_with_code_0(capsys):
    for words in (["--help"], ["--version"], ["report", "--help"]):
        with pytest.raises(SystemExit) as exit_:
            main(words)
        assert not exit_.value.code
    assert ssp.__version__ in capsys.readouterr().out
