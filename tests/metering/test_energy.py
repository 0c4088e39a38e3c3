"""Joules: from a counter that is made up, and from the machine's where there is one."""

import json
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import ssprop_patch as ssp
from metering import by_hand
from metering.by_hand import train
from ssprop_patch.metering import Energy
from ssprop_patch.metering.energy import ZeusCounter, find_counter


class Counter:
    """One joule at each reading, two of memory; notices whoever reads it out of turn."""

    def __init__(self):
        self.running, self.readings = False, 0

    def begin(self):
        assert not self.running
        self.running = True

    def end(self):
        assert self.running
        self.running, self.readings = False, self.readings + 1
        return {"GPU 0": 1.0, "DRAM 0": 0.0}


def test_a_counter_of_ones_own_measures_from_making_to_closing():
    counter = Counter()
    model = ssp.convert(by_hand.net(), 0.5)
    meter = ssp.Meter(model, energy=counter)
    assert counter.running
    train(model, 3)
    assert counter.readings == 0  # nothing is read while it trains
    assert meter.report().energy == Energy({"GPU 0": 1.0, "DRAM 0": 0.0})
    assert meter.report().energy.total == 2.0
    assert counter.running
    assert meter.close().energy.total == 3.0
    assert not counter.running
    assert meter.report().energy.total == 4.0  # what was used until it closed


def test_what_is_measured_shows_in_the_report_and_in_json():
    with ssp.Meter(ssp.convert(by_hand.net(), 0.5), energy=Counter()) as meter:
        report = meter.report()
    assert "energy               1.0 J (GPU 0 1.0 J, DRAM 0 0.0 J)" in str(report)
    assert json.loads(report.to_json())["energy"] == {
        "joules": {"GPU 0": 1.0, "DRAM 0": 0.0},
        "total_joules": 1.0,
        "not_measured_because": None,
    }


def test_grams_of_co2_are_by_the_grid_that_the_user_names():
    assert Energy({"GPU 0": 3.6e6, "DRAM 0": 3.6e6}).co2_grams(400) == 800.0
    assert Energy({}, "why").co2_grams(400) is None
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="grams_per_kwh"):
            Energy({"GPU 0": 1.0}).co2_grams(wrong)


def test_energy_that_is_not_asked_for_is_said_to_be_so():
    with ssp.Meter(ssp.convert(by_hand.net(), 0.5), energy=False) as meter:
        energy = meter.report().energy
    assert energy == Energy({}, "not asked for") and energy.total is None
    assert str(energy) == "not measured (not asked for)"


def test_this_machine_is_measured_or_the_reason_is_said():
    counter, reason = find_counter()
    model = ssp.convert(by_hand.net(), 0.5)
    with ssp.Meter(model) as meter:
        train(model, 3)
        energy = meter.report().energy
    if counter is None:
        assert reason and energy == Energy({}, reason)
    else:
        assert energy.joules and all(joules >= 0 for joules in energy.joules.values())


def test_a_counter_that_fails_does_not_end_the_training():
    class Failing(Counter):
        def end(self):
            if self.readings == 1:
                raise OSError("the driver is gone")
            return super().end()

    model = ssp.convert(by_hand.net(), 0.5)
    meter = ssp.Meter(model, energy=Failing())
    assert meter.report().energy == Energy({"GPU 0": 1.0, "DRAM 0": 0.0})
    train(model, 1)
    energy = meter.report().energy
    assert energy.joules == {"GPU 0": 1.0, "DRAM 0": 0.0}
    assert energy.reason == "the counter failed: OSError: the driver is gone"
    assert "a part of the run was not measured: the counter failed" in str(energy)
    meter.close()


@pytest.mark.parametrize("with_counter_first", [True, False])
def test_a_run_of_which_a_part_was_not_measured_says_so(with_counter_first):
    first = ssp.Meter(by_hand.net(), energy=Counter() if with_counter_first else False)
    second = ssp.Meter(by_hand.net(), energy=False if with_counter_first else Counter())
    second.load_state_dict(first.state_dict())
    energy = second.report().energy
    assert energy.joules and energy.reason == "not asked for"


def test_without_zeus_the_extra_is_named():
    with mock.patch.dict(sys.modules, {"zeus": None, "zeus.monitor": None}):
        counter, reason = find_counter()
    assert counter is None and 'pip install "ssprop_patch[energy]"' in reason


class Monitor:
    """As zeus's, with what each kind of machine has."""

    def __init__(self, gpus=None, found=None):
        self.gpus, self.found, self.calls = gpus, found, []

    def begin_window(self, name, sync_execution=True):
        self.calls.append(("begin", name, sync_execution))

    def end_window(self, name, sync_execution=True):
        self.calls.append(("end", name, sync_execution))
        return self.found


def zeus_with(make):
    """As if zeus were installed, and made its monitors so."""
    modules = {name: SimpleNamespace(ZeusMonitor=make) for name in ("zeus", "zeus.monitor")}
    return mock.patch.dict(sys.modules, modules)


def measured(**found):
    return SimpleNamespace(**{"gpu_energy": {}, "cpu_energy": None, "dram_energy": None, **found})


@pytest.mark.parametrize(
    ("found", "joules"),
    [
        (measured(gpu_energy={0: 2.5, 3: 1.0}), {"GPU 0": 2.5, "GPU 3": 1.0}),
        (
            measured(cpu_energy={0: 4.0}, dram_energy={0: 0.5}),
            {"CPU package 0": 4.0, "DRAM 0": 0.5},
        ),
        (
            measured(
                soc_energy=SimpleNamespace(cpu_total_mj=1500, gpu_mj=2000, ane_mj=None, dram_mj=250)
            ),
            {"CPU": 1.5, "GPU": 2.0, "DRAM": 0.25},
        ),
        (measured(), {}),
    ],
)
def test_what_zeus_finds_is_taken_as_it_is_and_without_waiting_for_the_device(found, joules):
    monitor = Monitor(found=found)
    counter = ZeusCounter(monitor)
    counter.begin()
    assert counter.end() == joules
    assert [(what, sync) for what, _, sync in monitor.calls] == [("begin", False), ("end", False)]


def test_of_the_gpus_only_those_of_the_model_are_measured():
    """Each rank sees the GPUs of all: their sum would count each as often as there are ranks."""
    monitors = []

    def make(gpus=None):
        monitors.append(Monitor(gpus, measured(cpu_energy={0: 1.0})))
        return monitors[-1]

    with zeus_with(make):
        ssp.Meter(by_hand.net()).close()
        devices = [torch.device("cuda", i) for i in (3, 1, 3)] + [torch.device("cpu")]
        ssp.metering.energy.EnergyMeter(True, devices)
        find_counter()
    assert [monitor.gpus for monitor in monitors] == [[], [1, 3], None]


def test_a_machine_whose_driver_fails_is_no_error():
    def broken(*args):
        raise RuntimeError("no permission")

    with zeus_with(broken):
        counter, reason = find_counter()
    assert counter is None and reason == "zeus finds no counter: RuntimeError: no permission"
