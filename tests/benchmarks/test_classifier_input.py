"""benchmarks/train_classifier.py: what it refuses, in one line."""

from __future__ import annotations

import pytest
import train_classifier
from classifier import data
from classifier.options import parse


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet_18"], "did you mean resnet18"),
        (["--model", "torchvision:convnext"], "did you mean convnext"),
        (["--model", "keras:resnet18"], "timm:NAME"),
        (["--model", "inception_v3"], "made for --image-size 299"),
        (["--model", "torchvision:vit_b_16"], "made for --image-size 224"),
        (["--model", "naflexvit_base_patch16_gap", "--image-size", "32"], "no convolution"),
        (["--model", "mlp_mixer"], "did you mean"),
        (["--stem", "small", "--model", "mobilenetv3_small_050"], "no 7x7 stem"),
        (["--data", "cifar10", "--data-dir", "nowhere"], "--data-dir with the folder that holds"),
        (["--data", "mnist"], "or --download"),
        (["--data", "imagefolder", "--data-dir", "nowhere"], "train/CLASS/*"),
        (["--batch-size", "4000"], "1347 training images"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--device", "gpu"], "--device gpu"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train_classifier.main(arguments) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and message in line
    assert line.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--schedule BarShedule(0.8)", "did you mean BarSchedule"),
        ("--schedule BarSchedule(1.5)", "[0, 1)"),
        ("--drop-rate 1", "1 would drop every channel"),
        ("--drop-rate nan", "[0, 1)"),
        ("--epochs 0", "'0' is not an integer >= 1"),
        ("--epochs 2.5", "'2.5' is not an integer >= 1"),
        ("--lr 0", "'0' is not a number > 0"),
        ("--dropout 1", "'1' is not a number >= 0 and < 1"),
        ("--data imagenet", "invalid choice: 'imagenet'"),
        ("--methods sparse", "invalid choice: 'sparse'"),
        ("--drop-rate 0.5 --schedule 0.5", "not allowed with"),
        ("--resume --overwrite", "give one of them"),
        ("--sedes 3", "unrecognized arguments"),
    ],
)
def test_bad_option_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(arguments.split())
    assert exit_.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and message in line


def test_the_schedule_is_written_in_one_way():
    """So that a run goes on, however the same schedule was named."""
    texts = {
        "": "BarSchedule(0.8, period=2)",
        "--schedule paper": "BarSchedule(0.8, period=2)",
        "--drop-rate 0.5": "BarSchedule(0.5, period=2)",
        "--schedule 0.5": "ConstantSchedule(0.5)",
    }
    assert {words: parse(words.split()).schedule for words in texts} == texts


def test_unexpected_failure_is_one_line_and_another_code(tmp_path, monkeypatch, capsys):
    def fail(_: object) -> None:
        raise RuntimeError("out of memory\nand much more")

    monkeypatch.setattr(data, "load", fail)
    assert train_classifier.main(["--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("error: RuntimeError: out of memory (")
    with pytest.raises(RuntimeError):
        train_classifier.main(["--output", str(tmp_path / "out"), "--traceback"])
