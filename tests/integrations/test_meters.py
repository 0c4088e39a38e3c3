"""Callbacks with ``meter=True``: what they log, print and keep is what a Meter by hand counts."""

import json

import pytest
import torch.nn.functional as F

import ssprop_patch as ssp
from ssprop_patch.integrations import lightning as ours_in_lightning
from ssprop_patch.integrations import transformers as ours_in_transformers

from . import by_hand, in_lightning, in_transformers
from .by_hand import BAR, Net
from .test_lightning import Recorder

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*LeafSpec")

COUNTED = ("ssprop/backward_saved", "ssprop/total_saved", "ssprop/flops")


def metered_by_hand(make=Net, epochs=2, output=lambda y: y):
    """The scalars of each optimizer step, and the totals of all, of a loop with a Meter."""
    model, rows = make(), []
    optimizer = by_hand.sgd(model)
    ssp.convert(model, BAR, steps_per_epoch=5)
    with ssp.Meter(model) as meter:
        meter.log_to(lambda scalars, step: rows.append(scalars))
        for x, y in epochs * by_hand.data():
            optimizer.zero_grad()
            F.cross_entropy(output(model(x)), y).backward()
            optimizer.step()
        return [[row[name] for name in COUNTED] for row in rows], meter.totals


def assert_reported(callback, totals, printed):
    assert callback.meter is None  # it is closed
    assert callback.report.steps == 10 and callback.report.totals == totals
    lines = str(callback.report).splitlines()
    assert [line for line in lines if line.startswith("saved")] == [
        line for line in printed.splitlines() if line.startswith("saved")
    ]


def test_lightning(capsys):
    rows, totals = metered_by_hand()
    callback, recorder, model = (
        ours_in_lightning.SsPropCallback(BAR, meter=True, revert_at_end=True),
        Recorder(),
        in_lightning.Module(),
    )
    arguments = {"epochs": 2, "logger": recorder, "log_every_n_steps": 1}
    in_lightning.trainer(callback, **arguments).fit(model, in_lightning.loader())
    assert not ssp.is_converted(model)
    logged = [[m[n] for n in COUNTED] for _, m in recorder.logged if COUNTED[0] in m]
    assert len(logged) == 10
    for found, expected in zip(logged, rows, strict=True):
        assert found == pytest.approx(expected, rel=1e-6)  # Lightning logs in float32
    assert_reported(callback, totals, capsys.readouterr().out)


def test_lightning_counts_on_where_it_was_stopped(tmp_path, capsys):
    _, totals = metered_by_hand()
    first = ours_in_lightning.SsPropCallback(BAR, meter=True)
    in_lightning.fit(tmp_path, first, in_lightning.Stop(7), epochs=2)
    assert first.meter is None and first.report.steps == 7  # closed, not printed: it may go on
    assert "optimizer steps" not in capsys.readouterr().out
    second = ours_in_lightning.SsPropCallback(BAR, meter=True)
    in_lightning.fit(tmp_path, second, ckpt_path=str(tmp_path / "stopped.ckpt"), epochs=2)
    assert_reported(second, totals, capsys.readouterr().out)


def test_hugging_face(tmp_path, capsys):
    rows, totals = metered_by_hand(in_transformers.make, output=lambda y: y.logits)
    callback = ours_in_transformers.SsPropCallback(BAR, meter=True)
    _, _, run = in_transformers.train(tmp_path, callback, epochs=2)
    history = [[e[n] for n in COUNTED] for e in run.state.log_history if "loss" in e]
    assert history == rows
    assert_reported(callback, totals, capsys.readouterr().out)


def test_hugging_face_counts_on_from_a_checkpoint(tmp_path, capsys):
    _, totals = metered_by_hand(in_transformers.make, output=lambda y: y.logits)
    arguments = {"epochs": 2, "save_strategy": "steps", "save_steps": 7}
    first = ours_in_transformers.SsPropCallback(BAR, meter=True)
    in_transformers.train(tmp_path, first, **arguments)
    saved = json.loads((tmp_path / "checkpoint-7" / "ssprop_meter.json").read_text())
    assert saved["steps"] == 7
    capsys.readouterr()
    second = ours_in_transformers.SsPropCallback(BAR, meter=True)
    in_transformers.train(tmp_path, second, resume=str(tmp_path / "checkpoint-7"), **arguments)
    assert_reported(second, totals, capsys.readouterr().out)


@pytest.mark.parametrize("ours", [ours_in_lightning, ours_in_transformers], ids=["L", "HF"])
def test_a_second_training_counts_anew(ours, tmp_path):
    callback = ours.SsPropCallback(BAR, meter=True)
    for _ in range(2):
        if ours is ours_in_lightning:
            in_lightning.trainer(callback, epochs=1).fit(
                in_lightning.Module(), in_lightning.loader()
            )
        else:
            in_transformers.train(tmp_path, callback, epochs=1)
        assert callback.report.steps == 5
