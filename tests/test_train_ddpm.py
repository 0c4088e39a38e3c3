"""benchmarks/train_ddpm.py: a run of two steps, resuming, and what it measures."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("torchmetrics")
linalg = pytest.importorskip("scipy.linalg")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import train_ddpm  # noqa: E402
from classifier import checkpoint, costs, decoded  # noqa: E402
from classifier.batches import Batches  # noqa: E402
from ddpm import distance, measure, model  # noqa: E402
from ddpm.settings import Settings, parse, runs  # noqa: E402

import ssprop_patch as ssp  # noqa: E402

# Two steps an epoch, one epoch dense and one sparse.
TINY = ["--data", "digits", "--image-size", "8", "--channels", "8", "16", "--blocks", "1",
        "--share", "0.1", "--batch-size", "64", "--epochs", "2", "--held-out", "40",
        "--samples", "12", "--sample-steps", "3", "--feature-network", "resnet8_narrow",
        "--feature-epochs", "1"]  # fmt: skip
CPU = torch.device("cpu")


def rows_in(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["method"]: row for row in rows}


def settings_of(*more: str) -> Settings:
    return next(runs(parse("", [*TINY, "--methods", "ssprop", *more])))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three methods, uninterrupted."""
    folder = tmp_path_factory.mktemp("ddpm")
    assert train_ddpm.main([*TINY, "--output", str(folder)]) == 0
    return folder


def test_rows_and_pictures_of_the_three_methods(output):
    rows = rows_in(output)
    dense, sparse, equal = (rows[m] for m in ("dense", "ssprop", "dense-equal-compute"))
    assert (dense["steps"], sparse["steps"], equal["steps"]) == ("4", "4", "3")
    assert float(sparse["mean_drop_rate"]) == pytest.approx(0.4)  # every other epoch
    assert float(dense["mean_drop_rate"]) == float(equal["mean_drop_rate"]) == 0.0
    step = int(dense["total_flops"]) / 4
    assert abs(int(equal["total_flops"]) - int(sparse["total_flops"])) <= step / 2
    assert int(sparse["total_flops"]) < int(dense["total_flops"])
    assert len({row["weights"] for row in rows.values()}) == 3
    assert len({row["distance_of_real"] for row in rows.values()}) == 1
    for row in rows.values():
        assert math.isfinite(float(row["distance"])) and float(row["distance"]) > 0
        assert 0.5 < float(row["held_out_loss"]) < 2  # of noise of variance 1, hardly trained
        picture = Image.open(output / row["picture"])
        assert picture.format == "PNG" and picture.size == (8 * 9 + 1, 2 * 9 + 1)
    assert not list((output / "state").glob("*-seed*.pt"))


def test_says_that_the_distance_is_not_the_fid_and_repeats_nothing(output, capsys, monkeypatch):
    monkeypatch.setattr("ddpm.runs._run", None)  # training again would fail
    before = (output / "runs.csv").read_bytes()
    assert train_ddpm.main([*TINY, "--output", str(output)]) == 0
    assert train_ddpm.main([*TINY, "--output", str(output), "--table"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("not the Inception-FID, and cannot be compared with published ones") == 2
    assert (output / "runs.csv").read_bytes() == before
    assert train_ddpm.main([*TINY, "--output", str(output), "--table", "--lr", "0.1"]) == 2
    assert "no run with these options" in capsys.readouterr().err


def test_two_processes_give_the_same_rows_and_what_is_committed_of_them(output, tmp_path):
    arguments = [*TINY, "--output", str(tmp_path / "out"), "--jobs", "2", "--threads", "1"]
    assert train_ddpm.main([*arguments, "--results", str(tmp_path / "results")]) == 0
    alone, shared = rows_in(output), rows_in(tmp_path / "results")
    assert list(shared) == ["dense", "dense-equal-compute", "ssprop"]
    for method, row in shared.items():
        assert row["jobs"] == "2" and row["threads"] == "1"
        assert float(row["held_out_loss"]) == pytest.approx(float(alone[method]["held_out_loss"]))
    text = (tmp_path / "results" / "table.md").read_text()
    assert text.count("\n| ssprop BarSchedule(0.8, period=2) | 1 | 2 |") == 1
    assert "not the Inception-FID" in text
    assert min(Image.open(tmp_path / "results" / "samples.png").size) > 300


def test_interrupted_and_resumed_ends_as_if_it_was_not(output, tmp_path, capsys, monkeypatch):
    save, saves = checkpoint.save, []

    def save_and_stop(path, parts):
        save(path, parts)
        saves.append(path)
        raise KeyboardInterrupt

    arguments = [*TINY, "--methods", "ssprop", "--output", str(tmp_path)]
    monkeypatch.setattr(checkpoint, "save", save_and_stop)
    for epoch in (1, 2):
        assert train_ddpm.main(arguments) == 130
        assert "the same command continues" in capsys.readouterr().err
        state = torch.load(saves[-1], weights_only=True)
        assert len(state["history"]["epochs"]) == epoch
    assert not (tmp_path / "runs.csv").exists()
    monkeypatch.undo()
    assert train_ddpm.main(arguments) == 0  # nothing is left to train, all to measure
    torn, whole = rows_in(tmp_path)["ssprop"], rows_in(output)["ssprop"]
    for name in ("id", "weights", "train_loss", "held_out_loss", "distance", "total_flops"):
        assert torn[name] == whole[name], name
    assert not saves[-1].exists()


def test_options_that_cannot_be_are_one_line(tmp_path, capsys):
    for more, message in (
        (["--channels", "8", "12"], "multiple of 8"),
        (["--batch-size", "4000"], "more than the"),
        (["--schedule", "BarShedule(0.8)"], "did you mean BarSchedule"),
        (["--data", "pets"], "no images of 'pets'"),
        (["--device", "cuda:99"], "cuda:99"),
    ):
        assert train_ddpm.main([*TINY, "--output", str(tmp_path), *more]) == 2
        line = capsys.readouterr().err
        assert line.startswith("error: ") and message in line and line.count("\n") == 1
    for more in (["--share", "0"], ["--ema", "1"], ["--samples", "1"], ["--epochs", "0"]):
        with pytest.raises(SystemExit):
            train_ddpm.main([*TINY, *more])


def test_cost_is_that_of_the_converted_model():
    settings = settings_of()
    net, batch = model.build(settings, 1), model.inputs(settings, 1)
    cost = costs.StepCost(net, batch, exclude=settings.exclude)
    ssp.convert(net, 0.8, exclude=settings.exclude)
    for rate in (0.8, 0.4):
        ssp.get_controller(net).drop_rate = rate
        found = ssp.summary(net, inputs=batch)
        assert found.dense_backward - found.sparse_backward == cost.backward(0.0) - cost.backward(
            rate
        )
    out = [layer for layer in found.layers if layer.name.endswith("conv_out")]
    assert [layer.kept == layer.channels for layer in out] == [True]


class _Guess(nn.Module):
    """A denoiser that always answers the same number."""

    def __init__(self, answer: float) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, images, timesteps):
        return torch.full_like(images, self.answer)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> decoded.Source:
    folder = tmp_path_factory.mktemp("digits")
    return decoded.load("digits", data_dir=None, cache_dir=folder, size=8)


def test_held_out_loss_is_the_mean_squared_error_of_fixed_noise(source):
    settings = settings_of("--held-out", "300")
    batches = Batches(source.data(), batch_size=64, device=CPU, channels=1, augment=False,
                      channels_last=False)  # fmt: skip
    loss = [measure.held_out_loss(_Guess(a), settings, batches) for a in (0.0, 0.0, 1.0)]
    assert loss[0] == loss[1] == pytest.approx(1.0, abs=0.03)  # the variance of the noise
    # (n - 1)^2 - n^2 = 1 - 2 n, and the mean of n is near 0
    assert loss[2] - loss[0] == pytest.approx(1.0, abs=0.06)
    seen = []

    class Sees(_Guess):
        def forward(self, images, timesteps):
            seen.extend(timesteps.tolist())
            return super().forward(images, timesteps)

    measure.held_out_loss(Sees(0.0), settings, batches)
    assert sorted(seen) == [i * 1000 // 300 for i in range(300)] != seen


def test_distance_against_the_formula(source):
    class Pixels(nn.Module):
        num_features = 5

        def forward(self, images):
            return images.flatten(1)[:, 18:23].float()

    generated = source.train[0][:200].flip(3)
    found, real = distance.distances(Pixels(), source, generated, CPU)

    def formula(a: torch.Tensor, b: torch.Tensor) -> float:
        x, y = (Pixels()(t).double().numpy() for t in (a, b))
        c, d = np.cov(x.T), np.cov(y.T)
        root = linalg.sqrtm(c @ d).real
        return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c + d - 2 * root)

    chosen = torch.linspace(0, len(source.train[0]) - 1, 200).round().long()
    assert found == pytest.approx(formula(source.test[0], generated), rel=1e-4)
    assert real == pytest.approx(formula(source.test[0], source.train[0][chosen]), rel=1e-4)
    assert real < found


def test_features_are_what_the_last_layer_sees(source, tmp_path):
    settings = settings_of()
    features = distance.trained_features(settings, source, CPU, tmp_path)
    (saved,) = tmp_path.glob("classifier-*.pt")
    before = saved.stat().st_mtime_ns
    again = distance.trained_features(settings, source, CPU, tmp_path)
    assert saved.stat().st_mtime_ns == before  # not trained again
    images = source.test[0]
    out = features(images)
    assert torch.equal(out, again(images)) and out.shape == (450, features.num_features)
    logits = features.model.get_classifier()(out)
    accuracy = (logits.argmax(1) == source.test[1]).float().mean().item()
    assert accuracy == pytest.approx(features.accuracy)


def test_generated_images_are_of_the_run_s_seed():
    settings = settings_of()
    torch.manual_seed(0)
    net = model.build(settings, 3)
    a, b = (measure.generate(net, settings, CPU, 3) for _ in range(2))
    assert a.shape == (12, 3, 8, 8) and a.dtype == torch.uint8 and torch.equal(a, b)
    other = next(s for s in runs(parse("", [*TINY, "--seeds", "2"])) if s.seed == 1)
    assert not torch.equal(measure.generate(net, other, CPU, 3), a)
