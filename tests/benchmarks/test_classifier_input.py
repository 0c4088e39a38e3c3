"""benchmarks/train_classifier.py: what it refuses, in one line."""

from __future__ import annotations

import pytest
import train_classifier
from classifier import data
from classifier.options import parse


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schedule", "BarShedule(0.8)"], "did you mean BarSchedule"),
        (["--schedule", "BarSchedule(1.5)"], "[0, 1)"),
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
    "arguments",
    [
        ["--drop-rate", "1"],
        ["--drop-rate", "nan"],
        ["--epochs", "0"],
        ["--data", "imagenet"],
        ["--methods", "sparse"],
        ["--drop-rate", "0.5", "--schedule", "0.5"],
        ["--resume", "--overwrite"],
        ["--sedes", "3"],
    ],
)
def test_bad_option_is_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(arguments)
    assert exit_.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_unexpected_failure_is_one_line_and_another_code(tmp_path, monkeypatch, capsys):
    def fail(_: object) -> None:
        raise RuntimeError("out of memory\nand much more")

    monkeypatch.setattr(data, "load", fail)
    assert train_classifier.main(["--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("error: RuntimeError: out of memory (")
    with pytest.raises(RuntimeError):
        train_classifier.main(["--output", str(tmp_path / "out"), "--traceback"])
