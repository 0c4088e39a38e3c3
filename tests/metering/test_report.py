"""What a report says, in text and JSON, and how those of several ranks add up."""

import dataclasses
import json

import pytest

import ssprop_patch as ssp
from metering import by_hand
from metering.by_hand import quiet_meter, train
from ssprop_patch.metering import Energy, MeterReport


def a_report(steps=2, rate=0.5):
    model = ssp.convert(by_hand.net(), rate)
    with quiet_meter(model) as meter:
        train(model, steps)
        return meter.report()


def changed(report, **values):
    return dataclasses.replace(report, **values)


def test_json_holds_everything():
    report = a_report()
    found = json.loads(report.to_json())
    assert found["steps"] == 2 and found["ranks"] == 1
    others = 2 * 2 * 2 * (2 * (6 * 7 * 7) * 5)  # two steps of the linear layer: dX and dW
    assert found["others"]["backward"] == others
    layers = sum(row["backward_flops"] for row in found["layers"])
    assert found["backward_flops"] == layers + others
    assert found["dense_backward_flops"] > found["backward_flops"] > 0
    assert found["seconds"] == report.seconds
    assert [row["name"] for row in found["layers"]] == ["0", "2", "4"]
    assert found["energy"]["not_measured_because"] == "not asked for"


def test_a_report_comes_back_from_json():
    report = changed(
        a_report(), energy=Energy({"GPU 0": 1.0}, "why"), not_counted=("odd",), ranks=3
    )
    mixed = changed(report.layers[0], converted=False), *report.layers[1:]
    for one in (changed(report, layers=mixed), changed(report, others=None, unknown="why")):
        back = MeterReport.from_dict(json.loads(one.to_json()))
        assert back == one and back.to_dict() == one.to_dict()
    with pytest.raises(KeyError, match="steps"):
        MeterReport.from_dict({"layers": []})


def test_text_says_what_was_done_and_what_was_not_measured():
    text = str(a_report())
    assert "optimizer steps      2\n" in text
    words = " ".join(text.split())
    whole = words.index("% of the backward FLOPs of the whole network, ")
    assert words.index("% of the backward FLOPs of the 3 converted layers alone, ") > whole
    assert "not measured (not asked for)" in text
    assert str(a_report(0)).count("not measured") == 4  # three phases and energy


def test_the_table_has_a_row_for_each_layer():
    header, *rows = a_report().table().splitlines()
    assert header.split()[:4] == ["layer", "forwards", "backwards", "sparse"]
    assert [row.split()[:4] for row in rows] == [[n, "2", "2", "2"] for n in "024"]


def test_ranks_add_up_work_and_wait_for_the_slowest():
    one, two = a_report(2), a_report(3, rate=0.75)
    assert MeterReport.summed([one, changed(two, others=None, unknown="why")]).network is None
    one = changed(one, seconds={"forward": 1.0, "backward": 5.0}, wall_seconds=9.0)
    two = changed(two, seconds={"forward": 2.0, "backward": 4.0}, wall_seconds=8.0)
    both = MeterReport.summed([one, two])
    assert both.backward_flops == one.backward_flops + two.backward_flops
    assert both.forward_flops == one.forward_flops + two.forward_flops
    assert [row.totals.backwards for row in both.layers] == [5, 5, 5]
    assert both.seconds == {"forward": 2.0, "backward": 5.0}
    assert (both.steps, both.wall_seconds, both.ranks) == (3, 9.0, 2)
    assert "3 on 2 ranks" in str(both)


def test_energy_of_gpus_adds_up_and_a_host_counts_once():
    def on(host, gpu, package):
        energy = Energy({"GPU 0": gpu, "CPU package 0": package})
        return changed(a_report(1), energy=energy, host=host)

    both = MeterReport.summed([on("a", 1.0, 10.0), on("a", 2.0, 10.5), on("b", 4.0, 20.0)])
    assert both.energy.joules == {
        "GPU 0 of rank 0": 1.0,
        "GPU 0 of rank 1": 2.0,
        "GPU 0 of rank 2": 4.0,
        "CPU package 0 of a": 10.5,
        "CPU package 0 of b": 20.0,
    }
    assert both.energy.reason == ""


def test_a_rank_without_a_counter_is_a_gap_that_is_said():
    with_counter = changed(a_report(1), energy=Energy({"GPU 0": 1.0}))
    both = MeterReport.summed([with_counter, a_report(1)])
    assert both.energy.total == 1.0 and both.energy.reason == "not asked for"


def test_reports_of_different_models_do_not_add_up():
    other = ssp.Meter(ssp.convert(by_hand.net()[:2], 0.5), energy=False).close()
    with pytest.raises(ValueError, match="different models"):
        MeterReport.summed([a_report(), other])
    with pytest.raises(ValueError, match="no report"):
        MeterReport.summed([])


def test_all_ranks_of_one_process_are_this_one():
    model = ssp.convert(by_hand.net(), 0.5)
    with quiet_meter(model) as meter:
        train(model, 1)
        assert meter.report(all_ranks=True).layers == meter.report().layers
