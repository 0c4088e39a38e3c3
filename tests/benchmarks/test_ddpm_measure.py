"""benchmarks/ddpm: what a run costs, its loss, its images and their distance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from classifier import costs, decoded
from classifier.batches import Batches
from ddpm import distance, measure, model
from ddpm.settings import parse, runs
from scipy import linalg
from torch import nn

import ssprop_patch as ssp

from .tiny_ddpm import CPU, TINY, settings_of


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
    batches = Batches(
        source.data(), batch_size=64, device=CPU, channels=1, augment=False, channels_last=False
    )
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
