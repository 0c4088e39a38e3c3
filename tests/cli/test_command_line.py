"""What every command shares: help, errors in one line, and life as a process."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import ssprop_patch as ssp
from ssprop_patch.__main__ import _parser, main

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
    assert [row["name"] for row in rows] == [layer.name for layer in summary.layers]
    for column in ("forward", "dense_backward", "sparse_backward"):
        assert sum(int(row[column]) for row in rows) == getattr(summary, column)


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


def commands_with_help() -> dict[str, str]:
    parser = _parser()
    group = next(a for a in parser._actions if getattr(a, "choices", None))
    return {name: sub.format_help() for name, sub in group.choices.items()}


def test_every_example_of_the_help_is_a_command_line(tmp_path):
    texts = {"": _parser().format_help(), **commands_with_help()}
    for name, text in texts.items():
        lines = text.replace("\\\n", " ").partition("examples:")[2].splitlines()
        examples = [line for line in lines if line.startswith("  ssprop-patch")]
        assert len(examples) >= 3
        for example in examples:
            words = shlex.split(example.partition(" > ")[0])[1:]
            assert words[0] == name or not name
            _parser().parse_args(words)


def test_help_and_version_end_with_code_0(capsys):
    for words in (["--help"], ["--version"], ["report", "--help"]):
        with pytest.raises(SystemExit) as exit_:
            main(words)
        assert not exit_.value.code
    assert ssp.__version__ in capsys.readouterr().out
