"""``measure``: what is timed and how it is printed; how long it takes is never asserted."""

from __future__ import annotations

import json

import pytest
import torch

import ssprop_patch as ssp
from ssprop_patch.cli import measure
from ssprop_patch.cli.models import load_model

SIZE = ("--input-size", 2, 3, 8, 8, "--iterations", 1)


@pytest.fixture(autouse=True)
def counter(monkeypatch):
    """No counter of this machine takes part, unless a test brings its own."""
    found = [None, "no counter in this test"]
    monkeypatch.setattr(measure.energy, "find_counter", lambda: tuple(found))
    return found


def test_json_has_each_layer_the_steps_and_the_setting(nets, printed):
    found = json.loads(printed("measure", f"{nets}:build", *SIZE, "--drop-rate", 0.5, "--json"))
    summary = ssp.summary(load_model(f"{nets}:build"), input_size=(2, 3, 8, 8))
    converted = {row.name for row in ssp.plan(load_model(f"{nets}:build")).converted}
    for timed, counted in zip(
        found["layers"], (r for r in summary.layers if r.name in converted), strict=True
    ):
        assert (timed["name"], timed["cls"]) == (counted.name, counted.cls)
        for shape in ("input_shape", "weight_shape", "output_shape"):
            assert tuple(timed[shape]) == getattr(counted, shape)
        assert timed["calls"] == counted.calls
        for side in ("dense_ms", "sparse_ms"):
            assert 0 < timed[side]["p20"] <= timed[side]["p50"] <= timed[side]["p80"]
        assert timed["share"] == timed["sparse_ms"]["p50"] / timed["dense_ms"]["p50"]
        assert timed["pays"] == (timed["share"] < 1)
        assert timed["kernel"] in ("gather", "direct")
    assert [step["mode"] for step in found["steps"]] == ["forward", "backward", "step"]
    assert found["joules_per_step"] is None
    assert found["joules_not_measured_because"] == "no counter in this test"
    assert (found["drop_rate"], found["iterations"], found["amp"]) == (0.5, 1, "off")
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    assert found["native"] == f"C functions {ssp.kernels.backends()['C functions']}"


def test_csv_has_a_row_for_each_layer_and_part_of_a_step(nets, printed, read_csv):
    rows = read_csv(printed("measure", f"{nets}:build", *SIZE, "--csv"))
    assert [(r["kind"], r["name"]) for r in rows] == [
        ("layer", "stem"),
        ("layer", "same"),
        ("step", "forward"),
        ("step", "backward"),
        ("step", "step"),
    ]
    for row in rows:
        share = float(row["sparse_p50"]) / float(row["dense_p50"])
        assert float(row["share_of_dense"]) == pytest.approx(share)
        assert row["memory_format"] == "contiguous" and row["input_size"] == "2x3x8x8"
    assert [r["unit"] for r in rows] == ["ms", "ms", "s", "s", "s"]


def test_the_table_shows_layers_their_sum_the_steps_and_why_there_are_no_joules(nets, printed):
    out = printed("measure", f"{nets}:build", *SIZE)
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert lines["same"][1:5] == ["Conv2d", "2x10x6x6", "10x10x3x3", "2"]
    assert f"\nnative: C functions {ssp.kernels.backends()['C functions']}\n" in out
    assert lines["same"][5] in ("gather", "direct")
    assert "layers alone:" in out and "of 2\n" in out
    assert {"forward", "backward", "step"} <= set(lines)
    assert "energy: not measured: no counter in this test" in out


def test_joules_of_a_counter_are_shown(nets, printed, read_csv, counter, monkeypatch):
    class Counter:
        pass

    counter[:] = [Counter(), ""]
    given = []

    def joules_per_step(found, model, inputs, rate, **kwargs):
        given.append((found, rate, kwargs["autocast"]))
        return {"dense": 8.0, "sparse": 2.0}

    monkeypatch.setattr(measure, "joules_per_step", joules_per_step)
    words = ("measure", f"{nets}:build", *SIZE, "--drop-rate", 0.6, "--amp", "bf16")
    assert "energy: 8.00 J a step dense, 2.00 J sparse (0.25)" in printed(*words)
    assert json.loads(printed(*words, "--json"))["joules_per_step"] == {"dense": 8, "sparse": 2}
    row = read_csv(printed(*words, "--csv"))[-1]
    assert (row["name"], row["dense_p50"], row["unit"]) == ("energy", "8.0", "J")
    assert given == [(counter[0], 0.6, torch.bfloat16)] * 3


@pytest.fixture
def given(monkeypatch):
    """Note what is timed, and do not time it."""
    calls = []

    def time_layers(model, inputs, rate, **kwargs):
        calls.append((model, inputs, rate, kwargs))
        raise ValueError("enough")

    monkeypatch.setattr(measure, "time_layers", time_layers)
    return calls


def test_options_reach_what_is_timed(nets, given, refused):
    refused(
        "measure",
        f"{nets}:Two",
        "--input-size",
        2,
        3,
        8,
        8,
        "--input-size",
        1,
        2,
        9,
        "--channels-last",
        "--amp",
        "bf16",
        "--types",
        "Conv1d",
        "--iterations",
        7,
        "--drop-rate",
        0.3,
    )
    [(model, (image, sound), rate, kwargs)] = given
    assert image.shape == (2, 3, 8, 8) and sound.shape == (1, 2, 9)
    assert image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous()
    assert model.a.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.a.weight.is_contiguous() and model.b.weight.is_contiguous()
    assert model.training and rate == 0.3
    assert kwargs["types"] == (torch.nn.Conv1d,)
    assert kwargs["autocast"] == torch.bfloat16 and kwargs["iterations"] == 7


def test_without_options_it_is_float32_contiguous_and_the_papers_rate(nets, given, refused):
    refused("measure", f"{nets}:build", "--input-size", 2, 3, 8, 8)
    [(model, (x,), rate, kwargs)] = given
    assert x.is_contiguous() and x.dtype == torch.float32 and rate == 0.8
    assert model.stem.weight.is_contiguous() and kwargs["autocast"] is None
    assert set(kwargs["types"]) == {torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d}


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--input-size", 2, 4, 8, 8], "to have 3 channels", 1),
        (["--input-size", 2, 3, 8, 8, "--device", "gpu"], "--device gpu", 2),
        (["--input-size", 2, 3, 8, 8, "--device", "cuda:99"], "--device cuda:99", 2),
        (["--input-size", 2, 3, 8, 8, "--amp", "int8"], "invalid choice: 'int8'", 2),
        (["--input-size", 2, 3, 8, 8, "--iterations", 0], "'0' is not an integer", 2),
        (["--input-size", 2, 3, 8, 8, "--types", "Conv3d"], "no layer that a conversion", 1),
    ],
)
def test_what_cannot_be_timed_is_one_line(arguments, message, code, nets, refused):
    line, found = refused("measure", f"{nets}:build", *arguments)
    assert message in line and found == code
